"""`cctool train`: the signature of the command."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from cctool.cli import common, training
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import RunOptions, TrainOptions


def train(
    context: typer.Context,
    source: common.OptionalSource = None,
    output: common.Output = None,
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
    swap: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="MODE:KERNEL:LAYERS",
            help="Layers of a fresh network that live in a transform domain from the beginning, as in "
            "basis:dct:linear or coefficient:dwt:all; may be repeated.",
        ),
    ] = None,
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
    """Train a fresh network, or go on with any checkpoint; writes the best epoch by validation.

    Example: cctool train --arch resnet20 --data digits --epochs 20
    """
    values = training.completed(context, "train", dict(locals()))
    options = TrainOptions(
        training.fit_options(values),
        training.data_options(values),
        training.run_options(values),
        values["keep_storage"],
        tuple(values["swap"]) if values["swap"] else None,
    )
    model = common.model_options(arch, arg, input_shape, mean, std, spec, trust_pickle)
    invocation = training.invocation("train", values, model)

    from cctool.operations.train.run import run

    invocation.write(run, options, training.report, resumes=resume)
