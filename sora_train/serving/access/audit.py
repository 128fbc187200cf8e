"""The audit log: who did what when, by which request; nothing in it is ever changed."""

from typing import TYPE_CHECKING, Any

import sqlalchemy as sql

from sora_train.serving.access.tables import AUDIT
from sora_train.serving.jobs.database import Database

if TYPE_CHECKING:
    from sora_train.serving.safety.decision import Entry


class Audit:
    """The log of a database."""

    def __init__(self, database: Database):
        self.database = database

    def note(
        self,
        event: str,
        *,
        owner: str,
        subject: str = "",
        request: str = "",
        connection: sql.Connection | None = None,
        **detail: Any,
    ) -> None:
        """Add a line.

        Args:
            event: such as `video.created`.
            owner: id of the key, or `local`.
            subject: id of what was acted on.
            request: its id, as the answer's `x-request-id` has it.
            connection: of a transaction whose fate the line shares; default: one of its own.
            detail: whatever else is to be known, as JSON.
        """
        values = {"event": event, "owner": owner, "subject": subject, "request": request}
        if connection is None:
            with self.database.write() as own:
                self._insert(own, **values, detail=detail)
        else:
            self._insert(connection, **values, detail=detail)

    def _insert(self, connection: sql.Connection, **values: Any) -> None:
        at = int(self.database.now(connection))
        connection.execute(AUDIT.insert().values(at=at, **values))

    def record(self, entry: "Entry") -> None:
        """A decision of the safety policy; those to which no rule applied are not worth a line."""
        if entry.rules or entry.action == "block":
            names = ("category", "reason", "rules", "digest", "text")
            detail = {name: value for name in names if (value := getattr(entry, name))}
            event = f"{entry.stage}.{entry.action}"
            self.note(event, owner="policy", subject=entry.subject, **detail)

    def lines(self, *, owner: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """The newest lines, the newest first."""
        query = sql.select(AUDIT).order_by(AUDIT.c.number.desc()).limit(limit)
        if owner is not None:
            query = query.where(AUDIT.c.owner == owner)
        with self.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]
