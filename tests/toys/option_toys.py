"""Options as a call makes them: what is given, then a preset, then defaults."""

from dataclasses import replace
from typing import Any

from cctool.options.common import DataOptions


def asked(kind: Any, preset: Any = None, *, data: DataOptions | None = None, **given: Any) -> Any:
    """Make options of a verb; ``data`` takes the place of the options about data."""
    made = kind.from_given({"preset": preset, **given})
    return made if data is None else replace(made, data=data)
