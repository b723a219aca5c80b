"""Networks that are no classifiers, through every verb: what is measured, refused and verified."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from cctool.base.errors import TrainingError
from cctool.cli.main import app
from cctool.models import registry
from cctool.tasks.base import LOSS, Measure, relative_error
from cctool.tasks.table import TASKS
from segmentation_toys import segmentation_set

Run = Callable[..., str]

AUTOENCODER = """
    from torch import nn

    def make(width=8):
        return nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4, 3, 1, 1), nn.PixelShuffle(2),
        )

    def mse(outputs, targets, inputs):
        return (outputs - inputs).square().mean()

    def psnr(outputs, targets, inputs):
        return -10 * (outputs - inputs).square().mean().log10()

    psnr.unit = "dB"
"""
UNET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes, width):
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
            self.deep = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
            self.up = nn.Upsample(scale_factor=2)
            self.out = nn.Conv2d(2 * width, num_classes, 1)

        def forward(self, x):
            x = self.down(x)
            y = self.out(torch.cat([x, self.up(self.deep(x))], 1))
            return {"out": y, "aux": y[:, :, ::2, ::2]}

    def make(num_classes=3, width=12):
        return Net(num_classes, width)
"""


def written(folder: Path, name: str, code: str) -> None:
    (folder / name).write_text(textwrap.dedent(code))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in a folder with the toys; its output, or its error if ``says`` is expected."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "ae.py", AUTOENCODER)
    written(tmp_path, "unet.py", UNET)

    def invoke(line: str, says: str | None = None) -> str:
        before = set(tmp_path.rglob("*"))
        result = CliRunner().invoke(app, line.split())
        told = " ".join((result.stdout + result.stderr).split())
        if says is None:
            assert result.exit_code == 0, told
            if "--json" in line or "--spec" in line:
                return result.stdout
        else:
            assert result.exit_code == 1, told
            assert says in told
            assert {
                path for path in set(tmp_path.rglob("*")) - before if "__pycache__" not in str(path)
            } == set()
        return told

    return invoke


AE = "--arch ae.py:make"
LOSS_OF_AE = "--loss ae.py:mse"


def test_an_autoencoder_goes_through_every_verb(run: Run) -> None:
    run(
        f"train {AE} --data digits --limit 96 {LOSS_OF_AE} --metric ae.py:psnr --epochs 2 --batch-size 32 "
        "-o a.pt"
    )
    spec = json.loads(run(f"analyze a.pt {AE} --spec"))
    assert spec["task"] == "custom"
    assert spec["task_settings"] == {"loss": "ae.py:mse", "metric": "ae.py:psnr", "direction": "max"}
    chain = {
        "p.pt": f"prune a.pt {AE} {LOSS_OF_AE} --method l2 --rate 0.3 --finetune-epochs 1",
        "q.pt": f"quantize p.pt {AE} {LOSS_OF_AE} --method int8 --calibration 32",
        "r.pt": f"quantize p.pt {AE} {LOSS_OF_AE} --method int4 --weight-only --rounding adaround "
        "--rounding-steps 3 --calibration 32",
        "t.pt": f"quantize p.pt {AE} {LOSS_OF_AE} --method qat --epochs 1 --calibration 32",
        "w.pt": f"transform p.pt {AE} {LOSS_OF_AE} --keep 0.9",
        "f.pt": f"transform p.pt {AE} {LOSS_OF_AE} --target features --taps 5 --calibration 32",
    }
    for name, line in chain.items():
        run(f"{line} --limit 96 -o {name}")
        step = json.loads(run(f"analyze {name} {AE} --json"))["history"][-1]
        splits = {found["split"]: found["values"] for found in step["metrics_after"]}
        assert splits["test"].keys() == {"loss"}
        assert [found["values"].keys() for found in step["metrics_before"]] == [{"loss"}] * 2
        told = json.loads(run(f"evaluate {name} {AE} {LOSS_OF_AE} --limit 96 --json"))
        assert told["metrics"]["values"]["loss"] == pytest.approx(splits["test"]["loss"], rel=1e-6)
    assert "verified" in run(f"export q.pt {AE}")
    told = run(f"compare a.pt p.pt q.pt q.onnx {AE} {LOSS_OF_AE} --metric ae.py:psnr --limit 96")
    assert "psnr" in told
    assert "top-1" not in told


