"""`sora bench all`: every part runs at toy size, its rows say what they compare, and one that fails costs no other."""

import json
from pathlib import Path

import pytest

from benchmarks import overview
from benchmarks.overview import PARTS, TOY, Row, main, ratio_of, run
from sora_train.device.measuring import Stats


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failures, path = run(TOY, {part: PARTS[part]}, tmp_path / "out")
    assert failures == {}
    found = json.loads(path.read_text())
    assert found["measured"] and found["machine"]["cpu"] and found["commit"]
    page = path.with_suffix(".md").read_text()
    for name in found["measured"]:
        what, _, peer = name.rpartition(" / ")
        assert f"| {what} |" in page and f"| {peer} |" in page
    # Nothing is left beside the results.
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}


def test_a_part_that_fails_is_told_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("a thing", "peer", "1 s", "2 s", Stats(2.0, 1.9, 2.1, 3), 1.5, note="as it is")

    def missing(_: object) -> list[Row]:
        raise ImportError("no package of that name")

    monkeypatch.setattr(overview, "PARTS", {"first": missing, "second": lambda _: [row]})
    assert main(["--toy", "--out", str(tmp_path)]) == 1
    page = (tmp_path / "all.md").read_text()
    assert "| a thing | 1 s | peer | 2 s | **2.00** | 1.90-2.10 |  | 1.5 | met |" in page
    assert "first was not measured: ImportError: no package of that name" in page
    assert page in capsys.readouterr().out


def test_a_ratio_is_of_neighbours_in_time() -> None:
    """The machine is three times as slow in the second turn, for both."""
    assert ratio_of([1.0, 3.0], [2.0, 6.0]) == Stats(2.0, 2.0, 2.0, 2)
    assert not Row("", "", "", "", ratio_of([2.0], [1.0]), target=1.0).met
