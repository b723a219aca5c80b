"""Seeds for each purpose, made of (seed, epoch) alone, so that a resumed run draws the same."""

import hashlib

import torch

__all__ = ["derive", "generator"]


def derive(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words; different parts give independent streams."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive`; the global generators are left alone."""
    return torch.Generator().manual_seed(derive(*parts))
