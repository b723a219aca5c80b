"""How near the outputs of a folded network are to those of the network before."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

import torch
from torch import Tensor, nn

from cctool.base.errors import TransformError
from cctool.base.networks import copied, device_of, float_type_of
from cctool.graph.execution import blaming_the_size
from cctool.transforms.fold.probes import ReferenceOutputs, probes_of

EXACT = 1e-9
"""Largest difference of two outputs in float64, of the range of the output."""
_ROUNDINGS = 84
# Times how far rounding alone moves the network's own outputs from those in float64.
_OWN_NOISE = 4


class FoldChecks:
    """The network before anything is folded, and what it returns.

    Attributes:
        type: of its parameters.
        network: a copy, in float64 if its code runs so (`exact`).
        own: what it returns in its own type.
        reference: what the copy returns.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int], images: Sequence[Tensor]) -> None:
        self.type = float_type_of(model)
        probes = probes_of(input_shape, images, self.type, device_of(model))
        with blaming_the_size(input_shape):
            self.own = ReferenceOutputs(model, probes, self.type)
        self.network, self.reference, self.exact = copied(model), self.own, False
        try:
            doubled = copied(model).double()
            self.reference, self.network, self.exact = (
                ReferenceOutputs(doubled, self.own.probes, torch.float64),
                doubled,
                True,
            )
        except Exception:  # the network's code may need its own type in any way
            return
        if len(self.reference.probes) < len(self.own.probes):
            self.own = ReferenceOutputs(model, self.reference.probes, self.type)

    @property
    def images(self) -> int:
        """How many images it was run on in batches."""
        return sum(len(probe.inputs) for probe in self.own.probes if probe.images and len(probe.inputs) > 1)

    @property
    def limit(self) -> float:
        """Largest difference that is rounding, of an output's range."""
        return EXACT if self.exact else _ROUNDINGS * torch.finfo(self.type).eps

    def moved(self, network: nn.Module, watched: Sequence[int]) -> list[int]:
        """Numbers of the other probes whose outputs a folded copy changes."""
        others = (number for number in range(len(self.reference.probes)) if number not in watched)
        return [number for number in others if not self._distance(number, network) <= self.limit]

    def _distance(self, number: int, network: nn.Module) -> float:
        try:
            return self.reference.distance(number, network)
        except Exception:  # the network's own code may ask anything of a module that is gone
            return inf

    def double_error(self, network: nn.Module) -> float | None:
        """Largest difference of the folded copy's outputs in float64, of their range."""
        if not self.exact:
            return None
        return max(self.reference.distance(number, network) for number in range(len(self.own.probes)))

    @property
    def noises(self) -> list[float]:
        """For each probe, how far the network itself is from float64."""
        if not self.exact:
            return [0.0] * len(self.own.probes)
        return [self.reference.apart(number, self.own) for number in range(len(self.own.probes))]

    @property
    def noise(self) -> float | None:
        """The largest of `noises` that is a number; None where float64 could not run."""
        return max(filter(isfinite, self.noises), default=inf) if self.exact else None

    def error(self, network: nn.Module) -> float:
        """Largest difference of the folded network's outputs, of their range.

        Raises:
            TransformError: if it is more than rounding explains.
        """
        largest = 0.0
        for number, noise in enumerate(self.noises):
            limit = max(_ROUNDINGS * torch.finfo(self.type).eps, _OWN_NOISE * noise)
            error = self.own.distance(number, network)
            if not error <= limit:
                raise TransformError(
                    f"the folded network's outputs differ by {error:.1e} of their range, and rounding "
                    f"explains {limit:.1e}: nothing is written"
                )
            largest = max(largest, error if isfinite(noise) else 0.0)
        return largest
