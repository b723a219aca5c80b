"""What `cctool decode` can be asked."""

from __future__ import annotations

from dataclasses import dataclass

from cctool.base.errors import UsageError

__all__ = ["DecodeOptions"]


@dataclass(frozen=True)
class DecodeOptions:
    """Options of decoding written feature maps.

    Attributes:
        sources: folders that ``evaluate --bitstream`` wrote, or single stream files.
        output: folder for the maps, ``.npy`` files.
        force: replace the folder, where it holds nothing but earlier maps.
    """

    sources: tuple[str, ...]
    output: str
    force: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("decode needs a folder that evaluate --bitstream wrote, or stream files of it")
