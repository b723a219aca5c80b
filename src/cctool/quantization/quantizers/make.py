"""Building fake quantizers of weights and activations from their settings."""

from __future__ import annotations

from cctool.base.errors import QuantizationError
from cctool.quantization.quantizers.apot import ApotQuantizer
from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.dorefa_wrpn import DorefaWeightQuantizer, FixedQuantizer
from cctool.quantization.quantizers.lsq_pact import LsqQuantizer, PactQuantizer
from cctool.quantization.quantizers.uniform import MovingUniformQuantizer, UniformQuantizer

_WEIGHTS: dict[str, type[Quantizer]] = {
    "uniform": UniformQuantizer,
    "lsq": LsqQuantizer,
    "dorefa": DorefaWeightQuantizer,
    "pact": DorefaWeightQuantizer,
    "wrpn": FixedQuantizer,
    "apot": ApotQuantizer,
}
_ACTIVATIONS: dict[str, type[Quantizer]] = {
    "uniform": UniformQuantizer,
    "lsq": LsqQuantizer,
    "dorefa": FixedQuantizer,
    "pact": PactQuantizer,
    "wrpn": FixedQuantizer,
}


def make_quantizer(config: QuantizerConfig, *, weight: bool, channels: int | None) -> Quantizer:
    """Build a quantizer whose state has the shapes that its settings require, so that a file's state fits.

    Args:
        config: the settings.
        weight: whether it is for a weight, else for an activation.
        channels: size of the tensor along ``config.axis``; None if and only if that is None.

    Raises:
        QuantizationError: if the method does not quantize this or requires the other sign, or channels and
            axis do not match.
    """
    kind = "weights" if weight else "activations"
    method = (_WEIGHTS if weight else _ACTIVATIONS).get(config.method)
    if method is None:
        raise QuantizationError(f"{config.method} does not quantize {kind}")
    if config.method in ("dorefa", "pact", "wrpn") and config.signed != weight:
        sign = "signed" if weight else "unsigned"
        raise QuantizationError(f"{config.method} quantizes {kind} {sign}: set signed={weight}")
    if (config.axis is None) != (channels is None):
        raise QuantizationError(f"axis {config.axis} with {channels} channels: one needs the other")
    if channels is not None and channels < 0:
        raise QuantizationError(f"{channels} channels: 0 or more are allowed")
    # A weight is known completely in every pass, so its range needs no average over passes.
    if method is UniformQuantizer and config.momentum is not None and not weight:
        method = MovingUniformQuantizer
    return method(config, weight=weight, channels=channels)
