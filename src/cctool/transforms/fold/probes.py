"""The inputs that a fold is checked on, and how far outputs are apart on them.

The code of a network may decide by what it sees: by how large its inputs are, whether there is anything in
them, how many they are or of which size. So random inputs of one kind say nothing of others, and constants
and images are looked at as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from cctool.base.detectors import before_boxes
from cctool.base.networks import in_mode
from cctool.base.outputs import as_numbers, differences, is_measured, named_tensors

SCALES, CONSTANTS = (0.01, 0.1, 10.0), (0.0, 1.0, -1.0)
"""Besides N(0, 1): factors of such inputs, and inputs of one value."""

# Two suffice to tell samples apart; batch norm in training needs as many.
_SAMPLES, _LARGE_SAMPLES = 4, 2
_LARGE = 128 * 128
_SINGLES = 4
_MANY = 131  # samples of small inputs, as many as a batch may have
_SMALL = 64 * 64

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class CheckInput:
    """Inputs (B, C, H, W) of one kind, float64, exact in the network's own type."""

    inputs: Tensor
    images: bool = False


def probes_of(
    input_shape: Sequence[int], images: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> list[CheckInput]:
    """Random inputs first, then their multiples, constants, others in number and size, and the images.

    Some of the images are also there alone.
    """
    generator = torch.Generator().manual_seed(0)
    samples = _SAMPLES if prod(input_shape[1:]) <= _LARGE else _LARGE_SAMPLES
    drawn = torch.randn((samples, *input_shape), generator=generator, dtype=torch.float64)
    made = [drawn, *(scale * drawn for scale in SCALES)]
    made += [torch.full_like(drawn[:2], value) for value in CONSTANTS]
    singles = [image[None] for image in images[0][:_SINGLES]] if images else []
    channels, height, width = input_shape
    # A quarter more of large ones, which take long.
    larger = [2 * side if samples == _SAMPLES else side + side // 4 for side in (height, width)]
    sizes: list[tuple[int, ...]] = [(1, channels, height, width), (1, channels, *larger)]
    sizes += [(2, channels, height // 2, width // 2)] if min(height, width) > 1 else []
    sizes += [(_MANY, *input_shape)] if height * width <= _SMALL else []
    made += [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    found = [CheckInput(inputs) for inputs in made] + [
        CheckInput(batch, True) for batch in (*images, *singles)
    ]
    return [CheckInput(probe.inputs.to(dtype).double().to(device), probe.images) for probe in found]


def outputs_of(network: nn.Module, inputs: Tensor) -> Outputs:
    """All outputs of a network in evaluation mode, by name; of a detector what boxes are chosen from."""
    with torch.no_grad(), in_mode(network, training=False), before_boxes(network):
        # A copy, because networks may change their input in place.
        found = named_tensors(network(inputs.clone()))
        return {name: value.detach().clone() for name, value in found.items()}


def spreads(outputs: Outputs) -> dict[str, float]:
    """The range of each floating-point output over a batch; its magnitude where all values are the same."""
    return {name: spread for name, value in outputs.items() if (spread := _spread(value))}


def _spread(value: Tensor) -> float:
    if not value.numel() or not is_measured(value):
        return 0.0
    numbers = as_numbers(value).nan_to_num(0.0, 0.0, 0.0)
    return float(numbers.max() - numbers.min()) or float(numbers.abs().max())


def distance(left: Outputs, right: Outputs, least: Mapping[str, float]) -> float:
    """Largest difference of two sets of outputs, of the range of each; infinite if shapes differ.

    ``least`` has smallest ranges by name: outputs for constant inputs hardly vary.
    """
    if {n: v.shape for n, v in left.items()} != {n: v.shape for n, v in right.items()}:
        return float("inf")
    largest = 0.0
    for name, value in left.items():
        if not value.numel():
            continue
        if not is_measured(value):
            largest = largest if torch.equal(value, right[name]) else float("inf")
            continue
        spread = max(_spread(value), least.get(name, 0.0)) or 1.0
        largest = max(largest, float(differences(value, right[name]).max()) / spread)
    return largest


class ReferenceOutputs:
    """What a network returns for each probe that it runs on, to compare others with.

    Attributes:
        probes: in order, the first always among them.
        dtype: that the network computes in.
    """

    def __init__(self, network: nn.Module, probes: Sequence[CheckInput], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.probes: list[CheckInput] = []
        self._outputs: list[Outputs] = []
        for number, probe in enumerate(probes):
            try:
                found = outputs_of(network, probe.inputs.to(dtype))
            except Exception:  # networks may refuse empty images, or batches of one, in any way
                if not number:
                    raise
                continue
            self.probes.append(probe)
            self._outputs.append(found)
        self._least: dict[bool, dict[str, float]] = {True: {}, False: {}}
        for probe, outputs in zip(reversed(self.probes), reversed(self._outputs), strict=True):
            # In the end that of the first of its kind: random inputs, or a whole batch of images.
            self._least[probe.images] = spreads(outputs)

    def distance(self, number: int, network: nn.Module, dtype: torch.dtype | None = None) -> float:
        """How far the outputs of another network for one of the probes are from these.

        ``dtype`` is what that network computes in, if not the same.
        """
        probe = self.probes[number]
        found = outputs_of(network, probe.inputs.to(dtype or self.dtype))
        return distance(self._outputs[number], found, self._least[probe.images])

    def apart(self, number: int, other: ReferenceOutputs) -> float:
        """How far the outputs that another network gave for the same probe are from these."""
        least = self._least[self.probes[number].images]
        return distance(self._outputs[number], other._outputs[number], least)
