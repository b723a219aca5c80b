"""What `cctool transform` can be asked: the options of one run, with their checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cctool.base.errors import UsageError
from cctool.options.common import (
    DataOptions,
    TaskOptions,
    histograms_option,
    judged,
    report_file_option,
    zero_bar_option,
)
from cctool.options.fields import Options, assemble, at_least, between, leaves, nested, section
from cctool.options.prune.choices import Scope
from cctool.options.transform.choices import (
    Axes,
    Mode,
    Norm,
    Prequantizer,
    Select,
    TransformPreset,
    TransformTarget,
)

BLOCKS = "blocks"
"""Stands for every residual block where taps are named."""

_both = section("What is transformed")
_weights = section("Weights (--target weights)")
_features = section("Feature maps (--target features)")
_REPORT = "Report of the feature maps"
_report = section(_REPORT)


@dataclass(frozen=True)
class WeightOptions(Options):
    """How layers go into a transform domain."""

    # fmt: off
    mode: Mode = _weights(Mode.COEFFICIENT, "Transform the weights, or train basis functions in their place.")
    layers: tuple[str, ...] = _weights(
        ("all",), "Layers: linear (fc, dense), conv, all, or a pattern of module names; may be repeated.",
        metavar="KIND|GLOB", repeated=True, unset="all")
    axes: Axes | None = _weights(
        None, "Axes of a convolution to transform; linear layers have channel axes only.",
        unset="spatial, and channel where the kernel is 1x1")
    keep: float | None = _weights(
        None, "Fraction of the coefficients to keep.", unset="1, which loses nothing",
        bounds=between("(0, 1]"))
    threshold: float | None = _weights(
        None, "Keep coefficients of at least this magnitude, in place of --keep.", bounds=at_least(0))
    select: Select = _weights(
        Select.ENERGY, "Keep the coefficients of most energy, or a corner of low frequencies.")
    scope: Scope = _weights(
        Scope.LOCAL, "Let coefficients compete within their layer, or across the network.")
    block: int | None = _both(
        None, "Transform channel axes, or feature maps, in blocks of this size.",
        unset="whole axes for weights, 8 for features", bounds=at_least(2))
    levels: int | None = _both(
        None, "Levels of a wavelet.", unset="as many as fit for weights, 3 for features", bounds=at_least(1))
    normalize_gradients: bool = _weights(
        False, "Basis mode: scale gradients of frequencies to norm 1, as in the thesis.")
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Ways to choose coefficients that exclude each other, and what basis functions have no use for."""
        # fmt: off
        return [
            (self.keep is not None and self.threshold is not None,
             "--keep and --threshold exclude each other"),
            (self.select is Select.CORNER and self.threshold is not None,
             "--threshold chooses by magnitude; --select corner takes --keep"),
            (self.select is Select.CORNER and self.scope is Scope.GLOBAL,
             "--scope global ranks by energy; --select corner keeps the same share of each layer"),
            (self.keep is None and self.select is Select.CORNER,
             "--select corner: --keep says how large it is"),
            (self.keep is None and self.scope is Scope.GLOBAL,
             "--scope global: --keep says what layers compete for"),
            (self.mode is Mode.BASIS and (self.keep is not None or self.threshold is not None),
             "--keep and --threshold choose coefficients; --mode basis has none"),
            *(
                (self.mode is Mode.BASIS and given, f"{option} is for --mode coefficient")
                for given, option in (
                    (self.axes is not None, "--axes"),
                    (self.block is not None, "--block"),
                    (self.levels is not None, "--levels"),
                    (self.select is not Select.ENERGY, "--select"),
                    (self.scope is not Scope.LOCAL, "--scope"),
                )
            ),
            (self.normalize_gradients and self.mode is not Mode.BASIS,
             "--normalize-gradients is for --mode basis"),
        ]
        # fmt: on


