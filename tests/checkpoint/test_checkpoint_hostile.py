"""Files made to harm: code, and claims of more than they hold. Time and memory stay bounded."""

import pickle
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cctool.base.errors import CheckpointError, CorruptCheckpointError, SpecError, UnsafeCheckpointError
from cctool.checkpoint.checkpoint import load, open_file, save
from cctool.checkpoint.edits.thin import Thin
from cctool.operations.registries import tables
from checkpoint_toys import TABLES, make


class Payload:
    """Creates a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Custom(nn.Module):
    """A network of the user's own, to be pickled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_never_runs(legacy: bool, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    content = {"state_dict": {"w": torch.zeros(2)}, "extra": Payload(mark)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError, match=r"needs pickle.*getattr.*--trust-pickle") as caught:
        open_file(tmp_path / "a.pt")
    assert not mark.exists()
    assert legacy or "pathlib" in str(caught.value), "all that it contains is named"
    assert open_file(tmp_path / "a.pt", trust_pickle=True).tensors is not None
    assert mark.exists(), "the payload works, so that this test can fail"


def test_a_pickled_module_is_refused_with_what_it_contains(tmp_path: Path) -> None:
    torch.save(Custom(), tmp_path / "a.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"it contains .*Custom.*--trust-pickle") as caught:
        open_file(tmp_path / "a.pt")
    assert "weights_only" not in str(caught.value), "torch's advice is to switch the safety off"
    opened = open_file(tmp_path / "a.pt", trust_pickle=True)
    assert opened.tensors is not None
    assert opened.tensors.keys() == {"fc.weight", "fc.bias"}


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pt").write_bytes(pickle.dumps(Payload(mark), protocol=protocol))
        with pytest.raises(CheckpointError):
            open_file(tmp_path / "a.pt")
    assert not mark.exists()


def test_a_file_of_ours_never_unpickles_even_if_trusted(tmp_path: Path) -> None:
    from cctool.checkpoint.file import torch_file

    mark = tmp_path / "it ran"
    with (tmp_path / "a.pt").open("wb+") as stream:
        torch.save({"cctool": 1, "model": {}, "extra": Payload(mark)}, stream)
        torch_file._append_checksum(stream)
    with pytest.raises(UnsafeCheckpointError):
        open_file(tmp_path / "a.pt", trust_pickle=True)
    assert not mark.exists()


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"x")
        archive.writestr("a/data.pkl", b"x")
    with pytest.raises(UnsafeCheckpointError, match=r"TorchScript.*state_dict"):
        open_file(tmp_path / "a.pt")


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(10_000_000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.pt").stat().st_size < 100_000
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        open_file(tmp_path / "b.pt")


def test_tensors_that_no_bytes_back(tmp_path: Path) -> None:
    row = torch.zeros(1000)
    claims: dict[str, Any] = {
        "expanded": torch.zeros(1).expand(10**12),
        "meta": torch.empty(10**12, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "overlapping": row.as_strided((500, 500), (1, 1)),
        "nested in lists": [[{"x": torch.zeros(1).expand(10**12)}]],
    }
    for name, claim in claims.items():
        torch.save({"w": claim}, tmp_path / "a.pt")
        with pytest.raises(CorruptCheckpointError, match=r"not backed|sparse"):
            open_file(tmp_path / "a.pt")
        assert (tmp_path / "a.pt").stat().st_size < 10_000, name


def test_many_views_of_one_storage(tmp_path: Path) -> None:
    row = torch.zeros(100_000, dtype=torch.float16)
    torch.save({str(index): row[index:] for index in range(500)}, tmp_path / "a.pt")
    with pytest.raises(CorruptCheckpointError, match="claims to hold more"):
        open_file(tmp_path / "a.pt")


def test_a_storage_larger_than_its_record(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                # 1000 as a two-byte integer becomes 16,777,215 as a four-byte one.
                assert content.count(b"M\xe8\x03") == 2
                content = content.replace(b"M\xe8\x03", b"J\xff\xff\xff\x00")
            target.writestr(entry.filename, content)
    with pytest.raises(CorruptCheckpointError):
        open_file(tmp_path / "b.pt")


def test_containers_that_contain_themselves(tmp_path: Path) -> None:
    knot: list[Any] = []
    knot.extend([knot] * 100)
    torch.save({"state_dict": knot}, tmp_path / "a.pt")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="no state dict"):
        open_file(tmp_path / "a.pt")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("stack", {"width": 2**20}),
        ("stack", {"width": 2**31 - 1}),
        ("many", {"layers": 10**9}),
        ("norms", {"width": 2**24 + 1}),
        ("norms", {"width": 2**20, "layers": 10**6}),
    ],
)
def test_a_small_file_cannot_ask_for_a_large_network(
    name: str, arguments: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = make(name)
    for edits in ((), ({"kind": "thin", "module": "0"},)):
        spec = checkpoint.spec.model_copy(update={"arguments": arguments, "edits": edits})
        save(replace(checkpoint, spec=spec), tmp_path / "a.pt", TABLES, overwrite=True)
        start = time.monotonic()
        with pytest.raises(SpecError, match="much larger network"):
            load(tmp_path / "a.pt", TABLES)
        assert time.monotonic() - start < 10


REGISTERED: list[tuple[str, dict[str, Any]]] = [
    ("resnet20", {"num_classes": 2**31 - 1}),
    ("vgg19", {"num_classes": 10**9}),
    ("torchvision:resnet18", {"num_classes": 10**12}),
    ("torchvision:densenet121", {"num_classes": 10**9, "growth_rate": 10**7}),
    ("torchvision:densenet121", {"block_config": [10**8, 1, 1, 1], "growth_rate": 1}),
    ("torchvision:vit_b_16", {"image_size": 2**20}),
    ("torchvision:swin_t", {"num_classes": 10**10}),
    ("torchvision:efficientnet_b0", {"num_classes": 10**11}),
    ("torchvision:mobilenet_v2", {"width_mult": 10**6}),
]


def test_absurd_arguments_of_registered_networks_cost_no_memory(tmp_path: Path) -> None:
    checkpoint = make()
    paths = []
    for index, (architecture, arguments) in enumerate(REGISTERED):
        spec = checkpoint.spec.model_copy(update={"architecture": architecture, "arguments": arguments})
        paths.append(str(tmp_path / f"{index}.pt"))
        save(replace(checkpoint, spec=spec), paths[-1], TABLES)
    script = """
import resource, sys, time
from cctool.checkpoint.checkpoint import load
from cctool.base.errors import CctoolError
from cctool.operations.registries import tables
import torchvision
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    start = time.monotonic()
    try:
        load(path, tables())
    except CctoolError as error:
        spent = time.monotonic() - start
        assert spent < 20, (path, spent, error)
    else:
        raise AssertionError(path)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert grown < 600, f"{grown:.0f} MiB"
"""
    subprocess.run([sys.executable, "-c", script, *paths], check=True)


def test_absurd_thin_edits_are_refused(tmp_path: Path) -> None:
    checkpoint = make()
    spec = checkpoint.spec.with_edits((Thin(module="fc", shapes={"weight": (2**31 - 1, 2**31 - 1)}),))
    save(replace(checkpoint, spec=spec), tmp_path / "a.pt", TABLES)
    with pytest.raises(SpecError, match="cannot be cut"):
        load(tmp_path / "a.pt", TABLES)


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        '{"w":{"dtype":"F32","shape":[1000000000,1000000],"data_offsets":[0,4]}}',
        '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999]}}',
        "[" * 100_000,
    ],
)
def test_safetensors_headers_that_lie(header: str, tmp_path: Path) -> None:
    for length in (len(header), 2**63, 0):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + header.encode() + bytes(4))
        with pytest.raises(CorruptCheckpointError, match="not a readable safetensors"):
            open_file(tmp_path / "a.safetensors")


def test_a_checkpoint_imports_nothing_that_was_not_named(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    (tmp_path / "net.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    checkpoint = make()
    for reference in (f"{tmp_path}/net.py:make", "antigravity:fly"):
        spec = checkpoint.spec.model_copy(update={"architecture": reference})
        save(replace(checkpoint, spec=spec), tmp_path / "a.pt", TABLES, overwrite=True)
        with pytest.raises(Exception, match="--arch"):
            load(tmp_path / "a.pt", tables())
    assert not mark.exists()
    assert "antigravity" not in sys.modules
