"""Coded feature maps of a trained ResNet-20 on CIFAR-10: compression ratio and accuracy, row by row.

The codecs stand behind all nine residual blocks, and each block gets what its predecessor's maps decode to.
Ratios are of all maps of the measured images, 8 bits a value over all coded bits, side information included
(headers, ranges, steps, means, block tables), as `cctool evaluate --bitstream` would write them.

- the published presets, with the ratio at every order k of the code;
- the default table at several qualities, without any training; over a KLT of the channels; and with steps by
  the outputs' sensitivity (--allocate);
- the last with fine-tuning in the loop: the taps stay in, gradients pass straight through, the uncoded
  network is the teacher (--distilled), and the rate is a part of the loss (--rate-weight);
- the mean of the weights of networks that calls with the same --keep have tuned (--mean-of; Wortsman et al.
  2022, arXiv 2203.05482), which lie in one valley because they began with the same network.

Rows that are in the file of --partial already are not measured again.

    python benchmarks/feature_codec.py WEIGHTS.pth CIFAR10_DIR --partial rows.json
"""

from __future__ import annotations

import argparse
import json
import re
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import record
from cctool.base.runtime import Silent, resolve_device, seed_everything
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.data.registry import open_data
from cctool.operations.context import Context
from cctool.operations.data import example, measured
from cctool.operations.keep.calibrate import calibration_images, put_taps
from cctool.operations.opening import open_checkpoint
from cctool.operations.registries import tables
from cctool.operations.train.finetune import finetune
from cctool.operations.train.teacher import distillation
from cctool.operations.transform.features import codec_configs
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.teacher import TeacherOptions
from cctool.options.train.fit import FitOptions, Schedule
from cctool.options.transform.choices import TransformPreset, TransformTarget
from cctool.options.transform.options import TransformOptions
from cctool.transforms.codec.figures import NetworkStatistics
from cctool.transforms.codec.sites import find_sites
from cctool.transforms.codec.taps import recording, set_quality

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CALIBRATION = 1024
ORDERS = range(6)
ALLOCATED = "dct with channel KLT, allocated"
PRESETS = (
    TransformPreset.FEATURE_COMPRESSION_DCT,
    TransformPreset.FEATURE_COMPRESSION_DCT_RETRAIN,
    TransformPreset.FEATURE_COMPRESSION_DWT,
)


