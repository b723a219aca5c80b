"""Options that `train` and `distill` share, and how they become records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from cctool.base.errors import UsageError
from cctool.cli import common
from cctool.cli.console import Console
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.train.fit import DecayScope, FitOptions, MetricMode, Schedule, Warmup
from cctool.options.train.run import RunOptions, find_resumed, run_folder_of

Epochs = Annotated[int, typer.Option(help="Passes over the training split; 0 writes the network as it is.")]
Optimizer = Annotated[str, typer.Option(help="sgd, adam, adamw or my.py:factory(groups, lr=...).")]
Lr = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Learning rate. Default: sgd 0.1, else 0.001; of a trained network 0.01 and 0.0003."),
]
Momentum = Annotated[Optional[float], typer.Option(help="Momentum of sgd. Default: 0.9.")]  # noqa: UP045
Nesterov = Annotated[bool, typer.Option("--nesterov", help="Nesterov's momentum for sgd.")]
WeightDecay = Annotated[float, typer.Option(help="Weight decay.")]
Decay = Annotated[
    DecayScope, typer.Option(help="Decay all parameters, or weights without biases and normalisation.")
]
ScheduleOption = Annotated[
    Schedule, typer.Option("--schedule", help="How the learning rate changes after the warm-up.")
]
Milestones = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="E,E,...", help="multistep: epochs after the warm-up at which the rate drops."),
]
LrGamma = Annotated[Optional[float], typer.Option(help="multistep: factor of a drop. Default: 0.1.")]  # noqa: UP045
Power = Annotated[Optional[float], typer.Option(help="poly: exponent. Default: 1.")]  # noqa: UP045
MinLr = Annotated[float, typer.Option(help="cosine and poly: learning rate at the end.")]
OnecycleWarm = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="onecycle: fraction of the steps in which the rate rises. Default: 0.3."),
]
WarmupOption = Annotated[
    Optional[Warmup],  # noqa: UP045
    typer.Option("--warmup", help="Grow linearly, or x4 an epoch (from lr/1024 over five)."),
]
WarmupEpochs = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Epochs of warm-up, part of --epochs. Default: 5 with --warmup, else 0."),
]
LabelSmoothing = Annotated[float, typer.Option(help="Share of the target spread over all classes.")]
ClipNorm = Annotated[Optional[float], typer.Option(help="Largest L2 norm of all gradients together.")]  # noqa: UP045
GammaL1 = Annotated[float, typer.Option(help="L1 penalty on batch-norm scales, as slimming needs it.")]
RateWeight = Annotated[
    float,
    typer.Option(help="Weight of coded feature maps' bits a value in the loss; for networks with codecs."),
]
Ema = Annotated[
    float,
    typer.Option(
        "--ema",
        metavar="DECAY",
        help="Average the weights over about 1/(1-DECAY) steps; the average is validated and written.",
    ),
]
Loss = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="FILE.py:FN", help="Your loss(outputs, labels) in place of cross-entropy."),
]
Metric = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="FILE.py:FN", help="Your metric(outputs, labels) of a split; decides what is best."),
]
MetricModeOption = Annotated[
    MetricMode, typer.Option("--metric-mode", help="Whether larger or smaller values of --metric are better.")
]
EvalFrom = Annotated[int, typer.Option(help="Evaluate from this epoch on.")]
Augment = Annotated[
    bool, typer.Option("--augment/--no-augment", help="Vary training images as the data set recommends.")
]
FreezeNorm = Annotated[
    bool, typer.Option("--freeze-norm", help="Leave batch norm's running statistics, and normalise by them.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last.pt.")]
StopAfter = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(metavar="EPOCHS", help="Stop after so many epochs of this call; --resume goes on."),
]
SaveEvery = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(metavar="EPOCHS", help="Keep a checkpoint of every so many epochs in the run folder."),
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files.")]
Mlflow = Annotated[bool, typer.Option("--mlflow", help="Write a run into a local MLflow file store.")]
MlflowDir = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="DIR", help="MLflow's file store. Default: in the run folder."),
]
Devices = Annotated[int, typer.Option(help="Processes on this machine, a device each.")]
Nodes = Annotated[
    int, typer.Option(help="Machines; set MASTER_ADDR, MASTER_PORT and NODE_RANK on each of them.")
]
KeepStorage = Annotated[
    bool, typer.Option("--keep-storage", help="Store tensors again as INPUT stored them.")
]

_REFERENCES = ("data", "val_data", "test_data", "optimizer", "loss", "metric", "teacher_arch")


def completed(
    context: typer.Context, verb: str, values: dict[str, Any], preset: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fill in what was not given on the command line: from the preset, and from the training to go on with.

    Args:
        context: tells what was given.
        verb: the command.
        values: the parameters of the command by name.
        preset: what the preset sets, by name.

    Returns:
        ``values``, with ``source`` and ``output`` of the training that ``--resume`` means, and under
        ``named`` the references that stand on this command line: a file's own never make code run.
    """
    values = dict(values)
    values["named"] = tuple(values.get(name) for name in _REFERENCES)
    values["milestones"] = _milestones(values["milestones"])
    values |= {name: value for name, value in (preset or {}).items() if not common.is_given(context, name)}
    if not values["resume"]:
        return values
    values["source"], values["output"] = find_resumed(values["source"], values["output"], verb)
    for name, value in _begun_with(verb, values).items():
        if name in values and not common.is_given(context, name) and name not in ("device", "workers"):
            values[name] = value
    return values


