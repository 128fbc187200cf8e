"""The benchmark of `sora serve`, short: real processes under many clients and kills, and what would be noticed."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web
from stub_backend import write_clip

from benchmarks import serve, serve_books, serve_times
from benchmarks.serve_clients import COMPLETED, DELETED, Api, Client, Habits, Notes, session
from benchmarks.serve_fleet import Fleet


def arguments(what: str, ckpt: Path, **flags: Any) -> Any:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return serve.arguments([what, f"--ckpt={ckpt}", *words])


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> Any:
    """The PostgreSQL server, or None for SQLite."""
    return request.getfixturevalue("postgres") if request.param == "postgresql" else None


@pytest.mark.slow
def test_many_clients_lose_nothing_and_get_nothing_twice(
    server: Any, tmp_path: Path, finished_run: Path
) -> None:
    row = serve.load(arguments("load", finished_run, clients=20, seconds=10), tmp_path, server)
    assert row["first_problems"] == [] and set(row["statuses"]) <= {"200", "404"}
    assert row["videos"][COMPLETED] and row["videos"][DELETED]
    assert row["at_server_ms"]["calls"] >= row["ms"]["quiet"]["calls"] > 50


@pytest.mark.slow
def test_whatever_is_killed_every_video_ends_once(
    server: Any, tmp_path: Path, finished_run: Path
) -> None:
    """A gateway, a worker, and the database (all that have it open, where it is a file)."""
    wanted = arguments("chaos", finished_run, clients=6, seconds=30, kills=3)
    row = serve.chaos(wanted, tmp_path, server)
    assert row["first_problems"] == [] and sum(row["kills"].values()) == 3
    assert row["videos"][COMPLETED] and row["failures"] == {}


@pytest.mark.slow
def test_workers_stand_behind_their_gateway(tmp_path: Path, finished_run: Path) -> None:
    with Fleet(tmp_path, {"backend": {"ckpt": str(finished_run)}}) as fleet:
        row = serve.served(fleet, {"prompt": "a ring", "seconds": 0.5, "size": "32x32", "steps": 2})
        (worker,) = fleet.gateway_workers()
        gateway = os.getpriority(os.PRIO_PROCESS, fleet.gateways[0].pid)
        assert os.getpriority(os.PRIO_PROCESS, worker) == min(19, gateway + 5)
    assert 0 < row["made"] < row["total"] and row["overhead"] < row["total"] - row["made"]


LEAVES_FIRST = """
import sys, time
from sora_train.serving.worker_process import leave_with_parent
leave_with_parent()
time.sleep(0.2)
"""


def test_a_worker_that_leaves_before_its_gateway_ends_well() -> None:
    process = subprocess.Popen([sys.executable, "-c", LEAVES_FIRST], stdin=subprocess.PIPE)
    assert process.wait(60) == 0
    process = subprocess.Popen([sys.executable, "-c", LEAVES_FIRST], stdin=subprocess.DEVNULL)
    assert process.wait(60) == -signal.SIGTERM


def test_shares_are_those_of_the_values() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [serve_times.at(values, share) for share in (0.5, 0.99, 1.0)] == [51, 100, 100]
    calls = [("retrieve", 200, 0.001 * number) for number in range(1, 101)]
    row = serve_times.calls_row([*calls, ("create", 503, 9.0)])
    assert row["ms"]["quiet"] == {"calls": 100, "p50": 51, "p90": 91, "p99": 100, "most": 100}
    assert row["statuses"] == {"200": 100, "503": 1}


def test_the_servers_own_times_are_added_up_over_gateways() -> None:
    line = 'sora_request_seconds_bucket{{le="{}",method="{}",route="/v1/videos/{{video_id}}"}} {}'
    page = [
        line.format(*row) for row in (("0.1", "GET", 90), ("0.2", "GET", 100), ("+Inf", "GET", 100))
    ]
    other = line.format("+Inf", "POST", 7)
    row = serve_times.server_row(["\n".join([*page, other]), "\n".join(page)])
    assert row == {"calls": 200, "p50": 55.6, "p99": 190.0}


class Careless:
    """A server that makes every kind of mistake that clients are to notice."""

    def __init__(self) -> None:
        self.count, self.deleted = 0, False

    async def create(self, request: web.Request) -> web.Response:
        self.count += 1  # whatever the Idempotency-Key says
        return web.json_response({"id": f"video_{self.count}"})

    async def retrieve(self, request: web.Request) -> web.Response:
        error = {"code": "", "message": ""}
        video = {"id": request.match_info["id"], "status": "failed", "error": error}
        return web.json_response(video | {"progress": 0})

    async def delete(self, request: web.Request) -> web.Response:
        return web.json_response({})  # and does not

    async def page(self, request: web.Request) -> web.Response:
        one = {"id": "video_1", "status": COMPLETED}
        return web.json_response({"data": [one, one], "has_more": False, "last_id": "video_1"})

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/videos", self.create)
        app.router.add_get("/v1/videos", self.page)
        app.router.add_get("/v1/videos/{id}", self.retrieve)
        app.router.add_delete("/v1/videos/{id}", self.delete)
        return app


def test_clients_notice_a_careless_server(tmp_path: Path) -> None:
    async def visit() -> list[str]:
        runner = web.AppRunner(Careless().app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address = "http://127.0.0.1:{}".format(*runner.addresses[0][1:2])
        notes = Notes()
        async with session(notes) as http:
            api = Api(http, [address], "key", notes, random.Random(0))
            client = Client(api, Habits(twice=1, pause=0.01, changes_mind=1), tmp_path)
            video_id = await client.ask()
            assert video_id is not None
            await client.follow(video_id, 1e12)
            await client.check_books()
        await runner.cleanup()
        return notes.problems

    told = "\n".join(asyncio.run(visit()))
    for noticed in ("made two videos", "failed: ", "was deleted and is 200", "listed twice"):
        assert noticed in told
    assert "completed in the server's book alone" in told


def test_files_that_are_cut_short_or_unsigned_are_noticed(tmp_path: Path) -> None:
    whole, short = (
        {"id": name, "status": COMPLETED, "frames": 16, "provenance": {"signed": False}}
        for name in ("whole", "short")
    )
    data = write_clip(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "short.mp4").write_bytes(data[: len(data) // 2])
    client: Any = SimpleNamespace(folder=tmp_path, videos={"a": whole, "b": short})
    (told,) = serve_books.file_problems(tmp_path, [client], signed=False)
    assert told.startswith("short: ")
    client.videos = {"a": whole | {"frames": 17}}
    assert list(serve_books.file_problems(tmp_path, [client], signed=False)) == [
        "whole: 16 frames of 17"
    ]
