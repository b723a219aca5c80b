"""Choices of `cctool prune`: methods, scopes, granularities, and how rates grow."""

from __future__ import annotations

from cctool.options.fields import Choice


class PruneMethod(Choice):
    """How units are ranked; the lowest are removed first."""

    SLIMMING = "slimming"
    L1 = "l1"
    L2 = "l2"
    FPGM = "fpgm"
    LAMP = "lamp"
    TAYLOR = "taylor"
    HESSIAN = "hessian"
    GRADIENT = "gradient"
    APOZ = "apoz"
    ACTIVATION = "activation"
    RANDOM = "random"


NEEDS_DATA = frozenset(
    {PruneMethod.TAYLOR, PruneMethod.HESSIAN, PruneMethod.GRADIENT, PruneMethod.APOZ, PruneMethod.ACTIVATION}
)
"""Methods that need training images."""

CHANNELS_ONLY = frozenset({PruneMethod.SLIMMING, PruneMethod.FPGM, PruneMethod.APOZ, PruneMethod.ACTIVATION})
"""Methods that rank channels, but not single weights."""


GLOBAL = frozenset({PruneMethod.SLIMMING, PruneMethod.LAMP, PruneMethod.TAYLOR, PruneMethod.HESSIAN})
"""Methods whose scores are comparable across the network."""


class Sparsifier(Choice):
    """How training drives units towards zero before they are cut."""

    GAMMA_L1 = "gamma-l1"
    GROUP_LASSO = "group-lasso"
    GROWING = "growing"


class Scope(Choice):
    """Whether units compete across the whole network, or only within their family."""

    GLOBAL = "global"
    LOCAL = "local"


class AttentionUnit(Choice):
    """What is removed from attention: the same positions of every head, or whole heads."""

    POSITIONS = "positions"
    HEADS = "heads"


class Reduce(Choice):
    """How the scores of a unit in each of its tensors are combined."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    FIRST = "first"


class Normalize(Choice):
    """What the scores of a family are divided by before families are compared."""

    NONE = "none"
    MEAN = "mean"
    MAX = "max"
    SUM = "sum"
    STANDARD = "standard"


class Granularity(Choice):
    """What is removed: channels, or parts of weights by a mask."""

    CHANNEL = "channel"
    ELEMENT = "element"
    NM = "nm"
    KERNEL = "kernel"
    ROW = "row"
    COLUMN = "column"
    BLOCK = "block"


class StepMode(Choice):
    """Whether each step starts from the input network, or from the previous step."""

    INDEPENDENT = "independent"
    PROGRESSIVE = "progressive"


class Images(Choice):
    """Training images as they are, or augmented as in training (crops, flips)."""

    PLAIN = "plain"
    AUGMENTED = "augmented"


class Growth(Choice):
    """How the rate grows from step to step, up to the full rate R at the last of N steps."""

    EXPONENTIAL = "exponential"
    LINEAR = "linear"
    AGP = "agp"

    def at(self, rate: float, step: int, steps: int) -> float:
        """Rate reached after step i of N.

        Exponential: 1 - (1 - R)^(i/N), so that the kept fraction shrinks by one factor. Linear: R * i/N.
        AGP: R * (1 - (1 - i/N)^3), fast at first (Zhu and Gupta 2017, arXiv 1710.01878, equation 1).
        """
        if step >= steps:
            return rate
        done = step / steps
        if self is Growth.LINEAR:
            return rate * done
        if self is Growth.AGP:
            return rate * (1 - (1 - done) ** 3)
        return float(1 - (1 - rate) ** done)
