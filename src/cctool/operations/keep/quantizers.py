"""Quantizers: their scales, the integers that files store for weights, and the ranges of activations.

As with codecs of feature maps, commands that change weights calibrate ranges again if they have training
images, and warn if not. Training runs the quantizers, so that ranges and weights adapt to each other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from cctool.base.networks import several
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.thin import Cut
from cctool.checkpoint.file.payload import fingerprint_of
from cctool.checkpoint.tables import Tables
from cctool.operations.context import Context
from cctool.operations.keep.encode import computed_weights, in_step, settled
from cctool.operations.keep.follower import Change, Cutting, Followed, Follower
from cctool.pruning.cut.surgery import CutPlan
from cctool.quantization.calibration.run import calibrate_activations
from cctool.quantization.calibration.weight_ranges import fit_computed
from cctool.quantization.network.attach import (
    attach,
    fold_of,
    following_values,
    held_by,
    quantizers_of,
    taken_weights,
)
from cctool.quantization.network.edit import QUANTIZE, with_quantizers
from cctool.quantization.network.points import Observing, WeightPoint
from cctool.transforms.codec.taps import bypassed

_FOLLOWING = ("uniform", "dorefa", "pact")
"""Methods whose range is that of the weight, not learned."""


class Quantizers(Follower):
    """Quantizers with their scales, and weights stored as integers."""

    kind = "quantize"
    edit = QUANTIZE
    in_programs = True

    def cut(self, model: nn.Module, plan: CutPlan) -> Collection[str]:
        """Keep only the scales of the channels that stay."""
        held = quantizers_of(model)
        for name, point in ({} if held is None else dict(held.state.weights)).items():
            for cut in plan.tensors.get(name, ()) or _cuts_of_sources(point, plan):
                if held is not None and point.config.axis == cut.dim:
                    held.take(name, cut.keep)
        return ()

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Write the number of scales into the spec; weights that are computed now have other values."""
        refit(checkpoint)
        return Followed(replace(checkpoint, spec=with_quantizers(checkpoint.spec, checkpoint.model)))

    def after_new_head(self, checkpoint: Checkpoint, names: Collection[str], context: Context) -> Followed:
        """Fresh layers compute in floating point."""
        held = quantizers_of(checkpoint.model)
        if held is None or not held.drop_within(names):
            return Followed(checkpoint)
        note = "the fresh last layer is not quantized: `cctool quantize` quantizes it"
        spec = with_quantizers(checkpoint.spec, checkpoint.model)
        return Followed(replace(checkpoint, spec=spec), (note,))

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Give weights the rounded values that are stored."""
        refit(checkpoint, trained=True)
        checkpoint = settled(checkpoint, change.context.tables)
        return Followed(replace(checkpoint, spec=with_quantizers(checkpoint.spec, checkpoint.model)))

    def as_stored(self, checkpoint: Checkpoint, tables: Tables, *, settle: bool) -> Checkpoint:
        """Store weights as integers."""
        return settled(checkpoint, tables, settle=settle)

    def own_forms(self, checkpoint: Checkpoint) -> Collection[str]:
        """Weights with a quantizer."""
        held = quantizers_of(checkpoint.model)
        return () if held is None else held.state.weights.keys()


def _cuts_of_sources(point: WeightPoint, plan: CutPlan) -> Sequence[Cut]:
    """The cut of a computed weight's channels, as the tensors that it is made of are cut along them."""
    cuts = [cut for name in point.made_of for cut in plan.tensors.get(name, ())]
    return [cut for cut in cuts if cut.dim == point.config.axis and cut.size == point.channels][:1]


