"""What the images are built of: every step is one of docker/install.sh, and the steps of the CPU image, taken here in
a folder instead of an image, make an environment that trains.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sentences import says

REPO = Path(__file__).resolve().parents[2]
INSTALL = REPO / "docker/install.sh"
IMAGES = ("Dockerfile", "Dockerfile.cpu")


def instructions(image: str) -> Iterator[tuple[str, str]]:
    """(instruction, the rest) of each; comments and line ends are gone."""
    text = (REPO / "docker" / image).read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, rest.strip()


def sent(repo: Path) -> list[Path]:
    """What .dockerignore leaves of the repository: here everything is left out but what a line with `!` names."""
    lines = [line for line in (repo / ".dockerignore").read_text().splitlines() if line]
    assert lines[1] == "*"
    return [repo / line[1:] for line in lines if line.startswith("!")]


def install(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(INSTALL), *words],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("image", IMAGES)
def test_images_are_pinned_and_not_of_root(image: str) -> None:
    stages: list[str] = []
    arguments: dict[str, str] = {}
    user = {}
    for word, rest in instructions(image):
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value.strip('"')
        elif word == "FROM":
            base, _, stage = rest.partition(" AS ")
            for name, value in arguments.items():
                base = base.replace(f"${{{name}}}", value)
            assert base in stages or re.search(r":[^:]*\d+\.\d+", base), f"{base} is not pinned"
            stages.append(stage)
            user[stage] = user.get(base, "root")
        elif word == "USER":
            user[stages[-1]] = rest
        elif word == "COPY" and not rest.startswith("--from="):
            source = rest.split()[0]
            assert source == "." or any(
                (REPO / source).is_relative_to(path) for path in sent(REPO)
            ), f"{image} copies {source}, which .dockerignore leaves out"
    made_for_people = [stage for stage in stages if stage in ("final", "flash")]
    assert made_for_people
    assert stages[-1] == "final", "a build without --target makes the last stage"
    assert {user[stage] for stage in made_for_people} == {"sora"}


@pytest.mark.parametrize("image", IMAGES)
def test_images_install_by_the_script_alone(image: str) -> None:
    """No other line installs anything, and each stage and extra that is named is there."""
    extras = set(re.findall(r"^(\w+) = \[", (REPO / "pyproject.toml").read_text(), re.MULTILINE))
    for word, rest in instructions(image):
        if word == "RUN":
            assert "install.sh" in rest or rest.startswith("useradd"), rest
            assert not re.search(r"\b(pip|apt-get) ", rest), rest
        if word == "ARG" and rest.startswith("EXTRAS="):
            assert set(rest.removeprefix("EXTRAS=").split(",")) <= extras


def test_what_is_sent_is_there() -> None:
    assert [path for path in sent(REPO) if not path.exists()] == []


def test_the_flash_attention_that_is_installed_is_one_the_extra_allows() -> None:
    (version,) = re.findall(r"^FLASH_ATTN=([\d.]+)", INSTALL.read_text(), re.MULTILINE)
    (least,) = re.findall(r"flash-attn>=([\d.]+)", (REPO / "pyproject.toml").read_text())
    assert [int(part) for part in version.split(".") if part] >= [
        int(part) for part in least.split(".")
    ]


@pytest.mark.parametrize(
    ("words", "environ", "facts"),
    [
        ([], {}, ("system, slurm, postgres, browser, python, flash or check",)),
        (["pyhton"], {}, ("pyhton",)),
        (["python"], {}, ("folder",)),
        (["check", "nowhere"], {}, ("docker/install.sh python nowhere",)),
        (["python", "nowhere"], {"PYTHON": "no_python"}, ("Python 3.11",)),
    ],
)
def test_mistakes_are_sentences(
    words: list[str], environ: dict[str, str], facts: tuple[str, ...]
) -> None:
    done = install(*words, **environ)
    assert done.returncode == 2
    says(done.stderr, *facts)
    assert not (REPO / "nowhere").exists()


def test_flash_attention_asks_for_its_compiler(tmp_path: Path) -> None:
    bare = "/usr/bin:/bin"
    if shutil.which("nvcc", path=bare):
        pytest.skip("nvcc is here, and would compile for an hour")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    done = install("flash", str(tmp_path), PATH=bare)
    assert done.returncode == 2
    assert "compiled with nvcc" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_cpu_image_in_a_folder(tmp_path: Path) -> None:
    """COPY and RUN as the Dockerfile has them, with /src and /opt/sora below a folder; packages of the distribution
    are not installed, which would change the machine."""
    variables = os.environ | {"PIP_FLAGS": ""}
    variables.pop("PYTHONPATH", None)
    overridden = {"PIP_FLAGS"}
    for word, line in instructions("Dockerfile.cpu"):
        rest = line.replace("/src", f"{tmp_path}/src").replace("/opt", f"{tmp_path}/opt")
        rest = rest.replace("/usr/local/bin/python3", sys.executable)
        if word == "ARG":
            name, _, value = rest.partition("=")
            if name not in overridden:
                variables[name] = value.strip('"')
        elif word == "COPY":
            source, target = rest.split()
            for path in sent(REPO) if source == "." else [REPO / source]:
                into = Path(target, path.relative_to(REPO)) if source == "." else Path(target)
                into.parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, into, **({"dirs_exist_ok": True} if path.is_dir() else {}))
        elif word == "RUN" and "install.sh python" in rest:
            subprocess.run(["bash", "-c", rest], env=variables, check=True)
    done = subprocess.run(
        [tmp_path / "src/docker/install.sh", "check", tmp_path / "opt/sora"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import sora_train; print(sora_train.__file__)"
    python = tmp_path / "opt/sora/bin/python"
    where = subprocess.run(
        [python, "-c", code], env=variables, capture_output=True, text=True, check=True, cwd="/"
    )
    assert where.stdout.startswith(str(tmp_path / "opt")), "the image's package is a copy"
    assert shlex.split(dict(instructions("Dockerfile.cpu"))["ENTRYPOINT"].strip("[]")) == ["sora"]
