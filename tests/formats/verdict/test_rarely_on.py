"""Inputs that switch on what hardly any do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cctool.formats.verdict.compare import many_batches, prime_size
from cctool.formats.verdict.rarely_on import RARE, rarely_on

SHAPE = (2, 4, 4)


class Channels(nn.Module):
    """Channel i of an activation is on where the mean of the input exceeds so many of its deviations."""

    def __init__(self, *thresholds: float, activation: str = "relu") -> None:
        super().__init__()
        self.thresholds, self.activation = nn.Buffer(torch.tensor(thresholds)), activation

    def forward(self, x: Tensor) -> Tensor:
        z = means(x)[:, None] - self.thresholds
        return torch.stack((getattr(F, self.activation)(z), z), 1).permute(0, 2, 1)


def means(x: Tensor) -> Tensor:
    """Standard normal for standard normal inputs."""
    return x.flatten(1).sum(1) / x[0].numel() ** 0.5


def batches(count: int = 8, size: int = 251) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, *SHAPE, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    "activation", ["relu", "relu6", "hardtanh", "hardswish", "silu", "gelu", "softplus", "elu", "mish"]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_inputs_for_a_channel_that_is_rarely_on(activation: str, sign: int) -> None:
    class One(Channels):
        def forward(self, x: Tensor) -> Tensor:
            # Far below 0 smooth ones are off, too; a negative factor makes others of what is on.
            return getattr(F, activation)(8 * (sign * means(x)[:, None] - self.thresholds))

    chosen, looked = rarely_on(One(0.0, 2.5), batches(), 256)
    assert looked == 8 * 251
    largest = (sign * means(torch.cat(batches()))).topk(8).values
    torch.testing.assert_close((sign * means(chosen)).sort(descending=True).values, largest)


def test_inputs_for_a_channel_that_is_rarely_below_its_bound() -> None:
    class Bounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.hardtanh(means(x)[:, None] + 3.5)

    chosen, _ = rarely_on(Bounded(), batches(), 256)
    lowest = means(torch.cat(batches())).topk(8, largest=False).values
    torch.testing.assert_close(means(chosen).sort().values, lowest)


def test_channels_that_are_off_for_all_get_the_inputs_that_come_closest() -> None:
    both, _ = rarely_on(Channels(2.5, 9.0), batches(), 256)
    only, _ = rarely_on(Channels(9.0), batches(), 256)
    assert len(both) == len(only) == 8
    assert float(means(only).min()) > 2.2


def test_channels_take_turns_and_the_rarest_is_first() -> None:
    class Opposite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = means(x)[:, None] * torch.tensor([1.0, -1.0])
            return F.relu(y - torch.tensor([2.1, 2.8]))

    chosen, _ = rarely_on(Opposite(), batches(), 6)
    assert (means(chosen) > 0).tolist() == [False, True] * 3
    assert means(chosen)[0] == means(torch.cat(batches())).min()


def test_truth_values_and_their_contraries_are_parts() -> None:
    class Chooses(nn.Module):
        def __init__(self, above: float) -> None:
            super().__init__()
            self.above = above

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(means(x) > self.above, x.mean((1, 2, 3)), x.amax((1, 2, 3)))

    dead = Channels(9.0)  # is always off, so that all inputs are looked at
    for above in (2.4, -2.4):
        chosen, _ = rarely_on(Both(Chooses(above), dead), batches(), 256)
        assert int((means(chosen) * above > 2.4**2).sum()) >= 8


class Both(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


def test_it_ends_where_every_channel_is_often_on() -> None:
    chosen, looked = rarely_on(Channels(0.0, 1.0), batches(), 256)
    assert (len(chosen), looked) == (0, 251)
    assert float((means(batches(1)[0]) > 1).float().mean()) > RARE


def test_masked_channels_have_no_inputs_of_their_own() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x * torch.tensor([1.0, 0.0])[:, None, None])

    chosen, looked = rarely_on(Masked(), batches(), 256)
    assert (len(chosen), looked) == (0, 8 * 251)


def test_inputs_without_finite_outputs_are_left_out() -> None:
    class Diverging(Channels):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.where(means(x) > 2.7, torch.inf, 0.0)[:, None, None]

    chosen, _ = rarely_on(Diverging(2.0), batches(), 256)
    assert len(chosen) == 8
    assert 2.0 < float(means(chosen).max()) <= 2.7


def test_what_is_not_computed_in_each_pass_is_followed_no_further() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes = 0
            self.rare = Channels(2.5)

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            # Another number of channels, then nothing at all.
            first = self.rare(x) if self.passes < 5 else F.relu(x)
            return first.flatten(1).sum(1) if self.passes < 7 else x.mean((1, 2, 3))

    chosen, looked = rarely_on(Sometimes(), batches(), 256)
    assert (len(chosen), looked) == (0, 5 * 251)


@pytest.mark.parametrize(("shape", "count"), [((1, 64, 64), 2008), ((3, 224, 224), 124)])
def test_batches_have_a_prime_size_and_depend_on_the_seed(shape: tuple[int, int, int], count: int) -> None:
    drawn = list(many_batches(shape, 0, free_batch=True))
    assert {len(batch) for batch in drawn} == {prime_size(shape, free_batch=True)}
    assert sum(map(len, drawn)) == count
    assert torch.equal(drawn[0], next(many_batches(shape, 0, free_batch=True)))
    assert not torch.equal(drawn[0], next(many_batches(shape, 1, free_batch=True)))
    assert {len(batch) for batch in many_batches((1, 8, 8), 0, free_batch=False)} == {1}
