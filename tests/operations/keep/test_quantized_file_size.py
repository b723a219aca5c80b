"""Files of quantized networks are as small as their bits say, and need nothing but themselves."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cctool
from cctool.checkpoint.checkpoint import Checkpoint, open_file, save
from cctool.checkpoint.spec import ModelSpec, Step
from cctool.models import registry
from cctool.operations.keep.encode import quantized_weights, settled
from cctool.operations.quantize.plan import attach_plan, plan
from cctool.operations.registries import tables
from cctool.options.common import DataOptions
from cctool.options.quantize.choices import QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.quantize.parts import CalibrationOptions
from cctool.quantization.network.attach import quantizers_of
from cctool.quantization.network.edit import with_quantizers

WEIGHTS = 270_608
STEP = Step(verb="quantize", options={f"option{i}": f"value{7 * i}" for i in range(40)}, seed=0)
KINDS: list[tuple[QuantizeMethod, int, dict[str, Any]]] = [
    (QuantizeMethod.INT8, 8, {"calibration": CalibrationOptions(reduce_range=False)}),
    (QuantizeMethod.INT8, 7, {}),
    (QuantizeMethod.INT4, 4, {}),
    (QuantizeMethod.INT2, 2, {}),
    (QuantizeMethod.LSQ, 2, {"weight_bits": 2, "activation_bits": 4}),
    (QuantizeMethod.DOREFA, 4, {"weight_bits": 4, "activation_bits": 4}),
]


def resnet20() -> Checkpoint:
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_channels": 1}
    model = registry.build("resnet20", arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    spec = ModelSpec(architecture="resnet20", arguments=arguments, input_shape=(1, 32, 32))
    # Histories of compressed networks have two lines at least.
    return Checkpoint(model.eval(), spec, history=(STEP, STEP))


def quantized(method: QuantizeMethod, **options: Any) -> Checkpoint:
    checkpoint = resnet20()
    model = checkpoint.model
    attach_plan(
        model, plan(checkpoint, QuantizeOptions(data=DataOptions(data="digits"), method=method, **options))
    )
    with torch.no_grad():
        for _, weight, quantizer, fold in quantized_weights(model):
            quantizer.initialise(weight, fold)
    held = quantizers_of(model)
    assert held is not None
    for index, key in enumerate(held.activation_keys):
        quantizer = held.quantizer(key)
        if quantizer is not None and quantizer.has_range:
            quantizer.set_range(torch.tensor(-0.1 * index), torch.tensor(1.0 + index))
    return settled(replace(checkpoint, spec=with_quantizers(checkpoint.spec, model)), tables())


@pytest.mark.parametrize(("method", "bits", "options"), KINDS)
def test_a_quantized_network_is_as_small_as_its_bits_say(
    method: QuantizeMethod, bits: int, options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = quantized(method, **options)
    assert sum(math.prod(form.shape) for form in checkpoint.stored.values()) == WEIGHTS
    packed = WEIGHTS * bits / 8
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"small{suffix}"
        save(checkpoint, path, tables())
        assert packed < path.stat().st_size <= 1.05 * packed + 20_000
        payload = open_file(path).payload
        assert payload is not None
        # Names, spec and history of all tensors, and the container.
        assert path.stat().st_size <= sum(value.nbytes for value in payload.tensors.values()) + 6_000
    loaded = cctool.load(tmp_path / "small.pt")
    x = torch.linspace(-1, 1, 1024).reshape(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), checkpoint.model.eval()(x))