class Run:
    """The network, the data, and how they are measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        device = resolve_device(arguments.device)
        self.arguments = arguments
        self.context = Context(
            device=device,
            runtime=RuntimeOptions(device=arguments.device, seed=arguments.seed),
            model_options=ModelOptions(),
            tables=tables(),
            user_code=frozenset(),
            reporter=Silent(),
            output=Path("none.pt"),
            force=False,
            stamp=lambda outcome: outcome.checkpoint,
        )
        self.data = DataOptions(data=f"cifar10:{arguments.data}", batch_size=arguments.batch_size)
        named = ModelOptions(arch="resnet20", mean=MEAN, std=STD)
        path = Path(arguments.weights)
        self.checkpoint = open_checkpoint(path, named, self.context.tables, frozenset(), Silent())
        self.checkpoint.model.to(device)

    def source(self, limit: int | None = None) -> DataSource:
        """CIFAR-10, or the first so many images of each split."""
        return open_data(str(self.data.data), input_shape=(3, 32, 32), limit=limit)

    def coded(self, options: TransformOptions) -> Checkpoint:
        """A copy of the network with calibrated codecs."""
        seed_everything(self.context.runtime.seed)
        fresh = replace(self.checkpoint, model=deepcopy(self.checkpoint.model))
        images, used = calibration_images(
            fresh, self.source(), options.features.calibration, self.data, self.context
        )
        sites = find_sites(fresh.model, example(fresh), options.features.taps)
        return put_taps(fresh, sites, codec_configs(options, sites, used), images)

    def measured(self, checkpoint: Checkpoint, limit: int | None = None) -> dict[str, Any]:
        """Accuracy on the test split, and what its maps take."""
        checkpoint.model.eval()
        statistics = NetworkStatistics(checkpoint.model)
        with recording(checkpoint.model, statistics):
            metrics = measured(checkpoint, self.source(limit), self.data, self.context)
        taps = statistics.figures()
        found: dict[str, Any] = {"n": metrics.n, "top1": round(metrics.values["top1"], 2)}
        if not taps:
            return found
        elements, side = sum(tap.elements for tap in taps), sum(tap.side_bits for tap in taps)
        payload = [sum(tap.payload_bits[k] for tap in taps) for k in ORDERS]
        best = sum(min(tap.payload_bits) for tap in taps)
        return found | {
            "ratio": round(8 * elements / (best + side), 3),
            "ratio_by_k": [round(8 * elements / (bits + side), 3) for bits in payload],
            "entropy_ratio": round(8 * elements / (sum(tap.entropy_bits for tap in taps) + side), 3),
            "side_share": round(side / (best + side), 5),
            "saturated": sum(tap.clamped_symbols for tap in taps),
            "zero_symbols": round(
                sum(tap.zero_symbols * tap.symbols for tap in taps) / sum(tap.symbols for tap in taps), 2
            ),
            "taps": [
                {"name": tap.name, "ratio": round(tap.ratio_8bit, 2), "k": tap.best_k, "sqnr": tap.sqnr_db}
                for tap in taps
            ],
        }

    def finetuned(self, options: TransformOptions, quality: float) -> dict[str, Any]:
        """The network after training with the codecs in the loop, then coded at a quality of its own."""
        arguments = self.arguments
        trained, images = self._trained(options)
        set_quality(trained.model, quality)
        held_out = measured(trained, self.source(), self.data, self.context, split="validation")
        return self.measured(trained) | {
            "validation_top1": round(held_out.values["top1"], 2),
            "train_images": images,
            "distilled": arguments.distilled,
            "epochs": arguments.epochs,
            "lr": arguments.lr,
            "rate_weight": arguments.rate_weight,
            "schedule": arguments.schedule,
            "ema": arguments.ema,
        }

    def mean(self, options: TransformOptions, qualities: tuple[float, ...], quality: float) -> dict[str, Any]:
        """The mean of kept networks, coded at a quality of its own."""
        coded = self.coded(options)
        kept = [torch.load(self._kept(each), weights_only=True) for each in qualities]
        own = coded.model.state_dict()
        for name, parameter in coded.model.named_parameters():
            own[name] = sum(state[name] for state in kept) / len(kept)
            assert own[name].shape == parameter.shape
        coded.model.load_state_dict(own)
        set_quality(coded.model, quality)
        return self.measured(coded) | {"mean_of": list(qualities)}

    def _kept(self, quality: float) -> Path:
        return Path(self.arguments.keep, f"tuned-{quality:g}.pt")

    def _trained(self, options: TransformOptions) -> tuple[Checkpoint, int]:
        """The network trained at the quality of the options, and on how many images."""
        arguments, coded = self.arguments, self.coded(options)
        fit = FitOptions(
            epochs=arguments.epochs,
            optimizer="sgd",
            lr=arguments.lr,
            rate_weight=arguments.rate_weight,
            schedule=Schedule(arguments.schedule),
            ema=arguments.ema,
            freeze_norm=True,
        )
        images = self.source(arguments.train_images)
        count = len(images.split("train"))
        kept = self._kept(options.features.quality) if arguments.keep else None
        if kept is not None and kept.is_file():
            coded.model.load_state_dict(torch.load(kept, weights_only=True))
            return coded, count
        objective = None
        if arguments.distilled:
            named = TeacherOptions(arguments.weights, ModelOptions(arch="resnet20", mean=MEAN, std=STD))
            objective = distillation(coded, images, named, self.context)[0]
        trained = finetune(
            coded, images, fit, self.data, self.context, objective=objective, choose_best=False
        )
        if kept is not None:
            torch.save(trained.model.state_dict(), kept)
        return trained, count


def ours(quality: float, **given: Any) -> TransformOptions:
    """Options of ``cctool transform --target features --mean-shift --quality N``."""
    given = {"calibration": CALIBRATION, "mean_shift": True} | given
    return TransformOptions.from_given({"target": TransformTarget.FEATURES, "quality": quality, **given})


def published(preset: TransformPreset) -> TransformOptions:
    """Options of ``--preset``."""
    return TransformOptions.from_given({"preset": preset, "calibration": CALIBRATION})


@dataclass(frozen=True)
class Job:
    """One row.

    Attributes:
        options: the codec; None without.
        tuned: the quality after a fine-tuning; None without one.
        images: of the test split; all where None.
        mean_of: the qualities at which networks were tuned whose mean is measured; none where it is empty.
    """

    options: TransformOptions | None
    tuned: float | None = None
    images: int | None = None
    mean_of: tuple[float, ...] = ()


def jobs(arguments: argparse.Namespace) -> dict[str, Job]:
    """What is measured, by the rows' names."""
    few = arguments.sweep_images
    found = {"float": Job(None)}
    if few is not None:
        found[f"float, {few:,} images"] = Job(None, images=few)
    best: dict[str, Any] = {"channel_klt": True, "allocate": True}
    for quality in arguments.tuned:
        found[f"{ALLOCATED}, quality {quality:g}, tuned"] = Job(ours(quality, **best), tuned=quality)
        for other in arguments.coded_at:
            name = f"{ALLOCATED}, tuned at {quality:g}, coded at {other:g}"
            found[name] = Job(ours(quality, **best), tuned=other)
    for quality in arguments.plain_tuned:
        found[f"dct, quality {quality:g}, tuned"] = Job(ours(quality), tuned=quality)
        for other in arguments.coded_at:
            found[f"dct, tuned at {quality:g}, coded at {other:g}"] = Job(ours(quality), tuned=other)
    for other in arguments.coded_at if arguments.mean_of else ():
        named = " and ".join(f"{quality:g}" for quality in arguments.mean_of)
        job = Job(ours(other), tuned=other, mean_of=tuple(arguments.mean_of))
        found[f"dct, mean of those tuned at {named}, coded at {other:g}"] = job
    for preset in PRESETS:
        found[f"preset {preset}"] = Job(published(preset), images=few)
    for name, given in (("dct", {}), ("dct with channel KLT", {"channel_klt": True}), (ALLOCATED, best)):
        for quality in arguments.sweep:
            found[f"{name}, quality {quality:g}"] = Job(ours(quality, **given), images=few)
    found["haar, quality 44"] = Job(ours(44, kernel="dwt"), images=few)
    return found


