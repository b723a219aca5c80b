import pytest
import torch

from cctool.quantization.encodings.intn import INTN, encode_integers
from cctool.quantization.encodings.masked import MASKED, encode_masked, inner_of
from cctool.quantization.encodings.uint8 import AFFINE_U8
from cctool.quantization.export.integer_weights import IntegerWeight, from_stored


def weight(low: int = -127, high: int = 127, zero: int = 0) -> IntegerWeight:
    integers = torch.tensor([[low, high, 0, 5], [1, high - 1, 2, 3]])
    return IntegerWeight(
        "a.weight", integers.int(), torch.tensor(0.5), torch.tensor(zero, dtype=torch.int32), None, low, high
    )


def test_values_are_the_products() -> None:
    given = weight(0, 255, 3)
    assert given.values().tolist() == [[-1.5, 126.0, -1.5, 1.0], [-1.0, 125.5, -0.5, 0.0]]


@pytest.mark.parametrize(("low", "high", "zero"), [(-127, 127, 0), (0, 255, 100), (-8, 7, -3)])
def test_scaling_multiplies_values_and_keeps_the_grid(low: int, high: int, zero: int) -> None:
    factor = torch.tensor([-2.0, 0.25])
    given = weight(low, high, zero)
    found = given.scaled(factor, 0)
    assert found is not None
    torch.testing.assert_close(found.values(), given.values() * factor[:, None])
    assert found.scale.min() > 0
    assert low <= int(found.integers.min())
    assert int(found.integers.max()) <= high
    assert (found.low, found.high) == (low, high)


def test_a_mirrored_lowest_integer_is_clipped_by_one_step() -> None:
    given = weight(-128, 127)
    found = given.scaled(torch.tensor([-1.0, 1.0]), 0)
    assert found is not None
    assert found.integers[0].tolist() == [127, -127, 0, -5]


def test_a_factor_of_zero_gives_zeros_on_any_grid() -> None:
    found = weight(0, 255, 100).scaled(torch.tensor([0.0, 1.0]), 0)
    assert found is not None
    assert found.values()[0].tolist() == [0, 0, 0, 0]
    assert found.values()[1].any()


def test_scales_along_another_dimension_take_no_factor() -> None:
    given = weight()
    scaled = given.scaled(torch.tensor([1.0, 2.0, 1.0, 1.0]), 1)
    assert scaled is not None
    assert scaled.scaled(torch.tensor([2.0, 3.0]), 0) is None
    assert scaled.scaled(torch.ones(2), 0) is scaled


@pytest.mark.parametrize(
    ("low", "high", "bits"),
    [(-127, 127, 8), (-128, 127, 8), (-8, 7, 4), (-7, 7, 4), (0, 15, 4), (0, 16, 5), (-1, 1, 2)],
)
def test_bits_hold_the_grid(low: int, high: int, bits: int) -> None:
    assert weight(low, high).bits == bits


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_stored_integers_decode_to_what_the_checkpoint_holds(
    axis: int | None, symmetric: bool, bits: int
) -> None:
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) + 0.3
    encoded = INTN.encode(tensor, {"bits": bits, "symmetric": symmetric, "axis": axis, "group": None})
    found = from_stored("a", encoded)
    assert found is not None
    assert torch.equal(found.values(), INTN.decode(encoded))
    assert (found.axis, found.bits) == (axis, bits)
    assert (found.low < 0) is symmetric


def test_the_lowest_of_all_integers_is_kept() -> None:
    encoded = encode_integers(torch.tensor([-128, 5]), torch.tensor(1.0), bits=8)
    found = from_stored("a", encoded)
    assert found is not None
    assert found.values().tolist() == [-128, 5]
    assert found.low == -128


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_masked_weights_have_their_integers_and_zero_elsewhere(axis: int | None, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 7, generator=generator) < 0.4
    tensor = (torch.randn(5, 7, generator=generator) + 0.3) * mask
    inner = inner_of("intn", {"bits": 4, "symmetric": symmetric, "axis": axis, "group": None})
    encoded = encode_masked(tensor, mask, inner)
    found = from_stored("a", encoded)
    assert found is not None
    assert torch.equal(found.values(), MASKED.decode(encoded))
    assert not found.values()[~mask].any()
    assert int(found.integers.min()) >= found.low
    assert int(found.integers.max()) <= found.high


def test_other_forms_are_none() -> None:
    tensor = torch.randn(4, 6)
    assert from_stored("a", encode_masked(tensor, tensor != 0)) is None
    assert from_stored("a", AFFINE_U8.encode(tensor, {"axis": None})) is None
    grouped = INTN.encode(tensor, {"bits": 4, "symmetric": True, "axis": 0, "group": 2})
    assert from_stored("a", grouped) is None
    double = INTN.encode(tensor.double(), {"bits": 4, "symmetric": True, "axis": 0, "group": None})
    assert from_stored("a", double) is None


@pytest.mark.parametrize(("low", "high", "zero"), [(-8, 7, 0), (0, 15, 3), (-127, 127, 0)])
def test_a_finer_grid_holds_the_same_values(low: int, high: int, zero: int) -> None:
    given = weight(low, high, zero)
    found = given.finer(7)
    assert torch.equal(found.values(), given.values())
    assert found.bits == max(given.bits, 7)
    assert int(found.integers.max()) == high * (8 if high < 100 else 1)
