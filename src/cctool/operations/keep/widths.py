"""Widths that a cut has left, as the spec says them."""

from __future__ import annotations

from dataclasses import replace

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.thin import THIN, thinned
from cctool.operations.keep.follower import Cutting, Followed, Follower

__all__ = ["Widths"]


class Widths(Follower):
    """Final shapes of tensors, and integer attributes of modules."""

    kind = "thin"
    edit = THIN
    in_programs = True

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        """Write them into the spec."""
        plan = cutting.plan
        attributes = [(module, name) for module, values in plan.attributes.items() for name in values]
        spec = thinned(checkpoint.spec, checkpoint.model, plan.tensors, attributes)
        return Followed(replace(checkpoint, spec=spec))