def test_without_its_loss_an_autoencoder_is_not_measured_and_what_needs_it_is_refused(run: Run) -> None:
    run(f"train {AE} --data digits --limit 64 {LOSS_OF_AE} --epochs 1 --batch-size 32 -o a.pt")
    told = "this network's loss is ae.py:mse; name it with --loss ae.py:mse"
    for line in (
        f"prune a.pt {AE} --method l2 --finetune-epochs 1",
        f"prune a.pt {AE} --method taylor",
        f"prune a.pt {AE} --method l2 --max-drop 2%",
        f"quantize a.pt {AE} --method qat --epochs 1",
        f"quantize a.pt {AE} --method lsq --epochs 1",
        f"quantize a.pt {AE} --method int4 --weight-only --max-drop 2%",
        f"evaluate a.pt {AE}",
        f"train a.pt {AE} --epochs 1 -o b.pt",
    ):
        run(f"{line} --limit 64", says=told)
    for line in (
        f"prune a.pt {AE} --method l2 -o p.pt",
        f"quantize a.pt {AE} --method int8 --calibration 32 -o q.pt",
        f"transform a.pt {AE} --target features --taps 5 --calibration 32 -o f.pt",
        f"compare a.pt {AE}",
    ):
        assert f"not measured: {told}" in run(f"{line} --limit 64")
    assert json.loads(run(f"analyze p.pt {AE} --json"))["history"][-1]["metrics_after"] == []


def test_a_budget_of_a_loss_is_relative_and_kept(run: Run) -> None:
    run(f"train {AE} --data digits --limit 96 {LOSS_OF_AE} --epochs 2 --batch-size 32 -o a.pt")
    run(f"prune a.pt {AE} {LOSS_OF_AE} --method l2 --max-drop 3 --limit 96", says="--max-drop 2%")
    line = (
        f"prune a.pt {AE} {LOSS_OF_AE} --method l2 --max-drop 60% --recalibrate 32 --limit 96 --json -o b.pt"
    )
    report = json.loads(run(line))["products"][0]["report"]
    budget = report["budget"]
    assert (budget["metric"], budget["relative"], budget["budget"]) == ("loss", True, pytest.approx(0.6))
    for trial in budget["curve"]:
        assert trial["drop"] == pytest.approx(trial["value"] / budget["before"] - 1)
    within = [trial["rate"] for trial in budget["curve"] if trial["drop"] <= 0.6]
    assert budget["rate"] == max(within)
    for split in ("validation", "test"):
        told = json.loads(run(f"evaluate b.pt {AE} {LOSS_OF_AE} --limit 96 --split {split} --json"))
        (after,) = [found for found in report["metrics_after"] if found["split"] == split]
        assert told["metrics"]["values"] == pytest.approx(after["values"], rel=1e-6)


def test_a_segmentation_network_goes_through_every_verb(run: Run, tmp_path: Path) -> None:
    segmentation_set(tmp_path / "set")
    net = "--arch unet.py:make"
    run(f"train {net} --data segment:set --epochs 6 --batch-size 4 --lr 0.02 -o u.pt")
    spec = json.loads(run(f"analyze u.pt {net} --spec"))
    assert (spec["task"], spec["classes"]) == ("segmentation", ["ground", "dark", "bright"])
    run(f"prune u.pt {net} --target macs=0.5 --method l2 --finetune-epochs 1 --batch-size 4 -o p.pt")
    report = json.loads(run(f"prune u.pt {net} --max-drop 5 --method l2 --recalibrate 12 --json -o d.pt"))
    report = report["products"][0]["report"]
    assert report["budget"]["metric"] == "miou"
    within = [trial["rate"] for trial in report["budget"]["curve"] if trial["drop"] <= 5]
    assert report["budget"]["rate"] == max(within)
    for after in report["metrics_after"]:
        told = json.loads(run(f"evaluate d.pt {net} --split {after['split']} --json"))
        assert told["metrics"]["values"] == pytest.approx(after["values"], rel=1e-6)
    run(f"quantize p.pt {net} --method int8 -o q.pt")
    run(
        f"distill {net} --arg width=6 --teacher u.pt --teacher-arch unet.py:make --data segment:set "
        "--epochs 1 -o s.pt"
    )
    run(f"transform p.pt {net} --target features --taps down -o f.pt")
    for name in ("u.pt", "p.pt", "d.pt", "q.pt", "s.pt", "f.pt"):
        told = json.loads(run(f"evaluate {name} {net} --per-class --json"))
        assert set(told["metrics"]["values"]) == {"loss", "miou", "pixels"}
        if name == "u.pt":
            assert told["metrics"]["values"]["miou"] == pytest.approx(
                iou_by_numpy(run, tmp_path / "set"), rel=1e-9
            )
    assert "verified" in run(f"export p.pt {net}")
    session = onnxruntime.InferenceSession("p.onnx")
    assert [output.name for output in session.get_outputs()] == ["out", "aux"]
    assert "layers on integers" in run(f"export q.pt {net}")


