"""`sora serve` under load, under kills, and beside the bare sampler; real processes, real HTTP over 127.0.0.1.

    sora bench serve load --clients 200 --seconds 60
    sora bench serve chaos --seconds 300 --kills 20 --postgres
    sora bench serve overhead

load: clients create, poll, download, delete; what they were answered, how long it took by their own clock and by the
server's, and whether their books, the server's lists, the database and the folder of files agree at the end. chaos: the
same, patiently, while gateways, workers and the database are killed; every file is decoded and its signature read.
overhead: seconds of a job from the request to the answer that says completed, less those of its sampling; the same
sampling alone, in this process, stands beside it.
Without --ckpt the model is the smallest one, after two steps of training.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.serve_books import database_problems, file_problems
from benchmarks.serve_clients import (
    COMPLETED,
    PROMPTS,
    Api,
    Client,
    Habits,
    Notes,
    session,
)
from benchmarks.serve_fleet import Fleet, postgres, tiny_run
from benchmarks.serve_times import at, calls_row, cpu_seconds, machine_seconds, server_row
from sora_train.base.code_version import commit, cpu_model
from sora_train.base.files import write_atomically
from sora_train.errors import Fault

TINY = {"seconds": 0.5, "size": "32x32", "steps": 2}
RAMP_SECONDS = 5.0
"""In which the clients arrive."""


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    ways = {"load": load, "chaos": chaos, "overhead": overhead}
    with postgres() if args.postgres else contextlib.nullcontext() as server:
        folder = args.out / f"{args.what}-{time.strftime('%H%M%S')}"
        row = ways[args.what](args, folder, server)
    kind = "postgresql" if args.postgres else "sqlite"
    row = {"database": kind, "commit": commit(), "cpu": cpu_model(), **row}
    print(json.dumps(row, indent=1))
    write_atomically(args.out / f"{args.what}-{kind}.json", json.dumps(row, indent=1))
    return 1 if row.get("problems") else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sora bench serve", description=__doc__)
    parser.add_argument("what", choices=("load", "chaos", "overhead"))
    parser.add_argument("--ckpt", default="")
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--video-seconds", type=float, default=0.5)
    parser.add_argument("--size", default="32x32")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/serve_bench"))
    return parser.parse_args(argv)


# --- load ---


def load(args: argparse.Namespace, folder: Path, server: Any) -> dict[str, Any]:
    """Clients for so many seconds. Two gateways share a PostgreSQL, one has a SQLite to itself."""
    ckpt = args.ckpt or str(tiny_run(args.out))
    gateways = (1, 0) if server else (1,)
    with Fleet(folder, {"backend": {"ckpt": ckpt}}, gateways=gateways, postgres=server) as fleet:
        seconds = args.seconds or 60.0
        habits = Habits(asks=[TINY], wait=60.0)
        row, clients = asyncio.run(
            _loaded(fleet, args.clients or 200, seconds, habits, args.seed, folder)
        )
        problems = [*row.pop("problems"), *database_problems(fleet, clients)]
    problems += file_problems(folder, clients, signed=False)
    return row | _found(problems)


async def _loaded(
    fleet: Fleet, count: int, seconds: float, habits: Habits, seed: int, folder: Path
) -> tuple[dict[str, Any], list[Client]]:
    notes = Notes()
    async with session(notes) as http:
        apis = apis_of(fleet, http, notes, count, seed)
        clients = [Client(api, habits, made_folder(folder / "downloads")) for api in apis]
        await warm_up(clients[0])
        begin = time.monotonic()
        spent, busy = cpu_seconds(fleet), machine_seconds()
        lives = [
            asyncio.create_task(_late(client, n * RAMP_SECONDS / count, begin + seconds))
            for n, client in enumerate(clients)
        ]
        await asyncio.sleep(seconds)
        calls, lags = list(notes.calls), sorted(notes.lags)
        spent = {name: value - spent[name] for name, value in cpu_seconds(fleet).items()}
        others = machine_seconds() - busy - sum(spent.values())
        at_server = [await _metrics(http, address) for address in fleet.addresses]
        await asyncio.gather(*lives)
        await asyncio.gather(*(client.check_books() for client in clients))
    row = {
        "clients": count,
        "seconds": seconds,
        "calls_a_second": round(len(calls) / seconds, 1),
        **calls_row(calls),
        "at_server_ms": server_row(at_server),
        "client_woke_late_ms": round(1000 * at(lags, 0.99), 1),
        "cpu_seconds": {name: round(value, 1) for name, value in spent.items()},
        "cpu_seconds_of_others": round(others, 1),
        "load_average": os.getloadavg()[0],
        "problems": notes.problems,
    }
    return row | fates_row(clients), clients


async def warm_up(client: Client) -> None:
    """A first video: the worker has its model afterwards. What was noted of it is forgotten."""
    habits, client.habits = client.habits, Habits(asks=[TINY], changes_mind=0.0, pause=0.2)
    await client.live(time.monotonic() + 0.001)
    client.habits = habits
    client.api.notes.calls.clear()
    client.api.notes.lags.clear()


async def _late(client: Client, pause: float, until: float) -> None:
    await asyncio.sleep(pause)
    await client.live(until)


def apis_of(
    fleet: Fleet, http: Any, notes: Notes, count: int, seed: int, patience: float = 0.0
) -> list[Api]:
    """A client's calls each, with a key of its own."""
    from sora_train.serving.access.keys import Keys
    from sora_train.serving.service import open_store
    from sora_train.serving.settings import Settings

    database = open_store(Settings.model_validate(fleet.settings)).database
    secrets = [Keys(database).add(f"client {number}")[1] for number in range(count)]
    database.close()
    draws = [random.Random(f"{seed}/{number}") for number in range(count)]
    return [
        Api(http, fleet.addresses, secret, notes, draw, patience)
        for secret, draw in zip(secrets, draws, strict=True)
    ]


