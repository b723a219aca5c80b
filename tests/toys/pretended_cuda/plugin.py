"""Tests with the marker `cuda` run on the GPU where there is one, else on the pretended device."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from pretended_cuda import pretended

REAL = torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run the test itself, not its fixtures, on the device."""
    if REAL or item.get_closest_marker("cuda") is None:
        return (yield)
    with pretended():
        return (yield)


def pytest_report_header() -> str:
    """Say what the CUDA tests run on."""
    return f"cuda: {torch.cuda.get_device_name() if REAL else 'pretended (tests/toys/pretended_cuda)'}"
