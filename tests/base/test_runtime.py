"""What a device cannot do is one sentence."""

import pytest
import torch
import torch.nn.functional as F

from cctool.base.errors import DeviceError
from cctool.base.runtime import device_errors
from pretended_cuda.plugin import REAL


def test_a_full_memory_says_what_may_fit() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ):
        with pytest.raises(DeviceError, match="memory is full; a smaller --batch-size"), device_errors():
            raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"), device_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.cuda
def test_an_operator_without_a_deterministic_form_is_named() -> None:
    torch.use_deterministic_algorithms(True)
    says = r"^--deterministic: \S*histc\S* has no deterministic form"
    with pytest.raises(DeviceError, match=says), device_errors():
        torch.histc(torch.ones(3, device="cuda"))


@pytest.mark.cuda
@pytest.mark.skipif(REAL, reason="a GPU cannot be used again in this process afterwards")
def test_a_label_that_is_no_class_is_suspected() -> None:
    with pytest.raises(DeviceError, match="label that the network has no class for"), device_errors():
        F.cross_entropy(torch.ones(2, 3, device="cuda"), torch.tensor([0, 3], device="cuda"))
