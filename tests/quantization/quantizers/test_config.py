"""Configs of quantizers: what is refused, and the integers that follow."""

from typing import Any

import pytest
from pydantic import ValidationError

from cctool.quantization.quantizers.config import QuantizerConfig


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({"method": "uniform", "bits": 8}, (-128, 127)),
        ({"method": "uniform", "bits": 8, "narrow": True}, (-127, 127)),
        ({"method": "uniform", "bits": 8, "reduce_range": True}, (-64, 63)),
        ({"method": "uniform", "bits": 8, "reduce_range": True, "narrow": True}, (-63, 63)),
        ({"method": "uniform", "bits": 8, "signed": False, "reduce_range": True}, (0, 127)),
        ({"method": "uniform", "bits": 1, "signed": False}, (0, 1)),
        ({"method": "uniform", "bits": 16, "signed": False}, (0, 65535)),
        ({"method": "lsq", "bits": 2}, (-2, 1)),
        ({"method": "lsq", "bits": 2, "narrow": True}, (-1, 1)),
        ({"method": "wrpn", "bits": 4}, (-7, 7)),
        ({"method": "wrpn", "bits": 4, "signed": False}, (0, 15)),
        ({"method": "dorefa", "bits": 3}, (-7, 7)),
        ({"method": "dorefa", "bits": 1}, (-1, 1)),
        ({"method": "pact", "bits": 4, "signed": False}, (0, 15)),
    ],
)
def test_limits(settings: dict[str, Any], limits: tuple[int, int]) -> None:
    assert QuantizerConfig(**settings).limits == limits


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "other", "bits": 8}, "method"),
        ({"method": "uniform", "bits": 0}, "bits"),
        ({"method": "uniform", "bits": 17}, "bits"),
        ({"method": "uniform", "bits": 8.0}, "bits"),
        ({"method": "uniform", "bits": True}, "bits"),
        ({"method": "uniform", "bits": 8, "signed": "yes"}, "signed"),
        ({"method": "uniform", "bits": 8, "axis": -1}, "axis"),
        ({"method": "uniform", "bits": 8, "momentum": 1.0}, "momentum"),
        ({"method": "uniform", "bits": 8, "momentum": float("nan")}, "momentum"),
        ({"method": "uniform", "bits": 8, "colour": 1}, "colour"),
        ({"method": "uniform", "bits": 1}, "signed uniform needs 2 bits"),
        ({"method": "wrpn", "bits": 1}, "signed wrpn needs 2 bits"),
        ({"method": "lsq", "bits": 8, "symmetric": False}, "lsq is symmetric"),
        ({"method": "lsq", "bits": 8, "momentum": 0.9}, "lsq takes no momentum"),
        ({"method": "dorefa", "bits": 8, "axis": 0}, "dorefa has one scale"),
        ({"method": "apot", "bits": 4, "axis": 0}, "apot has one scale"),
        ({"method": "uniform", "bits": 8, "narrow": True, "signed": False}, "narrow"),
        ({"method": "uniform", "bits": 8, "narrow": True, "symmetric": False}, "narrow"),
        ({"method": "dorefa", "bits": 8, "narrow": True}, "narrow"),
        ({"method": "uniform", "bits": 7, "reduce_range": True}, "reduce_range"),
        ({"method": "wrpn", "bits": 8, "reduce_range": True}, "reduce_range"),
        ({"method": "uniform", "bits": 8, "terms": 2}, "no additive terms"),
        ({"method": "apot", "bits": 4, "signed": False}, "apot is for weights"),
        ({"method": "apot", "bits": 9}, "8 at most"),
        ({"method": "apot", "bits": 4, "terms": 4}, "one bit is the sign"),
        ({"method": "apot", "bits": 8, "terms": 1}, "take more terms"),
    ],
)
def test_impossible_ones_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        QuantizerConfig(**settings)


@pytest.mark.parametrize(
    ("bits", "terms", "widths"),
    [(2, None, (1,)), (3, None, (2,)), (5, None, (2, 2)), (4, None, (2, 1)), (7, 3, (2, 2, 2)), (7, 1, (6,))],
)
def test_terms_share_the_bits_behind_the_sign(bits: int, terms: int | None, widths: tuple[int, ...]) -> None:
    assert QuantizerConfig(method="apot", bits=bits, terms=terms).term_bits == widths


def test_powers_have_no_limits() -> None:
    with pytest.raises(ValueError, match="no integers"):
        _ = QuantizerConfig(method="apot", bits=4).limits


def test_a_config_comes_back_from_json() -> None:
    config = QuantizerConfig(method="uniform", bits=4, signed=False, symmetric=False, axis=1, momentum=0.99)
    assert QuantizerConfig.model_validate_json(config.model_dump_json()) == config
