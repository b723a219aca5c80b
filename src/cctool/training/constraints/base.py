"""What training must respect apart from its loss: penalties on weights, weights that stay zero."""

from __future__ import annotations

from torch import Tensor


class Constraint:
    """Hooks into the steps of training, each of which may do nothing.

    A constraint holds the parameters that it acts on; `fit` trains these same objects.
    """

    name = "constraint"
    """Column of its penalty in the table of epochs."""

    def epoch(self, epoch: int) -> None:
        """Called before each epoch, numbered from 0."""

    def penalty(self) -> Tensor | None:
        """Return a scalar that is added to the loss."""
        return None

    def gradients(self) -> None:
        """Change gradients in place, after the backward pass and before they are clipped."""

    def weights(self) -> None:
        """Change weights in place, after the optimizer's step."""
