"""What `cctool transform` can be asked: the options of one run, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cctool.base.errors import UsageError
from cctool.options.common import DataOptions
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

__all__ = [
    "BLOCKS",
    "PRESETS",
    "FeatureOptions",
    "TransformOptions",
    "WeightOptions",
    "parse_order",
    "parse_sweep",
    "parse_targets",
    "preset_options",
]

BLOCKS = "blocks"
"""Stands for every residual block where taps are named."""

K_RANGE = range(6)
"""Orders of the exponential-Golomb code."""


@dataclass(frozen=True)
class WeightOptions:
    """How layers go into a transform domain.

    Attributes:
        mode: transform the weights, or replace them by trainable basis functions.
        layers: ``linear`` (``fc``, ``dense``), ``conv``, ``all``, or glob patterns of module names.
        axes: which axes of convolutions; None is spatial, or channel where the kernel is 1x1.
        keep: fraction of the coefficients that stay, in (0, 1].
        threshold: smallest magnitude of a coefficient that stays; in place of `keep`.
        select: which coefficients stay.
        scope: whether coefficients compete within their layer or across the network.
        block: transform channel axes in blocks of so many; None transforms them whole.
        levels: of a wavelet; None is as many as the size allows.
        normalize_gradients: basis mode only: scale the gradient of each frequency tensor to norm 1, as the
            thesis did.
    """

    mode: Mode = Mode.COEFFICIENT
    layers: tuple[str, ...] = ("all",)
    axes: Axes | None = None
    keep: float | None = None
    threshold: float | None = None
    select: Select = Select.ENERGY
    scope: Scope = Scope.LOCAL
    block: int | None = None
    levels: int | None = None
    normalize_gradients: bool = False

    def __post_init__(self) -> None:
        problems = [text for wrong, text in self._checks() if wrong]
        if problems:
            raise UsageError("; ".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        return [
            (self.keep is not None and not 0 < self.keep <= 1, f"--keep {self.keep}: above 0, at most 1"),
            (self.threshold is not None and self.threshold < 0, f"--threshold {self.threshold}: 0 or more"),
            (
                self.keep is not None and self.threshold is not None,
                "--keep and --threshold exclude each other",
            ),
            (
                self.select is Select.CORNER and self.threshold is not None,
                "--threshold chooses by magnitude; --select corner takes --keep",
            ),
            (
                self.select is Select.CORNER and self.scope is Scope.GLOBAL,
                "--scope global ranks by energy; --select corner keeps the same share of each layer",
            ),
            (
                self.keep is None and self.select is Select.CORNER,
                "--select corner: --keep says how large it is",
            ),
            (
                self.keep is None and self.scope is Scope.GLOBAL,
                "--scope global: --keep says what layers compete for",
            ),
            (self.block is not None and self.block < 2, f"--block {self.block}: at least 2 is needed"),
            (self.levels is not None and self.levels < 1, f"--levels {self.levels}: at least 1 is needed"),
            (
                self.mode is Mode.BASIS and (self.keep is not None or self.threshold is not None),
                "--keep and --threshold choose coefficients; --mode basis has none",
            ),
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
            (
                self.normalize_gradients and self.mode is not Mode.BASIS,
                "--normalize-gradients is for --mode basis",
            ),
        ]


@dataclass(frozen=True)
class FeatureOptions:
    """How feature maps are coded behind chosen modules.

    Attributes:
        taps: `BLOCKS`, or glob patterns of module names whose output is coded.
        bits: of the quantizer before the transform.
        symbol_bits: of the signed quantizer behind the transform; None is enough for every value.
        q_table: path of a JSON or CSV file with the quantizer's steps; None is the default table.
        norm: scale that the steps refer to.
        mean_shift: subtract each sample's mean before the transform; None is the kernel's own custom.
        block: side of a block of the block transforms.
        levels: of a wavelet.
        k: order of the exponential-Golomb code; None chooses each tap's best on the calibration images.
        prequantizer: how values become integers.
        quality: 1 to 100, scales the steps as the JPEG library does: 50 leaves them, 100 is finest.
        ratio: compression against 8 bit that is searched for; in place of `quality`.
        sweep: measure a range of qualities, to a table and a plot.
        dead_zone: widens the quantizer's zero: values round up from 0.5 + dead_zone steps on.
        allocate: choose steps by how much the outputs change with each coefficient; else the default table.
        channel_klt: decorrelate channels by a calibrated orthogonal transform before the spatial one.
        calibration: training images that ranges, bases and orders are calibrated on.
        report_file: workbook or table with the figures of each tap.
        histograms: folder of PNG histograms per tap and sub-band.
        zero_bar: draw the bar of the zeros in the histograms, which dwarfs the others.
    """

    taps: tuple[str, ...] = (BLOCKS,)
    bits: int = 8
    symbol_bits: int | None = None
    q_table: str | None = None
    norm: Norm = Norm.ORTHO
    mean_shift: bool | None = None
    block: int = 8
    levels: int = 3
    k: int | None = None
    prequantizer: Prequantizer = Prequantizer.AUTO
    quality: float | None = None
    ratio: float | None = None
    sweep: bool = False
    dead_zone: float = 0.0
    channel_klt: bool = False
    allocate: bool = False
    calibration: int = 1024
    report_file: str | None = field(default=None, metadata={"recorded": False})
    histograms: str | None = field(default=None, metadata={"recorded": False})
    zero_bar: bool = field(default=False, metadata={"recorded": False})

    def __post_init__(self) -> None:
        problems = [text for wrong, text in self._checks() if wrong]
        if problems:
            raise UsageError("; ".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        return [
            (not 2 <= self.bits <= 16, f"--bits {self.bits}: 2 to 16 is allowed"),
            (
                self.symbol_bits is not None and not 2 <= self.symbol_bits <= 32,
                f"--symbol-bits {self.symbol_bits}: 2 to 32 is allowed",
            ),
            (not 2 <= self.block <= 64, f"--block {self.block}: 2 to 64 is allowed"),
            (not 1 <= self.levels <= 10, f"--levels {self.levels}: 1 to 10 is allowed"),
            (self.k is not None and self.k not in K_RANGE, f"--k {self.k}: 0 to 5 is allowed"),
            (
                self.quality is not None and not 1 <= self.quality <= 100,
                f"--quality {self.quality}: 1 to 100 is allowed",
            ),
            (self.ratio is not None and self.ratio <= 1, f"--target ratio={self.ratio}: above 1 is needed"),
            (
                sum((self.quality is not None, self.ratio is not None, self.sweep)) > 1,
                "--quality, --target ratio and --sweep exclude each other",
            ),
            (not 0 <= self.dead_zone < 0.5, f"--dead-zone {self.dead_zone}: 0 or more, below 0.5"),
            (self.allocate and self.q_table is not None, "--allocate chooses the steps that --q-table gives"),
            (self.allocate and self.norm is Norm.NONE, "--allocate: --norm ortho is needed"),
            (self.calibration < 1, f"--calibration {self.calibration}: at least 1 is needed"),
        ]


@dataclass(frozen=True)
class TransformOptions:
    """Options of one transform.

    Attributes:
        target: what goes into a transform domain.
        kernel: ``dct``, ``dst``, ``dft``, ``dwt`` (haar), ``klt``, ``identity``, or a wavelet by its name in
            PyWavelets.
        weights: how layers do.
        features: how feature maps do.
        preset: the published method that these options were taken from; see `preset_options`.
        data: what is calibrated and measured on.
    """

    target: TransformTarget = TransformTarget.WEIGHTS
    kernel: str = "dct"
    weights: WeightOptions = field(default_factory=WeightOptions)
    features: FeatureOptions = field(default_factory=FeatureOptions)
    preset: TransformPreset | None = None
    data: DataOptions = field(default_factory=DataOptions)


def parse_targets(texts: tuple[str, ...]) -> tuple[TransformTarget | None, float | None]:
    """Parse ``--target weights``, ``--target features`` and ``--target ratio=8``.

    >>> parse_targets(("features", "ratio=8"))
    (<TransformTarget.FEATURES: 'features'>, 8.0)

    Raises:
        UsageError: if one is something else, or two of a kind are given.
    """
    target: TransformTarget | None = None
    ratio: float | None = None
    for text in texts:
        key, equals, value = text.partition("=")
        if equals and key == "ratio" and ratio is None:
            try:
                ratio = float(value)
            except ValueError:
                raise UsageError(f"--target {text}: a number is expected, as in ratio=8") from None
        elif not equals and key in [item.value for item in TransformTarget] and target is None:
            target = TransformTarget(key)
        else:
            raise UsageError(f"--target {text}: weights or features once, and ratio=N once, are allowed")
    return target, ratio


def parse_order(text: str) -> int | None:
    """Parse ``--k``: a number, or ``auto``.

    >>> parse_order("auto") is None
    True
    """
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(f"--k {text}: 0 to 5, or auto, is allowed")
    return int(text)


def parse_sweep(text: str) -> bool:
    """Parse ``--sweep quality``."""
    if text != "quality":
        raise UsageError(f"--sweep {text}: quality is what can be swept")
    return True


PRESETS: dict[TransformPreset, dict[str, Any]] = {
    TransformPreset.FEATURE_COMPRESSION_DCT: {
        "target": TransformTarget.FEATURES,
        "kernel": "dct",
        "norm": Norm.NONE,
        "symbol_bits": 8,
        "mean_shift": False,
        "prequantizer": Prequantizer.UNSIGNED,
    },
    TransformPreset.FEATURE_COMPRESSION_DCT_RETRAIN: {
        "target": TransformTarget.FEATURES,
        "kernel": "dct",
        "norm": Norm.NONE,
        "symbol_bits": 8,
        "mean_shift": False,
        "prequantizer": Prequantizer.UNSIGNED,
    },
    TransformPreset.FEATURE_COMPRESSION_DWT: {
        "target": TransformTarget.FEATURES,
        "kernel": "dwt",
        "levels": 3,
        "symbol_bits": 8,
        "mean_shift": True,
        "prequantizer": Prequantizer.UNSIGNED,
    },
    TransformPreset.THESIS_BASIS: {
        "target": TransformTarget.WEIGHTS,
        "mode": Mode.BASIS,
        "normalize_gradients": True,
    },
}
"""The options that each preset sets; the quantizer tables of the published ones stand in `transforms`."""


def preset_options(
    preset: TransformPreset | None, *, data: DataOptions | None = None, **given: Any
) -> TransformOptions:
    """Make options as a preset sets them, except for those that are given.

    Args:
        preset: the published method; None sets nothing.
        data: what is calibrated and measured on.
        given: ``target``, ``kernel``, and attributes of `WeightOptions` and `FeatureOptions` by name; where
            both have one of that name (``block``, ``levels``), the target's gets it.
    """
    values = (PRESETS[preset] if preset is not None else {}) | given
    target = values.pop("target", TransformTarget.WEIGHTS)
    kernel = values.pop("kernel", "dct")
    chosen = FeatureOptions if target is TransformTarget.FEATURES else WeightOptions
    foreign = [name for name in values if name not in chosen.__dataclass_fields__]
    if foreign:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise UsageError(f"{names}: not for --target {target}")
    made = chosen(**values)
    return TransformOptions(
        target=target,
        kernel=kernel,
        weights=made if isinstance(made, WeightOptions) else WeightOptions(),
        features=made if isinstance(made, FeatureOptions) else FeatureOptions(),
        preset=preset,
        data=data or DataOptions(),
    )
