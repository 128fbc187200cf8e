"""Databases to test with: a PostgreSQL server of our own, which can be killed and started again."""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg


def programs() -> Path | None:
    """The folder of PostgreSQL's server programs, which Debian keeps out of the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def missing() -> str:
    """Why no server can be started here; empty where one can."""
    if programs() is None:
        return "no PostgreSQL server is installed: docker/install.sh postgres"
    if os.getuid() == 0 and not any(one.pw_name == "postgres" for one in pwd.getpwall()):
        return "PostgreSQL does not run as root, and there is no user postgres"
    return ""


class Postgres:
    """A server with a folder and a port of its own."""

    def __init__(self) -> None:
        # Not pytest's folder, whose parents only its user may search.
        self.folder = Path(tempfile.mkdtemp(prefix="sora-postgres-"))
        if os.getuid() == 0:
            self.folder.chmod(0o755)
            shutil.chown(self.folder, "postgres")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.data = self.folder / "data"
        self._as_owner(f"initdb -D {self.data} -A trust -U postgres -E UTF8 --locale=C -N")
        self.start()

    def _as_owner(self, command: str) -> None:
        folder = programs()
        assert folder is not None
        whole = f"cd {self.folder} && {folder}/{command} >>{self.folder}/log 2>&1"
        argv = ["sh", "-c", whole]
        if os.getuid() == 0:
            argv = ["su", "postgres", "-s", "/bin/sh", "-c", whole]
        done = subprocess.run(argv, check=False)
        assert done.returncode == 0, (self.folder / "log").read_text()

    def start(self) -> None:
        # What a kill of the server leaves is what it left to the system: no need to wait for disks.
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off"
        self._as_owner(f'pg_ctl -D {self.data} -w -o "{options}" start')

    def kill(self) -> None:
        """Every process of the server ends at once, with whatever it was doing."""
        self._as_owner(f"pg_ctl -D {self.data} -m immediate stop")

    def shoot(self) -> None:
        """The same by SIGKILL: no process of the server does anything more."""
        first = (self.data / "postmaster.pid").read_text().split()[0]
        pids = [first, *Path(f"/proc/{first}/task/{first}/children").read_text().split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        end = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
            time.sleep(0.01)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        address = f"postgresql://postgres@127.0.0.1:{self.port}/{database}"
        return psycopg.connect(address, autocommit=True)

    def new_database(self) -> str:
        """The address of an empty one."""
        name = f"sora_{secrets.token_hex(6)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def cut(self) -> None:
        """End all connections but this one."""
        with self.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
