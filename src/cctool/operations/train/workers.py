"""Training in several processes: starts workers, listens to them and ends them.

Nothing is pickled and no command line is run again: a worker gets a JSON file with the options, the path of
the checkpoint to start from, and the user's code that this command line names.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import TypeAdapter

import cctool.base.errors
from cctool.base.errors import CctoolError, DeviceError, TrainingError, UsageError
from cctool.operations.context import Context, Outcome
from cctool.operations.train.one_process import Fitted, Start, open_logs
from cctool.operations.train.resume import forms_to
from cctool.operations.train.run_folder import RunFolder
from cctool.options.train.run import RunOptions
from cctool.training.resume.progress import EpochRow, best_of

# Seconds to wait for the cause of a failure, after the first worker has failed.
_PATIENCE = 3.0
# Variables by which the machines find the first one, and know their number.
_PLACE = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")

_Heard = queue.Queue[tuple[int, dict[str, Any]]]


def node_rank() -> int:
    """Number of this machine among those that train together, from 0."""
    return int(os.environ.get("NODE_RANK", "0"))


def fit_in_processes(verb: str, start: Start, options: Any, context: Context, folder: RunFolder) -> Fitted:
    """Train in ``--devices`` processes on each of ``--nodes`` machines.

    The model of ``start`` has the weights of the best epoch afterwards.

    Raises:
        UsageError: if machines cannot find each other.
        DeviceError: if there are fewer devices than processes.
        CctoolError: what a worker raised.
    """
    run: RunOptions = options.run
    environment = _environment(run, context.device)
    folder.save(replace(start.checkpoint, resume=start.resume), folder.start)
    job = folder.path / f"job{node_rank()}.json"
    job.write_text(json.dumps(_job(verb, start, options, context), indent=1), encoding="utf-8")
    first = int(str(start.resume.state["epoch"])) if start.resume else 0
    _listen(job, environment, run, context, folder)
    if node_rank() and run.nodes > 1:
        # The first machine has the files.
        return Fitted((), None, completed=True)
    if not folder.last.exists():
        raise TrainingError(f"the workers ended without a word; see {folder.path}/worker-0.log")
    last = folder.load(folder.last)
    if last.resume is None:
        raise TrainingError(f"{folder.last} holds no training state")
    state: Any = last.resume.state
    best = best_of(last.resume, last.model.state_dict())
    completed = state["epoch"] >= options.fit.epochs
    if completed and best is not None:
        start.checkpoint.model.load_state_dict(best.weights)
    rows = tuple(EpochRow(**row) for row in state["rows"])
    # The workers have logged the epochs; the final metrics are added to the same logs here.
    logs = open_logs(options, context, folder, max(first, state["epoch"])) if completed else ()
    return Fitted(rows, best.epoch if best else None, completed, logs)


def _job(verb: str, start: Start, options: Any, context: Context) -> dict[str, Any]:
    template = context.stamp(
        Outcome(
            start.checkpoint,
            None,
            metrics_before=start.metrics_before,
            notes=start.notes(keep_storage=False),
            others=start.others,
            continues=start.continues,
        )
    ).history[-1]
    return {
        "verb": verb,
        "options": _dumped(options),
        "model_options": _dumped(context.model_options),
        "runtime": _dumped(context.runtime),
        "device": str(context.device),
        "user_code": sorted(context.user_code),
        "output": str(context.output),
        "fresh": start.fresh,
        "forms": forms_to(start.forms),
        "remarks": list(start.remarks),
        "step": template.model_dump(mode="json"),
    }


def _dumped(options: Any) -> Any:
    return TypeAdapter(type(options)).dump_python(options, mode="json")


def _environment(run: RunOptions, device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(
                f"--device {device} with --devices {run.devices}: --device cuda lets each take its own"
            )
        if run.devices > torch.cuda.device_count():
            raise DeviceError(
                f"--devices {run.devices}: this machine has {torch.cuda.device_count()} usable CUDA devices"
            )
    if run.nodes > 1 and (missing := [name for name in _PLACE if name not in os.environ]):
        raise UsageError(f"--nodes {run.nodes}: set {', '.join(missing)} in the environment of every machine")
    # Otherwise each worker would start as many threads as there are CPUs.
    threads = max(1, (os.cpu_count() or 1) // run.devices)
    package = str(Path(cctool.base.errors.__file__).parents[1])
    return {
        # The user's own setting, in the environment, wins.
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1") if run.nodes > 1 else "127.0.0.1",
        "MASTER_PORT": os.environ["MASTER_PORT"] if run.nodes > 1 else str(_free_port()),
        "WORLD_SIZE": str(run.processes),
        "LOCAL_WORLD_SIZE": str(run.devices),
        "GROUP_RANK": str(node_rank() if run.nodes > 1 else 0),
        # Workers import this very package, even if it is not installed.
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _listen(
    job: Path, environment: dict[str, str], run: RunOptions, context: Context, folder: RunFolder
) -> None:
    """Run the workers and relay their messages, until all have ended well or one has failed."""
    heard: _Heard = queue.Queue()
    with _workers(job, environment, run, folder, heard) as workers:
        running, failures, deadline = len(workers), {}, float("inf")
        while running and time.monotonic() < deadline:
            try:
                rank, message = heard.get(timeout=0.2)
            except queue.Empty:
                continue
            if "end" in message:
                running -= 1
                if message["end"] and rank not in failures:
                    failures[rank] = ("", f"worker {rank} ended with status {message['end']}")
            elif "error" in message:
                failures[rank] = tuple(message["error"])
            elif "note" in message:
                context.reporter.note(message["note"])
            elif "warn" in message:
                context.reporter.warn(message["warn"])
            if failures:
                # One failure makes the other workers fail; the message with the cause may come later.
                deadline = min(deadline, time.monotonic() + _PATIENCE)
    if failures:
        raise _error(failures, folder)


def _error(failures: dict[int, Any], folder: RunFolder) -> CctoolError:
    """The most telling error: a CctoolError of any worker, else the first failure."""
    named = {rank: failure for rank, failure in failures.items() if failure[0]}
    rank, (kind, text) = min((named or failures).items())
    found = getattr(cctool.base.errors, kind, None) if kind else None
    if isinstance(found, type) and issubclass(found, CctoolError):
        return found(text)
    return TrainingError(f"{text} (see {folder.path}/worker-{rank}.log)")


@contextlib.contextmanager
def _workers(
    job: Path, environment: dict[str, str], run: RunOptions, folder: RunFolder, heard: _Heard
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the workers, each with a thread that listens to it; all have ended when the block ends."""
    workers: list[subprocess.Popen[str]] = []
    listeners: list[threading.Thread] = []
    with contextlib.ExitStack() as files:
        try:
            for local in range(run.devices):
                rank = int(environment["GROUP_RANK"]) * run.devices + local
                log = files.enter_context((folder.path / f"worker-{rank}.log").open("w", encoding="utf-8"))
                worker = files.enter_context(_start_worker(job, environment, rank, local, log))
                workers.append(worker)
                listeners.append(threading.Thread(target=_hear, args=(rank, worker, heard), daemon=True))
                listeners[-1].start()
            yield workers
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
            for listener in listeners:
                listener.join()


def _start_worker(
    job: Path, environment: dict[str, str], rank: int, local: int, log: IO[str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cctool.operations.train.worker", str(job)],
        # The worker exits when this pipe closes, so that it cannot outlive a killed parent.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(local)},
        # Ctrl-C in the terminal then reaches only the parent, which ends its workers.
        start_new_session=True,
    )


def _hear(rank: int, worker: subprocess.Popen[str], heard: _Heard) -> None:
    if worker.stdout is not None:
        for line in worker.stdout:
            heard.put((rank, json.loads(line)))
    heard.put((rank, {"end": worker.wait()}))
