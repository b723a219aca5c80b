"""The settings of a quantizer. They are part of files, and so are validated before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from cctool.checkpoint.spec import Record

MAX_BITS = 16
"""Most bits of a quantizer: integers and their indices fit 16 bits."""

QuantizerMethod = Literal["uniform", "dorefa", "pact", "lsq", "wrpn", "apot"]

_SPAN = 64
_INTEGERS = ("uniform", "lsq")
_FIXED_SCALE = ("dorefa", "pact", "wrpn", "apot")


class Brief(Record):
    """A record that omits defaults when written: a network has one point per call."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        defaults = {name: item.default for name, item in type(self).model_fields.items()}
        return {
            name: value
            for name, value in handler(self).items()
            if name == "kind" or getattr(self, name) != defaults[name]
        }


class QuantizerConfig(Brief):
    """Settings of one quantizer.

    Attributes:
        method: ``uniform`` has a range from calibration or from the data; ``lsq`` learns its step, ``pact``
            its clipping value; ``dorefa`` and ``wrpn`` have fixed ranges; ``apot`` has sums of
            powers of two for levels and learns its clipping value.
        bits: 1 to 16.
        signed: integers from -2^(bits-1) to 2^(bits-1) - 1, else from 0 to 2^bits - 1. DoReFa, PACT and WRPN
            quantize weights signed and activations unsigned; APoT is for weights, signed.
        symmetric: the zero point is 0, and unsigned values are 0 or more. Otherwise the zero point is an
            integer that represents 0 exactly; uniform only.
        narrow: the lowest signed integer is -(2^(bits-1) - 1).
        axis: the dimension of the quantized tensor whose slices have separate scales; None is one scale.
        momentum: in training, the range is an exponential moving average over the data, with this weight for
            the old value; uniform only. A weight's range is that of the weight itself in every training pass,
            whatever the momentum.
        reduce_range: use 7 of 8 bits, because CPUs without VNNI saturate when they add pairs of products.
        terms: APoT's number of additive terms; None gives each two bits, as the paper does.
    """

    method: QuantizerMethod
    bits: int = Field(ge=1, le=MAX_BITS, strict=True)
    signed: bool = Field(default=True, strict=True)
    symmetric: bool = Field(default=True, strict=True)
    narrow: bool = Field(default=False, strict=True)
    axis: Annotated[int, Field(ge=0, le=7, strict=True)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    reduce_range: bool = Field(default=False, strict=True)
    terms: Annotated[int, Field(ge=1, le=MAX_BITS, strict=True)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> QuantizerConfig:
        method = self.method
        if not self.symmetric and method != "uniform":
            raise ValueError(f"{method} is symmetric: only uniform quantizers have a zero point")
        if self.momentum is not None and method != "uniform":
            raise ValueError(f"{method} takes no momentum: only uniform quantizers follow a moving range")
        if self.axis is not None and method in _FIXED_SCALE:
            raise ValueError(f"{method} has one scale for the tensor: an axis is for uniform and lsq")
        if self.terms is not None and method != "apot":
            raise ValueError(f"{method} has no additive terms: only apot has")
        if self.narrow and (method not in _INTEGERS or not self.signed or not self.symmetric):
            raise ValueError(
                "narrow takes the lowest integer from signed, symmetric uniform or lsq quantizers"
            )
        if self.reduce_range and (method not in _INTEGERS or self.bits != 8):
            raise ValueError("reduce_range takes one bit from 8-bit uniform or lsq quantizers")
        if self.signed and self.bits < 2 and method not in ("dorefa", "pact"):
            raise ValueError(f"signed {method} needs 2 bits or more: one is the sign")
        if method == "apot":
            self._possible_powers()
        return self

    def _possible_powers(self) -> None:
        if not self.signed:
            raise ValueError("apot is for weights, which are signed")
        if self.bits > 8:
            raise ValueError(f"apot with {self.bits} bits: 8 at most")
        if self.terms is not None and self.terms >= self.bits:
            raise ValueError(
                f"apot with {self.terms} terms of {self.bits} bits: one bit is the sign, each term needs one"
            )
        span = sum(2**width - 1 for width in self.term_bits)
        if span > _SPAN:
            raise ValueError(
                f"apot with {len(self.term_bits)} terms of {self.bits} bits reaches 2^-{span}, "
                f"and 2^-{_SPAN} is the least that is allowed: take more terms"
            )

    @property
    def effective_bits(self) -> int:
        """Bits of the integers: ``bits``, less the one that ``reduce_range`` takes."""
        return self.bits - self.reduce_range

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest integer; DoReFa's weights are the odd ones among them.

        Raises:
            ValueError: for apot, whose levels are not evenly spaced.
        """
        if self.method == "apot":
            raise ValueError("apot's levels are no integers")
        if self.signed and self.method in ("dorefa", "pact"):
            return -(2**self.bits - 1), 2**self.bits - 1
        bits = self.effective_bits
        if not self.signed:
            return 0, 2**bits - 1
        top: int = 2 ** (bits - 1) - 1
        return -top - (not self.narrow and self.method != "wrpn"), top

    @property
    def term_bits(self) -> tuple[int, ...]:
        """APoT: bits of each additive term; together with the sign they are ``bits``."""
        width = self.bits - 1
        terms = self.terms if self.terms is not None else (width + 1) // 2
        return tuple(width // terms + (term < width % terms) for term in range(terms))