async def _metrics(http: Any, address: str) -> str:
    async with http.get(f"{address}/metrics") as response:
        return str(await response.text())


def fates_row(clients: list[Client]) -> dict[str, Any]:
    return {"videos": dict(Counter(fate for one in clients for fate in one.fates.values()))}


def _found(problems: list[str]) -> dict[str, Any]:
    return {"problems": len(problems), "first_problems": problems[:20]}


def made_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


# --- chaos ---


def chaos(args: argparse.Namespace, folder: Path, server: Any) -> dict[str, Any]:
    """Two gateways, a worker of the first and one beside them, and somebody who kills them by a plan of chance."""
    ckpt = args.ckpt or str(tiny_run(args.out))
    settings = {"backend": {"ckpt": ckpt}, "signing": {"dev_cert": "bench"}}
    with Fleet(folder, settings, gateways=(1, 0), workers=1, postgres=server) as fleet:
        seconds = args.seconds or 300.0
        killer = Killer(fleet, args.kills, seconds, args.seed)
        row, clients = asyncio.run(
            _disturbed(fleet, args.clients or 20, seconds, killer, args.seed, folder)
        )
        problems = [*row.pop("problems"), *database_problems(fleet, clients)]
    problems += file_problems(folder, clients, signed=True)
    return row | _found(problems)


class Killer(threading.Thread):
    """Kills one thing after the other, evenly spread over the time, and starts each again after a pause."""

    def __init__(self, fleet: Fleet, kills: int, seconds: float, seed: int):
        super().__init__(daemon=True)
        self.fleet, self.draw = fleet, random.Random(seed)
        ways = [fleet.kill_gateway, fleet.kill_worker, fleet.kill_database]
        self.ways = [ways[number % 3] for number in range(kills)]
        self.draw.shuffle(self.ways)
        self.gap = seconds / (kills + 1)
        self.done: list[str] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        begin = time.monotonic()
        try:
            for number, way in enumerate(self.ways, 1):
                moment = begin + self.gap * (number + self.draw.uniform(-0.4, 0.4))
                time.sleep(max(0.0, moment - time.monotonic()))
                self.done.append(way(self.draw, self.draw.uniform(0.0, 3.0)))
        except BaseException as error:
            self.failure = error


