"""Damaged files: any flipped bit, any truncation, and files whose parts contradict each other."""

import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cctool.base.errors import CctoolError, CheckpointError, CorruptCheckpointError, SpecError
from cctool.checkpoint.checkpoint import load, open_file, save
from cctool.checkpoint.file import torch_file
from cctool.checkpoint.file.payload import canonical
from checkpoint_toys import TABLES, make, quantized
from golden_checkpoints import FOLDER

SUFFIXES = (".pt", ".safetensors")


def written(folder: Path, suffix: str) -> bytes:
    path = folder / f"whole{suffix}"
    save(quantized(make(), "affine-u8", axis=0), path, TABLES)
    return path.read_bytes()


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_flipped_bit_is_seen(suffix: str, every: int, tmp_path: Path) -> None:
    data = written(tmp_path, suffix)
    path = tmp_path / f"flipped{suffix}"
    # All bits where a format keeps its structure, at the start and at the end; and all through the file.
    bits = [
        *range(128),
        *range(128, 8 * len(data) - 1000, every),
        *range(8 * len(data) - 1000, 8 * len(data)),
    ]
    for index, bit in (divmod(position, 8) for position in bits):
        flipped = bytearray(data)
        flipped[index] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load(path, TABLES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_truncation_is_seen(suffix: str, tmp_path: Path) -> None:
    data = written(tmp_path, suffix)
    path = tmp_path / f"short{suffix}"
    for length in (*range(0, len(data), 97), *range(len(data) - 90, len(data))):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            load(path, TABLES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_appended_and_zeroed_bytes_are_seen(suffix: str, tmp_path: Path) -> None:
    data = written(tmp_path, suffix)
    path = tmp_path / f"odd{suffix}"
    middle = len(data) // 2
    for odd in (data + b"x", data + data, data[:middle] + bytes(512) + data[middle + 512 :]):
        path.write_bytes(odd)
        with pytest.raises(CheckpointError):
            load(path, TABLES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_a_folder_and_no_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(CheckpointError, match="no such file"):
        open_file(path)
    path.touch()
    with pytest.raises(CorruptCheckpointError, match="is empty"):
        open_file(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="is not a file"):
        open_file(path)
    with pytest.raises(CheckpointError, match=r"cannot read|no such file"):
        open_file(tmp_path / ("x" * 300 + suffix))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content",
    [b"x", b"hello world\n" * 100, bytes(5000), b"PK\x03\x04" + bytes(99), b"PK\x05\x06" + bytes(18)],
)
def test_files_of_another_kind(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)):
        open_file(path)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A file of format 1 whose document was changed by someone who then made its checksum right."""
    document = torch.load(FOLDER / "uint8-per-channel.pt", weights_only=True)
    changed = change(document)
    path = folder / "changed.pt"
    with path.open("wb+") as stream:
        torch.save(document if changed is None else changed, stream)
        torch_file._append_checksum(stream)
    return path


def assign(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


DEEP = "[" * 100_000 + "]" * 100_000
CHANGES = {
    "a changed tensor": (assign("model", "fc.bias", value=torch.zeros(3)), "fc.bias does not match"),
    "an added tensor": (assign("model", "extra", value=torch.zeros(3)), "malformed"),
    "a later format": (assign("cctool", value=3), "format 3"),
    "a format that is no number": (assign("cctool", value=True), "format True"),
    "a tensor for a format": (assign("cctool", value=torch.ones(3)), "format"),
    "no model": (assign("model", value=[1]), "not a state dict"),
    "a number among the tensors": (assign("model", "fc.bias", value=3), "not a state dict"),
    "no spec": (assign("spec", value=None), "spec is missing"),
    "a spec that is no JSON": (assign("spec", value="{"), "spec is malformed"),
    "a deep spec": (assign("spec", value=DEEP), "spec is malformed"),
    "a spec without architecture": (assign("spec", value="{}"), "spec is malformed at architecture"),
    "a spec with a surprise": (
        assign("spec", value='{"architecture":"toy","input_shape":[1,6,6],"surprise":1}'),
        "malformed at surprise",
    ),
    "a spec of no size": (assign("spec", value='{"architecture":"toy","input_shape":[1,0,6]}'), "malformed"),
    "a spec with NaN": (
        assign("spec", value='{"architecture":"toy","input_shape":[1,6,6],"arguments":{"x":NaN}}'),
        "JSON",
    ),
    "a spec with infinity": (
        assign("spec", value='{"architecture":"toy","input_shape":[1,6,6],"arguments":{"x":1e999}}'),
        "JSON",
    ),
    "no history": (assign("history", value=torch.zeros(3)), "history is missing"),
    "a deep history": (assign("history", value=DEEP), "history is malformed"),
    "no digests": (assign("digests", value=None), "digests are not JSON"),
    "deep digests": (assign("digests", value=DEEP), "digests are not JSON"),
    "digests that are numbers": (assign("digests", value='{"a":1}'), "not a table of texts"),
    "other digests": (assign("digests", value="{}"), "does not match its digest"),
    "encoded tensors that are none": (assign("encoded", value=3), "malformed"),
    "no index": (assign("encoded", "index", value=None), "malformed"),
    "a deep index": (assign("encoded", "index", value=DEEP), "malformed"),
    "an index that is a list": (assign("encoded", "index", value="[]"), "malformed"),
    "an arena of floats": (assign("encoded", "arena", value=torch.zeros(9999)), "row of bytes"),
    "a short arena": (assign("encoded", "arena", value=torch.zeros(3).byte()), "outside the arena"),
    "a deep order": (assign("encoded", "order", value=DEEP), "malformed"),
    "an order of lists": (assign("encoded", "order", value="[[1]]"), "malformed"),
    "a short order": (assign("encoded", "order", value='["fc.weight"]'), "malformed"),
    "a resume state that is none": (assign("resume", value=5), "resume state is malformed"),
    "resumed numbers": (assign("resume", value={"tensors": {"a": 1}, "state": "{}"}), "not a state"),
    "a deep resume state": (assign("resume", value={"tensors": {}, "state": DEEP}), "malformed"),
    "a list": (lambda document: [document], "no state dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_parts_that_are_not_what_they_should_be(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    with pytest.raises(CheckpointError, match=message):
        load(rewritten(tmp_path, change), TABLES)


def reindexed(name: str, **update: Any) -> Callable[[dict[str, Any]], None]:
    import json

    def change(document: dict[str, Any]) -> None:
        index = json.loads(document["encoded"]["index"])
        entry = index[name]
        for key, value in update.items():
            part, _, field = key.partition("__")
            if field:
                entry["parts"][part][field] = value
            else:
                entry[key] = value
        document["encoded"]["index"] = canonical(index)

    return change


@pytest.mark.parametrize(
    "update",
    [
        {"shape": [2**31 - 1, 2**31 - 1]},
        {"shape": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1]},
        {"dtype": "float8"},
        {"parameters": 3},
        {"levels__offset": -1},
        {"levels__offset": 2**62},
        {"levels__shape": [2**31 - 1] * 8},
        {"levels__shape": [0, *[2**31 - 1] * 8]},
        {"levels__dtype": "object"},
        {"low__offset": 1},
        {"parts": {}},
    ],
)
def test_index_entries_that_point_nowhere(update: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError):
        load(rewritten(tmp_path, reindexed("fc.weight", **update)), TABLES)


def test_an_unsigned_file_of_ours_is_refused(tmp_path: Path) -> None:
    save(make(), tmp_path / "a.pt", TABLES)
    torch.save(torch.load(tmp_path / "a.pt", weights_only=True), tmp_path / "b.pt")
    with pytest.raises(CorruptCheckpointError, match="checksum at its end is missing"):
        load(tmp_path / "b.pt", TABLES)


def test_tensors_that_do_not_fit_the_spec(tmp_path: Path) -> None:
    for arguments, message in (
        ({"width": 5}, r"has conv\.weight \[4, 1, 3, 3\] instead of \[5"),
        ({"classes": 2}, r"fc\.bias \[3\]"),
    ):
        for kind in (make(), quantized(make(), "affine-u8", axis=0)):
            odd = replace(kind, spec=kind.spec.model_copy(update={"arguments": arguments}))
            save(odd, tmp_path / "a.pt", TABLES, overwrite=True)
            with pytest.raises(SpecError, match=message):
                load(tmp_path / "a.pt", TABLES)
    odd = replace(make(), spec=make().spec.model_copy(update={"architecture": "hidden"}))
    save(odd, tmp_path / "b.pt", TABLES)
    with pytest.raises(SpecError, match=r"lacks fc.*has unexpected|lacks mask.*has unexpected"):
        load(tmp_path / "b.pt", TABLES)


def test_unknown_encodings_are_refused_by_name(tmp_path: Path) -> None:
    save(quantized(make(), "bf16"), tmp_path / "a.pt", TABLES)
    poorer = replace(TABLES, encodings={"fp16": TABLES.encodings["fp16"]})
    with pytest.raises(SpecError, match="stored as 'bf16': this version knows fp16"):
        load(tmp_path / "a.pt", poorer)


@pytest.mark.parametrize("kind", ["pt", "safetensors", "foreign"])
def test_mutated_files_raise_only_our_errors(kind: str, tmp_path: Path) -> None:
    suffix = ".safetensors" if kind == "safetensors" else ".pt"
    if kind == "foreign":
        torch.save(make().model.state_dict(), tmp_path / "a.pt")
        data = (tmp_path / "a.pt").read_bytes()
    else:
        data = written(tmp_path, suffix)
    source = random.Random(1)
    path = tmp_path / f"mutated{suffix}"
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(source.randrange(1, 6)):
            start = source.randrange(len(mutated))
            kind_of_change = source.randrange(3)
            if kind_of_change == 0:
                mutated[start] = source.randrange(256)
            elif kind_of_change == 1:
                mutated[start : start + source.randrange(1, 40)] = source.randbytes(source.randrange(1, 40))
            else:
                del mutated[start : start + source.randrange(1, 40)]
        path.write_bytes(mutated)
        # What still opens is a foreign file with other numbers in it.
        with contextlib.suppress(CctoolError):
            open_file(path)
