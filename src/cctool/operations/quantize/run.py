"""`cctool quantize`: compute and store in fewer bits.

Each kind of method has a module: weights that are only stored in few bits (`stored`), integers that are
calibrated (`calibrated`), and quantizers that are trained (`trained`).
"""

from __future__ import annotations

from collections.abc import Iterator

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.context import Context, Outcome
from cctool.operations.quantize import calibrated as quantize_integer
from cctool.operations.quantize import stored as quantize_stored
from cctool.operations.quantize import trained as quantize_trained
from cctool.options.quantize.choices import INTEGERS, TRAINED, QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions


def run(checkpoint: Checkpoint, options: QuantizeOptions, context: Context) -> Iterator[Outcome]:
    """Quantize a copy of the network; yields one product.

    Raises:
        QuantizationError: if nothing is selected, or a tensor cannot be stored in the method's encoding.
        UsageError: if a pattern matches nothing, or images are needed and there are none.
        DataError: if the data set that was given cannot be opened.
    """
    trained = options.method in TRAINED
    if trained or (options.method is QuantizeMethod.CODEBOOK and options.epochs):
        yield from quantize_trained.run(checkpoint, options, context)
    elif options.method in INTEGERS and options.group is None:
        yield from quantize_integer.run(checkpoint, options, context)
    else:
        yield from quantize_stored.run(checkpoint, options, context)
