"""All ways to store a tensor, by the name that stands in the file.

A new one is a file with its `Encoding` and a line here.
"""

from __future__ import annotations

from cctool.checkpoint.encoding import Encoding
from cctool.quantization.affine import AFFINE_U8
from cctool.quantization.bits import BITS
from cctool.quantization.codebook import CODEBOOK
from cctool.quantization.half import BF16, FP16
from cctool.quantization.integers import INTN
from cctool.quantization.masked import MASKED

__all__ = ["ENCODINGS"]

ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding for encoding in (FP16, BF16, AFFINE_U8, INTN, CODEBOOK, BITS, MASKED)
}
