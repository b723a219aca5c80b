"""Fresh last layers: their number of outputs, which the spec must know before anything is cut."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.head import HEAD, Head
from cctool.operations.context import Context
from cctool.operations.keep.follower import Followed, Follower


class Heads(Follower):
    """Last layers with another number of outputs than the architecture's."""

    kind = "head"
    edit = HEAD
    in_programs = True

    def after_new_head(self, checkpoint: Checkpoint, names: Collection[str], context: Context) -> Followed:
        """Record the number of outputs."""
        modules = dict(checkpoint.model.named_modules())
        edits = tuple(
            Head(module=name, outputs=modules[name].get_parameter("weight").shape[0])
            for name in names
            if name in modules
        )
        return Followed(replace(checkpoint, spec=checkpoint.spec.with_edits(edits)))
