"""Bare tensors, read back by the libraries that own the formats."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cctool.base.errors import CheckpointError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.spec import ModelSpec
from cctool.formats.records import ExportRequest
from cctool.formats.table import FORMATS
from cctool.options.inspect.export import DEFAULT_SUFFIXES, SUFFIXES, ExportFormat

READERS: dict[ExportFormat, Callable[[Path], dict[str, Tensor]]] = {
    ExportFormat.STATE_DICT: lambda path: torch.load(path, weights_only=True),
    ExportFormat.SAFETENSORS: lambda path: safetensors.torch.load_file(path),
}
BARE = pytest.mark.parametrize("kind", READERS)


def test_every_format_has_a_writer_and_suffixes() -> None:
    assert set(FORMATS) == set(ExportFormat) == set(SUFFIXES) == set(DEFAULT_SUFFIXES)
    for kind, suffix in DEFAULT_SUFFIXES.items():
        assert Path(f"a{suffix}").suffix in SUFFIXES[kind]


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16)
    )
    model[4].weight = model[3].weight
    model[0].weight = nn.Parameter(model[0].weight.detach().to(memory_format=torch.channels_last))
    return model.eval()


def request(model: nn.Module, path: Path, **stored: EncodedTensor) -> ExportRequest:
    spec = ModelSpec(architecture="net.py:net", input_shape=(3, 4, 4))
    names = {name.replace("__", "."): value for name, value in stored.items()}
    return ExportRequest(Checkpoint(model, spec, stored=names), path, (3, 4, 4))


@BARE
def test_any_code_loads_the_tensors(kind: ExportFormat, tmp_path: Path) -> None:
    model, path = net(), tmp_path / f"a{DEFAULT_SUFFIXES[kind]}"
    written = FORMATS[kind](request(model, path))
    assert (written.path, written.format, written.bytes) == (str(path), str(kind), path.stat().st_size)
    tensors = READERS[kind](path)
    assert set(tensors) == set(model.state_dict())
    assert tensors["0.weight"].dtype == torch.float32
    other = net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(tensors)
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(other(x), model(x))


def test_ties_survive_in_a_state_dict(tmp_path: Path) -> None:
    FORMATS[ExportFormat.STATE_DICT](request(net(), tmp_path / "a.pt"))
    tensors = torch.load(tmp_path / "a.pt", weights_only=True)
    assert tensors["3.weight"].data_ptr() == tensors["4.weight"].data_ptr()


@BARE
def test_nan_is_written_as_it_is(kind: ExportFormat, tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model[0].bias[1] = torch.nan
    path = tmp_path / f"a{DEFAULT_SUFFIXES[kind]}"
    FORMATS[kind](request(model, path))
    assert READERS[kind](path)["0.bias"].isnan().tolist() == [False, True, False, False]


@BARE
def test_small_storage_is_written_dense_and_said(kind: ExportFormat, tmp_path: Path) -> None:
    model, path = net(), tmp_path / f"a{DEFAULT_SUFFIXES[kind]}"
    stored = EncodedTensor("test", (4, 3, 3, 3), "float32", {"q": torch.zeros(108, dtype=torch.uint8)})
    written = FORMATS[kind](request(model, path, **{"0__weight": stored}))
    assert "1 tensors" in written.notes[0]
    assert torch.equal(READERS[kind](path)["0.weight"], model[0].weight)


@BARE
def test_an_existing_file_is_kept(kind: ExportFormat, tmp_path: Path) -> None:
    path = tmp_path / f"a{DEFAULT_SUFFIXES[kind]}"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        FORMATS[kind](request(net(), path))
    assert path.read_text() == "mine"


def test_a_view_of_a_large_storage_is_written_small(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.zeros(1000, 1000)[:4, :4])
    FORMATS[ExportFormat.STATE_DICT](request(model, tmp_path / "a.pt"))
    assert (tmp_path / "a.pt").stat().st_size < 10_000
