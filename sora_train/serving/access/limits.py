"""What a key may have: so many requests a minute, jobs at once, seconds and costs a month; counted in the database.

Each check is part of the transaction that uses up what it counts, with the owner locked, so that several gateways grant
no more together than one would.
"""

from dataclasses import dataclass

import sqlalchemy as sql

from sora_train.serving.access.billed import month_start, used_since
from sora_train.serving.access.keys import Key
from sora_train.serving.access.prices import Prices
from sora_train.serving.access.tables import KEYS
from sora_train.serving.errors import TooManyRequests, Unavailable
from sora_train.serving.jobs.database import Database
from sora_train.serving.jobs.job import IN_PROGRESS, QUEUED, Asked
from sora_train.serving.jobs.tables import CHARACTERS, JOBS
from sora_train.serving.settings import LimitSettings

MINUTE = 60.0


@dataclass(frozen=True)
class Limits:
    """The limits of all keys."""

    database: Database
    settings: LimitSettings
    prices: Prices

    def count_request(self, key: Key | None) -> None:
        """Count a request that makes something. Raises TooManyRequests, which says when the next one may come.

        A key that was quiet may ask its whole minute's number at once; then the minute refills evenly.
        """
        if key is None:
            return
        rate = _given(key.requests_per_minute, self.settings.requests_per_minute)
        if not rate:
            return
        this = KEYS.c.id == key.id
        with self.database.write() as connection:
            row = sql.select(KEYS.c.filled_until).where(this).with_for_update()
            filled = connection.execute(row).scalar_one()
            now = self.database.now(connection)
            after = max(filled, now) + MINUTE / rate
            if after - now > MINUTE + 1e-6:
                raise TooManyRequests(
                    f"The key may make {rate} requests a minute; wait a moment.",
                    retry_after=after - now - MINUTE,
                )
            connection.execute(KEYS.update().where(this).values(filled_until=after))

    def require_room(self, connection: sql.Connection, key: Key | None, asked: Asked) -> None:
        """Raise Unavailable or TooManyRequests where one more job is too much; the owner is locked meanwhile."""
        waiting = sql.select(sql.func.count()).where(JOBS.c.status == QUEUED)
        if connection.execute(waiting).scalar_one() >= self.settings.queue:
            raise Unavailable("Too many jobs are waiting; try again later.", retry_after=30.0)
        if key is None:
            return
        active = JOBS.c.owner == key.id, JOBS.c.status.in_((QUEUED, IN_PROGRESS))
        running = [
            Asked.from_dict(row)
            for row in connection.scalars(sql.select(JOBS.c.asked).where(*active))
        ]
        most = _given(key.concurrent, self.settings.concurrent)
        if most and len(running) >= most:
            raise TooManyRequests(
                f"{len(running)} jobs of the key wait or run, and {most} may; wait until one is done.",
                retry_after=5.0,
                code="concurrency_limit_exceeded",
            )
        self._require_quota(connection, key, [*running, asked])

    def require_room_for_character(self, connection: sql.Connection, owner: str) -> None:
        """Raise TooManyRequests where one more character is too much; theirs are locked meanwhile."""
        most = self.settings.characters
        mine = sql.select(sql.func.count()).where(CHARACTERS.c.owner == owner)
        if most and connection.execute(mine).scalar_one() >= most:
            raise TooManyRequests(
                f"The key keeps {most} characters, and may keep no more; delete one.",
                code="character_limit_exceeded",
            )

    def _require_quota(self, connection: sql.Connection, key: Key, jobs: list[Asked]) -> None:
        """What the month was billed, what runs, and what is asked now must fit together."""
        if key.seconds_per_month is None and key.cost_per_month is None:
            return
        used = used_since(connection, key.id, month_start(self.database.now(connection)))
        estimates = [self.prices.estimate(job) for job in jobs]
        for name, most, unit in (
            ("seconds", key.seconds_per_month, "seconds of video"),
            ("cost", key.cost_per_month, self.prices.currency),
        ):
            total = used[name] + sum(one[name] for one in estimates)
            if most is not None and total > most + 1e-9:
                error = TooManyRequests(
                    f"The key may use {most:g} {unit} a month, and would have used {total:g} with this job; ask for "
                    "less, or for a higher quota.",
                    code="insufficient_quota",
                )
                error.type = "insufficient_quota"
                raise error


def _given(own: int | None, otherwise: int) -> int:
    return otherwise if own is None else own
