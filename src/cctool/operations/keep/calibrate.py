"""Calibrating the codecs of a checkpoint on the training images of its data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from cctool.base.errors import DataError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.data.serving.batches import Batches
from cctool.operations.context import Context
from cctool.operations.data import example, feed_of, first_images
from cctool.options.common import DataOptions
from cctool.transforms.codec.calibrate import calibrate, choose_orders
from cctool.transforms.codec.codec import CodecConfig
from cctool.transforms.codec.sites import Site, find_sites
from cctool.transforms.codec.taps import drop_taps, fingerprint, set_taps, taps_of, with_taps


@dataclass(frozen=True)
class _Images:
    """The first ``count`` images of batches, anew at each iteration, with a progress bar."""

    batches: Batches
    count: int
    context: Context

    def __iter__(self) -> Iterator[Tensor]:
        steps = min(len(self.batches), -(-self.count // max(1, len(self.batches.parts[0]))))
        shown = self.context.reporter.progress(self.batches, "calibrating", steps)
        return first_images(shown, self.count)


def calibration_images(
    checkpoint: Checkpoint, source: DataSource, count: int, data: DataOptions, context: Context
) -> tuple[_Images, int]:
    """At most ``count`` un-augmented training images in an order drawn from the seed, and their number.

    Raises:
        DataError: if there are none.
    """
    # Shuffled, because the first images of a sorted data set are all of one class.
    served = feed_of(checkpoint, source, data, context).plain("train", shuffle=True)
    if not served.samples:
        raise DataError(f"{source.reference} has no training images to calibrate on")
    return _Images(served, count, context), min(count, served.samples)


def say_fewer(asked: int, used: int, context: Context) -> None:
    """Say where ``--calibration`` was given and asks for more training images than there are."""
    if "calibration" in context.given and used < asked:
        context.say_once(f"--calibration {asked:,}: {used:,} are there")


def why_no_images(checkpoint: Checkpoint, source: DataSource | None) -> str:
    """Why a network cannot be calibrated on training images; "" if it can."""
    if source is None or "train" not in source.loaders:
        return "no training images"
    return "" if checkpoint.spec.preprocessing is not None else "the preprocessing is unknown"


def put_taps(
    checkpoint: Checkpoint, sites: Sequence[Site], configs: Mapping[str, CodecConfig], images: _Images
) -> Checkpoint:
    """Calibrate codecs, one for each site, and put them behind modules in place of all earlier taps.

    A tap is a codec behind a module, through which that module's feature maps pass. The model is changed in
    place and must be on the device of the images.
    """
    model = checkpoint.model
    now = fingerprint(model)
    found = calibrate(model, sites, configs, images, now)
    drop_taps(model)
    set_taps(model, found)
    # Last: the best order of a code depends on the symbols of maps that have passed all earlier codecs.
    choose_orders(model, images)
    return replace(checkpoint, spec=with_taps(checkpoint.spec, model), resume=None)


def recalibrate_taps(
    checkpoint: Checkpoint, source: DataSource, data: DataOptions, context: Context
) -> Checkpoint:
    """Calibrate the codecs of a checkpoint again, for its present weights and widths; in place.

    Ranges, bases and all that calibration chose (orders, prequantizers, the scale of default tables) are
    found again on as many images as the first time. Quality and everything else stay.

    Raises:
        DataError: if there are no training images.
        TransformError: if a map is not finite any more.
    """
    model = checkpoint.model.to(context.device)
    hooks = taps_of(model)
    configs = {name: hook.codec for name, hook in hooks.items()}
    # Sites are looked for on the network without codecs, whose maps may no longer have the codecs' shapes.
    parts = drop_taps(model)
    try:
        sites = find_sites(model, example(checkpoint), tuple(hooks))
        count = max((config.images for config in configs.values()), default=1)
        images, used = calibration_images(checkpoint, source, max(count, 1), data, context)
    finally:
        set_taps(model, parts)
    configs = {name: config.model_copy(update={"images": used}) for name, config in configs.items()}
    return put_taps(checkpoint, sites, configs, images)
