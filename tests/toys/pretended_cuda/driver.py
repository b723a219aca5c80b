"""What `torch.cuda` and its neighbours answer while the device is pretended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretended_cuda.marks import CUDA

T = TypeVar("T")

_APART = 0x5EED
"""Added to seeds, so that the device's generator gives other numbers than the CPU's."""


class Driver:
    """One device: its generator, and what functions of `torch.cuda` that need a driver say of it."""

    def __init__(self) -> None:
        self.sync_mode = "default"
        self.generators: dict[int, Any] = {}  # the device's, by the address of what they wrap
        self._seeded(0)

    def replacements(self) -> list[tuple[Any, str, Any]]:
        """Owner, name and replacement of each function that would ask a driver."""
        nothing: Callable[..., None] = lambda *a, **k: None  # noqa: E731
        zero: Callable[..., int] = lambda *a, **k: 0  # noqa: E731
        answers: dict[str, Any] = {
            "_lazy_init": nothing, "init": nothing, "is_initialized": lambda: True,
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": zero,
            "set_device": self.check_index, "synchronize": nothing, "empty_cache": nothing,
            "get_device_name": lambda *a: "pretended", "get_device_capability": lambda *a: (8, 0),
            "is_bf16_supported": lambda *a, **k: True, "is_current_stream_capturing": lambda: False,
            "reset_peak_memory_stats": nothing, "memory_allocated": zero, "max_memory_allocated": zero,
            "memory_reserved": zero, "max_memory_reserved": zero, "manual_seed": self._seeded,
            "manual_seed_all": self._seeded, "get_rng_state": self._state_of,
            "set_rng_state": self._set_state,
            "get_rng_state_all": lambda: [self._state_of()], "set_sync_debug_mode": self._set_sync_mode,
            "set_rng_state_all": lambda states: self._set_state(states[0]),
            "get_sync_debug_mode": lambda: self.sync_mode, "stream": lambda s: contextlib.nullcontext(),
        }  # fmt: skip
        accelerator = {"synchronize": nothing, "current_device_index": zero, "empty_cache": nothing}
        health = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
        return [
            *((torch.cuda, name, value) for name, value in answers.items()),
            *((torch.accelerator, name, value) for name, value in accelerator.items()),
            *(
                (torch.optim.Optimizer, name, nothing)
                for name in health
                if hasattr(torch.optim.Optimizer, name)
            ),
        ]

    def check_index(self, device: Any) -> None:
        """Refuse any device but the first."""
        index = device.index if isinstance(device, torch.device) else device
        if isinstance(index, int) and index > 0:
            raise RuntimeError("CUDA error: invalid device ordinal")

    def drawing(self, run: Callable[[], T]) -> T:
        """Run what draws random numbers with the device's generator."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            return run()
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(before)

    def _seeded(self, seed: int) -> None:
        self._state = torch._C.Generator().manual_seed((int(seed) + _APART) % 2**63).get_state()

    def _state_of(self, device: Any = CUDA) -> Tensor:
        return self._state.clone()

    def _set_state(self, state: Tensor, device: Any = CUDA) -> None:
        self._state = state.clone()

    def _set_sync_mode(self, mode: str) -> None:
        self.sync_mode = mode
