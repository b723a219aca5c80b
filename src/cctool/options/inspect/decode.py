"""What `cctool decode` can be asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cctool.options.fields import Options, option


@dataclass(frozen=True)
class DecodeOptions(Options):
    """Options of decoding feature maps that ``evaluate --bitstream`` wrote.

    Attributes:
        sources: folders that it wrote, or single stream files; the command's arguments.
    """

    sources: tuple[str, ...]
    # fmt: off
    output: str = option(
        ..., "New folder for the decoded maps, .npy files.", "--output", "-o", metavar="OUTDIR", writes=True)
    force: bool = option(False, "Replace the folder if it holds only maps of an earlier decode.")
    # fmt: on

    @classmethod
    def from_given(cls, given: Mapping[str, Any], sources: tuple[str, ...] = ()) -> DecodeOptions:
        """Make the options of a call.

        Args:
            given: keyword -> value.
            sources: the command's arguments.
        """
        return cls(sources, **given)

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """Nothing to decode."""
        missing = "decode needs a folder that evaluate --bitstream wrote, or stream files of it"
        return ((not self.sources, missing),)