def refit(checkpoint: Checkpoint, *, trained: bool = False) -> int:
    """Find the ranges of computed weights again, in place, after what they are made of has changed.

    Learned steps stay where the number of channels did not change otherwise than a cut has foreseen; after
    a training also ranges that it kept. Returns the number of weights.
    """
    model, computed = checkpoint.model, computed_weights(checkpoint.model)
    if not computed:
        return 0
    # Loading a checkpoint imports this module; it must not import what opens data.
    from cctool.operations.data import example

    held = held_by(model)
    # Codecs and quantizers may not fit the network yet.
    with bypassed(model):
        with following_values(model, lambda key, value: None):
            inputs = example(checkpoint)
        taken = taken_weights(model, inputs)
    count = 0
    for name, quantizer in computed.items():
        point, value = held.state.weights[name], taken.get(name)
        if value is None:
            continue
        axis = point.config.axis
        channels = None if axis is None else value.shape[axis]
        fits = channels == point.channels
        if not fits:
            point = point.model_copy(update={"channels": channels})
            attach(model, {name: point}, {})
            quantizer = computed_weights(model)[name]
        kept = trained and point.config.method == "uniform" and point.config.momentum is None
        if (point.config.method in _FOLLOWING and not kept) or not fits:
            fit_computed(quantizer, value, fold_of(model, point))
            count += 1
    return count


class Ranges(Follower):
    """Ranges of activations, which are valid for the weights that they were found with."""

    in_programs = True

    def after_change(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Calibrate ranges again; without images or a known preprocessing they stay, with a warning.

        Those of weights that are computed need no images.
        """
        # Loading a checkpoint imports this module; it must not import what calibrates.
        from cctool.operations.keep.calibrate import calibration_images, why_no_images

        held = quantizers_of(checkpoint.model)
        if held is None or not _stale(checkpoint):
            return Followed(checkpoint)
        if refit(checkpoint):
            spec = with_quantizers(checkpoint.spec, checkpoint.model)
            checkpoint = replace(checkpoint, spec=spec)
        if not held.activation_keys:
            return Followed(checkpoint)
        context, count = change.context, len(held.activation_keys)
        why = why_no_images(checkpoint, change.source)
        if change.source is None or why:
            note = (
                f"{count} ranges of activations stay those of the weights before: {why} to find them on again"
            )
            context.reporter.warn(f"{note}; `cctool quantize --data` does")
            return Followed(checkpoint, (note,))
        model = checkpoint.model.to(context.device)
        # As many images as the first time.
        wanted = max(held.state.images, 1)
        images, used = calibration_images(checkpoint, change.source, wanted, change.data, context)
        calibrate_activations(model, images, held.state.observing or Observing())
        held.state.images = used
        ranges, on = several(count, "activation"), several(used, "training image")
        note = f"the ranges of {ranges} were found again on {on}"
        context.reporter.note(note)
        return Followed(in_step(checkpoint, context.tables), (note,))

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        """Record that the ranges, trained together with the weights, are valid for them."""
        held = quantizers_of(checkpoint.model)
        if held is None:
            return Followed(checkpoint)
        held.state.fingerprint = fingerprint_of(checkpoint.model)
        spec = checkpoint.spec
        now = {(edit["kind"], edit["module"]): edit for edit in with_quantizers(spec, checkpoint.model).edits}
        edits = tuple(now[edit["kind"], edit["module"]] for edit in spec.edits)
        return Followed(replace(checkpoint, spec=spec.model_copy(update={"edits": edits})))

    def stale(self, checkpoint: Checkpoint) -> str:
        """A warning if ranges were found for other weights than the network has now."""
        held = quantizers_of(checkpoint.model)
        if held is None or not held.activation_keys or not _stale(checkpoint):
            return ""
        return (
            f"the ranges of {several(len(held.activation_keys), 'activation')} were found for other weights "
            "than the network has now; `cctool quantize` finds them again"
        )


def _stale(checkpoint: Checkpoint) -> bool:
    """Whether ranges were found for other weights than the network has now."""
    held = quantizers_of(checkpoint.model)
    return held is not None and held.state.fingerprint != fingerprint_of(checkpoint.model)
