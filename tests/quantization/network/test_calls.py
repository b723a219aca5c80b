"""The calls of a pass, and what flows between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cctool.quantization.network.calls import INPUT, CallSite, Flow, flow_of
from quantizing_toys import Functional, Lost, Residual, images, made


def flow(build: type[nn.Module]) -> Flow:
    return flow_of(made(build), (images(),))


def test_a_shared_module_has_a_place_for_each_time_it_is_passed() -> None:
    relus = [call.place for call in flow(Residual).calls if call.place.function == "relu"]
    assert relus == [CallSite("relu", "relu", 0), CallSite("relu", "relu", 1)]
    convolutions = [call for call in flow(Functional).calls if call.place.module == "twice"]
    assert [call.place.number for call in convolutions] == [0, 1]
    assert {call.weight for call in convolutions} == {"twice.weight"}


def test_values_are_followed_from_call_to_call() -> None:
    found = flow(Residual)
    by_key = {(call.place.module, call.place.key): number for number, call in enumerate(found.calls)}
    add = found.calls[by_key["", "add#0"]]
    assert add.sources == (by_key["bn2", "batch_norm#0"], by_key["relu", "relu#0"])
    assert found.calls[by_key["conv1", "conv2d#0"]].sources == (INPUT,)
    assert found.outputs == (by_key["fc", "linear#0"],)
    assert set(found.calls[by_key["relu", "relu#0"]].users) == {
        by_key["conv2", "conv2d#0"],
        by_key["", "add#0"],
    }


def test_a_result_in_place_counts_as_lost_only_where_the_network_drops_it() -> None:
    assert [call.place.function for call in flow(Lost).calls if call.lost] == ["relu"]
    assert not any(call.lost for call in flow(Residual).calls)


def test_what_depends_on_no_input_is_constant() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.conv.weight - self.conv.weight.mean()
            return nn.functional.conv2d(x, weight).mean((2, 3))

    calls = {call.place.function: call for call in flow_of(made(Standardised), (images(),)).calls}
    assert calls["sub"].constant
    assert not calls["conv2d"].constant
    assert calls["conv2d"].weight == "conv2d#0:weight"
    assert calls["conv2d"].weight_shape == (4, 3, 1, 1)


def test_the_network_stays_as_it_is() -> None:
    model, x = made(Residual), images()
    before, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    kept = x.clone()
    flow_of(model, (x,))
    assert torch.equal(model(x), before)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks


class Loops(nn.Module):
    """Layers called for each sample, for chunks of 100, as often as the input says, and three times."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        self.single, self.chunked, self.repeated, self.thrice = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3)).repeat(1, 2)[:, :4]
        y = torch.stack([self.single(sample) for sample in y])
        y = torch.cat([self.chunked(part) for part in y.split(100)])
        for _ in range(3):
            y = self.thrice(y)
        # The values that a network is traced with have a smaller sum than those of another pass.
        for _ in range(1 + int(x.abs().sum() > 1) if self.asks else 1):
            y = self.repeated(y)
        return y


def test_loops_of_varying_length_are_told_from_fixed_ones() -> None:
    x = torch.full((2, 3, 4, 4), 1e-3)
    found = {c.place.module: c.looped for c in flow_of(Loops(asks=False).eval(), (x,)).calls if c.weight}
    samples = "how often it is called depends on the number of samples, as in a loop over them"
    assert found == {"single": samples, "chunked": samples, "thrice": "", "repeated": ""}
    # Nothing is known of chunks where the code asks for values, which a pass of shapes has none of.
    found = {c.place.module: c.looped for c in flow_of(Loops(asks=True).eval(), (x,)).calls if c.weight}
    assert found["single"] == samples
    assert found["thrice"] == ""
    assert found["repeated"] == "how often it is called depends on the network's input"