def _order(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(f"--k {text}: 0 to 5, or auto, is allowed")
    return int(text)


def _sweep(text: str) -> bool:
    if text != "quality":
        raise UsageError(f"--sweep {text}: quality is what can be swept")
    return True


@dataclass(frozen=True)
class FeatureOptions(Options):
    """How feature maps are coded behind chosen modules."""

    # fmt: off
    taps: tuple[str, ...] = _features(
        (BLOCKS,), "Modules whose output is coded: blocks (every residual block), or a pattern of module "
        "names; may be repeated.", metavar="blocks|GLOB", repeated=True, unset=BLOCKS)
    bits: int = _features(8, "Bits of the quantizer before the transform.", bounds=between("[2, 16]"))
    symbol_bits: int | None = _features(
        None, "Bits that quantized coefficients are clamped to.", unset="enough for every value",
        bounds=between("[2, 32]"))
    q_table: str | None = _features(
        None, "Step sizes of the coefficients' quantizer.", metavar="FILE.json|.csv", reads=True,
        unset="the default table")
    norm: Norm = _features(
        Norm.ORTHO, "Scale of the transform that the steps refer to; none is scipy's norm=None.")
    mean_shift: bool | None = _features(
        None, "Send each sample's mean separately.", "--mean-shift/--no-mean-shift",
        unset="--mean-shift for wavelets only")
    block: int = _both(8, "Side of a block of the transform.", bounds=between("[2, 64]"))
    levels: int = _both(3, "Levels of a wavelet.", bounds=between("[1, 10]"))
    k: int | None = _features(
        None, "Order of the exponential-Golomb code, 0 to 5, or auto: each tap's best on the calibration "
        "images.", metavar="0-5|auto", parse=_order, shown="auto", bounds=between("[0, 5]"))
    prequantizer: Prequantizer = _features(
        Prequantizer.AUTO, "How values become integers before the transform.")
    quality: float | None = _features(
        None, "1 to 100: scale the steps as JPEG does; 50 leaves them unscaled.", bounds=between("[1, 100]"))
    ratio: float | None = None
    sweep: bool = _report(
        False, "Measure a range of qualities: a table and a plot next to the product.", metavar="quality",
        parse=_sweep)
    dead_zone: float = _features(
        0.0, "Widen the quantizer's zero: round magnitudes up only from 0.5 + this many steps on.",
        bounds=between("[0, 0.5)"))
    channel_klt: bool = _features(False, "First decorrelate channels by a calibrated orthogonal basis.")
    allocate: bool = _features(False, "Choose the steps by how much each coefficient changes the outputs.")
    calibration: int = _features(1024, "Training images to calibrate on.", bounds=at_least(1))
    report_file: str | None = report_file_option(_REPORT)
    histograms: str | None = histograms_option(_REPORT)
    zero_bar: bool = zero_bar_option(_REPORT)
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Ways to find a quality or steps that exclude each other."""
        # fmt: off
        return [
            (self.ratio is not None and self.ratio <= 1, f"--target ratio={self.ratio}: above 1 is needed"),
            (sum((self.quality is not None, self.ratio is not None, self.sweep)) > 1,
             "--quality, --target ratio and --sweep exclude each other"),
            (self.allocate and self.q_table is not None, "--allocate chooses the steps that --q-table gives"),
            (self.allocate and self.norm is Norm.NONE, "--allocate: --norm ortho is needed"),
            (self.zero_bar and self.histograms is None,
             "--zero-bar is for --histograms DIR, which is not given"),
        ]
        # fmt: on


def _target(text: str) -> TransformTarget | float:
    """Parse an item of ``--target``: ``weights``, ``features``, or the ratio of ``ratio=8``."""
    key, equals, value = text.partition("=")
    if not equals and key in [item.value for item in TransformTarget]:
        return TransformTarget(key)
    try:
        if key == "ratio":
            return float(value)
    except ValueError:
        raise UsageError(f"--target {text}: a number is expected, as in ratio=8") from None
    raise UsageError(f"--target {text}: weights or features once, and ratio=N once, are allowed")


@dataclass(frozen=True)
class TransformOptions(Options):
    """Options of one transform."""

    # fmt: off
    target: TransformTarget = _both(
        TransformTarget.WEIGHTS, "weights or features; with features also ratio=N, the compression ratio "
        "against 8 bit to search for.", metavar="weights|features|ratio=N", repeated=True, parse=_target,
        unset="weights")
    kernel: str = _both(
        "dct", "dct, dst, dft, dwt (haar), klt (from the data), identity, or a wavelet such as db2 or "
        "bior2.2.")
    weights: WeightOptions = nested(WeightOptions)
    features: FeatureOptions = nested(FeatureOptions)
    preset: TransformPreset | None = _both(
        None, "Set the options of a published method; options that you give win.")
    fold: bool = _both(
        False, "Bake batch norm, computed weights (weight_norm, spectral_norm, torch's pruning, ...) and "
        "parallel branches into plain layers, in place of a transform.", if_given=True)
    data: DataOptions = nested(DataOptions)
    judge: TaskOptions = judged()
    # fmt: on

    @property
    def unrecorded(self) -> tuple[str, ...]:
        """Fields that history leaves out, because folding has no use for them."""
        return ("target", "kernel", "weights", "features", "preset") if self.fold else ()

    @classmethod
    def from_given(cls, given: Mapping[str, Any]) -> TransformOptions:
        """Make the options of a call: what is given, then the preset, then the defaults.

        ``block`` and ``levels`` go to the weights or to the feature maps, whichever are the target.

        Raises:
            UsageError: if an option of the other target is given.
        """
        if given.get("fold"):
            return cls._folding(given)
        preset = given.get("preset")
        values = {**(PRESETS[preset] if preset is not None else {}), **given}
        target, ratio = _split(values.pop("target", ()))
        other = "weights" if target is TransformTarget.FEATURES else "features"
        own = [leaf for leaf in leaves(cls) if leaf.path[0] != other]
        foreign = sorted(values.keys() - {leaf.keyword for leaf in own})
        foreign += ["target ratio"] if ratio is not None and target is TransformTarget.WEIGHTS else []
        if foreign:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
            raise UsageError(f"{names}: not for --target {target}")
        return assemble(cls, values, {("target",): target, ("features", "ratio"): ratio}, of=own)

    @classmethod
    def _folding(cls, given: Mapping[str, Any]) -> TransformOptions:
        own = [leaf for leaf in leaves(cls) if leaf.path[0] in ("fold", "data", "judge")]
        foreign = sorted(given.keys() - {leaf.keyword for leaf in own})
        if foreign:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
            raise UsageError(f"{names}: not with --fold, which puts nothing into another domain")
        return assemble(cls, given, of=own)


def _split(items: Any) -> tuple[TransformTarget, float | None]:
    """Part the items of ``--target`` into the target and the ratio."""
    items = items if isinstance(items, tuple) else (items,)
    targets = [item for item in items if isinstance(item, TransformTarget)]
    ratios = [item for item in items if not isinstance(item, TransformTarget)]
    if len(targets) > 1 or len(ratios) > 1:
        raise UsageError("--target: weights or features once, and ratio=N once, are allowed")
    return targets[0] if targets else TransformTarget.WEIGHTS, ratios[0] if ratios else None


_PUBLISHED = {
    "target": TransformTarget.FEATURES,
    "kernel": "dct",
    "norm": Norm.NONE,
    "symbol_bits": 8,
    "mean_shift": False,
    "prequantizer": Prequantizer.UNSIGNED,
}

PRESETS: Mapping[TransformPreset, Mapping[str, Any]] = {
    TransformPreset.FEATURE_COMPRESSION_DCT: _PUBLISHED,
    TransformPreset.FEATURE_COMPRESSION_DCT_RETRAIN: _PUBLISHED,
    TransformPreset.FEATURE_COMPRESSION_DWT: {
        **{name: _PUBLISHED[name] for name in ("target", "symbol_bits", "prequantizer")},
        "kernel": "dwt",
        "levels": 3,
        "mean_shift": True,
    },
    TransformPreset.THESIS_BASIS: {
        "target": TransformTarget.WEIGHTS,
        "mode": Mode.BASIS,
        "normalize_gradients": True,
    },
}
"""The options that each preset sets; the quantizer tables of the published ones stand in `transforms`."""
