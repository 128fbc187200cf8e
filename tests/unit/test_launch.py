"""What `sora launch` renders survives the shells it goes through, is what the plain files are, and acts on codes."""

import dataclasses
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses, says

from sora_train.cli import run
from sora_train.config import Config, LaunchConfig
from sora_train.config.job import JobConfig, freeze, thaw
from sora_train.config.sections.launch import limit_seconds
from sora_train.errors import EXIT_FAULT, EXIT_REQUEUE, EXIT_USER, ConfigError, Fault, UserError
from sora_train.tools.launch import k8s, local, node, slurm
from sora_train.tools.launch.array import array_of
from sora_train.tools.launch.job import Job

REPO = Path(__file__).resolve().parents[2]
PLAIN = REPO / "launch"
STUB = r"""#!/bin/bash
# In python's place: writes down how it was called.
for word in "$@"; do printf '%s\0' "$word"; done > "$TOLD/arguments"
env -0 > "$TOLD/environment"
printf '%s' "$PWD" > "$TOLD/folder"
if [[ " $* " == *" --freeze"* ]]; then echo "$FREEZES_TO"; exit; fi
[ -z "${SAVES:-}" ] || { sleep 0.05; mkdir -p "$SAVES"; touch "$SAVES/MANIFEST.json"; }
exit "${CODE:-0}"
"""
CLUSTER = {
    # Options of srun and apptainer, then the command of the node.
    "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do shift; done\nSLURM_NODEID=1 exec "$@"\n',
    "apptainer": '#!/bin/bash\nwhile [[ "$1" != bash ]]; do shift; done\nexec "$@"\n',
    "scontrol": (
        '#!/bin/bash\ncase "$1 $2" in "show hostnames") echo a; echo b ;; '
        '"show node") echo "   NodeAddr=10.0.0.7 NodeHostName=$3" ;; *) echo "$*" >> "$TOLD/scontrol" ;; esac\n'
    ),
}
WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/\n\r", exclude_categories=["Cs", "Cc"]),
    min_size=1, max_size=20,
).filter(lambda word: word not in (".", ".."))  # fmt: skip


def job(folder: Path, name: str = "run", **keys: object) -> Job:
    run_dir = folder / name
    return Job("named", run_dir, run_dir / "launch/config-0.yaml", folder, LaunchConfig(**keys), 2)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    for name, text in {"python": STUB, **CLUSTER}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run_script(script: str | list[str], stubs: Path, told: Path, **environ: str) -> int:
    told.mkdir(exist_ok=True)
    variables = os.environ | {"TOLD": str(told), "PATH": f"{stubs}:{os.environ['PATH']}"}
    variables |= {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", "-c", script] if isinstance(script, str) else script
    return subprocess.run(command, env=variables | environ, check=False).returncode


def told_of(told: Path) -> tuple[list[str], dict[str, str]]:
    arguments = (told / "arguments").read_bytes().decode().split("\0")[:-1]
    environment = (told / "environment").read_bytes().decode().split("\0")[:-1]
    return arguments, dict(entry.split("=", 1) for entry in environment)


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@settings(max_examples=12, deadline=None)
@given(
    folder=WORDS,
    name=WORDS,
    value=st.text(
        st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]),
        max_size=30,
    ),
)
@pytest.mark.parametrize("scheduler", ["local", "slurm", "apptainer"])
def test_paths_and_values_survive_every_shell(
    scheduler: str, folder: str, name: str, value: str, stubs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    root = tmp_path_factory.mktemp("law")
    (root / folder).mkdir()
    keys: dict[str, object] = {
        "env": {"GIVEN": value},
        "python": str(stubs / "python"),
        "setup": ["export SET=up"],
    }
    if scheduler == "apptainer":
        keys |= {"container": f"{root}/{folder}.sif", "container_runtime": "apptainer"}
    given_job = job(root / folder, name, nodes=1 if scheduler == "local" else 2, **keys)
    if scheduler == "local":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local.sys, "executable", str(stubs / "python"))
            script = local.render(given_job)
    else:
        script = f"cd -- {shlex.quote(str(root / folder))}\n{slurm.render(given_job)}"
    assert run_script(script, stubs, root / "told") == 0
    arguments, environment = told_of(root / "told")
    assert environment["GIVEN"] == value and environment["SET"] == "up"
    assert after(arguments, "--frozen") == str(given_job.frozen)
    assert after(arguments, "--nproc-per-node") == "2"
    assert (root / "told/folder").read_text() == str(root / folder)
    start = "local" if scheduler == "local" else "71-0/node-1"
    assert after(arguments, "--log-dir") == f"{given_job.logs}/{start}"
    if scheduler != "local":
        places = [after(arguments, f"--{key}") for key in ("node-rank", "master-addr", "master-port")]  # fmt: skip
        assert places == ["1", "10.0.0.7", "20071"]


