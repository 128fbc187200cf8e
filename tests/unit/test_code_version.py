"""Which code runs: of its commit, what was changed since, and its digest each edit makes another."""

import subprocess
from pathlib import Path

import pytest

from sora_train.base import code_version


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_commit_is_named_and_so_is_what_was_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(code_version, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("x = 1")
    git(tmp_path, "init")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    clean = code_version.code_digest()
    assert code_version.commit() == head[:12]
    assert (clean["commit"], clean["diff"]) == (head, "")
    (tmp_path / "a.py").write_text("x = 2")
    changed = code_version.code_digest()
    assert code_version.commit() == f"{head[:12]}-dirty"
    assert changed["commit"] == head and changed["diff"]
    assert changed["package"] != clean["package"]


def test_outside_a_checkout_or_without_git_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(code_version, "PACKAGE", tmp_path)
    assert code_version.commit() == ""
    assert list(code_version.code_digest()) == ["package"]
    monkeypatch.setenv("PATH", "")
    assert code_version.commit() == ""


def test_the_digest_is_of_names_and_text(tmp_path: Path):
    (tmp_path / "a.py").write_text("x = 1")
    first = code_version.package_digest(tmp_path)
    (tmp_path / "a.txt").write_text("nothing")
    assert code_version.package_digest(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = code_version.package_digest(tmp_path)
    (tmp_path / "b.py").write_text("x = 2")
    assert len({first, renamed, code_version.package_digest(tmp_path)}) == 3
