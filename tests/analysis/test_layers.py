"""The layer table: rows, sums, and how tensors are stored."""

import pytest
import torch
from torch import Tensor, nn

from cctool.analysis.layers import LayerRow, LayerTable, Totals, tabulate
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.spec import ModelSpec
from cctool.graph.cost import measure


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.group = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1), groups=4)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)
        self.auxiliary = nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.pool(self.group(x) + x)
        return self.head(x.mean((2, 3)) * self.scale)


def table_of(model: nn.Module, shape: tuple[int, int, int] = (3, 16, 16), **changes: object) -> LayerTable:
    checkpoint = Checkpoint(model, ModelSpec(architecture="net.py:net", input_shape=shape), **changes)  # type: ignore[arg-type]
    return tabulate(checkpoint, measure(model, shape))


def row(table: LayerTable, name: str) -> LayerRow:
    return next(layer for layer in table.layers if layer.name == name)


def test_rows_stand_in_order_of_execution_and_say_what_they_do() -> None:
    table = table_of(Net())
    assert [layer.name for layer in table.layers] == [
        "stem", "norm", "(network)", "group", "pool", "head", "auxiliary",
    ]  # fmt: skip
    stem = row(table, "stem")
    assert (stem.type, stem.attributes) == ("Conv2d", "k=3, s=2, p=1, g=1")
    assert (stem.input_shape, stem.output_shape) == ((1, 3, 16, 16), (1, 8, 8, 8))
    assert stem.sums.macs == 8 * 64 * 27
    assert row(table, "group").attributes == "k=3x1, s=1, p=2x0, d=2x1, g=4"
    assert row(table, "pool").attributes == "k=2, s=2, p=0"
    own = row(table, "(network)")
    assert own.sums.parameters == 8
    # The rectifier, the sum and the product with the scale are the network's own.
    assert own.sums.activation_ops == 512
    assert own.sums.elementwise_ops == 512 + 8
    assert own.sums.pooling_ops == 8 * 16


def test_rows_sum_to_the_totals_and_these_to_the_model() -> None:
    model = Net()
    table = table_of(model)
    assert sum((layer.sums for layer in table.layers), Totals()) == table.totals
    assert table.totals.parameters == sum(p.numel() for p in model.parameters())
    assert table.totals.bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_what_never_ran_is_named() -> None:
    table = table_of(Net())
    assert table.unused == ("auxiliary",)
    assert row(table, "auxiliary").calls == 0
    assert row(table, "auxiliary").input_shape is None


def test_zeros_scale_the_effective_macs_only() -> None:
    model = Net()
    before = table_of(model).totals
    with torch.no_grad():
        model.stem.weight[:4] = 0
    table = table_of(model)
    assert table.totals.macs == before.macs
    assert row(table, "stem").sums.effective_macs == row(table, "stem").sums.macs // 2
    assert row(table, "stem").sparsity == 50.0
    assert row(table, "norm").sparsity is None
    assert table.totals.sparsity == pytest.approx(100 * 108 / table.totals.weights)


def test_tied_tensors_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(nn.Flatten(), first, second)
    table = table_of(model, (1, 2, 2))
    assert table.totals.parameters == 16
    assert table.totals.bytes == 64
    assert [row(table, name).sums.macs for name in ("1", "2")] == [16, 16]


def test_bytes_are_those_of_the_stored_form() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    stored = EncodedTensor(
        "test", (10, 16), "float32", {"q": torch.zeros(160, dtype=torch.uint8), "range": torch.zeros(2)}
    )
    table = table_of(model, (1, 4, 4), stored={"1.weight": stored})
    assert table.totals.bytes == 160 + 8 + 40


def test_faults_are_counted_in_their_row() -> None:
    model = Net()
    with torch.no_grad():
        model.norm.running_mean[3] = torch.inf
    table = table_of(model)
    assert row(table, "norm").sums.nonfinite == table.totals.nonfinite == 1
