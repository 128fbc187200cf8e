"""One database, SQLite or PostgreSQL: transactions, the clock that all hosts share, and what is said when it is away.

SQLite writes begin with BEGIN IMMEDIATE, so that a transaction that reads and then writes never meets another's write
in between; PostgreSQL locks the rows, or a name, instead.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from sora_train.errors import UserError
from sora_train.serving.jobs.job import DatabaseAway

LOCK_SECONDS = 15.0
"""How long a statement waits for another's lock, and a connection for the server."""
CONNECTIONS = 15
"""Of a process, all kept: making another takes longer than what it is needed for."""
WRITERS = 10
"""Of them, those that may write at once: those who look find one however many wait for each other to write."""


class Database:
    """`with database.write() as connection: ...` is one transaction."""

    def __init__(self, url: str, clock: Callable[[], float] | None = None):
        """
        Args:
            url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`.
            clock: seconds since 1970 for tests; default: the server's clock, of SQLite that of this host.

        Raises:
            UserError: no such kind of database.
        """
        self._clock = clock
        try:
            self.url = sql.make_url(url)
        except ArgumentError:
            raise UserError(f"database {url!r} is no address; {_SPELLINGS}") from None
        kind = self.url.get_backend_name()
        if kind not in ("sqlite", "postgresql"):
            raise UserError(f"database is of kind {kind}; {_SPELLINGS}")
        self.is_sqlite = kind == "sqlite"
        self.engine = self._sqlite() if self.is_sqlite else self._postgresql()
        # SQLite has one writer, and who waits for it asks again and again; here they wait to be called.
        self._writers = threading.BoundedSemaphore(1 if self.is_sqlite else WRITERS)
        # Each statement by itself: BEGIN and COMMIT are ways to the server and back.
        self._reading = (
            self.engine
            if self.is_sqlite
            else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        )

    def _sqlite(self) -> sql.Engine:
        if not self.url.database or self.url.database == ":memory:":
            raise UserError(
                f"database {self.shown} is in memory, where jobs do not survive; {_SPELLINGS}"
            )
        Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sql.create_engine(self.url, connect_args={"timeout": LOCK_SECONDS}, **_POOL)

        @event.listens_for(engine, "connect")
        def configure(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # the driver begins no transactions of its own
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")  # an accepted job survives a power cut

        @event.listens_for(engine, "begin")
        def begin(connection: sql.Connection) -> None:
            writes = connection.get_execution_options().get("writes")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine

    def _postgresql(self) -> sql.Engine:
        options = {
            "connect_timeout": int(LOCK_SECONDS),
            "options": f"-c lock_timeout={int(LOCK_SECONDS)}s",
        }
        url = self.url.set(drivername="postgresql+psycopg")
        return sql.create_engine(url, connect_args=options, pool_pre_ping=True, **_POOL)

    @property
    def shown(self) -> str:
        """The address without its password."""
        return self.url.render_as_string(hide_password=True)

    @contextlib.contextmanager
    def write(self) -> Iterator[sql.Connection]:
        """A transaction that may write, committed at the end. Raises DatabaseAway."""
        with self._sentences(), self._turn(), self.engine.connect() as connection:
            connection.execution_options(writes=True)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for one of this process's writers to end."""
        if not self._writers.acquire(timeout=LOCK_SECONDS):
            raise PoolTimeout(f"others of this process write for {LOCK_SECONDS:g} s")
        try:
            yield
        finally:
            self._writers.release()

    @contextlib.contextmanager
    def read(self) -> Iterator[sql.Connection]:
        """To look: each statement sees what was committed before it. Raises DatabaseAway."""
        with self._sentences(), self._reading.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise self._away(error) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise self._away(error) from error
            raise

    def _away(self, error: Exception) -> DatabaseAway:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        return DatabaseAway(
            f"the database {self.shown} does not answer ({reason[:200]}); nothing is lost, try again when it is back"
        )

    def lock(self, connection: sql.Connection, name: str) -> None:
        """Until the transaction's end nobody else holds this name. SQLite has one writer as it is."""
        if not self.is_sqlite:
            connection.execute(
                sql.select(sql.func.pg_advisory_xact_lock(sql.func.hashtextextended(name, 0)))
            )

    def now(self, connection: sql.Connection) -> float:
        """Seconds since 1970 by the one clock that all hosts share."""
        if self._clock is not None:
            return self._clock()
        if self.is_sqlite:
            return time.time()
        clock = sql.extract("epoch", sql.func.clock_timestamp())
        return float(connection.execute(sql.select(clock)).scalar_one())

    def create(self, metadata: sql.MetaData) -> None:
        """Make the tables that are not there yet."""
        with self.write() as connection:
            self.lock(connection, "sora tables")
            metadata.create_all(connection)

    def close(self) -> None:
        self.engine.dispose()


_POOL: dict[str, Any] = {
    "pool_size": CONNECTIONS,
    "max_overflow": 0,
    "pool_timeout": LOCK_SECONDS,
    # Errors show statements without their values: prompts are no business of the log.
    "hide_parameters": True,
}
_SPELLINGS = "write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
