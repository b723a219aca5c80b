"""The rules of the layout: rooms of a readable size, short functions, one name for one thing."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "cctool"
FILES = sorted(SOURCE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})
MOST_ENTRIES = 14
MOST_AT_THE_TOP = 20
LONGEST_FUNCTION = 80


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(SOURCE.parent)))
def test_a_folder_is_taken_in_at_one_glance(folder: Path) -> None:
    found = entries(folder)
    assert len(found) <= (MOST_AT_THE_TOP if folder == SOURCE else MOST_ENTRIES), found


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.relative_to(SOURCE)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def test_a_public_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(SOURCE)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_every_room_says_what_is_in_it() -> None:
    for folder in FOLDERS:
        module = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(module), folder


def test_options_need_no_excuse_for_the_linter() -> None:
    assert not [path for path in FILES if "UP045" in path.read_text(encoding="utf-8")]


def test_tests_stand_where_the_code_does() -> None:
    """Each folder of tests has the name of a room, or holds what several rooms share."""
    tests = Path(__file__).parent
    others = {"benchmarks", "toys", "golden"}
    for folder in (path for path in tests.rglob("*") if path.is_dir() and path.name != "__pycache__"):
        if others.isdisjoint(folder.relative_to(tests).parts):
            assert (SOURCE / folder.relative_to(tests)).is_dir(), folder
