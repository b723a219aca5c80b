"""Random inputs that reach what hardly any do: channels that their biases keep at 0, sides of a choice.

A fault in what one of a hundred inputs reaches would be seen or not by chance of the draw. So the network
alone is run on many, and those are chosen that switch such parts of it on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.outputs import named_tensors
from cctool.formats.verdict.modes import Otherwise
from cctool.formats.verdict.rounding import returned

RARE = 0.05
"""Share of the inputs that switch on what counts as rarely on, at most."""

_EACH = 8  # inputs for one part: as many as tell a fault from steps
_ON = 0.1  # of a channel's largest distance from its usual value: smooth activations are never quite off

_aten = torch.ops.aten
_KINKS = {_aten.relu, _aten.relu_, _aten.clamp, _aten.clamp_, _aten.clamp_min, _aten.clamp_min_}
_KINKS |= {_aten.hardtanh, _aten.hardtanh_, _aten.threshold, _aten.threshold_, _aten.maximum, _aten.where}
_KINKS |= {_aten.hardswish, _aten.hardswish_, _aten.hardsigmoid, _aten.hardsigmoid_}
_KINKS |= {_aten.silu, _aten.silu_, _aten.gelu, _aten.mish, _aten.elu, _aten.elu_, _aten.softplus}


def rarely_on(model: nn.Module, batches: Iterable[Tensor], most: int) -> tuple[Tensor, int]:
    """Inputs that switch on parts of a network which few of them do, or come closest to it.

    A part is a channel of an activation's output, which is on if its largest value there is another one than
    usually; or a truth value that is computed of the input, or its contrary. A fault may switch on what is
    off, so the inputs for a part are those whose values before the activation are the farthest in the
    direction in which it is on. The parts take turns, the rarest first, and then those that are always off.

    Args:
        model: on any device.
        batches: inputs [B, ...] on the CPU; no more are taken once all channels are often on.
        most: number of inputs that are returned, at most.

    Returns:
        The inputs, none of which makes outputs that are not finite; and how many were looked at.
    """
    samples: list[Tensor] = []
    seen = _Seen()
    for batch in batches:
        samples.append(batch)
        seen.add(model, batch)
        if not seen.undecided():
            break
    if not samples:
        return torch.empty(0), 0
    drawn = torch.cat(samples)
    return drawn[seen.chosen(most)], len(drawn)


@dataclass(frozen=True)
class _Parts:
    """What inputs make of some parts of a network.

    Attributes:
        values: largest ones, [inputs, parts].
        before: the same before the activation.
        choices: whether they are truth values.
    """

    values: Tensor
    before: Tensor
    choices: bool

    def joined(self, other: _Parts) -> _Parts | None:
        """These inputs and others; None if the parts are not the same ones."""
        if (self.choices, self.values.shape[1]) != (other.choices, other.values.shape[1]):
            return None
        return _Parts(
            torch.cat((self.values, other.values)), torch.cat((self.before, other.before)), self.choices
        )

    @property
    def on(self) -> Tensor:
        """Which inputs switch on which parts, [inputs, parts]."""
        away = (self.values - self.values.median(0).values).abs()
        return away > _ON * away.amax(0)

    @property
    def towards(self) -> Tensor:
        """How far values before the activation are in the direction in which it is on, [inputs, parts]."""
        on = self.on
        mean = (self.before * on).sum(0) / on.sum(0).clamp(min=1)
        lower = on.any(0) & (mean < self.before.median(0).values)
        return self.before.where(~lower, -self.before)


class _Seen:
    """How far inputs switch on the parts of a network."""

    def __init__(self) -> None:
        self._parts: list[_Parts | None] | None = None
        self._finite: list[Tensor] = []

    @property
    def _known(self) -> list[_Parts]:
        return [part for part in self._parts or () if part is not None]

    def add(self, model: nn.Module, batch: Tensor) -> None:
        """Run the network on a batch."""
        watch = _Watch(len(batch))
        with Otherwise(watch):
            outputs = named_tensors(returned(model, batch)).values()
        finite = torch.ones(len(batch), dtype=torch.bool)
        for value in outputs:
            if value.is_floating_point() and value.dim() and len(value) == len(batch):
                finite &= value.reshape(len(batch), -1).isfinite().all(1).cpu()
        self._finite.append(finite)
        if self._parts is None:
            self._parts = list(watch.parts)
            return
        # What is not computed in every pass is followed no further.
        both = zip(self._parts, watch.parts, strict=False)
        self._parts = [None if old is None else old.joined(new) for old, new in both]

    def undecided(self) -> bool:
        """Whether a channel is off for all inputs so far, or on for few of them."""
        return any(bool((one.on.float().mean(0) <= RARE).any()) for one in self._known if not one.choices)

    def chosen(self, most: int) -> Tensor:
        """Indices of the inputs that switch on what few do, by turns for each part."""
        if not self._known:
            return torch.empty(0, dtype=torch.long)
        towards = torch.cat([one.towards for one in self._known], 1)
        share = torch.cat([one.on for one in self._known], 1).float().mean(0)
        towards = towards.where(torch.cat(self._finite)[:, None], -torch.inf)
        varies = towards.amax(0) > towards.nan_to_num(neginf=torch.inf).amin(0)
        parts = ((share <= RARE) & varies).nonzero().flatten()
        parts = parts[share[parts].where(share[parts] > 0, 1.0).argsort(stable=True)]
        values, indices = towards[:, parts].sort(dim=0, descending=True, stable=True)
        turns = indices[:_EACH].flatten()[values[:_EACH].flatten() > -torch.inf]
        return torch.tensor(list(dict.fromkeys(turns.tolist()))[:most], dtype=torch.long)


class _Watch:
    """Keeps what operations make of each input of a batch.

    Attributes:
        parts: of each operation that switches something on.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self.parts: list[_Parts] = []

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The operation."""
        kink = func.overloadpacket in _KINKS
        # An operation in place changes what it was given.
        before = self._largest(args[0]) if kink else None
        found = func(*args, **kwargs)
        values = self._largest(found)
        if values is None:
            return found
        if found.dtype == torch.bool:
            contrary = self._largest(~found)
            assert contrary is not None
            both = torch.cat((values, contrary), 1)
            self.parts.append(_Parts(both, both, choices=True))
        elif kink:
            same = before is not None and before.shape == values.shape and args[0].is_floating_point()
            self.parts.append(
                _Parts(values, before if same and before is not None else values, choices=False)
            )
        return found

    def _largest(self, value: Any) -> Tensor | None:
        """The largest value at each channel, [inputs, channels]; None of what is no number for each input."""
        if not isinstance(value, Tensor) or not value.dim() or len(value) != self._n or not value.numel():
            return None
        rows = value.detach().cpu().float()
        return rows.reshape(self._n, rows.shape[1] if rows.dim() > 1 else 1, -1).amax(2).nan_to_num()
