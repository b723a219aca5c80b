"""`cctool distill`: the signature of the command."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from cctool.cli import common, training
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.train.distill import PRESETS, DistillOptions, DistillPreset
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import RunOptions


def distill(
    context: typer.Context,
    source: common.OptionalSource = None,
    *,
    teacher: Annotated[str, typer.Option(help="Checkpoint or foreign file of the teacher.")],
    teacher_arch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Architecture of a foreign teacher, as in torchvision:resnet18."),
    ] = None,
    teacher_arg: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="KEY=VALUE", help="Argument of the teacher's architecture; may be repeated."),
    ] = None,
    teacher_input: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="CxHxW", help="Size of the teacher's input; images are resized to it."),
    ] = None,
    teacher_mean: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="M,M,M", help="Mean that a foreign teacher's inputs are centred by."),
    ] = None,
    teacher_std: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="S,S,S", help="Deviation that a foreign teacher's inputs are divided by."),
    ] = None,
    output: common.Output = None,
    temperature: Annotated[
        float, typer.Option(help="T of the softened outputs.")
    ] = DistillOptions.temperature,
    alpha: Annotated[
        float, typer.Option(help="Weight of the teacher; the labels weigh 1 - alpha.")
    ] = DistillOptions.alpha,
    preset: Annotated[
        Optional[DistillPreset],  # noqa: UP045
        typer.Option(help="Set the options as a published method did; options that you give stand."),
    ] = None,
    epochs: training.Epochs = FitOptions.epochs,
    optimizer: training.Optimizer = FitOptions.optimizer,
    lr: training.Lr = None,
    momentum: training.Momentum = None,
    nesterov: training.Nesterov = False,
    weight_decay: training.WeightDecay = FitOptions.weight_decay,
    decay: training.Decay = FitOptions.decay,
    schedule: training.ScheduleOption = FitOptions.schedule,
    milestones: training.Milestones = None,
    lr_gamma: training.LrGamma = None,
    power: training.Power = None,
    min_lr: training.MinLr = FitOptions.min_lr,
    onecycle_warm: training.OnecycleWarm = None,
    warmup: training.WarmupOption = None,
    warmup_epochs: training.WarmupEpochs = None,
    label_smoothing: training.LabelSmoothing = FitOptions.label_smoothing,
    clip_norm: training.ClipNorm = None,
    gamma_l1: training.GammaL1 = FitOptions.gamma_l1,
    rate_weight: training.RateWeight = FitOptions.rate_weight,
    loss: training.Loss = None,
    metric: training.Metric = None,
    metric_mode: training.MetricModeOption = FitOptions.metric_mode,
    eval_from: training.EvalFrom = FitOptions.eval_from,
    augment: training.Augment = FitOptions.augment,
    freeze_norm: training.FreezeNorm = FitOptions.freeze_norm,
    ema: training.Ema = FitOptions.ema,
    resume: training.Resume = False,
    stop_after: training.StopAfter = None,
    save_every: training.SaveEvery = None,
    tensorboard: training.TensorBoard = False,
    mlflow: training.Mlflow = False,
    mlflow_dir: training.MlflowDir = None,
    devices: training.Devices = RunOptions.devices,
    nodes: training.Nodes = RunOptions.nodes,
    keep_storage: training.KeepStorage = False,
    data: common.Data = None,
    val_data: common.ValData = None,
    test_data: common.TestData = None,
    batch_size: common.BatchSize = DataOptions.batch_size,
    workers: common.Workers = DataOptions.workers,
    limit: common.Limit = None,
    arch: common.Arch = None,
    arg: common.Arg = None,
    input_shape: common.Input = None,
    mean: common.Mean = None,
    std: common.Std = None,
    spec: common.Spec = None,
    trust_pickle: common.TrustPickle = False,
    device: common.Device = RuntimeOptions.device,
    precision: common.PrecisionOption = Precision.FULL,
    seed: common.Seed = RuntimeOptions.seed,
    deterministic: common.Deterministic = False,
    allow_nonfinite: common.AllowNonfinite = False,
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Train a student on labels and on a teacher's outputs.

    The loss is alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross-entropy.

    Example: cctool distill --arch mobilenet_student --data digits --teacher teacher.pt
    """
    chosen = PRESETS[preset] if preset is not None else None
    values = training.completed(context, "distill", dict(locals()), chosen)
    options = DistillOptions(
        teacher=teacher,
        teacher_model=common.model_options(
            teacher_arch, teacher_arg, teacher_input, teacher_mean, teacher_std, None, trust_pickle
        ),
        temperature=values["temperature"],
        alpha=values["alpha"],
        fit=training.fit_options(values),
        data=training.data_options(values),
        run=training.run_options(values),
        keep_storage=values["keep_storage"],
        preset=DistillPreset(values["preset"]) if values["preset"] else None,
    )
    model = common.model_options(arch, arg, input_shape, mean, std, spec, trust_pickle)
    invocation = training.invocation("distill", values, model)

    from cctool.operations.train.run import distill as run

    invocation.write(run, options, training.report, resumes=resume)
