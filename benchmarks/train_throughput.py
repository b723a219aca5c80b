"""Training throughput of cctool's loop against bare hand-written ones: CIFAR-10, resnet20, the same work.

Three loops take turns, a round each: cctool's `fit`, and what one writes by hand in plain PyTorch, once as
most people write it and once with channels-last memory. All train one network each from equal weights with
SGD (momentum 0.9, Nesterov, weight decay 5e-4, a cosine schedule), crop with four pixels of padding, flip and
normalise in batches from uint8 images in memory, and count loss and accuracy. Evaluation and files are in
none of them. The ratio is that of the medians of images a second, against the faster bare loop.

    python benchmarks/train_throughput.py CIFAR_DIR [--rounds 8] [--steps 16] [--device cpu] [--threads N]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import record
from cctool.checkpoint.spec import Preprocessing
from cctool.data.registry import open_data
from cctool.models.registry import build
from cctool.options.train.fit import FitOptions
from cctool.training.loop.feed import Feed
from cctool.training.loop.fit import Task, fit
from cctool.training.objectives import Supervised
from cctool.training.processes import make_fabric
from cctool.training.resume.progress import EpochRow

SEED, BATCH, LR = 0, 128, 0.1
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class BareLoop:
    """The loop that one writes by hand; imports nothing of cctool's."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, steps: int, rounds: int, channels_last: bool
    ) -> None:
        self.device = images.device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.format).train()
        self.images, self.labels, self.steps, self.total = images, labels, steps, steps * rounds
        self.mean = torch.tensor(MEAN, device=self.device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(STD, device=self.device).view(1, 3, 1, 1) * 255
        self.optimizer = torch.optim.SGD(
            model.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.done = 0

    def augment(self, images: Tensor) -> Tensor:
        """Crop with four pixels of padding and flip, each image by its own draw."""
        n, _, height, width = images.shape
        padded = F.pad(images, (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2, n, 1), device=self.device)
        rows = top + torch.arange(height, device=self.device)
        columns = left + torch.arange(width, device=self.device)
        flips = torch.rand(n, 1, device=self.device) < 0.5
        columns = torch.where(flips, columns.flip(1), columns)
        index = torch.arange(n, device=self.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def round(self) -> float:
        """Train one round; returns its seconds."""
        started = time.perf_counter()
        order = torch.randperm(len(self.images), device=self.device)
        losses, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for step in range(self.steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            labels = self.labels[chosen]
            batch = ((self.augment(self.images[chosen]) - self.mean) / self.std).contiguous(
                memory_format=self.format
            )
            for group in self.optimizer.param_groups:
                group["lr"] = LR * (1 + math.cos(math.pi * self.done / self.total)) / 2
            logits = self.model(batch)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses += loss.detach()
            correct += (logits.argmax(1) == labels).sum()
            self.done += 1
        losses.item(), correct.item()
        return time.perf_counter() - started


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round of each loop; the first round of each warms it up and is left out."""
    device = torch.device(arguments.device)
    source = open_data(f"cifar10:{arguments.cifar}", limit=arguments.steps * BATCH)
    split = source.split("train")
    assert split.images is not None
    assert split.labels is not None
    networks = []
    for _ in range(3):
        torch.manual_seed(SEED)
        networks.append(build("resnet20", {"num_classes": 10}))
    rounds = arguments.rounds + 1
    on_device = split.images.to(device), split.labels.to(device)
    bare = {
        name: BareLoop(network, *on_device, arguments.steps, rounds, channels_last)
        for name, network, channels_last in (
            ("bare", networks[1], False),
            ("bare_channels_last", networks[2], True),
        )
    }
    seconds: dict[str, list[float]] = {"cctool": [], **{name: [] for name in bare}}

    def take_turns(row: EpochRow, model: nn.Module) -> None:
        seconds["cctool"].append(row.seconds)
        for name, loop in bare.items():
            seconds[name].append(loop.round())

    feed = Feed(source, Preprocessing(mean=MEAN, std=STD), batch_size=BATCH, device=device, seed=SEED)
    options = FitOptions(epochs=rounds, optimizer="sgd", lr=LR, nesterov=True)
    fabric = make_fabric(device)
    fit(
        Task(
            networks[0],
            feed.training(),
            options,
            Supervised(),
            LR,
            fabric,
            observers=(take_turns,),
            input_shape=source.shape,
        )
    )
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    """Measure, print a JSON line and write it to `benchmarks/results`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cifar", help="folder of CIFAR-10's binary files")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds = measure(arguments)
    images = arguments.steps * BATCH
    rates = {name: images / statistics.median(values) for name, values in seconds.items()}
    fastest = max(rates["bare"], rates["bare_channels_last"])
    row: dict[str, Any] = {
        "benchmark": "train_throughput",
        "device": arguments.device,
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["cctool"] / fastest, 3),
        "ratio_to_plain": round(rates["cctool"] / rates["bare"], 3),
        "target": 0.95,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "batch_size": BATCH,
    }
    command = (
        f"python benchmarks/train_throughput.py CIFAR_DIR --rounds {arguments.rounds} "
        f"--steps {arguments.steps} --device {arguments.device} --threads {arguments.threads}"
    )
    name = "train_throughput" if arguments.device == "cpu" else "train_throughput_cuda"
    record.write(name, command, SEED, [row])


if __name__ == "__main__":
    main()
