"""The tables of keys, of what was billed, and of what was done; beside those of jobs, in the same database."""

import sqlalchemy as sql
from sqlalchemy import Column, Index, Table

from sora_train.serving.jobs.tables import METADATA

_Number = sql.BigInteger().with_variant(sql.Integer, "sqlite")

KEYS = Table(
    "keys",
    METADATA,
    Column("id", sql.String, primary_key=True),
    Column("name", sql.String, nullable=False),
    # Of the secret, which is 256 random bits: a fast hash is as good as a slow one.
    Column("sha256", sql.String, nullable=False, unique=True),
    # Its last characters, by which its owner knows it again.
    Column("ends_with", sql.String, nullable=False),
    Column("created_at", sql.BigInteger, nullable=False),
    Column("expires_at", sql.BigInteger),
    Column("revoked_at", sql.BigInteger),
    Column("requests_per_minute", sql.Integer),
    Column("concurrent", sql.Integer),
    Column("seconds_per_month", sql.Float),
    Column("cost_per_month", sql.Float),
    # Until when the requests of the last minute fill its rate.
    Column("filled_until", sql.Float, nullable=False, default=0.0),
)

AUDIT = Table(
    "audit",
    METADATA,
    Column("number", _Number, primary_key=True, autoincrement=True),
    Column("at", sql.BigInteger, nullable=False),
    Column("owner", sql.String, nullable=False),
    Column("event", sql.String, nullable=False),
    Column("subject", sql.String, nullable=False),
    Column("request", sql.String, nullable=False),
    Column("detail", sql.JSON, nullable=False),
    Index("audit_by_owner", "owner", "number"),
)
