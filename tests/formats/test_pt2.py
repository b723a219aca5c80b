import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import ExportError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec, Preprocessing, Step
from cctool.formats import pt2
from cctool.formats.pt2 import DESCRIPTION, write_pt2
from cctool.formats.records import ExportRequest, Samples
from cctool.quantization.export.network import rounding_network
from cctool.quantization.network.attach import attach
from cctool.quantization.network.calls import CallSite
from cctool.quantization.network.points import CallPoint, WeightPoint
from cctool.quantization.quantizers.config import QuantizerConfig

SHAPE = (3, 8, 8)

ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1])
images = torch.load(sys.argv[2], weights_only=True)
torch.save([program.module()(batch) for batch in images], sys.argv[3])
assert not any(name.partition(".")[0] == "cctool" for name in sys.modules)
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class OneByOne(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(OneByOne, self).forward(row[None]) for row in x])


def request(model: nn.Module, path: Path, **changes: Any) -> ExportRequest:
    spec = ModelSpec(
        architecture="net.py:net", input_shape=SHAPE, preprocessing=Preprocessing(mean=(0.5,), std=(0.25,))
    )
    checkpoint = Checkpoint(model, spec, history=(Step(verb="train", options={}, seed=0),))
    return ExportRequest(checkpoint, path, SHAPE, **changes)


def quantized() -> nn.Module:
    model = Net().eval()
    weights = QuantizerConfig(method="uniform", bits=4, narrow=True, axis=0)
    activations = QuantizerConfig(method="uniform", bits=8, signed=False, symmetric=False)
    held = attach(
        model,
        {"conv.weight": WeightPoint(config=weights, channels=6)},
        {CallSite("conv", "conv2d", 0): CallPoint(weight="conv.weight", input=activations)},
    )
    held.quantizer("conv/weight").initialise(model.conv.weight)  # type: ignore[union-attr]
    held.quantizer("conv/conv2d#0:input").set_range(torch.tensor(-3.0), torch.tensor(3.0))  # type: ignore[union-attr]
    return model


def test_another_process_without_cctool_gives_the_quantized_networks_outputs(tmp_path: Path) -> None:
    model = quantized()
    written = write_pt2(request(model, tmp_path / "a.pt2", network=rounding_network(model), quantized=True))
    assert written.agreements[0].max_abs_error < 1e-5
    images = [torch.randn(batch, *SHAPE) for batch in (1, 4)]
    torch.save(images, tmp_path / "images.pt")
    names = [str(tmp_path / name) for name in ("a.pt2", "images.pt", "found.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *names], check=True, capture_output=True)
    for batch, found in zip(images, torch.load(names[2]), strict=True):
        expected = model(batch)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert (expected - Net().eval()(batch)).abs().max() > 1e-3


def test_the_program_says_what_it_is_and_where_the_data_agree(tmp_path: Path) -> None:
    samples = Samples("ten images", [torch.randn(6, *SHAPE), torch.randn(4, *SHAPE)])
    written = write_pt2(request(Net(), tmp_path / "a.pt2", samples=samples))
    assert [(found.inputs, found.n) for found in written.agreements] == [
        ("random inputs", 256),
        ("ten images", 10),
    ]
    assert (written.format, written.notes) == ("pt2", ())
    extra = {DESCRIPTION: ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    about = json.loads(extra[DESCRIPTION])
    assert (about["cctool.architecture"], about["cctool.history"]) == ("net.py:net", "train")
    assert about["cctool.mean"] == "[0.5]"


def test_a_network_that_loops_over_samples_is_for_batches_of_one(tmp_path: Path) -> None:
    written = write_pt2(request(OneByOne(), tmp_path / "a.pt2"))
    assert written.agreements[0].batch_sizes == (1,)
    assert any("fixed to 1" in note for note in written.notes)


def test_a_program_that_computes_something_else_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = pt2._read_back

    def wrong(path: Path) -> Any:
        run = read(path)
        return lambda batch: [value + 0.1 for value in run(batch)]

    monkeypatch.setattr(pt2, "_read_back", wrong)
    with pytest.raises(ExportError, match="does not compute"):
        write_pt2(request(Net(), tmp_path / "a.pt2"))
    assert not list(tmp_path.iterdir())
