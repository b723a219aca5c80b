"""docs/checkpoint-format.md says what is so."""

import hashlib
import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import TABLES, make, quantized

from cctool.checkpoint.checkpoint import save
from cctool.checkpoint.torch_file import FORMAT_VERSION

TEXT = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_its_program_reads_a_quantized_file(
    axis: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = quantized(make(), "affine-u8", axis=axis)
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
    (entry,) = json.loads(example).values()
    save(quantized(make(), "affine-u8", axis=0), tmp_path / "a.pt", TABLES)
    index = json.loads(torch.load(tmp_path / "a.pt", weights_only=True)["encoded"]["index"])
    written = index["fc.weight"]
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


def test_the_keys_are_all_named(tmp_path: Path) -> None:
    save(quantized(make(), "affine-u8", axis=0), tmp_path / "a.pt", TABLES)
    save(quantized(make(), "affine-u8", axis=0), tmp_path / "a.safetensors", TABLES)
    document = torch.load(tmp_path / "a.pt", weights_only=True)
    data = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    spec, step = json.loads(document["spec"]), json.loads(document["history"])["steps"][0]
    for key in (*document, *document["encoded"], *header["__metadata__"], *spec, *step):
        assert f"`{key}`" in TEXT, key
    assert f"Format version: **{FORMAT_VERSION}**" in TEXT
    assert all(f"`{name}`" in TEXT for name in TABLES.encodings)
