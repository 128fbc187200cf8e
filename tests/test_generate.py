"""docs/generate.md is walked: its files are written as they stand, and its commands run at toy size, in their order."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from test_readme import SMALL, blocks, commands, exit_code

from sora_train.sampling.prompts.file import read_prompts
from sora_train.sampling.prompts.storyboard import Storyboard

REPO = Path(__file__).resolve().parent.parent
PAGE = (REPO / "docs" / "generate.md").read_text(encoding="utf-8")


def write_files(folder: Path) -> None:
    """The page's YAML files by the names in their first lines, and the image that they name."""
    for language, text in blocks(PAGE):
        if language == "yaml":
            (folder / text.splitlines()[0].removeprefix("# ")).write_text(text)
    Image.new("RGB", (48, 48), (48, 84, 244)).save(folder / "end.png")


def test_the_page_s_files_are_what_it_says(tmp_path: Path):
    write_files(tmp_path)
    texts = [one.text("shapes") for one in read_prompts(tmp_path / "prompts.yaml")]
    assert f"`{texts[1]}`" in PAGE, "the caption that the fields become"
    assert Storyboard.read(tmp_path / "board.yaml").asked.seconds == 1.125
    assert Storyboard.read(tmp_path / "minute.yaml").asked.seconds == 60


@pytest.mark.slow
def test_the_page_is_walked_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    toy = [*SMALL, "train.steps=2", "checkpoint.every=2", "sample.every=0", "run.device=cpu"]
    assert exit_code(["train", "experiment=quickstart", *toy, "run.dir=runs/quickstart"]) == 0
    given = [
        line for language, text in blocks(PAGE) if language == "bash" for line in commands(text)
    ]
    assert len(given) == 6
    for command in given:
        words = shlex.split(command)[1:]
        assert exit_code([*words, "--steps", "1", "--guidance-scale", "1"]) == 0, command
        (out,) = re.findall(r"--out (\S+)", command)
        rows = json.loads((tmp_path / out / "prompts.json").read_text())
        assert all((tmp_path / out / row["file"]).stat().st_size for row in rows), command
    longer = json.loads((tmp_path / "clips/longer/prompts.json").read_text())[0]
    assert longer["written"] == "red circle moves left" != longer["prompt"]
