"""docs/checkpoint-format.md says what is so."""

import hashlib
import json
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cctool.checkpoint.checkpoint import save
from cctool.checkpoint.file.compact import COMPACT_VERSION
from cctool.checkpoint.file.torch_file import DENSE_VERSION
from checkpoint_toys import TABLES, make, quantized

TEXT = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")


def compressed_text(document: dict[str, Any]) -> dict[str, Any]:
    data = document["text"].numpy().tobytes()
    text = zlib.decompress(data[4:])
    assert len(text) == struct.unpack("<I", data[:4])[0]
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_its_program_reads_a_quantized_file(
    axis: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One dense tensor is large, and one tied.
    checkpoint = quantized(make(width=64), "affine-u8", axis=axis)
    model = checkpoint.model
    model.bn.running_mean = torch.randn(2000)
    model.bn.running_var = model.bn.bias.detach()
    save(checkpoint, tmp_path / "student.quantize.pt", TABLES)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert "cctool" not in program
    names: dict[str, Any] = {}
    exec(program, names)
    expected = checkpoint.model.state_dict()
    assert names["state_dict"].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(names["state_dict"][name], value), name


def test_its_index_is_what_is_written(tmp_path: Path) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", TEXT, flags=re.DOTALL)
    name, entry = json.loads(example)
    save(quantized(make(), "affine-u8", axis=0), tmp_path / "a.pt", TABLES)
    written = dict(compressed_text(torch.load(tmp_path / "a.pt", weights_only=True))["index"])[name]
    assert written.keys() == entry.keys()
    assert written["parts"].keys() == entry["parts"].keys()
    assert written["parts"]["low"].keys() == entry["parts"]["low"].keys()


def test_the_checksum_is_where_and_what_it_says(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        save(make(), tmp_path / f"a{suffix}", TABLES)
        data = (tmp_path / f"a{suffix}").read_bytes()
        found = re.search(rb"cctool-sha256:([0-9a-f]{64})", data)
        assert found is not None
        masked = data[: found.start(1)] + b"0" * 64 + data[found.end(1) :]
        assert found.group(1).decode() == hashlib.sha256(masked).hexdigest()
        if suffix == ".pt":
            assert len(data) - found.start() == 78
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.comment == data_comment(tmp_path / "a.pt")
        assert archive.testzip() is None


def data_comment(path: Path) -> bytes:
    return path.read_bytes()[-78:]


def test_the_digests_and_the_content_hash_are_what_it_says(tmp_path: Path) -> None:
    parent = save(make(), tmp_path / "a.pt", TABLES)
    document = torch.load(tmp_path / "a.pt", weights_only=True)
    digests = {}
    for name, tensor in document["model"].items():
        head = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}".encode()
        digests[name] = hashlib.sha256(head + tensor.contiguous().numpy().tobytes()).hexdigest()
    assert json.loads(document["digests"]) == digests
    content = {
        "spec": json.loads(document["spec"]),
        "history": json.loads(document["history"]),
        "tensors": digests,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert parent.content == hashlib.sha256(text.encode()).hexdigest()
    assert parent.file == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()


def test_the_combined_digest_is_what_it_says(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        save(quantized(make(), "affine-u8", axis=0), tmp_path / f"a{suffix}", TABLES)
    document = torch.load(tmp_path / "a.pt", weights_only=True)
    digests = {}
    for name, entry in compressed_text(document)["index"]:
        parts = {k: digest_in_arena(document["arena"], v) for k, v in entry.get("parts", {}).items()}
        head = {key: entry[key] for key in ("encoding", "shape", "dtype", "parameters") if key in entry}
        text = json.dumps({**head, "parts": parts}, sort_keys=True, separators=(",", ":"))
        digests[name] = (
            hashlib.sha256(text.encode()).hexdigest() if parts else digest_in_arena(document["arena"], entry)
        )
    text = json.dumps(digests, sort_keys=True, separators=(",", ":"))
    assert document["digest"] == hashlib.sha256(text.encode()).hexdigest()
    assert safetensors_metadata(tmp_path / "a.safetensors")["digest"] == document["digest"]


def digest_in_arena(arena: torch.Tensor, place: dict[str, Any]) -> str:
    length = getattr(torch, place["dtype"]).itemsize * int(np.prod(place["shape"]))
    data = arena.numpy().tobytes()[place["offset"] : place["offset"] + length]
    return hashlib.sha256(f"{place['dtype']}{place['shape']}".encode() + data).hexdigest()


def safetensors_metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return found


def test_the_keys_are_all_named(tmp_path: Path) -> None:
    keys: set[str] = set()
    for kind, checkpoint in {"dense": make(), "small": quantized(make(), "affine-u8", axis=0)}.items():
        for suffix in (".pt", ".safetensors"):
            save(checkpoint, tmp_path / (kind + suffix), TABLES)
        keys |= torch.load(tmp_path / f"{kind}.pt", weights_only=True).keys()
        keys |= safetensors_metadata(tmp_path / f"{kind}.safetensors").keys()
    text = compressed_text(torch.load(tmp_path / "small.pt", weights_only=True))
    keys |= text.keys() | text["spec"].keys() | text["history"]["steps"][0].keys()
    for key in keys:
        assert f"`{key}`" in TEXT, key
    for version in (DENSE_VERSION, COMPACT_VERSION):
        assert f"format version **{version}**" in TEXT.replace("\n", " ")
    assert all(f"`{name}`" in TEXT for name in TABLES.encodings)
