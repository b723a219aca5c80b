"""Files that earlier versions wrote load as they did then."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from cctool.checkpoint.checkpoint import load, save
from cctool.checkpoint.file.compressed import inflated
from checkpoint_toys import TABLES
from golden_checkpoints import EXPECTED, FOLDER, KINDS, expected_logits

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
    found = expected_logits(name, loaded, torch.tensor(KNOWN["input"]).reshape(2, 1, 6, 6))
    # The weights are the same bit for bit; convolutions sum in an order that depends on the processor.
    torch.testing.assert_close(found, torch.tensor(KNOWN[name]["logits"]).to(found), rtol=1e-5, atol=1e-6)


def document(path: Path) -> dict[str, Any]:
    """Everything but the tensors; how torch lays out the archive differs by its version."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            found = {k: v for k, v in file.metadata().items() if k != "checksum"}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = tensors.get("cctool.text")
    else:
        found = torch.load(path, weights_only=True)
        text = found.get("text")
    if text is not None:
        # Nor are zlib's streams the same in all its versions.
        found = found | json.loads(inflated(text))
        # Quantizers come back in the order of the edits, which changes offsets, too.
        found["index"] = {name for name, _ in found["index"]}
    return {key: value for key, value in found.items() if key not in ("model", "text", "arena", "resume")}


@pytest.mark.parametrize("name", KINDS)
def test_writing_it_again_keeps_content_and_document(name: str, tmp_path: Path) -> None:
    first = load(FOLDER / name, TABLES)
    again = save(first, tmp_path / name, TABLES)
    assert again.content == KNOWN[name]["content"]
    old, new = document(FOLDER / name), document(tmp_path / name)
    if old["cctool"] == new["cctool"]:
        assert old == new
    else:
        # Encoded tensors of format 1.
        assert first.stored
        assert (tmp_path / name).stat().st_size < (FOLDER / name).stat().st_size
    if name.endswith(".safetensors") and not first.stored:
        assert (FOLDER / name).read_bytes() == (tmp_path / name).read_bytes()