def measure(run: Run, job: Job) -> dict[str, Any]:
    if job.options is None:
        return run.measured(run.checkpoint, job.images)
    if job.mean_of and job.tuned is not None:
        return run.mean(job.options, job.mean_of, job.tuned)
    if job.tuned is not None:
        return run.finetuned(job.options, job.tuned)
    return run.measured(run.coded(job.options), job.images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("weights", help="state dict of the trained resnet20")
    parser.add_argument("data", help="folder of CIFAR-10")
    parser.add_argument("--partial", help="JSON file of rows that were measured before")
    parser.add_argument("--only", default="", help="regular expression of the rows to measure")
    parser.add_argument("--tuned", type=float, nargs="*", default=[44, 30, 20], help="qualities, fine-tuned")
    parser.add_argument(
        "--plain-tuned", type=float, nargs="*", default=[], help="qualities, fine-tuned without a KLT"
    )
    parser.add_argument(
        "--coded-at", type=float, nargs="*", default=[], help="further qualities of each tuned network"
    )
    parser.add_argument(
        "--mean-of", type=float, nargs="*", default=[], help="qualities of kept networks, averaged"
    )
    parser.add_argument("--keep", help="folder of tuned weights; what lies there is not tuned again")
    parser.add_argument("--sweep", type=float, nargs="*", default=[20, 30, 44, 60, 80])
    parser.add_argument("--sweep-images", type=int, help="test images of untuned rows; all unless given")
    parser.add_argument("--train-images", type=int, help="of fine-tuning; all unless given")
    parser.add_argument("--distilled", action="store_true", help="tuned rows follow the uncoded network")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--rate-weight", type=float, default=0.0, help="of the loss of tuned rows")
    parser.add_argument("--schedule", default="cosine", help="of the learning rate of tuned rows")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of the average of tuned rows' weights")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    partial = Path(arguments.partial) if arguments.partial else None
    rows: dict[str, Any] = {}
    if partial is not None and partial.is_file():
        rows = json.loads(partial.read_text(encoding="utf-8"))
    run = Run(arguments)
    wanted = jobs(arguments)
    for name, job in wanted.items():
        if name not in rows and re.search(arguments.only, name):
            began = time.process_time()
            found = measure(run, job)
            rows[name] = {"name": name} | found | {"cpu_seconds": round(time.process_time() - began)}
            print(f"# {time.strftime('%H:%M:%S')} {json.dumps(rows[name])}", flush=True)
            if partial is not None:
                partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    command = (
        f"python benchmarks/feature_codec.py WEIGHTS CIFAR10_DIR --epochs {arguments.epochs} "
        f"--lr {arguments.lr:g} --rate-weight {arguments.rate_weight:g} "
        f"--schedule {arguments.schedule} --ema {arguments.ema:g}"
        + "".join(
            " ".join((f" --{name.replace('_', '-')}", *(f"{value:g}" for value in vars(arguments)[name])))
            for name in ("sweep", "tuned", "plain_tuned", "coded_at", "mean_of")
        )
        + (" --distilled" if arguments.distilled else "")
        + (f" --train-images {arguments.train_images}" if arguments.train_images else "")
        + (f" --sweep-images {arguments.sweep_images}" if arguments.sweep_images else "")
    )
    ordered = [rows[name] for name in wanted if name in rows]
    record.write("feature_codec", command, arguments.seed, ordered)


if __name__ == "__main__":
    main()
