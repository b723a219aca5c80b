"""Codecs of feature maps, kept in step with the weights around them.

A tap is a codec behind a module, calibrated for the network's weights. Commands that change the weights
without the codecs (a cut, a quantization) calibrate again if they have training images. Training runs the
codecs, so that weights adapt to their ranges: the ranges stay, and a warning names maps that outgrew them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
    set_taps,
    stale_taps,
    tap_buffers,
    taps_of,
    with_taps,
)

if TYPE_CHECKING:
    from cctool.data.records import DataSource
    from cctool.pruning.cut.planner import Planner


_TOLERATED = 0.1
"""Percent of a tap's values that may saturate after training without a warning."""


class Codecs(Follower):
    """Codecs behind modules, with their ranges and bases."""

    kind = "tap"
    edit = TAP
    in_programs = True

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Take over the new shapes of the maps."""
        # Loading a checkpoint imports this module; it must not import what runs and calibrates networks.
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

    def after_new_head(self, checkpoint: Checkpoint, names: Collection[str], context: Context) -> Followed:
        """Codecs of maps with a channel for each class are gone."""
        from cctool.operations.data import example
        from cctool.transforms.codec.sites import find_sites

        model, hooks = checkpoint.model, taps_of(checkpoint.model)
        with bypassed(model):
            sites = find_sites(model, example(checkpoint), tuple(hooks)) if hooks else ()
        fitting = {site.name for site in sites if hooks[site.name].shape == site.shape}
        gone = [
            str(edit["module"])
            for edit in checkpoint.spec.edits
            if edit.get("kind") == "tap" and edit["module"] not in fitting
        ]
        if not gone:
            return Followed(checkpoint)
        taps = drop_taps(model)
        set_taps(model, {name: tap for name, tap in taps.items() if name in fitting})
        note = f"no codec behind {some(gone)}: its maps have a channel for each class"
        return Followed(replace(checkpoint, spec=with_taps(checkpoint.spec, model)), (note,))

    def after_change(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Calibrate again."""
        return recalibrated_taps(checkpoint, change.source, change.data, change.context)

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Accept codecs that the weights were trained with."""
        assert change.source is not None
        return trained_taps(checkpoint, change.source, change.data, change.context)

    def stale(self, checkpoint: Checkpoint) -> str:
        """Which codecs were calibrated for other weights than the network has."""
        stale = stale_taps(checkpoint.model)
        if not stale:
            return ""
        return (
            f"{some(stale)}: calibrated for other weights than the network has now; "
            "`cctool transform --target features` calibrates again"
        )

    def plain(self, checkpoint: Checkpoint) -> Checkpoint:
        """The network without codecs, which shares all other tensors."""
        gone = tap_buffers(checkpoint.model)
        if not gone:
            return checkpoint
        model = sharing_copy(checkpoint.model)
        drop_taps(model)
        stored = {name: form for name, form in checkpoint.stored.items() if name not in gone}
        return replace(checkpoint, model=model, spec=with_taps(checkpoint.spec, model), stored=stored)

    def fixed_widths(self, planner: Planner, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Families that pass through a codec which mixes channels by a calibrated basis."""
        hooks = taps_of(checkpoint.model)
        mixed = {name: hook.shape[0] for name, hook in hooks.items() if hook.codec.channel_klt}
        return _passing(planner, mixed) if mixed else {}


def recalibrated_taps(
    checkpoint: Checkpoint, source: DataSource | None, data: DataOptions, context: Context
) -> Followed:
    """Calibrate codecs again, in place, for weights that were changed without them.

    Without training images, or if the preprocessing is unknown, taps stay as they are, with a warning.
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
    # Calibration drops the training state; here its followers decide about it.
    return Followed(replace(found, resume=checkpoint.resume), (note,))


def trained_taps(checkpoint: Checkpoint, source: DataSource, data: DataOptions, context: Context) -> Followed:
    """Accept the codecs that a network was trained with, unless its maps outgrew their ranges.

    Taps of which more than a thousandth of the values saturate count as stale from then on.
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

    # As many images as the codecs were calibrated on.
    count = max(hook.codec.images for hook in hooks.values())
    images, _ = calibration_images(checkpoint, source, max(1, count), data, context)
    with torch.no_grad(), recording(model, sink), in_eval_mode(model):
        for batch in images:
            model(batch)
    # The weights have adapted to the ranges; calibrating again would undo that.
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
    """Number of values that passed one tap and of those that were clamped, and their range."""

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
    """Families whose cut would change the number of output channels of these modules."""
    found = {}
    for number, family in enumerate(planner.graph.families):
        # A trial cut of the family's first unit, on a copy of views, shows which widths depend on it.
        kept = [torch.ones(other.units, dtype=torch.bool) for other in planner.graph.families]
        kept[number][0] = family.units == 1
        plan = plan_cut(planner.model, planner.graph, Selection(tuple(kept), {}))
        widths = _widths(sketch(planner.model, plan), planner.inputs, channels)
        changed = [name for name, width in widths.items() if width != channels[name]]
        if changed:
            found[family.name] = f"the codec behind {changed[0]} mixes its channels by a calibrated basis"
    return found


def _widths(model: nn.Module, inputs: Sequence[Tensor], names: Iterable[str]) -> dict[str, int]:
    """Number of output channels of each of these modules."""
    from cctool.graph.execution import execute

    widths: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        widths[name] = output.shape[1]

    handles = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    with removing(handles):
        execute(model, inputs, [])
    return widths
