"""`cctool quantize` of networks that call layers in a loop over the batch: no result depends on its size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import QuantizationError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.spec import ModelSpec
from cctool.operations.registries import tables
from cctool.options.quantize.choices import Edges, QuantizeMethod
from cctool.options.quantize.parts import LayerBits
from cctool.options.target import parse_target
from cctool.quantization.network.attach import quantizers_of
from computed_toys import DATA, digit_images, signal_to_noise
from procedure_toys import context
from quantized_toys import outcome

REASON = "how often it is called depends on the number of samples, as in a loop over them"


class Mixed(nn.Module):
    """A stem, a branch that is called for ``chunk`` samples at a time, one layer three times, and a head."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 5, 4, 2), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
        self.again = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.branch(piece) for piece in self.stem(x).split(self.chunk)])
        for _ in range(3):
            y = y + self.again(y).relu()
        return self.head(y)


class Whole(nn.Module):
    """A network that takes one sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 5, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(x[i : i + 1])[0] for i in range(len(x))])


def singly(num_classes: int = 10) -> nn.Module:
    return Mixed(1)


def in_chunks(num_classes: int = 10) -> nn.Module:
    return Mixed(24)


def whole(num_classes: int = 10) -> nn.Module:
    return Whole()


LOOPS = {made.__name__: made for made in (singly, in_chunks, whole)}


def network(name: str) -> Checkpoint:
    torch.manual_seed(0)
    spec = ModelSpec(architecture=f"{Path(__file__)}:{name}", input_shape=(1, 32, 32))
    return Checkpoint(LOOPS[name]().eval(), spec)


def quantized(name: str, **given: Any) -> tuple[Checkpoint, Any]:
    """The float network, and what its quantization hands out."""
    floats = network(name)
    where = context(arch=floats.spec.architecture)
    return floats, outcome(floats, where, **{"data": DATA, "images": 64} | given)


def by_batches(checkpoint: Checkpoint, images: Tensor, size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([checkpoint.model.eval()(batch) for batch in images.split(size)])


@pytest.mark.parametrize("method", [QuantizeMethod.INT8, QuantizeMethod.QAT, QuantizeMethod.LSQ])
@pytest.mark.parametrize("name", ["singly", "in_chunks"])
def test_outputs_do_not_depend_on_the_batch(name: str, method: QuantizeMethod, tmp_path: Path) -> None:
    floats, found = quantized(name, method=method, **({} if method is QuantizeMethod.INT8 else {"epochs": 1}))
    images = digit_images(floats)
    alone = by_batches(found.checkpoint, images, 1)
    for size in (3, 25, 64):
        torch.testing.assert_close(by_batches(found.checkpoint, images, size), alone, atol=1e-5, rtol=1e-5)
    assert {item.name for item in found.report.left if item.reason == REASON} >= {"branch.0"}
    held = quantizers_of(found.checkpoint.model)
    assert held is not None
    assert {place.module.split(".")[0] for place in held.state.calls} >= {"stem", "again", "head"}
    # A loop of fixed length has a range for each of its calls.
    again = [place.number for place in held.state.calls if place.module == "again"]
    assert len(again) == 3
    assert all(place.module != "branch.0" for place in held.state.calls)
    if method is QuantizeMethod.INT8:
        assert signal_to_noise(by_batches(floats, images, 64), alone) > 18
    save(found.checkpoint, tmp_path / "a.pt", tables())
    again_loaded = load(tmp_path / "a.pt", tables(frozenset({floats.spec.architecture})))
    assert torch.equal(by_batches(again_loaded, images, 25), by_batches(found.checkpoint, images, 25))


def test_each_loop_is_named_once_in_the_report() -> None:
    _, found = quantized("singly")
    named = [item.name for item in found.report.left if item.reason == REASON]
    assert sorted(named) == sorted(set(named))


@pytest.mark.parametrize(
    "given",
    [
        {"edges": Edges.SAME},
        {"layers": (LayerBits("branch.0", 8),)},
        {"target": parse_target("bytes=0.6")},
    ],
)
def test_options_of_layers_and_searches_leave_the_loop_in_floats(given: dict[str, Any]) -> None:
    _, found = quantized("singly", **given)
    assert ("branch.0", REASON) in {(item.name, item.reason) for item in found.report.left}
    assert "branch.0.weight" not in found.checkpoint.stored
    assert "again.weight" in found.checkpoint.stored


def test_weights_alone_are_quantized_in_loops_too() -> None:
    floats, found = quantized("singly", method=QuantizeMethod.INT8, weight_only=True)
    assert "branch.0.weight" in found.checkpoint.stored
    images = digit_images(floats)
    wanted = by_batches(found.checkpoint, images, 1)
    torch.testing.assert_close(by_batches(found.checkpoint, images, 64), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [QuantizeMethod.QAT, QuantizeMethod.DOREFA])
def test_weights_alone_that_are_trained_leave_the_loop_in_floats(method: QuantizeMethod) -> None:
    floats, found = quantized("singly", method=method, weight_only=True, epochs=1)
    assert "branch.0.weight" not in found.checkpoint.stored
    assert "again.weight" in found.checkpoint.stored
    images = digit_images(floats)
    wanted = by_batches(found.checkpoint, images, 1)
    torch.testing.assert_close(by_batches(found.checkpoint, images, 64), wanted, atol=1e-5, rtol=1e-5)


def test_a_network_that_is_all_in_the_loop_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"body\.0, body\.3: how often .*--weight-only"):
        quantized("whole", data=replace(DATA, limit=32))


def test_a_target_that_cannot_be_reached_names_the_loop_once() -> None:
    with pytest.raises(QuantizationError, match=r"cannot be reached") as caught:
        quantized("singly", target=parse_target("bytes=0.01"))
    assert str(caught.value).count("branch.0 stays in floating point") == 1
