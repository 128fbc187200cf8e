"""What was billed: read from the rows that completed jobs leave, and that outlive them."""

import datetime

import sqlalchemy as sql

from sora_train.serving.jobs.tables import USAGE


def used_since(connection: sql.Connection, owner: str, since: int) -> dict[str, float]:
    """Seconds, cost and number of videos that were billed."""
    columns = (
        sql.func.coalesce(sql.func.sum(USAGE.c.seconds), 0.0),
        sql.func.coalesce(sql.func.sum(USAGE.c.cost), 0.0),
        sql.func.count(),
    )
    mine = USAGE.c.owner == owner, USAGE.c.at >= since
    seconds, cost, videos = connection.execute(sql.select(*columns).where(*mine)).one()
    return {"seconds": float(seconds), "cost": float(cost), "videos": videos}


def month_start(now: float) -> int:
    """When the calendar month began, in UTC."""
    first = datetime.datetime.fromtimestamp(now, datetime.UTC)
    return int(first.replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp())
