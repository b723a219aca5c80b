"""Networks without swapped layers and codecs, and codecs written as plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cctool.transforms.codec.codec import CodecConfig, CodecState, encode, reconstruct
from cctool.transforms.codec.export import ExportedCodec
from cctool.transforms.codec.taps import CalibratedTap, set_taps, tap_buffers, taps_of
from cctool.transforms.kernels.spatial import block_sizes
from cctool.transforms.layers.axes import TransformedAxis
from cctool.transforms.layers.build import coefficient_layer
from cctool.transforms.layers.coefficients import Coefficients
from cctool.transforms.plain import exportable, plain_model, type_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


def swapped() -> nn.Sequential:
    model = network()
    axis = TransformedAxis(dim=1, kernel="dct", size=64, kept=64)
    model[4] = coefficient_layer(model[4], Coefficients(axes=(axis,))).eval()
    return model


def images(size: int = 8) -> Tensor:
    return torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(1))


def tap(**given: Any) -> CalibratedTap:
    config = CodecConfig(**{"kernel": "dct", "table": (20.0,), "prequantizer": "offset", **given})
    return CalibratedTap(config, (4, 4, 4), "", torch.tensor([-1.0, 1.0]))


def test_a_network_of_ordinary_layers_is_its_own_plain_one() -> None:
    model = network()
    assert plain_model(model) is model
    assert exportable(model, codec=True) is model


def test_swapped_layers_and_codecs_are_gone_and_the_rest_is_shared() -> None:
    model = swapped()
    set_taps(model, {"2": tap()})
    plain = plain_model(model)
    assert [type(layer) for layer in plain] == [type(layer) for layer in network()]
    assert not taps_of(plain)
    assert not tap_buffers(plain)
    assert taps_of(model)
    assert plain[0].weight is model[0].weight
    torch.testing.assert_close(plain(images()), network()(images()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(images()), plain(images()), rtol=1e-3, atol=1e-3)


def test_a_codec_on_a_swapped_layer_stays_on_what_is_exported() -> None:
    model = network()
    axis = TransformedAxis(dim=2, kernel="dct", size=3, kept=3)
    model[2] = coefficient_layer(model[2], Coefficients(axes=(axis,))).eval()
    set_taps(model, {"2": tap()})
    coded = exportable(model, codec=True)
    assert type(coded[2]) is nn.Conv2d
    torch.testing.assert_close(coded(images()), model(images()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exportable(model, codec=False)(images()), plain_model(model)(images()))


def test_types_of_layers_say_what_they_are_made_of() -> None:
    assert type_of(network()[4]) == "Linear"
    assert type_of(swapped()[4]) == "Linear (dct coefficient)"


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()


@pytest.mark.parametrize(
    "config",
    [
        {"kernel": "dct", "table": (30.0,)},
        {"kernel": "dst", "table": (30.0,), "norm": "none"},
        {"kernel": "dft", "table": (30.0,), "symbol_bits": 3},
        {"kernel": "haar", "table": (9.0,), "levels": 3, "mean_shift": True},
        {"kernel": "bior2.2", "table": (9.0, 7.0, 5.0), "levels": 2},
        {"kernel": "identity", "bits": 4},
        {"kernel": "klt", "table": (30.0,), "block": 4},
        {"kernel": "dct", "table": (30.0,), "channel_klt": True, "dead_zone": 0.2, "block": 5},
    ],
    ids=lambda config: config["kernel"],
)
@pytest.mark.parametrize("size", [(8, 8), (7, 14), (1, 20)])
@pytest.mark.parametrize("prequantizer", ["offset", "signed"])
def test_codecs_as_arithmetic_are_the_codecs(
    config: dict[str, Any], size: tuple[int, int], prequantizer: str
) -> None:
    made = CodecConfig(**config, prequantizer=prequantizer)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    bases = {"channels": orthogonal(3, 0)} if made.channel_klt else {}
    if made.kernel == "klt":
        for axis, length in (("columns", size[0]), ("rows", size[1])):
            for side in set(block_sizes(length, made.block)):
                bases[axis if side == made.block else f"{axis}_rest"] = orthogonal(side, side)
    state = CodecState(made, torch.tensor([-2.0, 2.0]), bases)
    expected = reconstruct(encode(x, state), state)
    found = ExportedCodec(state, size)(x)
    # Sums in another order may round a tie the other way: a step of one coefficient.
    assert float((found != expected).double().mean()) < 0.02
    assert found.dtype == x.dtype
    assert not torch.equal(expected, x)
