"""Keeping codecs of feature maps in step with the weights around them.

A tap is calibrated for the weights of its network. Commands that change these without the codecs at work
(a cut, a quantization) calibrate again where training images are at hand. A training has the codecs in its
loop, so that weights are fitted to the ranges: these stay, and a warning says where maps outgrew them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cctool.base.networks import in_eval_mode, some
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.keep.calibrate import calibration_images, recalibrate_taps
from cctool.options.common import DataOptions
from cctool.transforms.codec.codec import Symbols
from cctool.transforms.codec.taps import fingerprint, recording, stale_taps, taps_of, with_taps

__all__ = ["recalibrated_taps", "trained_taps", "warn_of_stale_taps"]

_TOLERATED = 0.1
"""Percent of a tap's values that may saturate after a training without a word."""


def recalibrated_taps(
    checkpoint: Checkpoint, source: DataSource | None, data: DataOptions, context: Context
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Calibrate codecs again for weights that were changed without them, where there are images for it.

    Args:
        checkpoint: its model may be changed in place.
        source: opened for the checkpoint; None where there are no data.
        data: batch size and workers.
        context: device, seed, reporter.

    Returns:
        The checkpoint whose taps are in step, and what the history should say. Without training images, or
        where the preprocessing is unknown, taps stay as they are, with a warning.
    """
    stale = stale_taps(checkpoint.model)
    if not stale:
        return checkpoint, ()
    if source is None or "train" not in source.loaders or checkpoint.spec.preprocessing is None:
        why = "the preprocessing is unknown" if source and "train" in source.loaders else "no training images"
        note = f"{len(stale)} codecs stay calibrated for the weights before: {why} to calibrate them on again"
        context.reporter.warn(f"{note}; `cctool transform --target features --data` does")
        return checkpoint, (note,)
    found = recalibrate_taps(checkpoint, source, data, context)
    images = max(hook.codec.images for hook in taps_of(found.model).values())
    note = f"{len(taps_of(found.model))} codecs were calibrated again on {images:,} training images"
    context.reporter.note(note)
    # What becomes of the training's state is the caller's to decide.
    return replace(found, resume=checkpoint.resume), (note,)


def trained_taps(
    checkpoint: Checkpoint, source: DataSource, data: DataOptions, context: Context
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Accept the codecs that a training had in its loop, unless their maps outgrew them.

    Arguments and result as `recalibrated_taps`. Taps whose values saturate by more than a thousandth count
    as stale from then on.
    """
    stale = stale_taps(checkpoint.model)
    if not stale or "train" not in source.loaders:
        return checkpoint, ()
    model = checkpoint.model.to(context.device)
    hooks = taps_of(model)
    seen = {name: _Seen() for name in hooks}

    def sink(name: str, symbols: Symbols, x: Tensor, y: Tensor) -> None:
        seen[name].add(symbols, x)

    count = max(hook.codec.images for hook in hooks.values())
    images, _ = calibration_images(checkpoint, source, max(1, count), data, context)
    with torch.no_grad(), in_eval_mode(model), recording(model, sink):
        for batch in images:
            model(batch)
    worst = sorted(seen.items(), key=lambda item: -item[1].percent())
    outgrown = {name: found for name, found in worst if found.percent() > _TOLERATED}
    now = fingerprint(model)
    for name, hook in hooks.items():
        if name not in outgrown:
            hook.fingerprint = now
    notes = tuple(
        f"{name}: after training {found.percent():.2f} % of its values saturate; they reach from "
        f"{found.low:.4g} to {found.high:.4g}, its codec from "
        f"{' to '.join(f'{value:.4g}' for value in _bounds(model, name))}"
        for name, found in outgrown.items()
    )
    if notes:
        more = f", and {len(notes) - 1} codecs more" if len(notes) > 1 else ""
        context.reporter.warn(f"{notes[0]}{more}; `cctool transform --target features` calibrates again")
    return replace(checkpoint, spec=with_taps(checkpoint.spec, model)), notes


def warn_of_stale_taps(checkpoint: Checkpoint, context: Context) -> None:
    """Say which codecs were calibrated for other weights than the network has."""
    stale = stale_taps(checkpoint.model)
    if stale:
        context.reporter.warn(
            f"{some(stale)}: calibrated for other weights than the network has now; "
            "`cctool transform --target features` calibrates again"
        )


@dataclass
class _Seen:
    """What went through one tap."""

    values: int = 0
    clamped: int = 0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, symbols: Symbols, x: Tensor) -> None:
        assert symbols.clamped is not None
        low, high = torch.aminmax(x)
        self.values += x.numel()
        self.clamped += int(symbols.clamped[0])
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def percent(self) -> float:
        return 100 * self.clamped / self.values if self.values else 0.0


def _bounds(model: torch.nn.Module, name: str) -> list[float]:
    found: list[float] = model.get_submodule(name).get_buffer("tap_range").tolist()
    return found
