"""Measured time of a forward pass.

Machines are shared and clock rates vary, so only the ratio of two networks that run in turns is reliable: use
`compare`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.base.networks import device_of, float_type_of, in_mode
from cctool.graph.execution import blaming_the_size

_WARM_UP = 2  # first runs allocate memory and choose kernels
_FEWEST, _MOST = 3, 50
_SECONDS = 0.2


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass in evaluation mode.

    Attributes:
        milliseconds: median of all runs.
        fastest: of all runs, in milliseconds.
        runs: how many were timed.
        batch: batch size.
        device: name of the device in torch.
        threads: number of CPU threads of torch.
    """

    milliseconds: float
    fastest: float
    runs: int
    batch: int
    device: str
    threads: int


def measure_latency(
    model: nn.Module, input_shape: Sequence[int], *, batch: int = 1, seconds: float = _SECONDS
) -> Latency:
    """Time a network on the device that it is on.

    Args:
        model: any module that takes one tensor; its training flags are restored.
        input_shape: (C, H, W) of one input.
        batch: batch size.
        seconds: about how long to measure; at least 3 runs and at most 50.

    Raises:
        ArchitectureError: it does not run on these inputs.
    """
    return compare([model], input_shape, batch=batch, seconds=seconds)[0]


def compare(
    models: Sequence[nn.Module], input_shape: Sequence[int], *, batch: int = 1, seconds: float = _SECONDS
) -> tuple[Latency, ...]:
    """Time several networks on one device in turns, so that their ratios are reliable.

    Arguments and errors as for `measure_latency`; `seconds` is for each network.
    """
    device = device_of(models[0])
    generator = torch.Generator().manual_seed(0)
    dtype = float_type_of(models[0])
    images = torch.randn(batch, *input_shape, generator=generator).to(device, dtype)
    times: list[list[float]] = [[] for _ in models]
    # Turns, so that load and clock rate change for all networks alike.
    for turn in range(_WARM_UP + _MOST):
        for found, model in zip(times, models, strict=True):
            elapsed = _once(model, images, input_shape)
            if turn >= _WARM_UP:
                found.append(elapsed)
        if len(times[0]) >= _FEWEST and all(sum(found) >= seconds for found in times):
            break
    return tuple(
        Latency(
            milliseconds=1000 * statistics.median(found),
            fastest=1000 * min(found),
            runs=len(found),
            batch=batch,
            device=str(device),
            threads=torch.get_num_threads(),
        )
        for found in times
    )


def _once(model: nn.Module, images: Tensor, input_shape: Sequence[int]) -> float:
    with blaming_the_size(input_shape), in_mode(model, training=False):
        # CUDA kernels run asynchronously.
        _wait(images.device)
        start = time.perf_counter()
        model(images)
        _wait(images.device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
