"""Users of `/v1/videos`: they ask, look how far it is, take the file or change their mind, and keep books of it all."""

import asyncio
import contextlib
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PROMPTS = ("a red circle moves right", "a blue square", "a green ring turns", "ein gelber Kreis")
OPEN, COMPLETED, FAILED, DELETED = "open", "completed", "failed", "deleted"
CALL_SECONDS = 60.0
"""After which a call counts as unanswered."""


@dataclass
class Notes:
    """What all clients saw."""

    calls: list[tuple[str, int, float]] = field(default_factory=list)
    """What was called, the status (0: no whole answer), seconds."""
    problems: list[str] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    """How late this process itself woke up: part of every time that it measures."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def values(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


@dataclass
class Api:
    """The calls of one key."""

    session: aiohttp.ClientSession
    addresses: Sequence[str]
    key: str
    notes: Notes
    draw: random.Random
    patience: float = 0.0
    """Seconds for which a call without an answer, or with one of 429 or 5xx, is made again; 0: once."""

    async def call(self, what: str, method: str, path: str, **given: Any) -> Answer:
        end, pause = time.monotonic() + self.patience, 0.1
        headers = {"Authorization": f"Bearer {self.key}"} | given.pop("headers", {})
        while True:
            begin = time.perf_counter()
            answer = await self._once(method, path, headers, given)
            self.notes.calls.append((what, answer.status, time.perf_counter() - begin))
            is_final = answer.status and answer.status < 500 and answer.status != 429
            if is_final or time.monotonic() > end:
                return answer
            await asyncio.sleep(pause * self.draw.uniform(0.5, 1.5))
            pause = min(2 * pause, 3.0)

    async def _once(self, method: str, path: str, headers: dict[str, str], given: Any) -> Answer:
        address = self.draw.choice(self.addresses) + path
        try:
            async with self.session.request(method, address, headers=headers, **given) as response:
                return Answer(response.status, response.headers, await response.read())
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return Answer(0, {}, repr(error).encode())


@dataclass(frozen=True)
class Habits:
    """What clients are like."""

    asks: Sequence[dict[str, Any]] = ({},)
    """Bodies of requests, one of which is drawn each time."""
    twice: float = 0.2
    """Share of requests that are sent twice at once, with one Idempotency-Key."""
    changes_mind: float = 0.5
    """Share of videos that are deleted after some looks, whatever has come of them."""
    looks: tuple[int, int] = (2, 12)
    """After how many, drawn evenly."""
    pause: float = 1.0
    """Seconds between two looks, as the server asks for (`openai-poll-after-ms`)."""
    may_fail: bool = False
    """Whether a video may fail, with a reason."""
    wait: float = 120.0
    """How long a video may still take when the time is up."""


class Client:
    """One user with one video at a time."""

    def __init__(self, api: Api, habits: Habits, folder: Path):
        self.api, self.habits, self.folder, self.draw = api, habits, folder, api.draw
        self.fates: dict[str, str] = {}
        """What became of each video that the server took in."""
        self.videos: dict[str, dict[str, Any]] = {}
        """Of completed ones, the object; the file is in the folder."""

    def problem(self, told: str) -> None:
        self.api.notes.problems.append(told)

    async def live(self, until: float) -> None:
        """One video after the other until then."""
        while time.monotonic() < until:
            video_id = await self.ask()
            if video_id is None:
                await asyncio.sleep(self.habits.pause)
            else:
                await self.follow(video_id, until + self.habits.wait)

    async def ask(self) -> str | None:
        """The id of a new video; None where the server does not take it."""
        body = {"prompt": self.draw.choice(PROMPTS), **self.draw.choice(self.habits.asks)}
        headers = {"Idempotency-Key": secrets.token_hex(12)}
        times = 2 if self.draw.random() < self.habits.twice else 1
        calls = [
            self.api.call("create", "POST", "/v1/videos", json=body, headers=headers)
            for _ in range(times)
        ]
        answers = await asyncio.gather(*calls)
        for answer in answers:
            if answer.status != 200:
                self.problem(f"create: {answer.status} {answer.body[:200]!r}")
        ids = {answer.values["id"] for answer in answers if answer.status == 200}
        if len(ids) > 1:
            self.problem(f"one Idempotency-Key made two videos: {sorted(ids)}")
        for video_id in ids:
            if video_id in self.fates:
                self.problem(f"{video_id}: another request's video")
            self.fates[video_id] = OPEN
        return next(iter(ids), None)

    async def follow(self, video_id: str, end: float) -> None:
        """Look until it is over, or until this user no longer wants it."""
        changes_mind = self.draw.random() < self.habits.changes_mind
        looks = self.draw.randint(*self.habits.looks) if changes_mind else None
        count, progress = 0, -1
        while time.monotonic() < end:
            await asyncio.sleep(self.habits.pause * self.draw.uniform(0.9, 1.1))
            answer = await self.api.call("retrieve", "GET", f"/v1/videos/{video_id}")
            if answer.status != 200:
                self.problem(f"{video_id}: retrieve: {answer.status} {answer.body[:200]!r}")
                return
            video = answer.values
            if video["status"] in (COMPLETED, FAILED):
                await self.take(video)
                break
            if video["progress"] < progress:
                self.problem(f"{video_id}: progress fell from {progress} to {video['progress']}")
            progress, count = video["progress"], count + 1
            if count == looks:
                break
        if looks is not None or self.fates[video_id] == OPEN:
            await self.delete(video_id)

    async def take(self, video: dict[str, Any]) -> None:
        """What came of a video that is over."""
        video_id = video["id"]
        self.fates[video_id] = video["status"]
        if video["status"] == FAILED:
            told = video["error"] or {}
            if not (self.habits.may_fail and told.get("code") and told.get("message")):
                self.problem(f"{video_id}: failed: {told}")
            self.videos[video_id] = video
            return
        answer = await self.api.call("content", "GET", f"/v1/videos/{video_id}/content")
        if answer.status != 200 or len(answer.body) != int(answer.headers["content-length"]):
            self.problem(f"{video_id}: content: {answer.status} {answer.body[:200]!r}")
            return
        (self.folder / f"{video_id}.mp4").write_bytes(answer.body)
        self.videos[video_id] = video
        answer = await self.api.call("list", "GET", "/v1/videos?limit=100")
        if answer.status != 200 or all(one["id"] != video_id for one in answer.values["data"]):
            self.problem(f"{video_id}: is not listed ({answer.status})")

    async def delete(self, video_id: str) -> None:
        """Delete it; nobody finds it afterwards."""
        path = f"/v1/videos/{video_id}"
        answer = await self.api.call("delete", "DELETE", path)
        # Asked again after an answer that was lost, it is gone.
        if answer.status != 200 and not (self.api.patience and answer.status == 404):
            self.problem(f"{video_id}: delete: {answer.status} {answer.body[:200]!r}")
            return
        self.fates[video_id] = DELETED
        answer = await self.api.call("retrieve", "GET", path)
        if answer.status != 404:
            self.problem(f"{video_id}: was deleted and is {answer.status}")

    async def check_books(self) -> None:
        """The server lists what this client has, each once and as it saw it."""
        listed: list[dict[str, Any]] = []
        after = ""
        while True:
            answer = await self.api.call("list", "GET", f"/v1/videos?limit=100{after}")
            if answer.status != 200:
                self.problem(f"list: {answer.status} {answer.body[:200]!r}")
                return
            page = answer.values
            listed += page["data"]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        seen = [(one["id"], one["status"]) for one in listed]
        own = [(name, fate) for name, fate in self.fates.items() if fate != DELETED]
        for name, status in sorted(set(own) ^ set(seen)):
            whose = "the client's" if (name, status) in own else "the server's"
            self.problem(f"{name}: {status} in {whose} book alone")
        if len(seen) != len(set(seen)):
            self.problem("a video is listed twice")


@contextlib.asynccontextmanager
async def session(notes: Notes) -> AsyncIterator[aiohttp.ClientSession]:
    """Connections that are kept, one for each call under way; meanwhile it is noted how late this process wakes."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0)
    timeout = aiohttp.ClientTimeout(total=CALL_SECONDS)
    watching = asyncio.create_task(_watch(notes))
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as made:
        yield made
    watching.cancel()


async def _watch(notes: Notes) -> None:
    while True:
        begin = time.perf_counter()
        await asyncio.sleep(0.02)
        notes.lags.append(time.perf_counter() - begin - 0.02)
