"""What outputs mean is said in the tasks' folder alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cctool

SOURCE = Path(cctool.__file__).parent

ELSEWHERE = {
    "argmax": {
        "formats/verdict/limits.py": "the place of an output that is closest to its limit",
        "graph/cost_rules.py": "a name in the table of operations that cost nothing",
        "graph/solution.py": "the reason that freezes most channels",
        "pruning/masks/granularity.py": "the group that is worth most stays, so that no layer is left empty",
        "transforms/codec/calibrate.py": "the sign of a basis vector is that of its largest entry",
        "transforms/layers/keep.py": "the largest coefficient of a layer always stays",
        "transforms/layers/klt.py": "the sign of a basis vector, and the largest coefficient, which stays",
    },
    "topk": {"graph/cost_rules.py": "a name in the table of operations that cost nothing"},
    "cross_entropy": {},
    "top1": {},
    "top5": {},
}
"""Word -> file outside of the folder -> why it stands there. Keys of records keep their names."""


@pytest.mark.parametrize("word", ELSEWHERE)
def test_words_of_classification_stand_nowhere_else(word: str) -> None:
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if "tasks" not in path.relative_to(SOURCE).parts and re.search(rf"\b{word}\b", path.read_text())
    }
    assert found == set(ELSEWHERE[word])
