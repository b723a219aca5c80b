"""All tasks by name."""

from __future__ import annotations

from cctool.base.errors import SpecError
from cctool.tasks.base import LOSS, Measure, Task
from cctool.tasks.classification import Classification
from cctool.tasks.custom import CUSTOM, UNKNOWN, Untold
from cctool.tasks.regression import Regression
from cctool.tasks.segmentation import Segmentation

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Classification(), Segmentation(), Regression(), Untold(CUSTOM), Untold(UNKNOWN))
}
"""A new task is one file and one line here."""


def task_named(name: str) -> Task:
    """The task of a name.

    Raises:
        SpecError: if there is none.
    """
    if name not in TASKS:
        raise SpecError(f"unknown task {name!r}; allowed: {', '.join(TASKS)}")
    return TASKS[name]


def measure_named(name: str) -> Measure:
    """How people read a metric of any task; one that no task has is called by its name."""
    known = (LOSS, *(measure for task in TASKS.values() for measure in task.measures))
    return next((measure for measure in known if measure.name == name), Measure(name, name))
