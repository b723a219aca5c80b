"""Detectors of torchvision's form, and what they compute before they choose among boxes.

Such a network ends in code without parameters that keeps the boxes above a score and removes overlapping
ones: how many are left depends on the image, and a difference in the last digit may change which. What its
head puts out has fixed shapes, and decides all that follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def chooses_boxes(model: nn.Module) -> bool:
    """Whether it is a detector of one stage (SSD, RetinaNet, FCOS or built like them)."""
    chooses = callable(getattr(model, "postprocess_detections", None))
    return chooses and callable(getattr(getattr(model, "transform", None), "postprocess", None))


@contextmanager
def before_boxes(*models: nn.Module) -> Iterator[None]:
    """Let detectors return what their heads put out; other networks are left alone."""
    changed: list[tuple[nn.Module, str]] = []
    try:
        for model in models:
            if chooses_boxes(model):
                for owner, name, instead in _replacements(model):
                    if name not in vars(owner):
                        vars(owner)[name] = instead
                        changed.append((owner, name))
        yield
    finally:
        for owner, name in changed:
            del vars(owner)[name]


def _replacements(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    yield model, "postprocess_detections", _first
    yield model.transform, "postprocess", _first
    if isinstance(getattr(model, "anchor_generator", None), nn.Module):
        # Anchors are constants that only the choice takes.
        yield model.anchor_generator, "forward", _no_anchors


def _no_anchors(*_: Any) -> list[Any]:
    return []


def _first(found: Any, *others: Any) -> Any:
    return found
