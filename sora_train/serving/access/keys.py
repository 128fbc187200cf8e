"""API keys: made once, kept as hashes, revoked or expired."""

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from sora_train.errors import UserError
from sora_train.serving.access.billed import month_start, used_since
from sora_train.serving.access.tables import KEYS
from sora_train.serving.errors import Unauthorized
from sora_train.serving.jobs.database import Database

LOCAL = "local"
"""Owner of what is asked for on the machine itself while there is no key."""
PREFIX = "sk-sora-"
DAY = 86_400


@dataclass(frozen=True)
class Key:
    """A key without its secret. None among its limits: as the settings have them."""

    id: str
    name: str
    ends_with: str
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    requests_per_minute: int | None = None
    concurrent: int | None = None
    seconds_per_month: float | None = None
    cost_per_month: float | None = None

    def state(self, now: float) -> str:
        """active, revoked or expired."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


class Keys:
    """The keys of a database."""

    def __init__(self, database: Database):
        self.database = database

    def add(self, name: str, *, days: float | None = None, **limits: Any) -> tuple[Key, str]:
        """(the key, its secret, which nobody can show again)."""
        secret = PREFIX + secrets.token_urlsafe(32)
        with self.database.write() as connection:
            now = int(self.database.now(connection))
            values = {
                "id": f"key_{secrets.token_hex(6)}",
                "name": name,
                "ends_with": secret[-4:],
                "created_at": now,
                "expires_at": None if days is None else now + round(days * DAY),
                **limits,
            }
            connection.execute(KEYS.insert().values(**values, sha256=_hash(secret)))
        return Key(**values), secret

    def revoke(self, which: str) -> Key:
        """Revoke a key by its id or its name. Raises UserError where none, or more than one, is called so."""
        called = KEYS.c.revoked_at.is_(None), sql.or_(KEYS.c.id == which, KEYS.c.name == which)
        with self.database.write() as connection:
            rows = connection.execute(sql.select(KEYS).where(*called)).all()
            if len(rows) != 1:
                found = "no key" if not rows else f"{len(rows)} keys"
                raise UserError(
                    f"{found} that may be revoked has the id or name {which!r}; `sora serve keys ls` shows the ids"
                )
            now = int(self.database.now(connection))
            this = KEYS.c.id == rows[0].id
            connection.execute(KEYS.update().where(this).values(revoked_at=now))
        return _key(rows[0])

    def all(self) -> list[Key]:
        """The keys in the order in which they were made."""
        with self.database.read() as connection:
            rows = connection.execute(sql.select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id)).all()
        return [_key(row) for row in rows]

    def report(self) -> list[dict[str, Any]]:
        """The keys with their state, and what each was billed this month."""
        with self.database.read() as connection:
            now = self.database.now(connection)
            since = month_start(now)
            used = {
                row.id: used_since(connection, row.id, since)
                for row in connection.execute(sql.select(KEYS.c.id))
            }
        return [
            {**vars(key), "state": key.state(now)}
            | {f"used_{name}": value for name, value in used[key.id].items()}
            for key in self.all()
            if key.id in used
        ]

    def any(self) -> bool:
        """Whether a key was ever added: from then on every request needs one."""
        with self.database.read() as connection:
            return connection.execute(sql.select(KEYS.c.id).limit(1)).first() is not None

    def owner_of(self, header: str | None, *, may_be_local: bool) -> Key | None:
        """The key of an Authorization header; None for the machine itself, which needs none until there is one.

        Raises Unauthorized.
        """
        if not header:
            if may_be_local and not self.any():
                return None
            raise Unauthorized("No API key was given; send it as 'Authorization: Bearer KEY'.")
        scheme, _, secret = header.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized("The Authorization header must be 'Bearer KEY'.")
        with self.database.read() as connection:
            row = connection.execute(_BY_SECRET, {"sha256": _hash(secret.strip())}).one_or_none()
            # Most keys never expire: the clock is asked for the others.
            now = self.database.now(connection) if row is not None and row.expires_at else 0.0
        if row is None:
            if may_be_local and not self.any():
                return None  # clients always send some key
            raise Unauthorized("The API key is not known here.")
        key = _key(row)
        if key.state(now) != "active":
            raise Unauthorized(f"The API key is {key.state(now)}.")
        return key


# Built once: it is looked up in every request.
_BY_SECRET = sql.select(KEYS).where(KEYS.c.sha256 == sql.bindparam("sha256"))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _key(row: Any) -> Key:
    return Key(**{name: getattr(row, name) for name in Key.__dataclass_fields__})
