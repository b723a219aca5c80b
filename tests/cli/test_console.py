"""stdout is the product; everything else goes to stderr."""

import json
import subprocess
import sys

import pytest

from cctool.cli.console import Console, plain

NOISY = """
import os, sys
from cctool.cli.console import Console
console = Console(as_json={as_json})
with console.products_only():
    print("a library talks")
    os.write(1, b"a library talks from C\\n")
    os.system("echo a child talks")
    console.note("a note")
    console.path("product.pt")
    console.document({{"value": float("nan")}})
print("after")
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_only_products_reach_stdout(as_json: bool) -> None:
    code = NOISY.format(as_json=as_json)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = '{\n  "value": null\n}\nafter\n' if as_json else "product.pt\nafter\n"
    assert done.stdout == expected
    for line in ("a library talks", "a library talks from C", "a child talks", "a note"):
        assert line in done.stderr


def test_quiet_silences_notes_but_not_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.note("hidden")
    console.warn("shown")
    assert capsys.readouterr().err == "warning: shown\n"


def test_a_table_in_a_file_keeps_each_row_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    Console().table("", ("name", "count"), [(long, 1234567), ("[bold]", 2)])
    lines = capsys.readouterr().out.splitlines()
    assert any(long in line and "1,234,567" in line for line in lines)
    assert any("[bold]" in line for line in lines)


def test_intervals_are_aligned_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("", ("95 %",), [("8.25..90.05",), (None,), ("100.00..100.00",)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if ".." in line]
    assert [line.lstrip() for line in lines] == ["8.25..90.05", "100.00..100.00"]
    assert len({len(line) for line in lines}) == 1


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error("first\nsecond")
    assert capsys.readouterr().err == "error: first second\n"


def test_plain_is_strict_json() -> None:
    assert json.loads(json.dumps(plain({"a": (1, float("inf")), 2: None}), allow_nan=False)) == {
        "a": [1, None],
        "2": None,
    }


def test_names_in_a_file_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[2Jb\x9bc\rd\x07"
    console = Console()
    console.note(evil)
    console.warn(evil)
    console.error(evil)
    console.text(evil)
    console.table("", ("name",), [(evil,)])
    printed = capsys.readouterr()
    assert not set("\x1b\x9b\r\x07") & set(printed.out + printed.err)
    assert printed.err.count("a?[2Jb?c") == 3
    assert printed.out.count("a?[2Jb?c") == 2
