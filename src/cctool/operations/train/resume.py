"""Resuming an interrupted training: what it was asked to do, and whether this command asks for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from pydantic import JsonValue

from cctool.base.errors import CheckpointError, TrainingError
from cctool.checkpoint.checkpoint import open_file
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.spec import Parent, Step
from cctool.options.train.fit import Schedule
from cctool.options.transform.choices import Mode

# These decide where and how fast training runs, not what it computes.
_FREE = {"runtime.device", "data.workers"}
# Under these schedules the learning rate of an epoch does not depend on the number of epochs.
_LENGTH_FREE = {Schedule.CONSTANT.value, Schedule.MULTISTEP.value}


def last_step(path: Path) -> Step:
    """Read the unfinished line of history of a ``last.pt``.

    Raises:
        CheckpointError: if the file holds no training that can be resumed.
    """
    opened = open_file(path)
    if opened.payload is None or opened.payload.resume is None or not opened.payload.history.steps:
        raise CheckpointError(f"{path} holds no training that could go on")
    return opened.payload.history.steps[-1]


def refuse_other_options(earlier: Step, verb: str, now: Mapping[str, JsonValue], data: str | None) -> None:
    """Refuse to resume with other options than training began with.

    Args:
        earlier: the unfinished line of history.
        verb: of the present command.
        now: its options as the history would store them.
        data: the checkpoint's data set, which is used without ``--data``.

    Raises:
        TrainingError: naming every difference that matters.
    """
    if earlier.verb != verb:
        raise TrainingError(f"this training was begun by `cctool {earlier.verb}`: go on with that")
    then_flat, now_flat = flat(earlier.options), flat(now)
    for options in (then_flat, now_flat):
        # Without --data the remembered data set counts, which --data may name the other time.
        options["data.data"] = options.get("data.data") or data
    free = set(_FREE)
    if then_flat.get("fit.schedule") in _LENGTH_FREE:
        free.add("fit.epochs")
    different = [
        f"{name.rpartition('.')[2]} was {then_flat.get(name)}, now {now_flat.get(name)}"
        for name in sorted(then_flat.keys() | now_flat.keys())
        if name not in free and _given(then_flat.get(name)) != _given(now_flat.get(name))
    ]
    if different:
        raise TrainingError(
            f"--resume goes on with the same options only: {'; '.join(different)} (--force starts anew)"
        )


def refuse_other_files(earlier: Step, now: Mapping[str, Parent]) -> None:
    """Refuse to resume with other files, such as a teacher, than the unfinished line of history names.

    Raises:
        TrainingError: naming the first whose content differs.
    """
    for role, before in earlier.others.items():
        found = now.get(role)
        if found is not None and (found.content or found.file) != (before.content or before.file):
            raise TrainingError(
                f"--resume goes on with the same files only: the {role} {found.path} is not the one that "
                "training began with (--force starts anew)"
            )


def never_trained(history: Sequence[Step]) -> bool:
    """Whether a history begins with a fresh network and has no epoch of training."""
    epochs = [step.options.get("finetune_epochs") for step in history]
    epochs += [flat(step.options).get("fit.epochs") for step in history]
    return bool(history) and history[0].parent is None and not any(epochs)


def starts_afresh(history: Sequence[Step]) -> bool:
    """Whether the weights are untrained, which decides the default learning rate of the next training.

    True for a network that was never trained, and for one that got fresh basis functions since.
    """
    trained = [i for i, step in enumerate(history) if flat(step.options).get("fit.epochs")]
    since = history[trained[-1] + 1 :] if trained else history
    return never_trained(history) or any(
        step.verb == "transform" and flat(step.options).get("weights.mode") == Mode.BASIS.value
        for step in since
    )


def _given(value: Any) -> Any:
    # Files from before there was the option have no list, where others have an empty one.
    return None if value == [] else value


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options to one level, with dotted names.

    >>> flat({"fit": {"lr": 0.1}, "seed": 0})
    {'fit.lr': 0.1, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def forms_to(stored: Mapping[str, EncodedTensor]) -> dict[str, JsonValue]:
    """Stored forms as JSON, without the tensors' content."""
    return {
        name: {
            "encoding": form.encoding,
            "shape": list(form.shape),
            "dtype": form.dtype,
            "parameters": dict(form.parameters),
        }
        for name, form in stored.items()
    }


def forms_from(data: Any) -> dict[str, EncodedTensor]:
    """Stored forms from what `forms_to` gave; their parts are empty."""
    return {
        name: EncodedTensor(form["encoding"], tuple(form["shape"]), form["dtype"], {}, form["parameters"])
        for name, form in (data or {}).items()
    }


def run_folder_of(output: str) -> PurePath:
    """Path of the run folder that belongs to a product.

    >>> str(run_folder_of("out/net.train.pt"))
    'out/net.train.run'
    """
    path = PurePath(output)
    return path.with_name(f"{path.stem}.run")


def find_resumed(source: str | None, output: str | None, verb: str) -> tuple[str | None, str | None]:
    """Input and output of the training that ``--resume`` continues, from INPUT and ``--output`` as given.

    The same command line finds its run folder by its output. INPUT may also be a ``last.pt`` in a run folder,
    or a product with its run folder next to it: then that training continues and writes its product.
    """
    if source is None or source == "-":
        return source, output
    path = Path(source)
    expected = output or str(path.with_name(f"{path.stem}.{verb}.pt"))
    if Path(run_folder_of(expected), "last.pt").exists():
        return source, output
    if path.name == "last.pt" and path.parent.suffix == ".run":
        return source, output or str(path.parent.with_suffix(".pt"))
    beside = Path(run_folder_of(source), "last.pt")
    return (str(beside), output or source) if beside.exists() else (source, output)