async def _disturbed(
    fleet: Fleet, count: int, seconds: float, killer: Killer, seed: int, folder: Path
) -> tuple[dict[str, Any], list[Client]]:
    notes = Notes()
    # A few windows, so that kills meet videos half made; more than that would leave little to count.
    asks = [TINY, TINY, TINY | {"seconds": 6.0}]
    habits = Habits(
        asks=asks, changes_mind=0.15, looks=(1, 8), pause=0.5, may_fail=True, wait=400.0
    )
    async with session(notes) as http:
        apis = apis_of(fleet, http, notes, count, seed, patience=120.0)
        clients = [Client(api, habits, made_folder(folder / "downloads")) for api in apis]
        begin = time.monotonic()
        killer.start()
        await asyncio.gather(*(client.live(begin + seconds) for client in clients))
        await asyncio.to_thread(killer.join, 120.0)
        await asyncio.gather(*(client.check_books() for client in clients))
    if killer.failure is not None or killer.is_alive():
        notes.problems.append(f"the killer itself failed: {killer.failure!r}")
    failures = Counter(
        one["error"]["code"]
        for client in clients
        for one in client.videos.values()
        if one["error"] is not None
    )
    row = {
        "clients": count,
        "seconds": seconds,
        "until_all_was_over": round(time.monotonic() - begin, 1),
        "kills": dict(Counter(killer.done)),
        **calls_row(notes.calls),
        "failures": dict(failures),
        "load_average": os.getloadavg()[0],
        "problems": notes.problems,
    }
    return row | fates_row(clients), clients


# --- overhead ---


def overhead(args: argparse.Namespace, folder: Path, server: Any) -> dict[str, Any]:
    """One job after the other, and before each the same video by the sampler alone."""
    ckpt = args.ckpt or str(tiny_run(args.out))
    bare = Bare(ckpt, args)
    settings = {"backend": {"ckpt": ckpt}, "signing": {"dev_cert": "bench"}, "poll_ms": 20}
    rows = []
    with Fleet(folder, settings, postgres=server) as fleet:
        for number in range(-1, args.times):
            row = {"bare": bare.seconds(folder)} | served(fleet, bare.body)
            if number >= 0:  # the first loads the model
                rows.append(row)
                print(json.dumps(row), flush=True)
    told = {}
    for name in rows[0]:
        values = sorted(row[name] for row in rows)
        told[name] = {"median": at(values, 0.5), "least": values[0], "most": values[-1]}
    return {
        "times": args.times,
        "job": bare.body,
        "seconds": told,
        "overhead_share": at(sorted(row["overhead"] / row["made"] for row in rows), 0.5),
        "load_average": os.getloadavg()[0],
    }


class Bare:
    """The sampler without a service around it."""

    def __init__(self, ckpt: str, args: argparse.Namespace):
        from sora_train.serving.backends.local import LocalBackend

        self.backend = LocalBackend(ckpt)
        self.body = {"prompt": PROMPTS[0], "seconds": args.video_seconds, "size": args.size}
        self.body |= {"steps": args.steps, "seed": args.seed}

    def seconds(self, folder: Path) -> float:
        from sora_train.serving.jobs.job import Asked, Job, new_id

        width, height = map(int, self.body["size"].split("x"))
        given = {name: self.body[name] for name in ("prompt", "seconds", "steps", "seed")}
        asked = Asked("create", model=self.backend.models()[0], size=(width, height), **given)
        work = made_folder(folder / new_id())
        begin = time.perf_counter()
        self.backend.make(
            Job(work.name, "o", asked, "in_progress", 0, 0), [], work, lambda _: None, lambda: False
        )
        return time.perf_counter() - begin


def served(fleet: Fleet, body: dict[str, Any]) -> dict[str, float]:
    """Seconds of a job as its user sees them, and of its parts as the worker's log has them."""
    begin = time.perf_counter()
    video = _asked(fleet, "/v1/videos", json.dumps(body).encode())
    while video["status"] not in (COMPLETED, "failed"):
        time.sleep(0.02)
        video = _asked(fleet, f"/v1/videos/{video['id']}")
    total = time.perf_counter() - begin
    if video["status"] != COMPLETED:
        raise Fault(f"the video failed: {video['error']}")
    log = fleet.gateways[0].log.read_text()
    (told,) = re.findall(f"{video['id']}: completed: (.*)", log)
    parts = {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+) s", told)}
    rest = total - sum(parts[name] for name in ("made", "marked", "signed"))
    return {"total": total, **parts, "overhead": rest, "but_judging": rest - parts["judged"]}


def _asked(fleet: Fleet, path: str, body: bytes | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(fleet.addresses[0] + path, body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))
