"""The table of breaks fits the code as it is, so that `make mutants` does not find out half an hour later."""

import ast
import functools

import pytest
from mutate import AREAS, ROOT, Break, read_table

BREAKS = read_table([file.stem for file in sorted(AREAS.glob("*.yaml"))])


@functools.cache
def text_of(file: str) -> str:
    return (ROOT / file).read_text()


@functools.cache
def parsed(file: str) -> str:
    return program(file, text_of(file))


def program(file: str, text: str) -> str:
    """What a file says: of Python without its comments and spaces. Raises SyntaxError."""
    return ast.dump(ast.parse(text)) if file.endswith(".py") else text


def test_areas_have_ten_breaks_each_with_names_of_their_own() -> None:
    areas = {one.area for one in BREAKS}
    assert areas >= {"draws", "objective", "optimizer", "resume", "layouts", "data"}
    for area in areas:
        names = [one.name for one in BREAKS if one.area == area]
        assert len(names) == len(set(names)) >= 10


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: f"{one.area}-{one.name}".replace(" ", "_"))
def test_a_break_is_another_program_and_has_tests(one: Break) -> None:
    assert program(one.file, one.broken(text_of(one.file))) != parsed(one.file)
    for test in one.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in text_of(file)
