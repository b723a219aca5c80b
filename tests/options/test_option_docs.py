"""The docs' tables of options are made from the options, and the prose around them says nothing else."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cctool.options.fields import Leaf
from cctool.options.verbs import VERBS

DOCS = Path(__file__).parents[2] / "docs"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("option_tables", DOCS / "option_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = _script()
README = DOCS.parent / "README.md"
PAGES = [*sorted({DOCS / name for names in TABLES.PAGES.values() for name in names}), README]
EVERY_PAGE = [*sorted(DOCS.glob("*.md")), README]


def _name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", EVERY_PAGE, ids=_name)
def test_the_tables_are_what_the_script_makes(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert TABLES.filled(page) == page, "run: python docs/option_tables.py"
    assert (
        len(list(TABLES.marked(page))) == page.count("<!-- options:") == page.count("<!-- end of options -->")
    )


def test_a_table_that_was_changed_by_hand_is_seen() -> None:
    page = (DOCS / "train.md").read_text(encoding="utf-8")
    planted = page.replace("0 trains nothing. | 30 |", "0 trains nothing. | 40 |")
    assert planted != page
    assert TABLES.filled(planted) == page


def test_a_heading_that_no_option_has_is_refused() -> None:
    with pytest.raises(KeyError, match="Optimiser"):
        TABLES.filled("<!-- options: train | Optimiser -->\n<!-- end of options -->\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_help_without_its_default(verb: str) -> None:
    for leaf in VERBS[verb].offered:
        assert re.fullmatch(r"\S.*[.!?)]", leaf.spec.help), leaf.flag
        assert "default" not in leaf.spec.help.lower(), leaf.flag


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_stands_in_a_table(verb: str) -> None:
    pages = [(DOCS / name).read_text(encoding="utf-8") for name in TABLES.PAGES[verb]]
    made = [
        line for page in pages for found in TABLES.MARKED.finditer(page) for line in found[0].splitlines()
    ]
    absent = [leaf.flag for leaf in VERBS[verb].offered if not _stands(TABLES.row(leaf).rstrip(), made)]
    assert absent == []


def _stands(row: str, lines: list[str]) -> bool:
    """Whether a line begins with a row; those of what commands share have a further cell."""
    return any(line.startswith(row) for line in lines)


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_no_table_of_options_is_made_by_hand(path: Path) -> None:
    rest = TABLES.MARKED.sub("", path.read_text(encoding="utf-8"))
    assert not re.search(r"^\| *option *\|", rest, re.MULTILINE)


def _spellings(leaf: Leaf) -> set[str]:
    return {flag for flags in leaf.flags for flag in flags.split("/")}


KNOWN = {flag for verb in VERBS.values() for leaf in verb.offered for flag in _spellings(leaf)}
ELSEWHERE = {"--help", "--logdir"}
"""Of Typer, and of TensorBoard."""


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_a_page_names_no_option_that_no_command_has(path: Path) -> None:
    named = re.findall(
        r"(?<![\w|-])--[a-z][a-z0-9-]*", re.sub("<!--.*?-->", "", path.read_text(encoding="utf-8"))
    )
    assert {flag.rstrip("-") for flag in named} <= KNOWN | ELSEWHERE


# What prose says of defaults. A sentence ends at a dot, but 0.1 goes on; cells end at a bar.
_SENTENCE = r"(?:[^.|]|\.(?=\d))*?"
_FLAG = r"`(?:cctool )?(?:(?P<verb>[a-z]+) )?(?P<flag>--[a-z][a-z0-9-]*)"
_VALUE = r"`?(?P<value>[\w.,-]*\w)"
CLAIMS = [
    re.compile(pattern)
    for pattern in (
        rf"{_FLAG}[ =]{_VALUE}`(?:,| \() ?(?:the )?default\b",
        rf"{_FLAG}[^`]*`{_SENTENCE}\bdefault(?:s to| is|:)? {_VALUE}",
        rf"{_FLAG}[^`]*`{_SENTENCE}\bby default {_VALUE}",
        rf"{_FLAG}[^`]*`{_SENTENCE}[ (]{_VALUE}`? by default\b",
        rf"{_FLAG}(?: [^`]*)?` \({_VALUE}\)",
        rf"{_FLAG}[^`]*`(?:(?!`--|`[a-z]+ --).)*?`(?P<value>[\w.-]+)` \((?:the )?default\)",
    )
]


def _chunks(page: str) -> Iterator[str]:
    """Sentences that belong together: a paragraph, an item of a list, a row of a table with its header."""
    rest = re.sub(r"```.*?```", "", TABLES.MARKED.sub("", page), flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=#|- )", rest):
        lines = block.strip().splitlines()
        if lines and lines[0].startswith("|"):
            header = lines[0].replace("|", " ")
            yield from (header + line for line in lines[2:])
        else:
            yield " ".join(line.strip() for line in lines)


def _plain(text: str) -> str:
    try:
        return f"{float(text.replace(',', '')):g}"
    except ValueError:
        return text


def _told(leaf: Leaf) -> str:
    return str(leaf.spec.unset or TABLES.default(leaf))


def _decidable(leaf: Leaf, value: str, in_code: bool) -> bool:
    words = {str(item.value) for item in leaf.enum} if leaf.enum is not None else set()
    if value in words | {"on", "off"} or re.fullmatch(r"-?[\d.,]*\d", value):
        return True
    return in_code and re.fullmatch(r"[\w-]+", _told(leaf)) is not None


def _holds(leaf: Leaf, value: str) -> bool:
    """Whether an option's default is this value, or one of those that depend on other options."""
    return _plain(value) in {_plain(word) for word in re.findall(r"[\w.-]*\w", _told(leaf))}


