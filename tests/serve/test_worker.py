"""A worker delivers each job once, with its files whole, and says why where it cannot."""

import contextlib
import errno
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from databases import Postgres
from PIL import Image
from sentences import says

from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import Fault, UserError
from sora_train.serving.access.prices import Prices
from sora_train.serving.backends.base import Cancelled, Retry
from sora_train.serving.jobs.delivery import Steps
from sora_train.serving.jobs.files import FileStore
from sora_train.serving.jobs.job import Asked, DatabaseAway, Upload
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.jobs.sweeping import sweep
from sora_train.serving.jobs.worker import Pace, Worker

PACE = Pace(lease=3.0, poll=0.01, retry=0.05, news=0.05, sweep=0.1)


def asked(prompt: str = "a ring", **values) -> Asked:
    return Asked("create", prompt, "toy", 1.0, (64, 48), **values)


def a_video(folder: Path, frames: int = 20) -> Path:
    ramp = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 10
    path = folder / "made.mp4"
    encode_h264(np.broadcast_to(ramp, (frames, 48, 64, 3)).copy(), 8, path)
    return path


class Toy:
    """Makes a ramp of grey, or does what it is told instead."""

    name = "toy"

    def __init__(self) -> None:
        self.instead: list[Callable] = []
        self.made: list[str] = []
        self.inputs: list[list[Path]] = []

    def models(self) -> list[str]:
        return ["toy"]

    def check(self, _: Asked) -> None: ...

    def make(self, job, inputs, folder, progress, cancelled) -> Path:
        self.inputs.append(inputs)
        if self.instead:
            self.instead.pop(0)(SimpleNamespace(**locals()))
        self.made.append(job.id)
        progress(50)
        return a_video(folder)


class Here(SimpleNamespace):
    store: JobStore
    files: FileStore
    backend: Toy
    worker: Worker


@pytest.fixture
def here(database_url: str, tmp_path: Path) -> Iterator[Here]:
    store, files, backend = JobStore(database_url), FileStore(tmp_path / "files"), Toy()
    worker = Worker(store, files, backend, tmp_path / "work", pace=PACE)
    yield Here(store=store, files=files, backend=backend, worker=worker)
    store.database.close()


@contextlib.contextmanager
def running(worker: Worker) -> Iterator[None]:
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield
    finally:
        worker.stop.set()
        thread.join(120)
        assert not thread.is_alive()


