"""What is quantized where: records of one network's quantizers, including the `quantize` edit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cctool.checkpoint.spec import Edit
from cctool.options.quantize.choices import Observer
from cctool.quantization.network.calls import CallSite
from cctool.quantization.quantizers.config import Brief, QuantizerConfig

_MAX_CHANNELS = 2**20
_Name = Annotated[str, Field(max_length=4096)]


class WeightPoint(Brief):
    """The quantizer of one weight.

    Attributes:
        config: its settings.
        channels: number of slices with separate scales; None with one scale.
        norm: module whose batch norm follows: with one scale for the tensor, the weight is quantized as if
            this were folded into it.
        made_of: parameters and buffers that the weight is computed from, if it is no parameter itself.
    """

    config: QuantizerConfig
    channels: Annotated[int, Field(ge=0, le=_MAX_CHANNELS, strict=True)] | None = None
    norm: _Name | None = None
    made_of: tuple[_Name, ...] = Field(default=(), max_length=1000)


class CallPoint(Brief):
    """What is quantized at one call.

    Attributes:
        weight: name of the weight whose quantizer is used: that of a parameter, or of a `Kernel`; None if it
            is not quantized.
        input: quantizer of its first argument.
        output: quantizer of its result.
    """

    weight: _Name | None = None
    input: QuantizerConfig | None = None
    output: QuantizerConfig | None = None


class Observing(Brief):
    """How ranges of activations were found, so that they can be found again in the same way.

    Attributes:
        observer: its name.
        percentile: of the percentile observer.
        deviations: of the observer of standard deviations.
    """

    observer: Observer = Observer.MIN_MAX
    percentile: float = Field(default=99.99, gt=0, le=100)
    deviations: float = Field(default=3.0, gt=0, le=1e6)


class Quantize(Brief, Edit):
    """Quantizers of one module: of its weights by their names in it, of its calls by `CallSite.key`.

    A weight that is computed is named after the call that takes it, as in ``conv2d#0:weight``.

    Attributes:
        fingerprint: of the weights that the activations' ranges were calibrated for; "" if none were.
        images: number of images used for that.
        observing: how they were found; None if they were learned.
        method: name of the method, for reports.
    """

    kind: Literal["quantize"] = "quantize"
    weights: dict[_Name, WeightPoint] = Field(default={}, max_length=1000)
    calls: dict[_Name, CallPoint] = Field(default={}, max_length=10_000)
    fingerprint: str = Field(default="", max_length=128)
    images: int = Field(default=0, ge=0, strict=True)
    observing: Observing | None = None
    method: str = Field(default="", max_length=64)


def weight_key(name: str) -> str:
    """Key of the quantizer of a weight.

    >>> weight_key("layer1.0.conv1.weight")
    'layer1/0/conv1/weight'
    """
    return name.replace(".", "/")


def activation_key(place: CallSite, slot: str) -> str:
    """Key of the quantizer of an activation.

    >>> activation_key(CallSite("layer1.0", "add", 0), "output")
    'layer1/0/add#0:output'
    """
    return f"{place.module.replace('.', '/')}/{place.key}:{slot}".removeprefix("/")
