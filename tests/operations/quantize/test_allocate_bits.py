import itertools
import random

import pytest

from cctool.base.errors import QuantizationError
from cctool.operations.quantize.allocate_bits import LayerChoice, cheapest, fewest_bytes, frontier


def _choices(layers, seed=0, tried=(2, 3, 4, 8)):
    draw = random.Random(seed)
    found = []
    for layer in range(layers):
        weights, sensitivity = draw.randrange(8, 400), draw.random() ** 4
        found += [
            LayerChoice(f"l{layer}", bits, sensitivity * draw.random() * 4.0**-bits, 8 + weights * bits // 8)
            for bits in tried
        ]
    return found


def _all(choices):
    layers = {}
    for choice in choices:
        layers.setdefault(choice.layer, []).append(choice)
    for several in itertools.product(*layers.values()):
        yield (
            sum(c.bytes for c in several),
            sum(c.damage for c in several),
            {c.layer: c.bits for c in several},
        )


@pytest.mark.parametrize("seed", range(5))
def test_of_all_assignments_that_fit_the_one_of_least_damage_is_found(seed):
    choices = _choices(6, seed)
    every = list(_all(choices))
    smallest, largest = min(size for size, _, _ in every), max(size for size, _, _ in every)
    for share in (0, 0.2, 0.5, 0.9, 1):
        limit = int(smallest + share * (largest - smallest))
        found = cheapest(choices, limit)
        best = min((damage, size) for size, damage, _ in every if size <= limit)
        assert found.damage == pytest.approx(best[0], rel=1e-12)
        assert (found.bytes, found.damage, dict(found.bits)) in [
            (size, pytest.approx(damage), bits) for size, damage, bits in every
        ]
        assert found.bytes <= limit


def test_no_assignment_of_the_frontier_is_beaten_by_any():
    choices = _choices(5)
    every = list(_all(choices))
    found = frontier(choices)
    assert len(found) > 10
    for assignment in found:
        assert not any(
            size <= assignment.bytes and damage < assignment.damage * (1 - 1e-9) for size, damage, _ in every
        )
    assert [a.bytes for a in found] == sorted({a.bytes for a in found})


def test_a_thinned_frontier_stays_close_and_keeps_both_ends(monkeypatch):
    choices = _choices(8)
    whole = frontier(choices)
    monkeypatch.setattr("cctool.operations.quantize.allocate_bits._MOST", 60)
    thinned = frontier(choices)
    assert len(thinned) <= 61 < len(whole)
    assert thinned[0].bytes == whole[0].bytes
    assert thinned[-1].damage == pytest.approx(whole[-1].damage)
    limit = (whole[0].bytes + whole[-1].bytes) // 2
    exact = cheapest(choices, limit).damage
    monkeypatch.undo()
    assert cheapest(choices, limit).damage <= exact <= 2 * cheapest(choices, limit).damage


def test_a_limit_below_the_fewest_bits_is_refused_with_what_they_take():
    choices = _choices(3)
    least = min(size for size, _, _ in _all(choices))
    with pytest.raises(QuantizationError, match=f"take {least:,} bytes, and {least - 1:,} are left"):
        cheapest(choices, least - 1)


def test_the_fewest_bytes_within_a_measured_drop_are_found_and_nothing_is_measured_twice():
    choices = _choices(6)
    ends = frontier(choices)
    budget, measured = ends[len(ends) // 3].damage, []

    def drop(assignment):
        measured.append(tuple(assignment.bits.items()))
        return assignment.damage

    found, trials = fewest_bytes(choices, drop, budget)
    assert found == ends[len(ends) // 3]
    assert len(measured) == len(set(measured)) == len(trials) <= 2 + len(ends).bit_length()
    assert [trial.drop <= budget for trial in trials].count(False) > 0


def test_where_even_the_least_damage_is_too_much_the_drop_is_named():
    choices = _choices(4)
    with pytest.raises(QuantizationError, match=r"--max-drop 0.5: .* falls by 3\.00 points"):
        fewest_bytes(choices, lambda assignment: 3.0, 0.5)


def test_where_every_assignment_holds_the_budget_the_smallest_is_taken():
    choices = _choices(4)
    found, _ = fewest_bytes(choices, lambda assignment: 0.0, 0.5)
    assert set(found.bits.values()) == {2}
