"""A checkpoint's history, as a short table or in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cctool.operations.quantize.report import signal_lines

SHORT_HEADERS = ("step", "verb", "options", "parameters", "MACs", "bytes", "measured after", "parent")

# Characters of the options of a step, and digits of a hash, in the short table.
_LONGEST = 60
_HASH = 12


def short_rows(history: Any) -> list[tuple[object, ...]]:
    """A row for each step, with 12 digits of the parent's content hash, or of a foreign file's SHA-256."""
    return [_short(number, step) for number, step in enumerate(history, start=1)]


def _short(number: int, step: Any) -> tuple[object, ...]:
    size = step.after
    return (
        number,
        step.verb,
        _clipped(", ".join(f"{key}={value}" for key, value in _flat(step.options) if _main(key))),
        size.parameters if size else None,
        size.macs if size else None,
        size.bytes if size else None,
        "; ".join(map(_metrics, step.metrics_after)) or None,
        f"{step.parent.path} {(step.parent.content or step.parent.file)[:_HASH]}" if step.parent else None,
    )


def full_history(history: Any) -> str:
    """Every step with all that the history records."""
    return "\n\n".join("\n".join(_full(number, step)) for number, step in enumerate(history, start=1))


def _full(number: int, step: Any) -> Iterator[str]:
    yield f"step {number}: {step.verb}"
    files = {"parent": step.parent, **step.others} if step.parent else step.others
    for role, file in files.items():
        yield f"  {role}: {file.path}"
        yield f"    content sha256: {file.content or 'none: a foreign file'}"
        yield f"    file sha256:    {file.file}"
    for key, value in _flat(step.options):
        yield f"  {key}: {value}"
    yield f"  seed: {step.seed}"
    for what, size in (("before", step.before), ("after", step.after)):
        if size is not None:
            macs = "unknown" if size.macs is None else f"{size.macs:,}"
            weight = "unknown" if size.bytes is None else f"{size.bytes:,}"
            yield f"  {what}: {size.parameters:,} parameters, {macs} MACs, {weight} bytes of tensors"
    for what, found in (("before", step.metrics_before), ("after", step.metrics_after)):
        for metrics in found:
            yield f"  measured {what}: {_metrics(metrics)}"
    if step.signal is not None:
        yield f"  outputs: {'; '.join(signal_lines(step.signal))}"
    for note in step.notes:
        yield f"  note: {note}"
    for program, version in step.versions.items():
        yield f"  {program}: {version}"


def _flat(options: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Options that are not empty or false; nested ones by dotted names."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, False, "", []):
            yield f"{prefix}{key}", value


def _main(key: str) -> bool:
    """Whether the short table shows an option: not those of data and runtime, but the data set."""
    return key == "data.data" or not key.startswith(("data.", "runtime."))


def _metrics(metrics: Any) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.values.items())
    return f"{metrics.split} {values} (n={metrics.n:,})"


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
