"""All ways to store a tensor, by their names in files.

A new one is a file with its `Encoding`, and an entry here.
"""

from __future__ import annotations

from cctool.checkpoint.encoding import Encoding
from cctool.quantization.encodings.bitmask import BITS
from cctool.quantization.encodings.codebook import CODEBOOK
from cctool.quantization.encodings.float16 import BF16, FP16
from cctool.quantization.encodings.intn import INTN
from cctool.quantization.encodings.masked import MASKED
from cctool.quantization.encodings.uint8 import AFFINE_U8

ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding for encoding in (FP16, BF16, AFFINE_U8, INTN, CODEBOOK, BITS, MASKED)
}