@pytest.mark.parametrize("plain", [False, True], ids=["rendered", "plain"])
@pytest.mark.parametrize(
    "code, saves, again",
    [
        (0, True, False),
        (2, True, False),
        (75, False, True),
        (138, False, True),
        (1, False, False),
        (1, True, True),
        (137, True, True),
    ],
)
def test_a_batch_job_goes_on_where_that_helps(
    plain: bool, code: int, saves: bool, again: bool, stubs: Path, tmp_path: Path
) -> None:
    given_job = job(tmp_path, nodes=2, python="python")
    given_job.frozen.parent.mkdir(parents=True)
    script = [str(PLAIN / "slurm.sbatch"), "a=1"] if plain else ["-c", slurm.render(given_job)]
    environ = {"CODE": str(code), "FREEZES_TO": str(given_job.frozen)}
    if saves:
        environ["SAVES"] = str(given_job.run_dir / "checkpoints/step-000001")
    assert run_script(["bash", *script], stubs, tmp_path / "told", **environ) == code
    asked = tmp_path / "told/scontrol"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 71\n" if again else "")


@settings(max_examples=6, deadline=None)
@given(names=st.lists(WORDS, min_size=1, max_size=4, unique=True), data=st.data())
def test_each_task_of_an_array_has_its_own_run(
    names: list[str], data: st.DataObject, stubs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("array")
    shared = job(root, "sweep", nodes=2, python="python", array_limit=3)
    tasks = [
        dataclasses.replace(
            shared, run_dir=root / name, frozen=root / name / "launch/config-0.yaml"
        )
        for name in names
    ]
    task = data.draw(st.integers(0, len(names) - 1))
    script = slurm.render(shared, tasks)
    asked = directives(script)
    assert asked["array"] == f"0-{len(names) - 1}%3"
    assert asked["output"] == f"{shared.logs}/slurm-%A_%a.out"
    told = root / "told-by-it"
    assert run_script(script, stubs, told, SLURM_ARRAY_TASK_ID=str(task), CODE="75") == 75
    arguments, _ = told_of(told)
    assert after(arguments, "--frozen") == str(tasks[task].frozen)
    assert after(arguments, "--log-dir") == f"{tasks[task].logs}/71-0/node-1"
    assert (told / "scontrol").read_text() == "requeue 71\n", "a task by its own number"


def test_an_array_is_of_what_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "launch",
        "slurm",
        "-m",
        "experiment=parity_tiny",
        "launch.ranks=1",
        "seed=1,2",
        "run.dir=out",
    ]
    assert run([*command, "--print"]) == 0
    script = capsys.readouterr().out
    (first,) = (tmp_path / "out/seed=1/launch").glob("config-*.yaml")
    assert f"  {first}\n" in script and thaw(first).config.seed == 1
    assert directives(script)["array"] == "0-1"
    for seed in (1, 2):
        (tmp_path / f"out/seed={seed}/run.json").write_text("{}")
        (tmp_path / f"out/seed={seed}/summary.json").write_text('{"steps": 6}')
        assert run([*command, "--print"]) == 0
        told = capsys.readouterr().out
        says(told, f"{seed} of 2", "finished")
        assert ("--array=0-0" in told) == (seed == 1) and f"out/seed={seed}\n" not in told
    says(told, "sora sweep report")


