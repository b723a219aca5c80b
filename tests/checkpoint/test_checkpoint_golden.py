"""Files that earlier versions wrote load as they did then."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import TABLES
from golden_checkpoints import EXPECTED, FOLDER, KINDS

from cctool.checkpoint.checkpoint import load, save
from cctool.checkpoint.compressed import inflated

KNOWN = json.loads(EXPECTED.read_text())


def test_each_kind_has_a_file_and_each_file_is_small() -> None:
    files = {path.name for path in FOLDER.iterdir()} - {EXPECTED.name}
    assert files == set(KINDS) == KNOWN.keys() - {"input"}
    assert all((FOLDER / name).stat().st_size < 30_000 for name in files)


@pytest.mark.parametrize("name", KINDS)
def test_it_loads_with_equal_logits(name: str) -> None:
    loaded = load(FOLDER / name, TABLES)
    assert loaded.origin is not None
    assert loaded.origin.content == KNOWN[name]["content"]
    with torch.no_grad():
        found = loaded.model(torch.tensor(KNOWN["input"]).reshape(2, 1, 6, 6))
    # The weights are the same bit for bit; convolutions sum in an order that depends on the processor.
    torch.testing.assert_close(found, torch.tensor(KNOWN[name]["logits"]), rtol=1e-5, atol=1e-6)


def document(path: Path) -> dict[str, Any]:
    """The texts of a `.pt`: how torch lays out the archive differs by its version."""
    found = torch.load(path, weights_only=True)
    if "text" in found:
        # Nor need zlib's streams be the same.
        found = found | json.loads(inflated(found["text"]))
    return {key: value for key, value in found.items() if key not in ("model", "text", "arena", "resume")}


@pytest.mark.parametrize("name", KINDS)
def test_writing_it_again_keeps_content_and_document(name: str, tmp_path: Path) -> None:
    first = load(FOLDER / name, TABLES)
    again = save(first, tmp_path / name, TABLES)
    assert again.content == KNOWN[name]["content"]
    old, new = FOLDER / name, tmp_path / name
    if name.endswith(".safetensors") and not first.stored:
        assert old.read_bytes() == new.read_bytes()
    elif name.endswith(".pt") and document(old)["cctool"] == document(new)["cctool"]:
        assert document(old) == document(new)
    else:
        assert new.stat().st_size < old.stat().st_size, "what was written in format 1 gets smaller"
