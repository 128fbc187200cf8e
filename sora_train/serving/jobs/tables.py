"""The tables of jobs, of the characters they may name, and of the news that is sent of them."""

import sqlalchemy as sql
from sqlalchemy import Column, Index, Table

METADATA = sql.MetaData()
_Number = sql.BigInteger().with_variant(sql.Integer, "sqlite")

JOBS = Table(
    "jobs",
    METADATA,
    # Rises in the order in which an owner's jobs are committed: pages and claims go by it.
    Column("number", _Number, primary_key=True, autoincrement=True),
    Column("id", sql.String, unique=True, nullable=False),
    Column("owner", sql.String, nullable=False),
    Column("asked", sql.JSON, nullable=False),
    Column("seconds", sql.Float, nullable=False),
    Column("status", sql.String, nullable=False),
    Column("progress", sql.Integer, nullable=False, default=0),
    Column("created_at", sql.BigInteger, nullable=False),
    Column("completed_at", sql.BigInteger),
    Column("expires_at", sql.BigInteger),
    Column("error", sql.JSON(none_as_null=True)),
    Column("outputs", sql.JSON, nullable=False, default=dict),
    Column("usage", sql.JSON, nullable=False, default=dict),
    Column("facts", sql.JSON, nullable=False, default=dict),
    Column("idempotency_key", sql.String),
    Column("fingerprint", sql.String, nullable=False),
    Column("attempts", sql.Integer, nullable=False, default=0),
    Column("worker", sql.String),
    # Of the attempt that has the job, or that finished it.
    Column("token", sql.String),
    # When the job may be taken: at once, after a pause, or when the lease of its worker is over.
    Column("free_at", sql.Float, nullable=False, default=0.0),
    Column("swept", sql.Boolean, nullable=False, default=False),
    Index("jobs_by_owner", "owner", "number"),
    Index("jobs_by_status", "status", "number"),
    Index("jobs_by_key", "owner", "idempotency_key", unique=True),
)

CHARACTERS = Table(
    "characters",
    METADATA,
    Column("id", sql.String, primary_key=True),
    Column("owner", sql.String, nullable=False),
    Column("name", sql.String, nullable=False),
    Column("upload", sql.JSON, nullable=False),
    Column("created_at", sql.BigInteger, nullable=False),
)

WEBHOOKS = Table(
    "webhooks",
    METADATA,
    Column("number", _Number, primary_key=True, autoincrement=True),
    # The same for every endpoint and every attempt: receivers know a repetition by it.
    Column("event", sql.String, nullable=False),
    Column("endpoint", sql.String, nullable=False),
    Column("type", sql.String, nullable=False),
    Column("job", sql.String, nullable=False),
    Column("created_at", sql.BigInteger, nullable=False),
    Column("attempts", sql.Integer, nullable=False, default=0),
    # When it is sent next; None: it was, or was given up.
    Column("due", sql.Float),
    Column("reason", sql.String),
    Index("webhooks_by_due", "due"),
)

USAGE = Table(
    "usage",
    METADATA,
    # What a job was billed stays when the job is deleted.
    Column("job", sql.String, primary_key=True),
    Column("owner", sql.String, nullable=False),
    Column("at", sql.BigInteger, nullable=False),
    Column("model", sql.String, nullable=False),
    Column("size_class", sql.String, nullable=False),
    Column("seconds", sql.Float, nullable=False),
    Column("cost", sql.Float, nullable=False),
    Index("usage_by_owner", "owner", "at"),
)
