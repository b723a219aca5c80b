"""A toy options dataclass with a field of each kind: its command, checks, idle conditions, table, history."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cctool.base.errors import UsageError
from cctool.cli.frame import Invocation
from cctool.cli.signature import command
from cctool.options.common import DataOptions
from cctool.options.fields import (
    Choice,
    Idle,
    Options,
    at_least,
    between,
    idle_problems,
    leaves,
    nested,
    option,
    positive,
    recorded,
    section,
)
from cctool.options.verbs import VERBS, Verb


class Colour(Choice):
    """Words."""

    RED = "red"
    BLUE = "blue"


def pair(text: str) -> tuple[int, int]:
    pieces = text.split(":")
    if len(pieces) != 2 or not all(piece.isdecimal() for piece in pieces):
        raise UsageError(f"--pair {text}: A:B is expected")
    return int(pieces[0]), int(pieces[1])


NO_BRUSH = Idle(lambda asked: asked.brush is None, "there is nothing to paint with")
_painting = section("Painting")


@dataclass(frozen=True)
class Brush(Options):
    """An optional group: it is there where its key is given."""

    width: int = option(..., "Paint with a brush of this width.", "--brush", bounds=at_least(1))
    hairs: int = option(100, "Its hairs.", "--brush-hairs", bounds=positive())


@dataclass(frozen=True)
class Toy(Options):
    """One field of each kind."""

    required: str = option(..., "Must be given.")
    rate: float = _painting(0.5, "A number.", bounds=between("[0, 1)"))
    count: int | None = _painting(
        None, "A number that may be absent.", unset="as many as fit", bounds=at_least(1)
    )
    colour: Colour = _painting(Colour.RED, "A word.")
    other: Colour | None = option(None, "A word that may be absent.", idle=NO_BRUSH)
    dry: bool = option(False, "A switch.", recorded=False)
    wet: bool | None = option(None, "A switch both ways.", "--wet/--no-wet")
    names: tuple[str, ...] = option((), "Names; may be repeated.", metavar="GLOB", repeated=True)
    pair: tuple[int, int] | None = option(None, "Parsed.", metavar="A:B", parse=pair)
    size: int | None = option(
        1, "Parsed, with a default.", parse=lambda t: None if t == "auto" else int(t), shown="1"
    )
    code: str | None = option(None, "May name user code.", runs_code=True)
    brush: Brush | None = nested(Brush, key="width", panel="Painting")
    data: DataOptions = nested(
        DataOptions,
        DataOptions(batch_size=7),
        without=("val_data", "val_data_arguments", "test_data", "test_data_arguments"),
    )

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Two that exclude each other."""
        return ((self.dry and self.wet is True, "--dry and --wet exclude each other"),)


TOY = Verb("toy", "nowhere:Toy", "nowhere:run")
# Its options stand here and in no module of the package.
TOY.__dict__["options"] = Toy


def called(*line: str) -> tuple[Invocation | None, Any]:
    found: list[Invocation] = []

    def toy(call: Invocation) -> None:
        """Paint."""
        found.append(call)
        _ = call.options

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command(TOY, toy))
    result = CliRunner().invoke(app, list(line))
    return (found[0] if found else None), result


def test_every_kind_of_field_comes_from_the_command_line() -> None:
    line = "in.pt --required x --rate 0.25 --count 3 --colour blue --other red --dry --no-wet --names a"
    line += " --names b --pair 2:4 --size auto --code my.py:fn --brush 5 --brush-hairs 9 --data digits"
    line += " --limit 3 --seed 4"
    call, result = called(*line.split())
    assert result.exit_code == 0, result.output
    assert call is not None
    assert call.options == Toy(
        required="x",
        rate=0.25,
        count=3,
        colour=Colour.BLUE,
        other=Colour.RED,
        dry=True,
        wet=False,
        names=("a", "b"),
        pair=(2, 4),
        size=None,
        code="my.py:fn",
        brush=Brush(5, 9),
        data=DataOptions("digits", batch_size=7, limit=3),
    )
    assert call.source == "in.pt"
    assert call.frame.runtime.seed == 4
    assert call.verb.references(call.given) == ("my.py:fn", "digits")


