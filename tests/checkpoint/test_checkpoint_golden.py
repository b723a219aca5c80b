"""Files that earlier versions wrote load as they did then."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_toys import TABLES
from golden_checkpoints import EXPECTED, FOLDER, KINDS

from cctool.checkpoint.checkpoint import load, save

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


@pytest.mark.parametrize("name", [name for name in KINDS if name.endswith(".pt")])
def test_writing_it_again_keeps_the_document(name: str, tmp_path: Path) -> None:
    save(load(FOLDER / name, TABLES), tmp_path / name, TABLES)
    # torch's writer lays out the archive, and another version of it may do so differently.
    old, new = (torch.load(folder / name, weights_only=True) for folder in (FOLDER, tmp_path))
    for key in ("cctool", "spec", "history", "digests"):
        assert old[key] == new[key]


@pytest.mark.parametrize("name", [name for name in KINDS if name.endswith(".safetensors")])
def test_writing_it_again_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    save(load(FOLDER / name, TABLES), tmp_path / name, TABLES)
    assert (FOLDER / name).read_bytes() == (tmp_path / name).read_bytes()
