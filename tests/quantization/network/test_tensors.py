"""Which tensors are quantized, and why the others are not."""

import pytest
import torch
from torch import nn

from cctool.base.errors import UsageError
from cctool.quantization.network.tensors import select


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.fc = nn.Linear(6, 2)
        self.tied = nn.Linear(6, 2, bias=False)
        self.tied.weight = self.fc.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("table", torch.zeros(2, 2))
        self.register_buffer("empty", torch.zeros(0, 2))


WEIGHTS = [("conv.weight",), ("up.weight",), ("fc.weight", "tied.weight")]
ONE_DIMENSIONAL = {
    "conv.bias",
    "bn.weight",
    "bn.bias",
    "bn.running_mean",
    "bn.running_var",
    "up.bias",
    "fc.bias",
}


def chosen(**options: object) -> list[tuple[str, ...]]:
    return [item.names for item in select(Net(), **options)[0]]  # type: ignore[arg-type]


def test_weights_by_default_and_a_reason_for_each_other_tensor() -> None:
    selected, skipped = select(Net())
    assert [item.names for item in selected] == WEIGHTS
    assert [item.channels for item in selected] == [0, 1, 0]
    reasons = {item.name: item.reason for item in skipped}
    assert {name for name, reason in reasons.items() if reason.startswith("1-D")} == ONE_DIMENSIONAL
    assert reasons["bn.num_batches_tracked"] == "not floating point"
    assert reasons["scale"] == "a single number"
    assert reasons["empty"] == "empty"
    assert reasons["table"].startswith("a buffer")
    names = {name for item in selected for name in item.names} | reasons.keys()
    assert names == set(Net().state_dict())


def test_one_dimensional_tensors_on_request() -> None:
    found = chosen(include_1d=True)
    assert {names[0] for names in found} == {"conv.weight", "up.weight", "fc.weight"} | ONE_DIMENSIONAL
    assert {item.channels for item in select(Net(), include_1d=True)[0] if item.tensor.dim() == 1} == {None}


def test_include_and_exclude() -> None:
    assert chosen(include=["fc.*"]) == [("fc.weight", "tied.weight")]
    assert chosen(include=["*.weight"]) == WEIGHTS, "a pattern alone does not force a 1-D tensor"
    assert chosen(include=["bn.weight", "table"]) == [("table",), ("bn.weight",)], "a full name does"
    assert chosen(include=["bn.*"], include_1d=True) == [
        ("bn.weight",), ("bn.bias",), ("bn.running_mean",), ("bn.running_var",)
    ]  # fmt: skip
    assert chosen(exclude=["tied.weight"]) == WEIGHTS[:2], "all names of a tied tensor"
    assert chosen(include=["conv.weight"], exclude=["conv.*"]) == []
    reasons = {item.name: item.reason for item in select(Net(), include=["fc.*"], exclude=["conv.*"])[1]}
    assert reasons["conv.weight"] == "--exclude conv.*"
    assert reasons["up.weight"] == "no --include matches it"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=rf"--{option} nobody\.\*: no tensor has such a name"):
        select(Net(), **{option: ["nobody.*"]})


def test_a_matrix_that_is_a_parameter_of_no_layer() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(2, 3))

    (item,), skipped = select(Free())
    assert (item.names, item.channels, skipped) == (("matrix",), 0, [])
