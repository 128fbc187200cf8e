"""docs/cluster.md is true: its commands are read in the order of the page, and where SLURM is here they run on it.

The machinery is the README's: `test_readme` knows how each kind of command is cut short.
"""

import os
import shlex
import sys
from pathlib import Path

import pytest
import test_readme as readme
from cluster import Cluster, missing, until

REPO = Path(__file__).resolve().parents[3]
GUIDE = REPO / "docs/cluster.md"
CUT = [
    *readme.SMALL,
    "train.steps=2",
    "sample.every=0",
    "validation.every=0",
    "train.micro_batches=2",
    "parallel.self_test=false",
]


@pytest.fixture
def beginner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    return tmp_path


def steps() -> list[tuple[str, str]]:
    """(language, text) of the guide's files, and (bash, command) of each of its commands."""
    found = []
    for language, text in readme.blocks(GUIDE.read_text()):
        assert language in ("bash", "yaml"), f"no test for a block of {language}"
        lines = readme.commands(text) if language == "bash" else [text]
        found += [(language, line) for line in lines]
    return found


def write(text: str) -> None:
    """A file of the guide, whose first line is its name."""
    path = Path(text.splitlines()[0].removeprefix("# "))
    path.parent.mkdir(parents=True)
    path.write_text(text)


def words_of(command: str) -> list[str]:
    return shlex.split(os.path.expandvars(command))


def test_every_command_is_understood(beginner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is started: launchers print, torchrun's arguments are read and its configuration is composed."""
    for language, text in steps():
        if language == "yaml":
            write(text)
        elif text.startswith(("sora ", "torchrun ")):
            readme.treat(" ".join(map(shlex.quote, words_of(text))))
        else:
            assert text == "squeue --me"
    printed = capsys.readouterr().out
    for told in ("#SBATCH --partition=cpu", "#SBATCH --time=01:00:00", "ulimit -c 0", "OMP_NUM_THREADS=1",
                 "--container-image=/shared/sora.sqsh", "kind: JobSet", "needs no network"):  # fmt: skip
        assert told in printed or told == "needs no network" and "need no network" in printed, told


def test_a_misspelt_key_fails(beginner: Path) -> None:
    with pytest.raises(readme.UserError):
        readme.treat("sora launch slurm experiment=quickstart launch.nods=2")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(missing()), reason=missing() or "SLURM is here")
def test_every_command_runs(beginner: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    binaries = Path(sys.executable).parent
    cluster.env |= {
        "PYTHONPATH": str(REPO),
        "PWD": str(beginner),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{binaries}:{cluster.env['PATH']}",
    }
    jobs = []
    with cluster:
        for language, text in steps():
            if language == "yaml":
                write(text)
                continue
            words = words_of(text)
            if words[0] == "sora":
                words = [sys.executable, "-m", "sora_train", *words[1:]]
            elif words[0] == "torchrun":
                words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            said = cluster.run(*words, *(CUT if "experiment=quickstart" in words else []))
            if said.startswith("job "):
                jobs.append(said.split()[1])
        (job,) = jobs
        until(lambda: cluster.state(job) not in ("PENDING", "RUNNING"), 300, "end of the job")
        assert cluster.state(job) == "COMPLETED"
    for run in ("first", "two_nodes"):
        assert (beginner / f"runs/{run}/summary.json").is_file()
    ranks = list((beginner / f"runs/two_nodes/launch/logs/{job}-0").glob("node-*/**/stdout.log"))
    assert len(ranks) == 2, "as the guide says where logs are"