def test_an_axis_may_be_a_key_that_a_run_cannot_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("defaults: [override /data: clips]\nname: mine\n")
    keys = ["mine.yaml", "data.source=a b,c", "run.dir=out", "launch.ranks=1", "--print"]
    assert run(["launch", "slurm", "-m", *keys]) == 0
    assert directives(capsys.readouterr().out)["array"] == "0-1"
    frozen = [thaw(file).config for file in Path("out").glob("*/launch/config-*.yaml")]
    assert {config.data.source for config in frozen} == {"a b", "c"}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--exclusive", ["--exclusive"]),
        ("--comment=my first run", ["--comment=my first run"]),
        ("--comment='my first run'", ["--comment=my first run"]),
        ("--comment=it's mine", ["--comment=it's mine"]),
        ("--gres gpu:2", ["--gres", "gpu:2"]),
        ("--comment my first run", ["--comment", "my first run"]),
        ("-C a100", ["-C", "a100"]),
    ],
)
def test_an_option_with_blanks_is_one_word_to_the_scheduler(option: str, words: list[str]) -> None:
    assert shlex.split(slurm.option_line(option)) == words


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["optim.lrr=1,2"], ("optim.lr",)),
        (["seed=1,2", "sweep.method=tpe"], ("cannot be submitted",)),
        (["seed=1,2", "parallel.dp_shard=3"], ("2 rank(s)",)),
        (["optim.lr=interval(0,1)"], ("sweep.method=tpe",)),
    ],
)
def test_a_wrong_array_is_refused_before_anything_is_frozen(
    arguments: list[str], facts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = ["experiment=parity_tiny", "launch.ranks=2", "run.dir=out"]
    with refuses(UserError, *facts):
        array_of([*shared, *arguments], None)
    assert not list(tmp_path.rglob("config-*.yaml"))
    Path("own.py").write_text("")
    with refuses(UserError, "own keys"):
        array_of(["own.py", "seed=1,2"], None)


def test_a_checkpoint_of_an_earlier_start_does_not_count(stubs: Path, tmp_path: Path) -> None:
    given_job = job(tmp_path, nodes=2, python="python")
    saved = given_job.run_dir / "checkpoints/step-000001"
    saved.mkdir(parents=True)
    (saved / "MANIFEST.json").touch()
    time.sleep(0.05)
    assert run_script(slurm.render(given_job), stubs, tmp_path / "told", CODE="1") == 1
    assert not (tmp_path / "told/scontrol").exists()


def directives(text: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, flags=re.MULTILINE)
    return {key: shlex.split(value)[0] if value else "" for key, value in lines}


def test_directives_say_what_the_keys_say(tmp_path: Path) -> None:
    rendered = slurm.render(
        job(
            tmp_path, nodes=4, cpus=16, memory="900G", time="2-00:00:00", partition="gpu", account="us",
            qos="high", constraint="h100&ib", exclude="gpu[03,07]", options=("--reservation=mine",),
            lead_seconds=120,
        )
    )  # fmt: skip
    assert directives(rendered) == {
        "job-name": "named", "nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "2",
        "cpus-per-task": "16", "mem": "900G", "time": "2-00:00:00", "partition": "gpu",
        "account": "us", "qos": "high", "constraint": "h100&ib", "exclude": "gpu[03,07]",
        "chdir": str(tmp_path), "output": f"{tmp_path}/run/launch/logs/slurm-%j.out",
        "signal": "USR1@120", "open-mode": "append", "requeue": "", "reservation": "mine",
    }  # fmt: skip
    assert "export SRUN_CPUS_PER_TASK=16" in rendered and "srun --wait=120 " in rendered


def test_the_plain_files_are_what_is_rendered(tmp_path: Path) -> None:
    for path in PLAIN.glob("*.s*"):
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0, path
    rendered, plain = slurm.render(job(tmp_path, nodes=2)), (PLAIN / "slurm.sbatch").read_text()
    assert directives(plain).keys() <= directives(rendered).keys() | {"time"}
    for line in (
        "HEAD_NODE=",
        "HEAD_ADDRESS=",
        "MEETING_PORT=",
        "case ",
        "0 | 2)",
        "75 |",
        "*) AGAIN",
        "if [ -n",
    ):
        (one,) = [text for text in rendered.splitlines() if text.startswith(line)]
        assert one in plain.splitlines(), line
    flags = [set(re.findall(r" (--[a-z-]+)", text)) for text in (rendered, plain)]
    assert flags[0] - flags[1] <= {"--chdir"}, "of srun, torchrun and the ranks"

    def shape(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: shape(inner)
                for key, inner in value.items()
                if key not in ("env", "limits", "requests")
            }
        return [shape(inner) for inner in value] if isinstance(value, list) else type(value)

    given_job = job(tmp_path, nodes=2, image="me/sora", claim="work", mount=str(tmp_path))
    made, file = (
        yaml.safe_load(text) for text in (k8s.render(given_job), (PLAIN / "k8s.yaml").read_text())
    )
    assert shape(made) == shape(file)
    assert made["spec"]["failurePolicy"] == file["spec"]["failurePolicy"]


def test_pods_meet_at_the_first_by_its_name(tmp_path: Path) -> None:
    keys = {"image": "me/sora", "claim": "work", "mount": str(tmp_path), "cpus": 4, "nodes": 2}
    manifest = yaml.safe_load(k8s.render(job(tmp_path, namespace="us", env={"A": "b"}, **keys)))
    assert manifest["metadata"] == {"name": "named", "namespace": "us"}
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"]) == (2, 2)
    (ranks,) = spec["template"]["spec"]["containers"]
    words = shlex.split(ranks["command"][2])
    assert after(words, "--master-addr") == "named-node-0-0.named"
    assert after(words, "--node-rank") == "$JOB_COMPLETION_INDEX"
    assert {"name": "A", "value": "b"} in ranks["env"]
    assert ranks["resources"]["limits"] == {"nvidia.com/gpu": 2, "cpu": 4}
    for broken, said in (({"claim": ""}, "launch.claim"), ({"mount": "/else"}, "launch.mount=/else")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            k8s.render(job(tmp_path, **keys | broken))


def test_pyxis_gets_image_mounts_and_folder(tmp_path: Path) -> None:
    text = slurm.render(job(tmp_path / "a b", container="me#sora:1", mounts=("/data:/data",)))
    (step,) = [line for line in text.splitlines() if line.startswith("srun ")]
    words = shlex.split(step)
    assert "--container-image=me#sora:1" in words
    folder = tmp_path / "a b"
    assert f"--container-mounts=/data:/data,{folder}:{folder},{folder}/run:{folder}/run" in words
    assert f"--container-workdir={folder}" in words


@pytest.mark.parametrize(
    "codes, code",
    [
        ([75, 75], EXIT_REQUEUE), ([75, -signal.SIGTERM], EXIT_REQUEUE), ([-signal.SIGUSR1], EXIT_REQUEUE),
        ([2, 2], EXIT_USER), ([2, -signal.SIGTERM], EXIT_USER), ([2, 1], EXIT_FAULT), ([75, 1], EXIT_FAULT),
        ([-signal.SIGKILL], EXIT_FAULT), ([-signal.SIGSEGV, 75], EXIT_FAULT),
    ],
)  # fmt: skip
def test_a_node_s_code_is_its_ranks_codes(codes: list[int], code: int) -> None:
    assert node.combined(codes) == code


def test_ranks_that_cannot_meet_are_refused_in_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = ["--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={port}"]
        with pytest.raises(UserError, match=f"port {port} .*launch.port"):
            node.require_meeting_place(place)
        # Only the first node listens there.
        node.require_meeting_place([*place, "--node-rank=1"])
    with refuses(UserError, "no.such.host.invalid", "resolve", "IP address"):
        node.require_meeting_place(["--master-addr", "no.such.host.invalid"])
    node.require_meeting_place(["--standalone"])


def test_told_to_leave_before_torch_is_there_is_told_to_leave() -> None:
    command = [
        sys.executable,
        "-m",
        "sora_train.tools.launch.node",
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=127.0.0.1",
        "--master-port=1",
        "-m",
        "nothing",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        caught = f"/proc/{process.pid}/status"
        for _ in range(600):
            mask = int(Path(caught).read_text().partition("SigCgt:")[2].split()[0], 16)
            if mask >> (signal.SIGQUIT - 1) & 1:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == EXIT_REQUEUE


def test_an_edited_configuration_is_no_longer_frozen(tmp_path: Path) -> None:
    config = Config.model_validate({"run": {"dir": str(tmp_path)}})
    path = freeze(JobConfig(config))
    assert thaw(path).config == config and freeze(JobConfig(config)) == path
    path.write_text(path.read_text().replace("steps: 1000", "steps: 2000"))
    with refuses(Fault, "edited", "another file"):
        thaw(path)
    with refuses(Fault, "run.dir", "all nodes"):
        thaw(tmp_path / "config-1.yaml")


OWN = """
from sora_train import Config
from sora_train.config.sections.base import Section
from sora_train.train import main

class Mine(Section):
    words: str = "none"

class MyConfig(Config):
    mine: Mine = Mine()

if __name__ == "__main__":
    main(None, MyConfig)
"""


def test_a_project_s_own_file_brings_its_own_sections(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    words = ["own.py", "experiment=parity_tiny", "mine.words=two", "launch.ranks=2", "run.dir=run"]
    command = [sys.executable, "-m", "sora_train", "launch", "local", *words]
    environ = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [*command, "--print"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    call = shlex.split(done.stdout.splitlines()[-1])
    assert str(tmp_path / "own.py") in call
    frozen = yaml.safe_load(Path(after(call, "--frozen")).read_text())
    assert frozen["config"]["mine"] == {"words": "two"}
    wrong = subprocess.run(
        [*command, "parallel.ulysses=4"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    says(wrong.stderr, "launch.nodes=1", "2 rank(s)")


@pytest.mark.parametrize(
    "words, facts",
    [
        (["launch.nodes=2"], ("launch.nodes=2", "sora launch local")),
        (["launch.ranks=2", "parallel.ring=4"], ("launch.nodes=1", "2 rank(s)")),
        (["launch.time=soon"], ("launch.time",)),
        (["launch.time=4:00"], ("launch.lead_seconds=300",)),
        (["launch.env={A B: c}"], ("launch.env",)),
        (["launch.patition=gpu"], ("launch.partition",)),
    ],
)
def test_what_cannot_be_launched_is_told_before_it_is(
    words: list[str], facts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        run(["launch", "local", "experiment=parity_tiny", "run.dir=run", *words, "--print"])
    says(raised.value, *facts)
    assert "\n" not in str(raised.value)


def test_values_of_several_lines_are_refused_where_a_scheduler_reads_one(tmp_path: Path) -> None:
    for keys in ({"partition": "a\n#SBATCH -n9"}, {"options": ("--a\n--b",)}):
        with pytest.raises(ConfigError, match="has several lines"):
            slurm.render(job(tmp_path, **keys))
    with pytest.raises(ConfigError, match="has several lines"):
        slurm.render(dataclasses.replace(job(tmp_path), name="a\nb"))


@given(
    days=st.integers(0, 9),
    hours=st.integers(0, 23),
    minutes=st.integers(0, 59),
    seconds=st.integers(0, 59),
)
def test_time_limits_are_read_as_slurm_reads_them(
    days: int, hours: int, minutes: int, seconds: int
) -> None:
    whole = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert limit_seconds(f"{days}-{hours}:{minutes:02}:{seconds:02}") == whole
    assert limit_seconds(f"{hours}:{minutes:02}:{seconds:02}") == whole - days * 86400
    assert limit_seconds(f"{days}-{hours}") == (days * 24 + hours) * 3600
    assert limit_seconds(f"{minutes}:{seconds:02}") == minutes * 60 + seconds
    assert limit_seconds(str(minutes)) == minutes * 60


def processor_seconds(*arguments: str, cwd: Path) -> float:
    """Of a Python process: its own time, however busy the machine is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        check=True,
        capture_output=True,
    )
    after_it = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after_it.ru_utime + after_it.ru_stime - before.ru_utime - before.ru_stime


def test_launching_costs_little_more_than_reading_the_config(tmp_path: Path) -> None:
    """What comes before torchrun, by the libraries of the config; importing torch is seven times them."""
    libraries = processor_seconds("-c", "import hydra, pydantic", cwd=tmp_path)
    command = ["-m", "sora_train", "launch", "local", "experiment=quickstart", "run.dir=run"]
    assert processor_seconds(*command, "--print", cwd=tmp_path) < 4 * libraries


ENDS = """
import os, sys
from pathlib import Path
if "--freeze" in sys.argv:
    from sora_train.train import main
    main()
sys.exit(int(os.environ["CODES"].split(",")[int(os.environ["RANK"])]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("codes, code", [("0,0", 0), ("75,75", 75), ("2,2", 2), ("0,1", 1)])
def test_sora_launch_local_ends_with_the_ranks_code(codes: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    words = ["ends.py", "experiment=parity_tiny", "launch.ranks=2", "run.dir=run"]
    command = [sys.executable, "-m", "sora_train", "launch", "local", *words]
    environ = os.environ | {"PYTHONPATH": str(REPO), "CODES": codes}
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
