"""Tests with the marker `cuda` run on the GPU where there is one, else on the pretended device."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import pytest
import torch

from pretended_cuda import pretended

REAL = torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run the test itself, not its fixtures, on the device; put torch's settings back."""
    if item.get_closest_marker("cuda") is None:
        return (yield)
    with contextlib.nullcontext() if REAL else pretended(), _settings():
        return (yield)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    # A command sets these for the whole process.
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def pytest_report_header() -> str:
    """Say what the CUDA tests run on."""
    return f"cuda: {torch.cuda.get_device_name() if REAL else 'pretended (tests/toys/pretended_cuda)'}"