def _milestones(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(piece) for piece in text.split(","))
    except ValueError:
        raise UsageError(f"--milestones {text}: comma-separated epochs are expected, as in 15,25") from None


def _begun_with(verb: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the training that is to go on, by name; none where its ``last.pt`` cannot be found yet."""
    from cctool.operations.pipeline import default_output
    from cctool.operations.train.resume import last_step

    if values["source"] == "-":
        return {}
    output = values["output"] or default_output(verb, values["source"], values["arch"])
    last = Path(run_folder_of(str(output)), "last.pt")
    if not last.exists():
        last = Path(values["source"] or last)
    if not last.exists():
        return {}
    found: dict[str, Any] = {}
    for name, value in last_step(last).options.items():
        found |= (
            value if isinstance(value, dict) and name in ("fit", "data", "run", "runtime") else {name: value}
        )
    return found


def fit_options(values: Mapping[str, Any]) -> FitOptions:
    """Collect the options of training."""
    result: FitOptions = _record(FitOptions, values)
    return result


def run_options(values: Mapping[str, Any]) -> RunOptions:
    """Collect how a call runs."""
    result: RunOptions = _record(RunOptions, values)
    return result


def _record(kind: Any, values: Mapping[str, Any]) -> Any:
    """Build a record of its fields; what came out of a history is turned into enums and tuples again."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_python({item.name: values[item.name] for item in fields(kind)})


def invocation(verb: str, values: Mapping[str, Any], model: ModelOptions) -> common.Invocation:
    """Put together the frame of a training command.

    Args:
        verb: the command.
        values: the parameters of the command by name.
        model: how the network was named.
    """
    return common.Invocation(
        verb=verb,
        console=Console(quiet=values["quiet"], as_json=values["as_json"], debug=values["debug"]),
        source=values["source"],
        output=values["output"],
        force=values["force"],
        allow_nonfinite=values["allow_nonfinite"],
        model=model,
        runtime=_record(RuntimeOptions, values),
        user_code=values["named"],
    )


def data_options(values: Mapping[str, Any]) -> DataOptions:
    """Collect the data options."""
    result: DataOptions = _record(DataOptions, values)
    return result


def report(console: Console, found: Any) -> None:
    """Say what was measured before and after."""
    common.show_metrics(console, found.metrics_before, found.metrics_after)