def wrong_defaults(page: str, verbs: tuple[str, ...]) -> list[str]:
    """What a page says of defaults that the code does not.

    Args:
        page: its text.
        verbs: commands that it is about; options that they do not have are those of any command.
    """
    wrong = []
    for chunk in _chunks(page):
        for found in (found for claim in CLAIMS for found in claim.finditer(chunk)):
            value, flag, verb = found["value"], found["flag"], found["verb"]
            in_code = found.re in (CLAIMS[0], CLAIMS[-1])
            having = [
                [leaf for name in names for leaf in VERBS[name].offered if flag in _spellings(leaf)]
                for names in ((verb,) if verb in VERBS else verbs, VERBS)
            ]
            known = [leaf for leaf in having[0] or having[1] if _decidable(leaf, value, in_code)]
            if known and not any(_holds(leaf, value) for leaf in known):
                wrong.append(f"{flag} {value}: {found[0]}")
    return wrong


def _verbs_of(path: Path) -> tuple[str, ...]:
    word = path.stem.partition("-")[0]
    return (word,) if word in VERBS else tuple(VERBS)


@pytest.mark.parametrize("path", EVERY_PAGE, ids=_name)
def test_no_page_states_another_default_than_the_code(path: Path) -> None:
    assert wrong_defaults(path.read_text(encoding="utf-8"), _verbs_of(path)) == []


@pytest.mark.parametrize(
    ("verb", "right", "wrong"),
    [
        ("train", "`--epochs N` passes (default 30)", "`--epochs N` passes (default 40)"),
        ("train", "`--epochs N` passes, default: 30.", "`--epochs N` passes, default: 40."),
        ("train", "`--decay all` (the default) decays", "`--decay weights` (the default) decays"),
        ("train", "`--decay all`, the default, decays", "`--decay weights`, the default, decays"),
        ("train", "`--ema` averages; 0 by default.", "`--ema` averages; 0.998 by default."),
        ("train", "`--lr` of adam is by default 0.001", "`--lr` of adam is by default 0.002"),
        ("train", "| `--power` (1) |", "| `--power` (2) |"),
        ("quantize", "`--calibration N` (1,024) images", "`--calibration N` (512) images"),
        ("quantize", "`--observer`: `min-max` (the default)", "`--observer`: `mse` (the default)"),
        ("quantize", "`--equalize`, default off", "`--equalize`, default on"),
        ("train", "`prune --rate` (0.5)", "`prune --rate` (0.4)"),
    ],
)
def test_another_default_is_seen(verb: str, right: str, wrong: str) -> None:
    def table(row: str) -> str:
        return f"| a | b |\n| --- | --- |\n{row}\n" if row.startswith("|") else f"Some text.\n\n{row}\n"

    assert wrong_defaults(table(right), (verb,)) == []
    assert len(wrong_defaults(table(wrong), (verb,))) >= 1


@pytest.mark.parametrize(
    ("page", "right", "wrong"),
    [
        ("train.md", "`--lr-gamma` (0.1)", "`--lr-gamma` (0.2)"),
        ("quantize.md", "| `uint8` (default)", "| `fp16` (default)"),
        (
            "transform.md",
            "`--target weights`, the default",
            "`--target weights` or `--keep 1`, 0.5 by default",
        ),
        ("transform-features.md", "`--taps blocks` (the default)", "`--taps conv1` (the default)"),
        ("transform-features.md", "`auto` (the default)", "`signed` (the default)"),
    ],
)
def test_another_default_is_seen_in_a_page(page: str, right: str, wrong: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    planted = text.replace(right, wrong)
    assert planted != text
    assert wrong_defaults(planted, _verbs_of(DOCS / page))
