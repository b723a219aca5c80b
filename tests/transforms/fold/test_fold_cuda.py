"""Folding on a CUDA device gives what the CPU gives."""

import pytest
import torch

from cctool.base.networks import copied
from cctool.transforms.fold.fold import fold_network
from folding_toys import NETWORKS, lively

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ["rep", "over", "normed", "torch_pruned", "norms"])
def test_a_network_on_the_device_is_folded_as_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model = lively(NETWORKS[name]())
    moved = copied(model).to("cuda")
    fold_network(model, (1, 8, 8))
    found = fold_network(moved, (1, 8, 8))
    assert found.stays == ()
    expected, state = model.state_dict(), moved.state_dict()
    assert expected.keys() == state.keys()
    for key, value in state.items():
        assert value.device.type == "cuda"
        torch.testing.assert_close(value.cpu(), expected[key], rtol=1e-5, atol=1e-6)
