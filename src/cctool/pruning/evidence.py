"""What a network does on training images, as far as scores need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cctool.options.prune_choices import PruneMethod


@dataclass(frozen=True)
class Evidence:
    """What was seen on training images.

    Attributes:
        method: the method that it was gathered for.
        images: how many images were looked at.
        gradients: mean over the images of the loss's gradient, by the parameter's name; its shape. For
            taylor and gradient.
        squares: mean over the images of the squared gradient of one image's loss: the diagonal of the
            empirical Fisher matrix; its shape. For hessian.
    """

    method: PruneMethod
    images: int
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    squares: Mapping[str, Tensor] = field(default_factory=dict)