def until(true: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_a_video_its_pictures_and_its_facts_are_delivered(here: Here) -> None:
    job, _ = here.store.create("o", asked(seed=7))
    assert here.worker.work_one() and not here.worker.work_one()
    done = here.store.get(job.id)
    assert done.status == "completed" and done.progress == 100
    assert done.facts == {
        "seconds": 2.5, "size": [64, 48], "fps": 8.0, "frames": 20, "seed": 7,
        "new_seconds": 2.5, "watermark": False, "signed": False,
    }  # fmt: skip
    assert done.usage == {}
    paths = {name: here.files.local(file) for name, file in done.outputs.items()}
    with Image.open(paths["thumbnail"]) as image:
        assert (image.format, image.size) == ("WEBP", (64, 48))
        assert abs(np.asarray(image).mean() - 100) < 6  # frame 10 of the ramp
    with Image.open(paths["spritesheet"]) as image:
        assert (image.format, image.size) == ("JPEG", (4 * 64, 4 * 48))
        sheet = np.asarray(image).mean(-1)
        assert sheet[:48, :64].mean() < 10 and abs(sheet[-48:, -64:].mean() - 190) < 8
    assert here.files.names(f"outputs/{job.id}") == sorted(done.outputs.values())
    assert not (here.worker.work / job.id).exists()


def test_the_steps_follow_each_other_and_signing_is_last(here: Here) -> None:
    order = []

    def step(name: str, source: Path, target: Path | None = None) -> None:
        order.append((name, source.name))
        if target is not None:
            target.write_bytes(source.read_bytes() + b"\0\0\0\x08free")

    parent_job, _ = here.store.create("o", asked())
    here.worker.work_one()
    steps = Steps(
        judge=lambda job, video: step("judge", video) or SimpleNamespace(allowed=True, category=""),
        mark=lambda source, target: step("mark", source, target),
        sign=lambda job, source, target, parent: (
            step("sign", source, target),
            order.append(("parent", parent.read_bytes())),
        ),
        bill=lambda job, facts: Prices().of("toy", facts["size"], facts["new_seconds"]),
    )
    here.worker.steps = steps
    job, _ = here.store.create(
        "o", replace(asked(), op="extend", source=parent_job.id, source_seconds=2.0)
    )
    assert here.worker.work_one()
    source = here.files.local(here.store.get(parent_job.id).outputs["video"])
    assert order == [
        ("judge", "made.mp4"), ("mark", "made.mp4"), ("sign", "marked.mp4"),
        ("parent", source.read_bytes()),
    ]  # fmt: skip
    done = here.store.get(job.id)
    assert done.facts["signed"] and done.facts["watermark"]
    assert done.usage["seconds"] == done.facts["new_seconds"] == 0.5
    assert done.facts["seconds"] == 2.5
    assert here.files.local(done.outputs["video"]).read_bytes().endswith(b"\0\0\0\x08free" * 2)


@pytest.mark.parametrize(
    ("op", "is_made_from"), [("edit", True), ("extend", True), ("create", False)]
)
def test_a_clip_that_was_sent_is_the_parent_of_what_is_made_from_it(
    here: Here, tmp_path: Path, op: str, is_made_from: bool
) -> None:
    parents = []

    def sign(job, source, target, parent):
        target.write_bytes(source.read_bytes())
        parents.append(parent and parent.read_bytes())

    clip = a_video(tmp_path)
    here.files.put("inputs/a/image.png", clip)
    here.files.put("inputs/a/video.mp4", clip)
    uploads = (Upload("inputs/a/image.png", "image"), Upload("inputs/a/video.mp4", "video"))
    here.worker.steps = Steps(sign=sign)
    here.store.create("o", replace(asked(uploads=uploads), op=op))
    assert here.worker.work_one()
    assert parents == [clip.read_bytes() if is_made_from else None]


def test_the_log_tells_what_each_part_took(here: Here, caplog) -> None:
    def mark(source: Path, target: Path) -> None:
        time.sleep(0.5)
        target.write_bytes(source.read_bytes())

    here.worker.steps = Steps(mark=mark)
    here.store.create("o", asked())
    with caplog.at_level("INFO"):
        here.worker.work_one()
    (told,) = (line for line in caplog.messages if "completed" in line)
    parts = dict(re.findall(r"(\w+) ([\d.]+) s", told))
    assert list(parts) == ["prepared", "made", "judged", "marked", "signed", "stored"]
    assert float(parts["marked"]) >= 0.5 > max(float(parts["judged"]), float(parts["signed"]))


def test_what_the_policy_forbids_is_not_delivered(here: Here) -> None:
    blocked = SimpleNamespace(allowed=False, category="violence")
    here.worker.steps = Steps(judge=lambda job, video: blocked)
    job, _ = here.store.create("o", asked())
    here.worker.work_one()
    failed = here.store.get(job.id)
    assert failed.error["code"] == "moderation_blocked" and failed.usage == {}
    says(failed.error["message"], "violence")
    assert here.files.names(f"outputs/{job.id}") == []


def test_what_cannot_be_signed_fails(here: Here) -> None:
    def sign(*_: object) -> None:
        raise Fault("the key /etc/secret.pem has expired")

    here.worker.steps = Steps(sign=sign)
    job, _ = here.store.create("o", asked())
    here.worker.work_one()
    failed = here.store.get(job.id)
    assert failed.error["code"] == "signing_failed" and "secret" not in failed.error["message"]


def test_inputs_come_in_their_order_and_the_source_last(here: Here, tmp_path: Path) -> None:
    source, _ = here.store.create("o", asked())
    here.worker.work_one()
    for name in ("b.png", "a.mp4"):
        (tmp_path / name).write_text(name)
        here.files.put(f"inputs/x/{name}", tmp_path / name)
    uploads = Upload("inputs/x/b.png", "image"), Upload("inputs/x/a.mp4", "video")
    here.backend.instead.append(
        lambda made: [path.read_text() for path in made.inputs[:2]] == ["b.png", "a.mp4"] or 1 / 0
    )
    one = here.store.add_character("o", "Zork", Upload("inputs/x/b.png", "image"))
    job, _ = here.store.create("o", asked(uploads=uploads, source=source.id, character=(one.id,)))
    here.worker.work_one()
    assert here.store.get(job.id).status == "completed"
    kinds = [path.suffix for path in here.backend.inputs[-1]]
    assert kinds == [".png", ".mp4", ".mp4", ".png"]


@pytest.mark.parametrize(
    ("gone", "code"),
    [
        ({"source": "video_" + 24 * "0"}, "source_gone"),
        ({"uploads": (Upload("inputs/y/a.png", "image"),)}, "input_gone"),
        ({"character": ("char_" + 24 * "0",)}, "input_gone"),
    ],
)
def test_a_job_whose_files_are_gone_fails(here: Here, gone: dict, code: str) -> None:
    job, _ = here.store.create("o", asked(**gone))
    here.worker.work_one()
    assert here.store.get(job.id).error["code"] == code


def raises(error: BaseException) -> Callable:
    def instead(_: object) -> None:
        raise error

    return instead


def test_what_cannot_be_made_fails_with_its_sentence_and_without_our_folders(here: Here) -> None:
    job, _ = here.store.create("o", asked())
    path = here.worker.work / job.id / "inputs/00.png"
    here.backend.instead.append(raises(UserError(f"--image {path} cannot be read")))
    here.worker.work_one()
    error = here.store.get(job.id).error
    assert error == {"code": "invalid_request", "message": "--image inputs/00.png cannot be read"}
    job, _ = here.store.create("o", asked())
    here.backend.instead.append(raises(KeyError("/root/secret")))
    here.worker.work_one()
    error = here.store.get(job.id).error
    assert error["code"] == "server_error" and "secret" not in error["message"]


FULL = OSError(errno.ENOSPC, "No space left on device", "/srv/secret/x")


def full_store() -> Fault:
    fault = Fault("cannot write beside /srv/secret")
    fault.__cause__ = FULL
    return fault


@pytest.mark.parametrize(
    ("error", "code"),
    [(FULL, "disk_full"), (full_store(), "disk_full"), (Retry("away"), "server_error")],
)
def test_what_fails_for_now_is_tried_again_and_then_fails(here: Here, error, code: str) -> None:
    job, _ = here.store.create("o", asked())
    here.backend.instead = [raises(error)] * 2
    with running(here.worker):
        until(lambda: here.store.get(job.id).is_over)
    assert here.store.get(job.id).status == "completed" and here.store.get(job.id).attempts == 3
    job, _ = here.store.create("o", asked())
    here.backend.instead = [raises(error)] * 9
    here.worker.stop.clear()
    with running(here.worker):
        until(lambda: here.store.get(job.id).is_over)
    failed = here.store.get(job.id)
    assert failed.error["code"] == code and failed.attempts == 5
    assert "secret" not in failed.error["message"]


def test_a_disk_that_fills_while_files_are_put_leaves_nothing_under_a_name(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half of the spritesheet is written when the disk is full: no name of it and of the others is left."""
    import shutil

    job, _ = here.store.create("o", asked())
    copy, copied = shutil.copyfile, []

    def filling(source, target):
        copied.append(Path(source).name)
        if copied.count("spritesheet.jpg") in (1, 2) and copied[-1] == "spritesheet.jpg":
            data = Path(source).read_bytes()
            Path(target).write_bytes(data[: len(data) // 2])
            raise FULL
        return copy(source, target)

    monkeypatch.setattr("sora_train.serving.jobs.files.shutil.copyfile", filling)
    assert here.worker.work_one()
    assert here.store.get(job.id).status == "queued"
    left = [path for path in (Path(here.files.where)).rglob("*") if path.is_file()]
    assert left == []
    with running(here.worker):
        until(lambda: here.store.get(job.id).is_over)
    done = here.store.get(job.id)
    assert done.status == "completed" and done.attempts == 3
    assert here.files.names(f"outputs/{job.id}") == sorted(done.outputs.values())


def wait_until_cancelled(made) -> None:
    until(made.cancelled)
    raise Cancelled


def test_a_cancelled_job_stops_and_its_files_go(here: Here) -> None:
    job, _ = here.store.create("o", asked())
    here.backend.instead.append(wait_until_cancelled)
    with running(here.worker):
        until(lambda: here.backend.inputs)
        assert here.store.delete(job.id, "o")
        other, _ = here.store.create("o", asked())
        until(lambda: here.store.get(other.id).is_over)
        assert here.backend.made == [other.id]
        until(lambda: not (here.worker.work / job.id).exists())


def test_a_worker_that_is_told_to_stop_gives_its_job_back(here: Here) -> None:
    job, _ = here.store.create("o", asked())
    here.backend.instead.append(wait_until_cancelled)
    with running(here.worker):
        until(lambda: here.backend.inputs)
    assert (here.store.get(job.id).status, here.store.get(job.id).attempts) == ("queued", 0)
    other = Worker(here.store, here.files, Toy(), here.worker.work, pace=PACE)
    assert other.work_one() and here.store.get(job.id).attempts == 1


def test_a_job_that_takes_longer_than_a_lease_stays_with_its_worker(here: Here) -> None:
    here.worker.pace = replace(PACE, lease=0.6)
    job, _ = here.store.create("o", asked())
    others = []

    def slow(made) -> None:
        made.progress(30)
        for _ in range(15):
            time.sleep(0.1)
            others.append(here.store.claim("other", lease_seconds=1))
        assert here.store.get(job.id).progress == 30

    here.backend.instead.append(slow)
    assert here.worker.work_one()
    assert others == [None] * 15 and here.store.get(job.id).status == "completed"


def test_of_a_worker_thought_dead_and_its_successor_one_delivers(here: Here, tmp_path) -> None:
    """The slow one loses its lease while it works: nothing of its files remains, and the other's do."""
    job, _ = here.store.create("o", asked())
    other = Worker(here.store, here.files, Toy(), tmp_path / "work2", pace=PACE)

    def lose(made) -> None:
        with here.store.database.write() as connection:
            connection.exec_driver_sql("UPDATE jobs SET free_at = 0")
        assert other.work_one()

    here.backend.instead.append(lose)
    here.worker.pace = replace(PACE, lease=1000.0)  # no heartbeat meanwhile
    assert here.worker.work_one()
    done = here.store.get(job.id)
    assert done.status == "completed" and done.attempts == 2
    assert here.files.names(f"outputs/{job.id}") == sorted(done.outputs.values())


def test_a_database_that_goes_away_while_a_job_is_made_loses_nothing(
    postgres: Postgres, tmp_path: Path
) -> None:
    store = JobStore(postgres.new_database())
    files, backend = FileStore(tmp_path / "files"), Toy()
    worker = Worker(store, files, backend, tmp_path / "work", pace=PACE)
    first, _ = store.create("o", asked("1"))
    second, _ = store.create("o", asked("2"))

    back = threading.Timer(1.0, postgres.start)

    def kill(_: object) -> None:
        postgres.kill()
        back.start()

    backend.instead.append(kill)
    with running(worker):

        def over() -> bool:
            with contextlib.suppress(DatabaseAway):
                return store.get(first.id).is_over and store.get(second.id).is_over
            return False

        until(over)
    back.join()
    assert backend.made == [first.id, second.id]
    assert [store.get(one.id).status for one in (first, second)] == ["completed"] * 2
    assert [store.get(one.id).attempts for one in (first, second)] == [1, 1]
    store.database.close()


def test_an_answer_lost_at_the_very_end_does_not_take_the_files(here: Here) -> None:
    """The job is complete, nobody hears it, and the worker is told to stop: its files stay."""
    complete, release = here.store.complete, here.store.release

    def lost(*args, **values) -> bool:
        assert complete(*args, **values)
        here.worker.stop.set()
        raise DatabaseAway("gone")

    here.store.complete = lost
    job, _ = here.store.create("o", asked())
    assert here.worker.work_one()
    done = here.store.get(job.id)
    assert done.status == "completed"
    assert here.files.names(f"outputs/{job.id}") == sorted(done.outputs.values())
    assert release is not None


def test_files_of_deleted_expired_and_failed_jobs_are_swept_and_no_others(
    database_url: str, tmp_path: Path
) -> None:
    now = [1000.0]
    store = JobStore(database_url, clock=lambda: now[0])
    files, backend = FileStore(tmp_path / "files"), Toy()
    worker = Worker(store, files, backend, tmp_path / "work", pace=replace(PACE, keep=100.0))
    jobs = {}
    for name in ("kept", "deleted", "failed", "queued"):
        (tmp_path / "a.png").write_text("a")
        jobs[name] = store.create("o", asked(f"prompt of {name}"))[0]
        files.put(f"inputs/{jobs[name].id}/a.png", tmp_path / "a.png")
        if name == "failed":
            backend.instead.append(raises(UserError("no")))
        if name != "queued":
            assert worker.work_one()
    (worker.work / "left").mkdir(parents=True)
    store.delete(jobs["deleted"].id, "o")
    now[0] += PACE.lease + 1

    def there() -> set[str]:
        return {name for name, job in jobs.items() for kind in ("inputs", "outputs")
                if files.names(f"{kind}/{job.id}")}  # fmt: skip

    assert sweep(store, files, worker.work) == 2 and there() == {"kept", "queued"}
    assert not (worker.work / "left").exists()
    assert sweep(store, files, worker.work) == 0
    now[0] += 100
    assert sweep(store, files, worker.work) == 1 and there() == {"queued"}
    assert store.get(jobs["kept"].id).outputs == {}
    with store.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT id, asked FROM jobs").all()
    texts = {job_id: str(text) for job_id, text in rows}
    assert "prompt of" not in texts[jobs["deleted"].id] and "prompt of" in texts[jobs["kept"].id]
    store.database.close()
