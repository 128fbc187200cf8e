"""What is written RUN@STEP: one parser for every command and key that takes a checkpoint."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.checkpoint.layout import split_step
from sora_train.errors import UserError

# Names that are in no folder here, so that only their form decides.
NAMES = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="@/"), min_size=1, max_size=20
)
FOLDERS = st.lists(NAMES, min_size=1, max_size=3).map(lambda parts: "/".join(["nowhere", *parts]))


@given(FOLDERS, st.integers(0, 10**9))
def test_a_folder_and_a_step_come_back_as_they_were_joined(folder: str, step: int):
    assert split_step(f"{folder}@{step}") == (Path(folder), step)
    assert split_step(folder) == (Path(folder), None)


@given(st.text(max_size=20))
def test_any_text_is_a_folder_with_a_step_or_without_or_is_refused_with_its_name(text: str):
    try:
        folder, step = split_step(text)
    except UserError as error:
        assert text in str(error) and "@500" in str(error)
    else:
        assert (folder == Path(text)) if step is None else text.endswith(str(step))


@pytest.mark.parametrize(
    "text", ["runs/a@", "runs/a@x", "runs/a@-1", "runs/a@1.5", "@500", "runs/a@\u00b2"]
)
def test_what_is_no_step_is_refused(text: str):
    with pytest.raises(UserError, match="@500"):
        split_step(text)


def test_a_folder_with_that_name_is_that_folder(tmp_path: Path):
    for name in ("a@b", "a@500"):
        (tmp_path / name).mkdir()
        assert split_step(str(tmp_path / name)) == (tmp_path / name, None)
        assert split_step(f"{tmp_path / name}@7") == (tmp_path / name, 7)
