"""The checkpoints under golden/: one of each kind, which every later version must load.

``python tests/toys/golden_checkpoints.py`` writes those that are not there; a file that exists is a
promise and is never written again.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cctool.base.networks import copied
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.edits.fold import with_folds
from cctool.checkpoint.edits.mask import add_masks, with_masks
from cctool.checkpoint.edits.thin import Cut
from cctool.checkpoint.file.payload import ResumeState, fingerprint_of
from cctool.operations.keep import events
from cctool.operations.keep.encode import settled
from cctool.operations.quantize.plan import attach_plan, plan
from cctool.options.common import DataOptions
from cctool.options.quantize.choices import QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.quantization.encodings.masked import Inner
from cctool.quantization.network.attach import quantizers_of
from cctool.quantization.network.edit import with_quantizers
from cctool.quantization.network.points import Observing
from cctool.transforms.basis.build import basis_layer
from cctool.transforms.basis.linear import BasisArguments
from cctool.transforms.codec.codec import CodecConfig
from cctool.transforms.codec.taps import CalibratedTap, set_taps, with_taps
from cctool.transforms.fold.fold import fold_network
from cctool.transforms.layers.axes import TransformedAxis
from cctool.transforms.layers.base import with_swaps
from cctool.transforms.layers.build import coefficient_layer
from cctool.transforms.layers.coefficients import Coefficients
from cctool.transforms.swap import put_in_place
from checkpoint_toys import INPUT, TABLES, cut, make, masked, quantized
from procedure_toys import context

FOLDER = Path(__file__).parents[1] / "checkpoint" / "golden"
EXPECTED = FOLDER / "expected.json"


def thinned() -> Checkpoint:
    """The toy with two of four inner channels."""
    return cut(make(seed=3), torch.tensor([1, 3]))


def new_head() -> Checkpoint:
    """The thinned toy with a fresh last layer of five outputs, more than the architecture's three."""
    return events.new_head(thinned(), ["fc"], 5, context(seed=16)).checkpoint


def folded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its batch norm in the convolution, which has a bias now."""
    folding = fold_network(checkpoint.model, checkpoint.spec.input_shape)
    return replace(checkpoint, spec=with_folds(checkpoint.spec, checkpoint.model, folding.edits))


def resumable() -> Checkpoint:
    """The toy in the middle of a training."""
    state = ResumeState({"moment": torch.arange(3.0), "rng": torch.arange(4).byte()}, {"epoch": 2})
    return replace(make(seed=4), resume=state)


def single_weights(inner: Inner | None = None) -> Checkpoint:
    """The toy with half of the single weights of two layers, one bias and one batch norm's scale masked."""
    checkpoint = make(seed=9, width=8)
    generator = torch.Generator().manual_seed(9)
    parameters = dict(checkpoint.model.named_parameters())
    names = ("conv.weight", "bn.weight", "depthwise.weight", "fc.bias")
    shapes = {name: parameters[name].shape for name in names}
    return masked(
        checkpoint, {n: torch.rand(shape, generator=generator) < 0.5 for n, shape in shapes.items()}, inner
    )


def two_of_four() -> Checkpoint:
    """The toy whose last layer keeps two of every four neighbours."""
    pattern = torch.tensor([[True, False, False, True] * 2] * 3)
    return masked(make(seed=10, width=8), {"fc.weight": pattern})


def swapped(*layers: tuple[str, nn.Module], keep: float | None = None) -> Checkpoint:
    """The toy with other layers in the place of some; ``keep`` is the share of coefficients that stay."""
    checkpoint = make(seed=11, width=8)
    for name, layer in layers:
        put_in_place(checkpoint.model, name, layer)
    if keep is not None:
        named = {f"{name}.coefficients": layer.coefficients for name, layer in layers}
        bounds = {name: value.abs().flatten().quantile(1 - keep) for name, value in named.items()}
        add_masks(checkpoint.model, {name: value.abs() >= bounds[name] for name, value in named.items()})
    spec = with_masks(with_swaps(checkpoint.spec, checkpoint.model), checkpoint.model)
    return replace(checkpoint, spec=spec, model=checkpoint.model.eval())


