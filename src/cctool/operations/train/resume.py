"""Resuming an interrupted training: what it was asked to do, and whether this command asks for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from pydantic import JsonValue

from cctool.base.errors import TrainingError
from cctool.base.user_code import looks_like_user_code
from cctool.checkpoint.checkpoint import Checkpoint, open_file
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.spec import Parent, Step
from cctool.data.records import DataSource
from cctool.data.serving.batches import MINIMUM_TRAINING_SAMPLES
from cctool.operations.train.run_folder import product_in
from cctool.options.paths import is_same_file
from cctool.options.train.fit import Schedule
from cctool.options.transform.choices import Mode

# These decide where and how fast training runs, not what it computes.
_FREE = {"runtime.device", "data.workers"}
# Under these schedules the learning rate of an epoch does not depend on the number of epochs.
_LENGTH_FREE = {Schedule.CONSTANT.value, Schedule.MULTISTEP.value}

_ANEW = "without --resume, --force starts anew"


def last_step(path: Path, *, own: bool) -> Step | None:
    """The unfinished line of history of a file; None if it holds no training to resume.

    Args:
        path: a ``last.pt``, or INPUT.
        own: whether it is in the run folder of the command's product, see `may_resume`.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    payload = open_file(path).payload
    if payload is None or payload.resume is None or not may_resume(payload.history.steps, own=own):
        return None
    return unfinished_step(payload.history.steps)


def may_resume(history: Sequence[Step], *, own: bool) -> bool:
    """Whether a product may go on with the training that a file with this history holds.

    A run folder belongs to one product (``own``), and so does the training in its files, wherever they are
    copied. A network that `prune` cut is another one, whose product begins a run folder.
    """
    return bool(history) and (own or history[-1].verb == "prune")


def unfinished_step(history: Sequence[Step]) -> Step:
    """The line of a training that can be resumed; `prune` keeps its state and adds a line after it."""
    return next((step for step in reversed(history) if step.verb != "prune"), history[-1])


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
        f"{name.rpartition('.')[2]} was {_shown(then_flat.get(name))}, now {_shown(now_flat.get(name))}"
        for name in sorted(then_flat.keys() | now_flat.keys())
        if name not in free and _given(then_flat.get(name)) != _given(now_flat.get(name))
    ]
    if different:
        raise TrainingError(f"--resume goes on with the same options only: {'; '.join(different)} ({_ANEW})")


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
                f"training began with ({_ANEW})"
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


def _shown(value: Any) -> str:
    return "not given" if _given(value) is None else str(value)


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

    A run folder belongs to one product, and the same command line finds it by its output. Without
    ``--output``, INPUT may also be a ``last.pt`` in a run folder, or a product with its run folder next to
    it: then that training continues and writes its product, if the command's own product and run folder do
    not exist.
    """
    if source is None or source == "-":
        return source, output
    path, own = Path(source), Path(run_folder_of(output or source), "last.pt")
    if output is not None:
        # A product that is named as INPUT, too, is continued and not its own parent.
        return (str(own), output) if own.exists() and is_same_file(path, Path(output)) else (source, output)
    product = _product_of(path)
    if product is not None:
        return source, str(product)
    expected = path.with_name(f"{path.stem}.{verb}.pt")
    if Path(run_folder_of(str(expected))).exists() or expected.exists() or not own.exists():
        return source, None
    return str(own), source


def _product_of(last: Path) -> Path | None:
    """The product whose run folder a ``last.pt`` is in; None if it is in none."""
    if last.name != "last.pt" or last.parent.suffix != ".run":
        return None
    named = product_in(last.parent)
    if named is not None:
        return named
    products = [last.parent.with_suffix(suffix) for suffix in (".pt", ".safetensors")]
    return next((found for found in products if found.exists()), products[0])


def nothing_to_resume(last: Path, source: str | None) -> TrainingError:
    """The error for a product whose run folder holds no completed epoch; ``source`` is INPUT."""
    text = f"there is nothing to resume: {last} does not exist; leave --resume out to begin"
    product = None if source is None else _product_of(Path(source)) or Path(source)
    own = None if product is None else Path(run_folder_of(str(product)), "last.pt")
    if own is not None and own != last and own.exists():
        text += f", or go on with the training of INPUT itself by -o {product}"
    return TrainingError(text)


def refuse_other_input(
    earlier: Step, resumed: Checkpoint, given: Checkpoint, source: str | None, last: Path
) -> None:
    """Refuse to resume a training that began with another network than INPUT or ``--arch`` name now.

    Args:
        earlier: the unfinished line of history.
        resumed: the checkpoint that goes on.
        given: INPUT, or a fresh network.
        source: path of INPUT.
        last: the file that is resumed.

    Raises:
        TrainingError: naming both.
    """
    began = "a fresh network" if earlier.parent is None else earlier.parent.path
    found, spec = given.origin, resumed.spec
    if found is None:
        same = (given.spec.arguments, given.spec.input_shape) == (spec.arguments, spec.input_shape)
        # The user's file may have another path now.
        ours = looks_like_user_code(given.spec.architecture) and looks_like_user_code(spec.architecture)
        if earlier.parent is None and same and (ours or given.spec.architecture == spec.architecture):
            return
        named = f"--arch {given.spec.architecture} is"
    else:
        named = f"{source or found.path} is"
        if _same_file(found, earlier.parent) or _same_file(found, resumed.origin):
            return
    raise TrainingError(
        f"{last} goes on with a training that began with {began}, and {named} another network; "
        "leave --resume out and name another -o to begin a training"
    )


def _same_file(one: Parent | None, other: Parent | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.content or one.file) == (other.content or other.file)


def refuse_other_data(row: Mapping[str, Any], source: DataSource, processes: int) -> None:
    """Refuse to resume on a data set whose splits have other sizes than in the last epoch, ``row``.

    Raises:
        TrainingError: naming the split and both numbers.
    """
    # A last batch that is too small for the processes is left out.
    left_out = MINIMUM_TRAINING_SAMPLES * processes - 1
    for split, key, fewer in (("train", "n", left_out), ("validation", "validation_n", 0)):
        before = int(row.get(key) or 0)
        now = len(source.split(split)) if split in source.loaders else 0
        if before and not before <= now <= before + fewer:
            raise TrainingError(
                f"--resume goes on with the same data only: the {split} split of {source.reference} had "
                f"{before:,} images and has {now:,} now ({_ANEW})"
            )
