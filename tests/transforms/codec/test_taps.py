"""Taps on networks: what hooks do, where they go with their module, and the edit that brings them back."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cctool.base.errors import CorruptCheckpointError, SpecError, TransformError
from cctool.checkpoint.spec import ModelSpec
from cctool.transforms.codec.codec import CodecConfig, CodecState, Symbols, encode, reconstruct
from cctool.transforms.codec.taps import (
    TAP,
    CalibratedTap,
    Tap,
    bypassed,
    drop_taps,
    fingerprint,
    recording,
    set_quality,
    set_taps,
    stale_taps,
    state_of,
    tap_buffers,
    taps_of,
    with_taps,
)

DCT = CodecConfig(kernel="dct", table=(16.0,))
KLT = CodecConfig(kernel="klt", table=(16.0,), channel_klt=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)
    ).eval()


def tap(codec: CodecConfig = DCT, channels: int = 4, size: int = 12) -> CalibratedTap:
    bases = {}
    if codec.kernel == "klt":
        bases = {name: torch.eye(side).flip(0) for name, side in (("rows", 8), ("columns", 8))}
        bases |= {name: torch.eye(4) for name in ("rows_rest", "columns_rest")}
    if codec.channel_klt:
        bases["channels"] = torch.eye(channels).roll(1, 0)
    return CalibratedTap(codec, (channels, size, size), "", torch.tensor([-0.5, 2.0]), bases)


def images(n: int = 2) -> Tensor:
    return torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def test_the_reconstruction_feeds_the_next_module() -> None:
    model = network()
    x = images()
    with torch.no_grad():
        y = model[:2](x)
        codec = CodecState(DCT, torch.tensor([-0.5, 2.0]))
        expected = model[2:](reconstruct(encode(y, codec), codec))
        plain = model(x)
        set_taps(model, {"1": tap()})
        assert torch.equal(model(x), expected)
        assert not torch.equal(plain, expected)
        with bypassed(model):
            assert torch.equal(model(x), plain)
        assert torch.equal(model(x), expected)


def test_values_with_and_without_gradients_are_the_same() -> None:
    model = network()
    set_taps(model, {"1": tap(), "2": tap(KLT)})
    with torch.no_grad():
        expected = model(images())
    found = model(images())
    assert torch.equal(found, expected)
    found.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(model(images()), expected)


def test_names_of_other_tensors_stay_and_buffers_follow_the_module() -> None:
    model = network()
    before = list(model.state_dict())
    set_taps(model, {"1": tap(KLT)})
    added = {
        f"1.tap_{name}" for name in ("range", "channels", "rows", "rows_rest", "columns", "columns_rest")
    }
    assert set(model.state_dict()) == {*before, *added}
    assert tap_buffers(model) == added
    assert all(b.dtype == torch.float64 for b in deepcopy(model).double().buffers())
    copy = deepcopy(model)
    assert taps_of(copy)["1"] is not taps_of(model)["1"]
    state_of(copy, "1").bounds.fill_(1.0)
    assert state_of(model, "1").bounds.tolist() == [-0.5, 2.0]
    parts = drop_taps(model)
    assert list(model.state_dict()) == before
    assert not taps_of(model)
    set_taps(model, parts)
    fresh = deepcopy(network())
    set_taps(fresh, {"1": tap(KLT)})
    assert torch.equal(model(images()), fresh(images()))


def test_a_tap_that_is_there_is_replaced() -> None:
    model = network()
    set_taps(model, {"1": tap(KLT)})
    set_taps(model, {"1": tap()})
    assert tap_buffers(model) == {"1.tap_range"}
    assert len(model[1]._forward_hooks) == 1


def test_every_pass_is_recorded_and_may_be_replaced() -> None:
    model = network()
    set_taps(model, {"0": tap(), "2": tap()})
    seen: list[tuple[str, Symbols, Tensor, Tensor]] = []

    def sink(name: str, symbols: Symbols, x: Tensor, y: Tensor) -> Tensor | None:
        seen.append((name, symbols, x.clone(), y.clone()))
        return torch.zeros_like(y) if name == "2" else None

    with torch.no_grad():
        raw = model[0](images())
        with recording(model, sink):
            out = model(images())
    assert [entry[0] for entry in seen] == ["0", "2"]
    name, symbols, x, y = seen[0]
    assert torch.equal(reconstruct(symbols, state_of(model, name)), y)
    assert symbols.shape == (2, 4, 12, 12)
    assert torch.equal(y, raw)  # the module outside the model is tapped, too
    assert not torch.equal(x, y)
    assert not out.any()
    assert model(images()).any()
    assert len(seen) == 2


def test_a_module_that_is_passed_twice_codes_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 2, 3, padding=1)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))  # type: ignore[no-any-return]

    model = Twice().eval()
    set_taps(model, {"a": tap(channels=2)})
    seen: list[str] = []
    with torch.no_grad(), recording(model, lambda name, *_: seen.append(name)):
        model(torch.rand(1, 2, 12, 12))
    assert seen == ["a", "a"]
    assert tap_buffers(model) == {"a.tap_range", "b.tap_range"}


def test_channels_last_stays() -> None:
    model = network().to(memory_format=torch.channels_last)
    set_taps(model, {"0": tap()})
    x = images().to(memory_format=torch.channels_last)
    layouts: list[bool] = []
    model[1].register_forward_pre_hook(
        lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    with torch.no_grad():
        last = model(x)
    assert layouts == [True]
    plain = network()
    set_taps(plain, {"0": tap()})
    assert torch.allclose(plain(images()), last, atol=0.02)


def test_the_range_of_the_type_stays() -> None:
    model = network()
    set_taps(model, {"0": tap()})
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert model[0](images()).dtype == torch.bfloat16


def test_an_output_that_is_no_map_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    set_taps(model, {"1": tap()})
    with pytest.raises(TransformError, match=r"Linear returned a tensor \[2, 3\]"):
        model(images())


def test_fingerprints_tell_other_weights() -> None:
    model = network()
    now = fingerprint(model)
    set_taps(model, {"1": CalibratedTap(DCT, (4, 12, 12), now, torch.tensor([0.0, 1.0]))})
    assert fingerprint(model) == now
    assert stale_taps(model) == ()
    with torch.no_grad():
        model[2].bias[0] += 1
    assert stale_taps(model) == ("1",)
    assert stale_taps(network()) == ()


def test_quality_changes_the_steps_and_not_the_calibration() -> None:
    model = network()
    set_taps(model, {"1": tap()})
    before = model(images())
    set_quality(model, 90.0)
    fine = model(images())
    set_quality(model, None)
    assert torch.equal(model(images()), before)
    with bypassed(model):
        exact = model(images())
    assert (fine - exact).abs().mean() < (before - exact).abs().mean()


def spec(model: nn.Module) -> ModelSpec:
    return with_taps(ModelSpec(architecture="x", input_shape=(1, 12, 12)), model)


def test_the_edit_brings_a_tap_back() -> None:
    model = network()
    set_taps(model, {"1": tap(KLT), "2": tap()})
    edits = [Tap.model_validate(edit) for edit in spec(model).edits]
    assert [edit.module for edit in edits] == ["1", "2"]
    fresh = network()
    for edit in edits:
        TAP.apply(fresh, edit)
        TAP.apply(fresh, edit)  # twice changes nothing more
    fresh.load_state_dict(model.state_dict())
    for edit in edits:
        assert TAP.check is not None
        TAP.check(fresh, edit)
    assert torch.equal(fresh(images()), model(images()))
    assert spec(fresh) == spec(model)
    set_taps(model, {"2": drop_taps(model)["2"]})
    assert [edit["module"] for edit in spec(model).edits] == ["2"]
    assert with_taps(spec(fresh), network()).edits == ()


def edit(**changes: Any) -> Tap:
    return Tap(**({"module": "1", "codec": KLT, "shape": (4, 12, 12), "fingerprint": ""} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"module": "9"}, "no module '9'"),
        ({"shape": (10**9, 12, 12)}, "have no codec"),
        ({"shape": (0, 12, 12)}, "have no codec"),
    ],
)
def test_a_hostile_edit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        TAP.apply(network(), edit(**changes))


def test_more_hostile_edits() -> None:
    with pytest.raises(ValidationError):
        edit(shape=(1, 2))
    with pytest.raises(ValidationError):
        edit(codec={"kernel": "__import__('os')"})
    with pytest.raises(ValidationError):
        edit(fingerprint="x" * 1000)
    own = network()
    own[1].register_buffer("tap_range", torch.zeros(2))
    with pytest.raises(SpecError, match="of its own"):
        TAP.apply(own, edit())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit")
        scripted = nn.Sequential(nn.ReLU(), torch.jit.script(nn.ReLU()))
    with pytest.raises(SpecError, match="scripted"):
        TAP.apply(scripted, edit())


@pytest.mark.parametrize(
    ("buffer", "value", "words"),
    [
        ("tap_range", [2.0, -2.0], "no range"),
        ("tap_range", [0.0, float("nan")], "no range"),
        ("tap_channels", [[1.0] * 4] * 4, "not orthogonal"),
    ],
)
def test_hostile_values_are_refused(buffer: str, value: list[Any], words: str) -> None:
    model = network()
    set_taps(model, {"1": tap(KLT)})
    getattr(model[1], buffer).copy_(torch.tensor(value))
    assert TAP.check is not None
    with pytest.raises(CorruptCheckpointError, match=words):
        TAP.check(model, edit())
