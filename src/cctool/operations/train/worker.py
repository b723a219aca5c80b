"""One of several processes that train together: ``python -m cctool.operations.train.worker job.json``.

`workers.py` starts it. It loads the checkpoint itself, through the same composition root as every command,
and writes lines of JSON to its parent: ``{"note": ...}``, ``{"warn": ...}``, ``{"error": [kind, text]}``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from pydantic import TypeAdapter

from cctool.base.errors import CctoolError
from cctool.base.runtime import Silent, device_errors, seed_everything
from cctool.checkpoint.checkpoint import Checkpoint, load
from cctool.checkpoint.spec import Step
from cctool.operations.context import Context, Outcome
from cctool.operations.data import require_source
from cctool.operations.registries import tables
from cctool.operations.train import run as train
from cctool.operations.train.course import MakeGoal
from cctool.operations.train.one_process import Start, fit_here
from cctool.operations.train.resume import forms_from
from cctool.operations.train.run_folder import RunFolder
from cctool.options.common import ModelOptions, RuntimeOptions
from cctool.options.train.distill import DistillOptions
from cctool.options.train.run import TrainOptions

T = TypeVar("T")

_VERBS: dict[str, tuple[type[Any], MakeGoal]] = {
    "train": (TrainOptions, train.goal),
    "distill": (DistillOptions, train.distill_goal),
}


class _Channel:
    """A reporter that writes to the parent process."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def send(self, **message: Any) -> None:
        """Send one line."""
        print(json.dumps(message), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Say something worth knowing."""
        self.send(note=text)

    def warn(self, text: str) -> None:
        """Say something that may be wrong."""
        self.send(warn=text)

    def progress(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Pass ``items`` on."""
        yield from items


def main(job_path: str) -> int:
    """Do this process's part of a job; returns the exit status."""
    channel = _Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    # The channel has its own copy of stdout: what a library prints goes to the log, not between the messages.
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with device_errors():
            _work(json.loads(Path(job_path).read_text(encoding="utf-8")), channel)
    except CctoolError as error:
        traceback.print_exc()
        channel.send(error=[type(error).__name__, str(error)])
        return 1
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        channel.send(error=["", f"worker {os.environ['RANK']} failed: {text}"])
        return 1
    return 0


def _end_with_parent() -> None:
    # A buffered reader would hold a lock that the interpreter needs at its exit.
    while os.read(0, 1):
        pass
    os._exit(1)


def _work(job: dict[str, Any], channel: _Channel) -> None:
    kind, make_goal = _VERBS[job["verb"]]
    options = TypeAdapter(kind).validate_python(job["options"])
    context = replace(_context(job), asked=options.fit)
    rank = int(os.environ["RANK"])
    seed_everything(context.runtime.seed, deterministic=context.runtime.deterministic)
    if rank:
        # Dropout must differ between processes; the weights are copied from the first.
        torch.manual_seed(context.runtime.seed + rank)
    folder = RunFolder(context.output, context.tables)
    checkpoint = load(folder.start, context.tables)
    start = Start(
        replace(checkpoint, resume=None),
        fresh=job["fresh"],
        forms=forms_from(job["forms"]),
        resume=checkpoint.resume,
        remarks=tuple(job["remarks"]),
    )
    source = require_source(options.data, checkpoint, context, job["verb"], renames=True)
    checkpoint.model.to(context.device)
    goal = make_goal(checkpoint, source, options, context)
    if not rank:
        context = replace(context, reporter=channel)
    fit_here(start, goal.objective, source, options, context, folder)
    torch.distributed.destroy_process_group()


def _context(job: dict[str, Any]) -> Context:
    step = Step.model_validate(job["step"])
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if job["device"].startswith("cuda") else torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def stamp(outcome: Outcome) -> Checkpoint:
        return outcome.checkpoint.with_step(step.model_copy(update={"metrics_after": outcome.metrics_after}))

    return Context(
        device=device,
        runtime=TypeAdapter(RuntimeOptions).validate_python(job["runtime"]),
        model_options=TypeAdapter(ModelOptions).validate_python(job["model_options"]),
        tables=tables(job["user_code"]),
        user_code=frozenset(job["user_code"]),
        reporter=Silent(),
        output=Path(job["output"]),
        force=False,
        stamp=stamp,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
