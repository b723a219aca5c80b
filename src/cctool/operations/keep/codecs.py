"""Codecs of feature maps, in step with the weights around them.

A tap is calibrated for the weights of its network. Commands that change these without the codecs at work
(a cut, a quantization) calibrate again where training images are at hand. A training has the codecs in its
loop, so that weights are fitted to the ranges: these stay, and a warning says where maps outgrew them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cctool.base.networks import in_eval_mode, removing, some
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.context import Context
from cctool.operations.keep.follower import Change, Cutting, Followed, Follower, sharing_copy
from cctool.options.common import DataOptions
from cctool.pruning.cut.planner import Planner
from cctool.pruning.cut.surgery import plan_cut, sketch
from cctool.pruning.select.order import Selection
from cctool.transforms.codec.codec import Symbols
from cctool.transforms.codec.taps import (
    TAP,
    bypassed,
    drop_taps,
    fingerprint,
    recording,
    stale_taps,
    tap_buffers,
    taps_of,
    with_taps,
)

if TYPE_CHECKING:
    from cctool.data.records import DataSource
    from cctool.pruning.cut.planner import Planner

__all__ = ["Codecs", "recalibrated_taps", "trained_taps"]

_TOLERATED = 0.1
"""Percent of a tap's values that may saturate after a training without a word."""


class Codecs(Follower):
    """Codecs behind modules, with their ranges and bases."""

    kind = "tap"
    edit = TAP
    in_programs = True

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Take over the shape of the maps."""
        # Whoever loads a checkpoint imports this file, and not what cuts, runs and calibrates networks.
        from cctool.operations.data import example
        from cctool.transforms.codec.sites import find_sites

        model = checkpoint.model
        hooks = taps_of(model)
        if not hooks:
            return Followed(checkpoint)
        with bypassed(model):
            for site in find_sites(model, example(checkpoint), tuple(hooks)):
                hooks[site.name].shape = site.shape
        return Followed(replace(checkpoint, spec=with_taps(checkpoint.spec, model)))

    def after_change(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Calibrate again."""
        return recalibrated_taps(checkpoint, change.source, change.data, change.context)

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Accept what the training had in its loop."""
        assert change.source is not None
        return trained_taps(checkpoint, change.source, change.data, change.context)

    def stale(self, checkpoint: Checkpoint) -> str:
        """Say which codecs were calibrated for other weights than the network has."""
        stale = stale_taps(checkpoint.model)
        if not stale:
            return ""
        return (
            f"{some(stale)}: calibrated for other weights than the network has now; "
            "`cctool transform --target features` calibrates again"
        )

    def plain(self, checkpoint: Checkpoint) -> Checkpoint:
        """Maps are not coded; all other tensors are shared."""
        gone = tap_buffers(checkpoint.model)
        if not gone:
            return checkpoint
        model = sharing_copy(checkpoint.model)
        drop_taps(model)
        stored = {name: form for name, form in checkpoint.stored.items() if name not in gone}
        return replace(checkpoint, model=model, spec=with_taps(checkpoint.spec, model), stored=stored)

    def fixed_widths(self, planner: Planner, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Codecs that mix channels by a calibrated basis keep the number of these."""
        hooks = taps_of(checkpoint.model)
        mixed = {name: hook.shape[0] for name, hook in hooks.items() if hook.codec.channel_klt}
        return _passing(planner, mixed) if mixed else {}


def recalibrated_taps(
    checkpoint: Checkpoint, source: DataSource | None, data: DataOptions, context: Context
) -> Followed:
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
    from cctool.operations.keep.calibrate import recalibrate_taps, why_no_images

    stale = stale_taps(checkpoint.model)
    if not stale:
        return Followed(checkpoint)
    why = why_no_images(checkpoint, source)
    if source is None or why:
        note = f"{len(stale)} codecs stay calibrated for the weights before: {why} to calibrate them on again"
        context.reporter.warn(f"{note}; `cctool transform --target features --data` does")
        return Followed(checkpoint, (note,))
    found = recalibrate_taps(checkpoint, source, data, context)
    images = max(hook.codec.images for hook in taps_of(found.model).values())
    note = f"{len(taps_of(found.model))} codecs were calibrated again on {images:,} training images"
    context.reporter.note(note)
    # What becomes of the training's state is the caller's to decide.
    return Followed(replace(found, resume=checkpoint.resume), (note,))


def trained_taps(checkpoint: Checkpoint, source: DataSource, data: DataOptions, context: Context) -> Followed:
    """Accept the codecs that a training had in its loop, unless their maps outgrew them.

    Arguments and result as `recalibrated_taps`. Taps whose values saturate by more than a thousandth count
    as stale from then on.
    """
    from cctool.operations.keep.calibrate import calibration_images

    stale = stale_taps(checkpoint.model)
    if not stale or "train" not in source.loaders:
        return Followed(checkpoint)
    model = checkpoint.model.to(context.device)
    hooks = taps_of(model)
    seen = {name: _Seen() for name in hooks}

    def sink(name: str, symbols: Symbols, x: Tensor, y: Tensor) -> None:
        seen[name].add(symbols, x)

    count = max(hook.codec.images for hook in hooks.values())
    images, _ = calibration_images(checkpoint, source, max(1, count), data, context)
    with torch.no_grad(), recording(model, sink), in_eval_mode(model):
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
        f"{' to '.join(f'{x:.4g}' for x in model.get_submodule(name).get_buffer('tap_range').tolist())}"
        for name, found in outgrown.items()
    )
    if notes:
        more = f", and {len(notes) - 1} codecs more" if len(notes) > 1 else ""
        context.reporter.warn(f"{notes[0]}{more}; `cctool transform --target features` calibrates again")
    return Followed(replace(checkpoint, spec=with_taps(checkpoint.spec, model)), notes)


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


def _passing(planner: Planner, channels: Mapping[str, int]) -> dict[str, str]:
    """Families whose cut would change how many channels these modules put out."""
    found = {}
    for number, family in enumerate(planner.graph.families):
        kept = [torch.ones(other.units, dtype=torch.bool) for other in planner.graph.families]
        kept[number][0] = family.units == 1
        plan = plan_cut(planner.model, planner.graph, Selection(tuple(kept), {}))
        widths = _widths(sketch(planner.model, plan), planner.inputs, channels)
        changed = [name for name, width in widths.items() if width != channels[name]]
        if changed:
            found[family.name] = f"the codec behind {changed[0]} mixes its channels by a calibrated basis"
    return found


def _widths(model: nn.Module, inputs: Sequence[Tensor], names: Iterable[str]) -> dict[str, int]:
    """Channels that modules put out."""
    from cctool.graph.execution import execute

    widths: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        widths[name] = output.shape[1]

    handles = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    with removing(handles):
        execute(model, inputs, [])
    return widths
