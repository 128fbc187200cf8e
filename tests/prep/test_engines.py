"""However the stages are run, and whatever is killed meanwhile, the shards are the same to the last bit."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sentences import refuses

from benchmarks.footage import Shot, footage, write_footage
from data_prep.command import prepare
from sora_train.errors import UserError

LIGHT = [
    "scenes.detector=difference", "score.text=false", "score.faces=false", "score.nsfw=false", "score.brisque=false",
    "caption.by=template", 'caption.template="{camera} shot"', "cut.min_seconds=0.5", "sample=0",
]  # fmt: skip
COMMAND = "import sys; from data_prep.command import prepare; prepare(sys.argv[1:])"


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for number in range(5):
        cameras = ("static", "pan_right", "zoom_in")
        shots = [Shot(seed=10 * number + n, seconds=1.0, camera=cameras[n]) for n in range(3)]
        write_footage(footage(shots, height=72, width=128, fps=12), folder / f"{number}.mp4")
    return folder


def shards_of(out: Path) -> dict[str, str]:
    """The digest of every file that training reads."""
    files = [*out.glob("*.tar"), out / "manifest.parquet"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def given(films: Path, out: Path, *more: str) -> list[str]:
    # The folder's name goes into the manifest.
    return [f"input={films}", f"output={out / 'prep_out'}", "workers=2", *LIGHT, *more]


@pytest.fixture(scope="module")
def undisturbed(films: Path, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("calm")
    prepare(given(films, out))
    shards = shards_of(out / "prep_out")
    assert len(shards) == 2
    return shards


@pytest.mark.slow
def test_parts_of_an_array_give_the_same_shards(films: Path, tmp_path: Path, undisturbed):
    for part in ("2/2", "1/2", "1/2", "2/2", "2/2", "1/2"):
        prepare(given(films, tmp_path, f"part={part}"))
    prepare(given(films, tmp_path))
    assert shards_of(tmp_path / "prep_out") == undisturbed


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nobody.invalid:6379", "127.0.0.1:port"])
def test_a_ray_cluster_that_is_not_there_is_told_at_once(films: Path, tmp_path: Path, address: str):
    with refuses(UserError, address, "ray start --head"):
        prepare(given(films, tmp_path, "engine=ray", f"address={address}"))


def kill_at_random(arguments: list[str], draws: random.Random, most: float) -> bool:
    """Run the command and kill it with all its processes at a random moment; whether it was still running."""
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], start_new_session=True)
    try:
        process.wait(draws.uniform(0.5, most))
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


@pytest.mark.slow
def test_killed_at_twenty_moments(films: Path, tmp_path: Path, undisturbed):
    draws = random.Random(7)
    killed = sum(kill_at_random(given(films, tmp_path), draws, most=12.0) for _ in range(20))
    prepare(given(films, tmp_path))
    assert killed > 2 and shards_of(tmp_path / "prep_out") == undisturbed


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two nodes on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed: the extra `prep` brings it")
    os.environ["RAY_raylet_start_wait_time_s"] = "120"  # noqa: SIM112 - so Ray spells it
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_shards(films: Path, tmp_path: Path, undisturbed, cluster):
    arguments = given(films, tmp_path, "engine=ray", f"address={cluster.address}")
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=False, timeout=500)
    assert done.returncode == 0 and shards_of(tmp_path / "prep_out") == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_worker_a_node_and_the_driver_of_a_ray_cluster_die(films, tmp_path, undisturbed, cluster):
    import psutil

    arguments = given(films, tmp_path, "engine=ray", f"address={cluster.address}")
    driver = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], start_new_session=True)
    worker = _first_worker(psutil, deadline=time.monotonic() + 200)
    worker.kill()
    time.sleep(5)
    node = cluster.add_node(num_cpus=1)
    cluster.remove_node(node, allow_graceful=False)
    time.sleep(3)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    ledgers = [*(tmp_path / "prep_out/prep/stages").rglob("*.parquet")]
    assert ledgers and not (tmp_path / "prep_out/manifest.parquet").exists(), (
        "it was killed amid the work"
    )
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=False, timeout=600)
    assert done.returncode == 0 and shards_of(tmp_path / "prep_out") == undisturbed


def _first_worker(psutil, deadline: float):
    """The first process of an actor that runs a stage."""
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            if "MapWorker" in " ".join(process.info["cmdline"] or []):
                return process
        time.sleep(0.2)
    raise AssertionError("no actor was started")
