"""Draw features from the tables of a version's docs, to see whether readers find their files by name alone.

python benchmarks/feature_lottery.py CHECKOUT [--seed 12] [--count 30]

A feature is a row of a table in docs/: an option, a method, a field of a file. docs/architecture.md has those
that were drawn from d846b84, and the files that a reader guessed from the list of paths.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = ("architecture", "benchmarks")


def features(docs: Path) -> Iterator[tuple[str, str, str, str]]:
    """Page, heading, first and second cell of each row that is not the head of its table."""
    for page in sorted(docs.glob("*.md")):
        if page.stem in LEFT_OUT:
            continue
        heading, lines = "", page.read_text(encoding="utf-8").splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if line.startswith("#"):
                heading = line.lstrip("# ")
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            head = line.startswith("| ---") or following.startswith("| ---")
            if line.startswith("| ") and not head and len(cells) > 1 and cells[0]:
                yield page.stem, heading, cells[0], cells[1]


def main() -> None:
    """Print the rows that were drawn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--count", type=int, default=30)
    asked = parser.parse_args()
    drawn = random.Random(asked.seed).sample(list(features(asked.checkout / "docs")), asked.count)
    for number, (page, heading, name, text) in enumerate(drawn, start=1):
        print(f"{number}. {name} ({page}, {heading}): {text}")


if __name__ == "__main__":
    main()