def layer_of(name: str) -> nn.Module:
    """A layer of the toy that `swapped` changes."""
    return make(seed=11, width=8).model.get_submodule(name)


def coefficients(name: str, *axes: TransformedAxis) -> tuple[str, nn.Module]:
    """A layer of the toy, by coefficients."""
    return name, coefficient_layer(layer_of(name), Coefficients(axes=axes))


def basis(name: str, **arguments: Any) -> tuple[str, nn.Module]:
    """A layer of the toy, by basis functions."""
    torch.manual_seed(12)
    return name, basis_layer(layer_of(name), BasisArguments(**arguments))


def energetic() -> Checkpoint:
    """Linear layer and convolution by a DCT and a wavelet, half of the coefficients."""
    linear = [TransformedAxis(dim=d, kernel="dct", size=n, kept=n) for d, n in ((0, 3), (1, 8))]
    spatial = [TransformedAxis(dim=d, kernel="db2", size=3, kept=3, levels=1) for d in (2, 3)]
    return swapped(coefficients("fc", *linear), coefficients("depthwise", *spatial), keep=0.5)


def cut_corner() -> Checkpoint:
    """A low-frequency corner of a KLT and of blocks of a DST, with places cut."""
    axes = (
        TransformedAxis(dim=0, kernel="klt", size=3, kept=2),
        TransformedAxis(dim=1, kernel="dst", size=8, kept=2, block=4),
    )
    name, layer = coefficients("fc", *axes)
    left = torch.tensor([0, 2, 3, 5, 6, 7])
    checkpoint = cut(make(seed=11, width=8), left)
    put_in_place(checkpoint.model, name, layer.taken({"weight": [Cut(1, left, 8)]}))
    return replace(checkpoint, spec=with_swaps(checkpoint.spec, checkpoint.model))


def tapped(**codec: Any) -> Checkpoint:
    """The toy with a codec behind its first convolution."""
    checkpoint = make(seed=13)
    tap = CalibratedTap(CodecConfig(**codec), (4, 6, 6), "", torch.tensor([-2.0, 2.5]), {})
    set_taps(checkpoint.model, {"conv": tap})
    return replace(checkpoint, spec=with_taps(checkpoint.spec, checkpoint.model))


def quantizers(method: QuantizeMethod, **options: Any) -> Checkpoint:
    """The toy with quantizers of weights and activations."""
    checkpoint = make(seed=14, width=8)
    model, asked = checkpoint.model, QuantizeOptions(method=method, data=DataOptions(data="x"), **options)
    attach_plan(model, plan(checkpoint, asked))
    held = quantizers_of(model)
    assert held is not None
    for index, (key, quantizer) in enumerate(held.named()):
        if not quantizer.weight and quantizer.has_range:
            low = 0.0 if quantizer.config.symmetric else -0.25
            quantizer.set_range(torch.tensor(low), torch.tensor(1 + index / 8))
        elif quantizer.weight:
            quantizer.initialise(model.get_parameter(key.replace("/", ".")).detach())
    held.state.method, held.state.images, held.state.observing = str(method), 32, Observing()
    held.state.fingerprint = fingerprint_of(model)
    model.eval()
    return settled(replace(checkpoint, spec=with_quantizers(checkpoint.spec, model)), TABLES)


def expected_logits(name: str, checkpoint: Checkpoint, x: torch.Tensor = INPUT) -> torch.Tensor:
    """What the network computes; with quantized activations in float64.

    There no sum is so near to the middle of two integers that the order of its terms decides between them.
    """
    model = checkpoint.model.eval()
    if name.startswith("quantizers"):
        model, x = copied(model).double(), x.double()
    with torch.no_grad():
        result: torch.Tensor = model(x)
    return result


