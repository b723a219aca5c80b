"""`cctool train`, and how `train` and `distill` resume an earlier training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cctool.cli.frame import Invocation


def train(call: Invocation) -> None:
    """Train a fresh network, or continue from any checkpoint; writes the best epoch by validation.

    Example: cctool train --arch resnet20 --data digits --epochs 20
    """
    call = resumed(call)
    call.write(told, resumes=bool(call.given.get("resume")))


def told(report: Any) -> Any:
    """Metrics before and after."""
    from cctool.operations.context import metric_lines

    return metric_lines(report.metrics_before, report.metrics_after)


def resumed(call: Invocation) -> Invocation:
    """With ``--resume``, the call for the training to continue; options not given are that training's."""
    if not call.given.get("resume"):
        return call
    from cctool.operations.train.resume import find_resumed

    source, output = find_resumed(call.source, call.output, call.verb.name)
    found = _begun_with(call, source, output)
    told = {
        leaf.path: leaf.read(_at(found, leaf.path))
        for leaf in (*call.verb.own, *call.verb.shared)
        if leaf.keyword not in (*call.given, "device", "workers")
        and leaf.path[0] != "teacher_model"
        and _at(found, leaf.path) is not None
    }
    frame = call.verb.frame_of(call.given, {path: told[path] for path in told if path[0] == "runtime"})
    inputs = () if source is None else (source,)
    return replace(call, inputs=inputs, output=output, frame=frame, resumed=told)


def _begun_with(call: Invocation, source: str | None, output: str | None) -> Mapping[str, Any]:
    """Options that the training to resume began with; none if its ``last.pt`` is not found yet."""
    from cctool.operations.pipeline import default_output
    from cctool.operations.train.resume import last_step, nothing_to_resume, run_folder_of

    if source == "-":
        return {}
    name = output or default_output(call.verb.name, source, call.frame.model.arch)
    last = Path(run_folder_of(str(name)), "last.pt")
    begun = last if last.exists() or source is None else Path(source)
    step = last_step(begun, own=begun == last) if begun.exists() else None
    if step is None:
        raise nothing_to_resume(last, source)
    return step.options


def _at(options: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The value at a path of nested dictionaries; None if there is no such path."""
    value: Any = options
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