def test_what_is_not_given_keeps_the_fields_default() -> None:
    call, _ = called("in.pt", "--required", "x")
    assert call is not None
    assert call.options == Toy("x", data=DataOptions(batch_size=7))
    assert set(call.given) == {"required"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--rate 1", "--rate 1.0: [0, 1) is allowed"),
        ("--rate nan", "--rate nan: [0, 1) is allowed"),
        ("--count 0", "--count 0: 1 or more is allowed"),
        ("--pair 2", "--pair 2: A:B is expected"),
        ("--brush 1 --brush-hairs 0", "--brush-hairs 0: a positive number is needed"),
        ("--brush-hairs 3", "--brush-hairs: there is no --brush"),
        ("--other blue", "--other: there is nothing to paint with"),
        ("--dry --wet", "--dry and --wet exclude each other"),
        ("--rate 2 --count 0", "--rate 2.0: [0, 1) is allowed; --count 0: 1 or more is allowed"),
        ("--limit 0", "--limit 0: 1 or more is allowed"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(line: str, says: str) -> None:
    _, result = called("in.pt", "--required", "x", *line.split())
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_missing_option_and_an_unknown_word_are_wrong_usage() -> None:
    assert called("in.pt")[1].exit_code == 2
    assert called("in.pt", "--required", "x", "--colour", "green")[1].exit_code == 2


def test_help_states_flags_and_defaults() -> None:
    _, result = called("--help")
    text = " ".join(result.stdout.split())
    assert "Paint." in text
    for part in (
        "A number. [default: 0.5]",
        "A number that may be absent. Default: as many as fit.",
        "--wet / --no-wet",
        "--pair A:B",
        "--brush-hairs",
        "Parsed, with a default. [default: 1]",
    ):
        assert part in text, part
    assert "--val-data" not in text


def test_history_stores_what_decides_the_result() -> None:
    stored = recorded(Toy("x", wet=True, names=("a",), brush=Brush(3)))
    assert stored["colour"] == "red"
    assert stored["names"] == ["a"]
    assert stored["brush"] == {"width": 3, "hairs": 100}
    assert stored["data"]["batch_size"] == 7
    assert "dry" not in stored
    assert list(stored) == [item.name for item in fields(Toy) if item.name != "dry"]


def test_python_values_and_text_mean_the_same() -> None:
    text = TOY.read({"colour": "blue", "pair": "2:4", "names": ["a"], "rate": 0, "size": "auto"})
    values = TOY.read({"colour": Colour.BLUE, "pair": (2, 4), "names": ("a",), "rate": 0.0, "size": None})
    assert text == values
    for wrong in (
        {"colour": "green"},
        {"rate": "half"},
        {"count": True},
        {"count": 1.5},
        {"dry": 1},
        {"code": 3},
    ):
        with pytest.raises(UsageError):
            TOY.read(wrong)


def test_the_table_for_the_docs_has_each_option(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = option_tables()
    monkeypatch.setattr(tables, "VERBS", {"toy": TOY})
    table = tables.table("toy", "Painting")
    assert "| `--rate X` | A number. | 0.5 |\n" in table
    assert "| `--count N` | A number that may be absent. | as many as fit |\n" in table
    assert "| `--colour red\\|blue` | A word. | red |\n" in table
    assert "| `--brush-hairs N` | Its hairs. | 100 |\n" in table
    assert "| `--required TEXT` | Must be given. | required |\n" in tables.table("toy", "Options")
    page = "a\n<!-- options: toy | Painting -->\nold\n<!-- end of options -->\nb\n"
    assert tables.filled(page) == f"a\n<!-- options: toy | Painting -->\n{table}<!-- end of options -->\nb\n"
    with pytest.raises(KeyError, match="Nothing"):
        tables.table("toy", "Nothing")


def option_tables() -> Any:
    path = Path(__file__).parents[2] / "docs" / "option_tables.py"
    spec = importlib.util.spec_from_file_location("option_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_every_option_has_help_and_a_default_that_reads_as_itself(verb: Verb) -> None:
    for leaf in verb.offered:
        assert leaf.spec.help.endswith("."), leaf.keyword
        assert "default" not in leaf.spec.help.lower(), leaf.keyword
        if leaf.spec.shown is not None:
            assert leaf.read(leaf.spec.shown) == leaf.default, leaf.keyword
        elif not (
            leaf.required or leaf.is_key or (leaf.spec.repeated and not isinstance(leaf.default, tuple))
        ):
            assert leaf.read(leaf.default) == leaf.default, leaf.keyword


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_no_field_of_a_verb_is_out_of_reach(verb: Verb) -> None:
    """Each field is an option, or is made of one that is named here."""
    made = {("sources",): "the arguments", ("features", "ratio"): "--target ratio=N"}
    reached = {leaf.path for leaf in leaves(verb.options)}
    for path in _paths(verb.options, ()):
        shared = path[0] == "data" or path[-1] == "spec"
        assert path in reached or path in made or shared, path


def _paths(kind: Any, path: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    for item in fields(kind):
        inner = item.metadata.get("group")
        if inner is not None and is_dataclass(inner.kind):
            yield from _paths(inner.kind, (*path, item.name))
        else:
            yield (*path, item.name)


def test_idle_options_are_named_together() -> None:
    asked = Toy("x")
    assert idle_problems(asked, leaves(Toy), {"other", "brush_hairs"}) == [
        "--other: there is nothing to paint with",
        "--brush-hairs: there is no --brush",
    ]
    assert idle_problems(Toy("x", brush=Brush(1)), leaves(Toy), {"other", "brush", "brush_hairs"}) == []


@pytest.mark.parametrize("kind", ["Path | None", "tuple[int, ...]"])
def test_kinds_that_are_not_made_of_text_need_a_parse_function(kind: str) -> None:
    made = dataclass(frozen=True)(
        type("Odd", (Options,), {"__annotations__": {"field": kind}, "field": option(None, "A.")})
    )
    with pytest.raises(TypeError, match=r"Odd\.field: .* needs a parse function"):
        leaves(made)
