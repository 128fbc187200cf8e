"""Prompts in text and in fields: what a model reads of them is what its captions became."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses

from sora_train.data.captions.choice import CaptionChoice
from sora_train.data.captions.texts import dumped, named_by
from sora_train.data.shapes import captions as shapes
from sora_train.data.shapes.world import sample_scene
from sora_train.errors import UserError
from sora_train.sampling.prompts.file import read_prompts
from sora_train.sampling.prompts.written import FIELDS, Written, clean

TEXTS = st.text("abc déé,'\"{}: #-0", min_size=1, max_size=20).filter(str.strip)
FIELD_SETS = st.dictionaries(st.sampled_from(FIELDS), TEXTS, min_size=1)


@given(FIELD_SETS)
def test_fields_read_as_the_captions_that_were_trained(fields):
    """The other way round is training's own: a caption of fields in a manifest, drawn for a step."""
    captions = dumped(named_by({"dense": fields}))
    trained = CaptionChoice(0, {"dense": 1.0}).prompt("", captions, 0, 0)
    assert Written(**fields).text("my_clips") == trained


@given(st.integers(0, 2000), st.sampled_from(["train", "held_out"]))
def test_fields_of_a_scene_are_its_caption(index, split):
    scene = sample_scene(0, index, split)
    fields = shapes.parts(scene, scene.phrasing)
    assert Written(**fields).text("shapes") == scene.caption
    if "setting" in fields:
        bare = Written(**fields | {"setting": scene.background, "negative": "dull"})
        assert bare.text("shapes") == scene.caption
    short = {"lighting": scene.lighting, "style": scene.style}
    assert {**fields, **{name: fields[name] for name in short if name in fields}} == fields
    told = Written(**{name: short.get(name, text) for name, text in fields.items()})
    assert told.text("shapes") == scene.caption


def test_fields_of_shapes_stand_in_the_order_of_its_captions():
    fields = {"style": "flat", "lighting": "dim", "camera": "camera pans left", "setting": "navy"}
    told = Written(subject="a red ring", action="stays still", **fields).text("shapes")
    wanted = "a red ring stays still on a navy background, camera pans left, dim light, flat style"
    assert told == wanted


@given(st.lists(st.one_of(TEXTS, FIELD_SETS), min_size=1, max_size=4), TEXTS)
def test_every_form_of_a_file_holds_the_same_prompts(tmp_path_factory, entries, negative):
    folder = tmp_path_factory.mktemp("prompts")
    entries = [one if isinstance(one, str) else {"negative": negative, **one} for one in entries]
    files = {
        "a.yaml": yaml.safe_dump(entries, allow_unicode=True),
        "a.json": json.dumps(entries),
        "a.jsonl": "\n".join(map(json.dumps, entries)),
    }
    wanted = [Written(prompt=one) if isinstance(one, str) else Written(**one) for one in entries]
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        assert read_prompts(folder / name) == wanted


@pytest.mark.parametrize(
    ("name", "text", "facts"),
    [
        ("a.txt", "\n \n", ("a.txt holds no prompts", "one a line")),
        ("a.yaml", "[]", ("a.yaml holds no prompts",)),
        ("a.yaml", "prompt: x", ("must hold a list",)),
        ("a.yaml", "- a\n- 3", ("entry 2 is 3", "subject")),
        ("a.yaml", "- ''", ("entry 1 is ''",)),
        ("a.yaml", "- {subjct: a dog}", ("entry 1", "'subjct'", "did you mean 'subject'?")),
        ("a.yaml", "- {subject: [a, b]}", ("entry 1", "'subject' must be text")),
        ("a.yaml", "- {prompt: a, style: b}", ("entry 1", "prompt and style", "one of both")),
        ("a.yaml", "- {negative: dull}", ("entry 1", "nothing of what to show")),
        ("a.yaml", "- {subject: a", ("a.yaml", "line", "not valid YAML")),
        ("a.yaml", "[" * 9000, ("a.yaml",)),
        ("a.json", "[1,", ("a.json is not valid JSON",)),
        ("a.json", "[" * 100_000, ("a.json is not valid JSON",)),
        ("a.jsonl", '"a"\n{"subject"', ("a.jsonl line 2 is not valid JSON",)),
        ("a.txt", "a\nb\x07c", ("entry 2", "U+0007", "place 2", "take it out")),
        ("a.json", '["a\\u0000b"]', ("entry 1", "U+0000")),
        ("a.json", '[{"subject": "a\\u001bb"}]', ("entry 1", "subject", "U+001B")),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, name, text, facts):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with refuses(UserError, *facts):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with refuses(UserError, "--prompts", "none.txt", "cannot be read"):
        read_prompts(tmp_path / "none.txt")


@given(st.text(max_size=30))
def test_a_clean_prompt_is_one_line_and_stays_as_it_is(text):
    try:
        once = clean(text, "it")
    except UserError:
        return
    assert clean(once, "it") == once
    assert not set(once) & set("\t\r\n\0\x1b")
    assert once.split() == text.split()
