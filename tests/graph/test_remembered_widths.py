"""Sizes and attributes that remember which width they are, and what the code does with them."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cctool.graph.channels import couple
from cctool.graph.records import ChannelGraph
from cctool.graph.widths import Scale, Symbol, Width, as_float, powers_of, remembered

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
C = Symbol(None, 12)
WIDTH = Width(12, {C: 1})


@pytest.mark.parametrize(
    ("value", "expected", "kind", "exponent"),
    [
        (WIDTH // 4, 3, Width, 1),
        (3 * WIDTH, 36, Width, 1),
        (WIDTH * WIDTH, 144, Width, 2),
        (24 // WIDTH, 2, Width, -1),
        (-WIDTH, -12, Width, 1),
        (WIDTH**2 // 3, 48, Width, 2),
        (WIDTH**-0.5, 12**-0.5, Scale, -0.5),
        (1 / WIDTH, 1 / 12, Scale, -1),
        (WIDTH / 2, 6.0, Scale, 1),
        (2 / (WIDTH**0.5), 2 / 12**0.5, Scale, -0.5),
        (-(WIDTH**-0.5), -(12**-0.5), Scale, -0.5),
        (as_float(WIDTH), 12.0, Scale, 1),
    ],
)
def test_products_and_powers_are_remembered(
    value: object, expected: float, kind: type, exponent: float
) -> None:
    assert value == expected
    assert type(value) is kind
    assert dict(powers_of(value)) == {C: exponent}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (WIDTH + 1, 13), (WIDTH - WIDTH, 0), (WIDTH // 5, 2), (WIDTH % 5, 2), (abs(-WIDTH), 12),
        (WIDTH // WIDTH, 1), (float(WIDTH), 12.0), (int(WIDTH), 12), (copy.deepcopy(WIDTH), 12),
        (pickle.loads(pickle.dumps(WIDTH)), 12), (copy.deepcopy(WIDTH**0.5), 12**0.5),
    ],
)  # fmt: skip
def test_all_else_is_a_plain_number(value: object, expected: float) -> None:
    assert value == expected
    assert type(value) in (int, float)
    assert not powers_of(value)


def test_torch_takes_widths_for_sizes() -> None:
    x = torch.zeros(2, 12, 3)
    shape = torch.Size([2, WIDTH, 3])
    assert type(shape[1]) is Width
    assert x.view(2, 4, WIDTH // 4, 3).shape == (2, 4, 3, 3)
    assert torch.equal(x * (WIDTH**-0.5), x)
    assert (torch.ones(2) * WIDTH).tolist() == [12.0, 12.0]
    assert len({WIDTH: 1, 12: 2}) == 1


def test_attributes_are_put_back_also_when_the_pass_raises() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.width, self.calls = nn.Linear(3, 4), 4, 7

    model = Counting()
    before = dict(vars(model))

    def passing() -> None:
        with remembered(model, object()):
            assert type(model.width) is Width
            assert type(model.layer.in_features) is int
            assert type(math.sqrt(model.width)) is Scale
            model.calls = model.calls * 2
            raise KeyError

    with pytest.raises(KeyError):
        passing()
    assert vars(model) == before | {"calls": 14}
    assert {type(model.width), type(model.calls)} == {int}
    assert type(math.sqrt(4)) is float


class Net(nn.Module):
    """Two convolutions with the user's own arithmetic between them."""

    def __init__(
        self, between: Callable[["Net", Tensor], Tensor], width: int = 12, readers: int = 12
    ) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, width, 3), nn.Conv2d(readers, 6, 3), nn.Linear(6, 4)
        self.width, self.groups, self.per_group = width, 3, width // 3
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.between(self, self.a(x))).mean((2, 3)))  # type: ignore[no-any-return]


def family(graph: ChannelGraph, name: str) -> tuple[int, int]:
    return next((f.units, f.width) for f in graph.families if f.name == name)


def counted(graph: ChannelGraph) -> set[str]:
    return {str(entry.key) for entry in graph.attributes if entry.name == ""}


def quotient_first(m: Net, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c // m.groups, m.groups, h, w).sum(2).repeat_interleave(3, 1)


def quotient_last(m: Net, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, m.groups, c // m.groups, h, w).sum(1).repeat_interleave(3, 1)


def attribute(m: Net, x: Tensor) -> Tensor:
    return x.view(x.shape[0], m.groups, m.per_group, *x.shape[2:]).flatten(1, 2)


def test_which_part_of_a_split_scales_is_read_off_its_size() -> None:
    runs, positions = couple(Net(quotient_first), (X,)), couple(Net(quotient_last), (X,))
    assert family(runs, "a") == family(positions, "a") == (4, 3)
    first = {graph.families[0].places[0].indices[0].tolist().__str__() for graph in (runs, positions)}
    assert first == {"[0, 1, 2]", "[0, 4, 8]"}


def test_attributes_that_size_a_view_are_counted() -> None:
    graph = couple(Net(attribute), (X,))
    assert family(graph, "a") == (4, 3)
    assert counted(graph) == {"per_group"}


def test_an_assertion_says_what_an_attribute_holds() -> None:
    def asserting(m: Net, x: Tensor) -> Tensor:
        assert x.shape[1] == m.width
        return x

    assert "width" in counted(couple(Net(asserting), (X,)))
    assert "width" not in counted(couple(Net(lambda m, x: x), (X,)))


def test_a_width_that_the_code_forces_on_another_layer_ties_the_two() -> None:
    class Forced(nn.Module):
        """What comes in and what the inner layer sends out must have one width."""

        def __init__(self, forced: bool) -> None:
            super().__init__()
            self.a, self.inner, self.fc = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.forced = forced

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x.mean(1))
            y = self.inner(x)
            return self.fc(y.view(-1, x.shape[-1]) if self.forced else y.view(y.shape))  # type: ignore[no-any-return]

    def names(forced: bool) -> list[str]:
        return [f.name for f in couple(Forced(forced), (X,)).families]

    assert names(True) == ["a"]
    assert names(False) == ["a", "inner"]


def test_code_that_takes_no_subclass_of_int_is_traced_without() -> None:
    def picky(m: Net, x: Tensor) -> Tensor:
        if type(x.shape[1]) is not int or type(m.width) is not int:
            raise TypeError
        return x

    model = Net(picky)
    graph = couple(model, (X,))
    assert family(graph, "a") == (12, 1)
    assert type(model.width) is int