KINDS = {
    "dense.pt": lambda: make(seed=1),
    "dense.safetensors": lambda: make(seed=1),
    "tied.pt": lambda: make("tied", seed=2),
    "thinned.pt": thinned,
    "folded.pt": lambda: folded(make("branches", seed=17)),
    "folded-thinned.safetensors": lambda: folded(thinned()),
    "new-head.pt": new_head,
    "resumable.pt": resumable,
    "fp16.pt": lambda: quantized(make(seed=5), "fp16"),
    "bf16.pt": lambda: quantized(make(seed=6), "bf16"),
    "uint8.pt": lambda: quantized(make(seed=7), "affine-u8", axis=None),
    "uint8-per-channel.pt": lambda: quantized(make(seed=8), "affine-u8", axis=0),
    "uint8-per-channel.safetensors": lambda: quantized(make(seed=8), "affine-u8", axis=0),
    "thinned-uint8.pt": lambda: quantized(thinned(), "affine-u8", axis=1),
    "masked.pt": single_weights,
    "masked.safetensors": single_weights,
    "masked-2-4.pt": two_of_four,
    "masked-thinned.pt": lambda: masked(thinned(), {"fc.weight": torch.tensor([[True, False]] * 3)}),
    "masked-uint8.pt": lambda: single_weights(Inner("affine-u8")),
    "masked-uint8-per-channel.safetensors": lambda: single_weights(Inner("affine-u8", 0)),
    "masked-fp16.pt": lambda: single_weights(Inner("fp16")),
    "coefficients.pt": energetic,
    "coefficients-cut.safetensors": cut_corner,
    "basis-dct.pt": lambda: swapped(
        basis("conv", kernel="dct", outputs=8, inputs=1), basis("fc", kernel="dst", outputs=3, inputs=8)
    ),
    "basis-dft.pt": lambda: swapped(basis("fc", kernel="dft", outputs=3, inputs=8, ends=True)),
    "intn.pt": lambda: quantized(make(seed=14, width=8), "intn", bits=4, symmetric=True, axis=0, group=None),
    "intn-groups.safetensors": lambda: quantized(
        make(seed=14, width=8), "intn", bits=3, symmetric=False, axis=0, group=5
    ),
    "codebook-kmeans.pt": lambda: quantized(
        make(seed=14, width=8), "codebook", kind="kmeans", bits=3, axis=None, init="linear", seed=0
    ),
    "codebook-apot.safetensors": lambda: quantized(
        make(seed=14, width=8), "codebook", kind="apot", bits=4, terms=2, axis=0
    ),
    "masked-intn.pt": lambda: single_weights(Inner("intn", 0, {"bits": 2, "symmetric": True, "group": None})),
    "quantizers-int8.pt": lambda: quantizers(QuantizeMethod.INT8),
    "quantizers-qat.safetensors": lambda: quantizers(QuantizeMethod.QAT, weight_bits=4, asymmetric=True),
    "quantizers-lsq.pt": lambda: quantizers(QuantizeMethod.LSQ, weight_bits=2, activation_bits=4),
    "quantizers-dorefa.pt": lambda: quantizers(QuantizeMethod.DOREFA, weight_bits=2, activation_bits=4),
    "tap-dct.pt": lambda: tapped(
        kernel="dct", prequantizer="offset", k=2, table=tuple(range(4, 19)), quality=60.0, block=8
    ),
    "tap-dwt.safetensors": lambda: tapped(
        kernel="haar", prequantizer="signed", mean_shift=True, levels=2, table=(9.0, 6.0, 3.0), symbol_bits=8
    ),
}


def main() -> None:
    """Write what is missing."""
    FOLDER.mkdir(exist_ok=True)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    for name, kind in KINDS.items():
        if not (FOLDER / name).exists():
            checkpoint = kind()
            parent = save(checkpoint, FOLDER / name, TABLES)
            expected[name] = {"content": parent.content, "logits": expected_logits(name, checkpoint).tolist()}
            print(name, (FOLDER / name).stat().st_size)
    expected["input"] = INPUT.flatten().tolist()
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