def iou_by_numpy(run: Run, folder: Path) -> float:
    """Mean IoU of the exported network in percent, from the files alone."""
    run("export u.pt --arch unet.py:make")
    preprocessing = json.loads(run("analyze u.pt --arch unet.py:make --spec"))["preprocessing"]
    session = onnxruntime.InferenceSession("u.onnx")
    right, union = np.zeros(3), np.zeros(3)
    for file in sorted((folder / "test" / "images").glob("*.png")):
        pixels = np.asarray(Image.open(file), dtype=np.float32).transpose(2, 0, 1) / 255
        mean, std = (np.array(preprocessing[key], dtype=np.float32)[:, None, None] for key in ("mean", "std"))
        logits = session.run(["out"], {"input": ((pixels - mean) / std)[None]})[0][0]
        found, mask = logits.argmax(0), np.asarray(Image.open(folder / "test" / "masks" / file.name))
        for label in range(3):
            counts = mask != 255
            a, b = (found == label) & counts, (mask == label) & counts
            right[label] += (a & b).sum()
            union[label] += (a | b).sum()
    return float(100 * (right / union).mean())


@dataclass(frozen=True)
class Counting:
    """A task that nothing else knows: how many objects, by Poisson loss and absolute error."""

    name: str = "counting"
    measures: tuple[Measure, ...] = (Measure("off", "mean miscount", rising=False),)
    agreement: None = None
    has_loss: bool = True

    def fits(self, outputs: Any) -> bool:
        return isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] == 1

    def main_output(self, outputs: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise TrainingError("counting needs one number an image")
        return outputs

    def classes_in(self, outputs: Any) -> int | None:
        return None

    def imitation(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return (student - teacher).square().mean()

    def compared(self, outputs: Any) -> list[Tensor]:
        return [self.main_output(outputs)]

    def divergence(self, found: Any, wanted: Any) -> float:
        return relative_error(found, wanted)

    def guess(self, classes: int | None) -> float | None:
        return None

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return torch.nn.functional.poisson_nll_loss(outputs[:, 0], targets)

    def refuse(self, outputs: Any, targets: Tensor, split: str) -> None:
        pass

    def sums(self, outputs: Any, targets: Tensor, *, training: bool = False) -> Mapping[str, Tensor] | None:
        return {"off": (outputs[:, 0].exp() - targets).abs().sum()}

    def values(self, sums: Mapping[str, Tensor], n: float) -> dict[str, float]:
        return {"off": float(sums["off"]) / n}


COUNTED = """
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    def make():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1),
        )

    def data():
        generator = torch.Generator().manual_seed(0)
        images, counts = torch.zeros(96, 1, 16, 16), torch.randint(1, 6, (96,), generator=generator)
        for image, count in zip(images, counts):
            image.view(-1)[torch.randperm(256, generator=generator)[:count]] = 1
        sets = [TensorDataset(images[a:b], counts[a:b].float()) for a, b in ((0, 64), (64, 80), (80, 96))]
        return dict(zip(("train", "validation", "test"), sets))
"""


def test_a_task_of_one_file_and_one_line_passes_through_every_verb(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "counting", Counting())
    written(tmp_path, "count.py", COUNTED)
    net, data = "--arch count.py:make", "--data count.py:data"
    told = run(f"train {net} {data} --task counting --epochs 2 --batch-size 16 -o c.pt")
    assert "mean miscount" in told
    run(f"prune c.pt {net} {data} --method taylor --rate 0.3 --finetune-epochs 1 -o p.pt")
    run(f"prune c.pt {net} {data} --method l2 --max-drop 80% --recalibrate 32 -o d.pt")
    run(f"quantize p.pt {net} {data} --method int8 -o q.pt")
    run(f"quantize p.pt {net} {data} --method int4 --weight-only --target bytes=0.5 -o b.pt")
    run(f"quantize p.pt {net} {data} --method lsq --epochs 1 -o l.pt")
    run(f"transform p.pt {net} {data} --target features --taps 2 -o f.pt")
    run(
        f"distill {net} {data} --task counting --teacher c.pt --teacher-arch count.py:make --epochs 1 -o s.pt"
    )
    assert "verified" in run(f"export q.pt {net}")
    assert "mean miscount" in run(f"compare c.pt p.pt q.onnx {net} {data}")
    for name in ("c.pt", "p.pt", "d.pt", "q.pt", "b.pt", "l.pt", "f.pt", "s.pt"):
        values = json.loads(run(f"evaluate {name} {net} {data} --json"))["metrics"]["values"]
        assert set(values) == {"off", LOSS.name}
        assert json.loads(run(f"analyze {name} {net} --spec"))["task"] == "counting"


def test_a_network_that_learnt_nothing_is_told_so(run: Run) -> None:
    line = "train --arch lenet --data digits --batch-size 32 --no-augment --epochs"
    assert "is what guessing gives, 10.00 %: nothing was learnt" in run(f"{line} 1 --lr 1e-9 -o a.pt")
    assert "nothing was learnt" not in run(f"{line} 4 -o b.pt")


ODD = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
            self.head = nn.Linear(8, 10)

        def forward(self, x):
            y = self.head(self.body(x).mean((2, 3)))
            return {"nan": y * float("nan"), "none": {}, "two": (y[:, :3], y[:, 3:])}[self.kind]

    def make(kind):
        return Net(kind)

    def poses():
        images = torch.randint(0, 256, (24, 16, 16), dtype=torch.uint8)
        poses = images[:, 0, :4] / 255
        return {"train": (images, poses), "validation": (images[:8], poses[:8])}

    def near(outputs, targets):
        return (outputs[0] - targets[:, :3]).square().mean() + outputs[1].square().mean()
"""


def test_outputs_that_are_no_numbers_hit_nothing_and_are_warned_of(run: Run, tmp_path: Path) -> None:
    written(tmp_path, "odd.py", ODD)
    run("train --arch odd.py:make --arg kind=nan --data digits --limit 40 --epochs 0 -o n.pt")
    told = run("evaluate n.pt --arch odd.py:make --limit 40")
    assert "the test loss is NaN or infinite: the network's outputs are no numbers" in told
    assert "top-1 0.00 %" in told


def test_a_network_without_outputs_is_not_said_to_be_equal(run: Run, tmp_path: Path) -> None:
    written(tmp_path, "odd.py", ODD)
    run("train --arch odd.py:make --arg kind=none --data digits --limit 40 --epochs 0 -o n.pt")
    told = run("prune n.pt --arch odd.py:make --method l2 --rate 0.3 --limit 40 -o p.pt")
    assert "not compared: the network puts out no tensor" in told
    assert "equals masked within" not in told


def test_two_outputs_are_judged_by_the_users_functions(run: Run, tmp_path: Path) -> None:
    written(tmp_path, "odd.py", ODD)
    net = "--arch odd.py:make --arg kind=two --input 1x16x16 --data odd.py:poses"
    run(f"train {net} --loss odd.py:near --epochs 1 -o n.pt")
    assert json.loads(run("analyze n.pt --arch odd.py:make --spec"))["task"] == "custom"
    said = "the data are for regression, which does not suit what the network returns"
    run(f"train {net} --epochs 1 -o m.pt", says=said)


def test_the_loss_of_masks_does_not_depend_on_the_batch(run: Run, tmp_path: Path) -> None:
    segmentation_set(tmp_path / "set")
    for number in range(3):
        file = tmp_path / "set" / "test" / "masks" / f"{number}.png"
        mask = np.asarray(Image.open(file)).copy()
        mask[: 8 * (number + 1)] = 255
        Image.fromarray(mask).save(file)
    run("train --arch unet.py:make --data segment:set --epochs 1 --batch-size 4 -o u.pt")
    losses = [
        json.loads(run(f"evaluate u.pt --arch unet.py:make --batch-size {size} --json"))["metrics"]["values"][
            "loss"
        ]
        for size in (1, 4, 6)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    for file in (tmp_path / "set" / "test" / "masks").glob("*.png"):
        Image.fromarray(np.full((24, 24), 255, dtype=np.uint8)).save(file)
    run("evaluate u.pt --arch unet.py:make", says="nothing can be measured: all pixels have the label 255")


def test_compare_names_the_file_that_does_not_fit(run: Run, tmp_path: Path) -> None:
    segmentation_set(tmp_path / "set")
    run("train --arch unet.py:make --data segment:set --epochs 1 --batch-size 4 -o u.pt")
    run("train --arch lenet --data digits --limit 40 --epochs 1 -o l.pt")
    run("compare u.pt l.pt --arch unet.py:make --data segment:set", says="l.pt: ")


def test_settings_that_no_task_has_are_refused(run: Run, tmp_path: Path) -> None:
    spec = {"architecture": "lenet", "input_shape": [1, 32, 32], "task": "custom", "task_settings": {"x": 1}}
    (tmp_path / "s.json").write_text(json.dumps(spec))
    torch.save(registry.build("lenet", {}).state_dict(), "l.pth")
    line = "evaluate l.pth --spec s.json --mean 0 --std 1 --data digits --limit 40"
    run(line, says="the task custom has no setting x")
