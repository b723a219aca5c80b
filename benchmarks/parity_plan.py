"""The commands that `parity.py` runs: every verb and every method, on small networks and few digits.

A command may read what commands before it wrote; all paths are relative to the working folder. The products
are not listed here: whatever a command leaves in the folder, new or changed, is its product.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FILES", "PLAN", "Planned"]

SMALL = "--data digits --limit 96 --batch-size 32 --device cpu"
LIMIT = "--limit 64 --batch-size 32 --device cpu"


@dataclass(frozen=True)
class Planned:
    """One command of the plan.

    Attributes:
        name: by which the table and `--only` call it.
        line: what stands behind `cctool`, or a whole shell pipeline.
        process: whether it runs as `python -m cctool` in a process of its own, rather than in a copy of a
            process that has imported everything.
        shell: whether `line` is for the shell, with `cctool` standing for the program.
        status: exit status that it has to have.
    """

    name: str
    line: str
    process: bool = False
    shell: bool = False
    status: int = 0


FILES = {
    "net.py": """
import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer


def make_net(num_classes=10, in_channels=1, hidden=8):
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden, 3, stride=2, padding=1), nn.BatchNorm2d(hidden), nn.ReLU(),
        nn.Conv2d(hidden, hidden, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(hidden), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * hidden, num_classes),
    )


def make_vit(num_classes=10):
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32,
        num_classes=num_classes,
    )


def loss(outputs, labels):
    return nn.functional.multi_margin_loss(outputs, labels)


def errors(outputs, labels):
    return int((outputs.argmax(1) != labels).sum())


def factory(groups, lr):
    return torch.optim.RMSprop(groups, lr=lr)
""",
    "rates.csv": "layer,rate\nlayer1.0.conv1,0.5\nlayer2.1.conv1,0.25\n",
    "steps.json": '{"layer1.*": [2, 3, 4, 5, 6, 7, 8], "layer*": [6]}',
}
"""What lies in the working folder before the first command."""


def _trainings() -> list[Planned]:
    resnet, lenet = f"--arch resnet20 --arg base=4 {SMALL}", f"--arch lenet {SMALL}"
    mobile = f"--arch mobilenet_student --arg base=4 {SMALL}"
    own = f"--arch net.py:make_net {SMALL}"
    part = f"{lenet} --epochs 3 --schedule constant --optimizer adamw --ema 0.9"
    return [
        Planned(
            "train teacher",
            f"train {resnet} --epochs 6 --schedule cosine --optimizer sgd --nesterov --label-smoothing 0.1 "
            "--limit 480 -o teacher.pt",
            process=True,
        ),
        Planned(
            "train multistep",
            f"train {lenet} --limit 480 --epochs 6 --schedule multistep --milestones 3 --lr-gamma 0.5 "
            "--warmup linear "
            "--warmup-epochs 1 --optimizer adam --save-every 2 -o lenet.pt",
        ),
        Planned(
            "train onecycle",
            f"train {mobile} --epochs 2 --schedule onecycle --onecycle-warm 0.4 --gamma-l1 0.001 "
            "--clip-norm 1 "
            "--tensorboard -o mobile.pt",
        ),
        Planned(
            "train poly",
            f"train lenet.pt {SMALL} --epochs 1 --schedule poly --power 2 --min-lr 0.00001 --no-augment "
            "--decay weights -o poly.safetensors",
        ),
        Planned("train stopped", f"train {part} --stop-after 1 -o part.pt"),
        Planned("train resumed", "train part.run/last.pt --resume --device cpu"),
        Planned("train stopped again", f"train {part} --stop-after 1 -o half.pt"),
        Planned("train basis", f"train {lenet} --swap basis:dct:linear --epochs 1 -o swapped.pt"),
        Planned("train coefficients", f"train {lenet} --swap coefficient:dwt:conv --epochs 1 -o waves.pt"),
        Planned(
            "train own",
            f"train {own} --arg hidden=12 --epochs 2 --loss net.py:loss --metric net.py:errors "
            "--metric-mode min "
            "--optimizer net.py:factory --lr 0.002 --eval-from 2 -o own.pt",
        ),
        Planned(
            "train transformer", f"train --arch net.py:make_vit --input 3x32x32 {SMALL} --epochs 1 -o vit.pt"
        ),
        Planned("train devices", f"train {lenet} --epochs 1 --devices 2 -o two.pt", process=True),
        Planned(
            "train untrained", f"train --arch preact_resnet20 --arg base=4 {SMALL} --epochs 0 -o preact.pt"
        ),
        Planned(
            "train dense",
            f"train --arch densenet40 --arg growth_rate=2 {SMALL} --limit 32 --epochs 1 --deterministic -o "
            "densenet.pt",
        ),
        Planned(
            "train bf16",
            f"train {lenet} --epochs 3 --precision bf16 --warmup exponential --warmup-epochs 2 --seed 3 -o "
            "bf.pt",
        ),
        Planned(
            "distill",
            f"distill {mobile} --teacher teacher.pt --epochs 2 --temperature 3 --alpha 0.7 -o student.pt",
            process=True,
        ),
        Planned(
            "distill preset",
            f"distill student.pt --teacher teacher.pt {SMALL} --preset distiller-2018 --epochs 1 "
            "--freeze-norm -o d18.pt",
        ),
        Planned(
            "distill homework",
            f"distill lenet.pt --teacher teacher.pt {SMALL} --preset lhy-hw7 --epochs 1 -o hw7.pt",
        ),
    ]


def _prunings() -> list[Planned]:
    plain = ["slimming", "l1", "l2", "fpgm", "lamp", "random"]
    looking = ["taylor", "hessian", "gradient", "apoz", "activation"]
    extra = {
        "slimming": "--rate 0.4 --plot",
        "l1": "--rate 0.3 --round-to 2 --scope global --normalize mean",
        "l2": "--rate 0.5 --reduce max --min-channels 2 --exclude layer1.*",
        "fpgm": "--rate 0.3 --only layer2.* --only layer3.*",
        "lamp": "--rate 0.5 --normalize none",
        "random": "--rate 0.5 --seed 5",
        "taylor": "--rate 0.3 --reduce sum",
        "hessian": "--rate 0.3 --scope local",
        "gradient": "--rate 0.3 --scope global --normalize standard",
        "apoz": "--rate 0.3 --scope global --normalize max",
        "activation": "--rate 0.3 --reduce first --normalize sum --scope global",
    }
    made = [
        Planned(f"prune {name}", f"prune teacher.pt --method {name} {extra[name]} {LIMIT} -o p-{name}.pt")
        for name in plain
    ]
    made += [
        Planned(
            f"prune {name}",
            f"prune teacher.pt --method {name} {extra[name]} --samples 48 {LIMIT} -o p-{name}.pt",
        )
        for name in looking
    ]
    grains = {
        "element": "--rate 0.6 --scope global --method lamp",
        "nm": "--pattern 1:4",
        "kernel": "--rate 0.4 --method l2",
        "row": "--rate 0.4 --method l1",
        "column": "--rate 0.3",
        "block": "--rate 0.5 --block 2x3",
    }
    made += [
        Planned(f"prune {name}s", f"prune teacher.pt --granularity {name} {rest} {LIMIT} -o g-{name}.pt")
        for name, rest in grains.items()
    ]
    return [
        *made,
        Planned("prune macs", f"prune teacher.pt --method l2 --target macs=0.5 {LIMIT} -o t-macs.pt"),
        Planned(
            "prune params",
            f"prune mobile.pt --method l1 --target params=40% --steps 2 --growth linear {LIMIT} -o "
            "t-params.pt",
        ),
        Planned("prune bytes", f"prune teacher.pt --method l1 --target bytes=30kB {LIMIT} -o t-bytes.pt"),
        Planned(
            "prune budget",
            f"prune teacher.pt --method l2 --max-drop 5 --recalibrate 48 {LIMIT} -o t-drop.pt --json",
        ),
        Planned("prune table", f"prune teacher.pt --rates rates.csv {LIMIT} -o t-rates.pt"),
        Planned("prune keep", f"prune mobile.pt --method l1 --keep 0.8 --steps 2 {LIMIT} -o keep.pt"),
        Planned(
            "prune progressive",
            f"prune teacher.pt --method l1 --rate 0.5 --steps 2 --step-mode progressive --growth agp "
            f"--finetune-epochs 1 --lr 0.001 {SMALL} -o steps.pt",
        ),
        Planned(
            "prune gamma",
            "prune teacher.pt --rate 0.4 --sparsify gamma-l1 --sparsify-epochs 1 --sparsify-lr 0.01 "
            f"{SMALL} -o s-g.pt",
        ),
        Planned(
            "prune lasso",
            f"prune teacher.pt --method l2 --rate 0.4 --sparsify group-lasso {SMALL} -o s-lasso.pt",
        ),
        Planned(
            "prune growing",
            f"prune teacher.pt --method l2 --rate 0.4 --sparsify growing --sparsify-strength 0.01 "
            f"--optimizer sgd {SMALL} -o s-grow.pt",
        ),
        Planned(
            "prune rewind",
            "prune lenet.pt --method l1 --rate 0.4 --rewind lenet.run/epoch-0004.pt --finetune-epochs 1 "
            f"{SMALL} "
            "-o rewound.pt",
        ),
        Planned(
            "prune scratch", f"prune teacher.pt --method l1 --rate 0.4 --from-scratch {LIMIT} -o scratch.pt"
        ),
        Planned(
            "prune recalibrate",
            "prune teacher.pt --method l1 --rate 0.3 --recalibrate 48 --recalibrate-images augmented "
            f"{LIMIT} "
            "-o recal.pt",
        ),
        Planned(
            "prune taught",
            "prune mobile.pt --rate 0.3 --finetune-epochs 1 --teacher teacher.pt --temperature 2 --alpha "
            "0.6 "
            f"{SMALL} -o taught.pt",
            process=True,
        ),
        Planned(
            "prune preset",
            f"prune student.pt --preset lhy-hw7 --steps 2 --finetune-epochs 1 {SMALL} -o hw.pt",
        ),
        Planned(
            "prune plan", f"prune teacher.pt --method l1 --rate 0.5 --dry-run --plot-file plan.svg {LIMIT}"
        ),
        Planned(
            "prune plan json",
            f"prune densenet.pt --method l2 --rate 0.5 --round-to auto --dry-run --json {LIMIT}",
        ),
        Planned("prune masks", f"prune teacher.pt --method l1 --rate 0.3 --mask {LIMIT} -o masked.pt"),
        Planned("prune apply", f"prune masked.pt --apply-masks {LIMIT} -o applied.pt --json"),
        Planned("prune resumable", f"prune half.run/last.pt --method l1 --rate 0.3 {LIMIT} -o cut.pt"),
        Planned(
            "prune preact", f"prune preact.pt --method l2 --rate 0.5 {LIMIT} -o preact.prune.safetensors"
        ),
        Planned(
            "prune own", f"prune own.pt --arch net.py:make_net --method l1 --rate 0.5 {LIMIT} -o own.prune.pt"
        ),
        Planned(
            "prune heads",
            f"prune vit.pt --arch net.py:make_vit --method l1 --rate 0.5 --attention heads {LIMIT} -o "
            "heads.pt",
        ),
        Planned(
            "prune exact",
            f"prune vit.pt --arch net.py:make_vit --method l1 --rate 0.5 --exact {LIMIT} -o ex.pt",
        ),
    ]


def _quantizations() -> list[Planned]:
    stored = {
        "fp16": "",
        "bf16": "--include-1d",
        "uint8": "--per-channel",
        "int2": "--group-size 8",
        "int3": "--asymmetric",
        "int4": "--per-tensor --exclude fc*",
        "int5": "--equalize --bias-correction",
        "int6": "--layer fc=8 --layer layer1.*=float",
        "int7": "--include layer2.*",
        "codebook": "--weight-bits 3 --init density",
        "apot": "--weight-bits 4 --terms 2",
    }
    made = [
        Planned(f"quantize {name}", f"quantize teacher.pt --method {name} {rest} {LIMIT} -o q-{name}.pt")
        for name, rest in stored.items()
    ]
    observers = {
        "min-max": "--edges same",
        "moving-average": "--symmetric-activations",
        "percentile": "--percentile 99.5",
        "mse": "--per-tensor",
        "entropy": "--edges float",
        "aciq-gauss": "--full-range",
        "aciq-laplace": "--activation-bits 6",
        "n-std": "--deviations 2.5",
    }
    made += [
        Planned(
            f"quantize int8 {name}",
            f"quantize teacher.pt --method int8 --calibration 48 --observer {name} {rest} {LIMIT} -o "
            f"i8-{name}.pt",
        )
        for name, rest in observers.items()
    ]
    trained = {
        "qat": "--asymmetric --freeze-norm",
        "lsq": "--weight-bits 3 --teacher teacher.pt --alpha 0.5",
        "pact": "--alpha-decay 0.001",
        "dorefa": "--weight-bits 1 --activation-bits 2",
        "wrpn": "--weight-bits 2",
        "codebook": "--weight-bits 2 --init random",
    }
    made += [
        Planned(
            f"quantize trained {name}",
            f"quantize teacher.pt --method {name} {rest} --epochs 1 --lr 0.005 {SMALL} -o tr-{name}.pt",
        )
        for name, rest in trained.items()
    ]
    return [
        *made,
        Planned(
            "quantize weights", f"quantize student.pt --method int8 --weight-only {LIMIT} -o w8.safetensors"
        ),
        Planned(
            "quantize adaround",
            "quantize lenet.pt --method int4 --rounding adaround --rounding-steps 40 --calibration 48 "
            f"{LIMIT} "
            "-o ada.pt",
        ),
        Planned(
            "quantize search",
            f"quantize teacher.pt --method int4 --target bytes=0.2 {LIMIT} -o bits.pt",
            process=True,
        ),
        Planned(
            "quantize budget",
            f"quantize lenet.pt --method int4 --max-drop 4 --choices 2,3,8 {LIMIT} -o budget.pt --json",
        ),
        Planned("quantize preset", f"quantize student.pt --preset lhy-hw7 {LIMIT} -o homework.pt"),
        Planned("quantize masked", f"quantize g-element.pt --method int4 {LIMIT} -o masked4.pt"),
        Planned("quantize uint8 masked", f"quantize masked.pt --method uint8 {LIMIT} -o masked8.pt"),
        Planned(
            "quantize mobile", f"quantize mobile.pt --method int8 --calibration 48 {LIMIT} -o mobile8.pt"
        ),
        Planned("prune integers", f"prune i8-min-max.pt --method l1 --rate 0.3 {LIMIT} -o cut8.pt"),
        Planned(
            "prune stored",
            f"prune q-int2.pt --method l1 --rate 0.3 --finetune-epochs 1 --keep-storage {SMALL} -o cut2.pt",
        ),
        Planned("train stored", f"train q-codebook.pt {SMALL} --epochs 1 --keep-storage -o again.pt"),
        Planned("train quantizers", f"train tr-lsq.pt {SMALL} --epochs 1 -o lsq-again.pt"),
        Planned("train masked", f"train g-nm.pt {SMALL} --epochs 1 --optimizer adam -o nm-again.pt"),
    ]


def _transforms() -> list[Planned]:
    weights = {
        "dct": "--layers linear --keep 0.25",
        "dst": "--layers conv --axes both --keep 0.5 --scope global",
        "dft": "--layers all --threshold 0.02",
        "dwt": "--layers conv --axes channel --levels 1 --keep 0.6",
        "db2": "--layers conv --axes both --keep 0.5",
        "bior2.2": "--layers all --keep 0.7",
        "klt": "--layers all --keep 0.4",
        "identity": "--layers classifier.* --keep 0.3",
    }
    made = [
        Planned(f"transform {name}", f"transform lenet.pt --kernel {name} {rest} {LIMIT} -o x-{name}.pt")
        for name, rest in weights.items()
    ]
    basis = {"dct": "--layers all", "dst": "--layers linear", "dft": "--layers all --normalize-gradients"}
    made += [
        Planned(
            f"transform basis {name}",
            f"transform lenet.pt --mode basis --kernel {name} {rest} {LIMIT} -o b-{name}.pt",
        )
        for name, rest in basis.items()
    ]
    tuned = "--calibration 48"
    features = {
        "dct": "--taps layer1.* --quality 70 --report-file taps.xlsx --histograms bars --zero-bar",
        "dst": "--block 4 --norm none --quality 40 --prequantizer signed",
        "dft": "--mean-shift --dead-zone 0.1",
        "klt": "--taps layer2.* --k 1",
        "dwt": "--levels 2 --symbol-bits 6",
        "db2": "--quality 30 --prequantizer offset",
        "identity": "--bits 5",
    }
    made += [
        Planned(
            f"transform features {name}",
            f"transform teacher.pt --target features --kernel {name} {rest} {tuned} {LIMIT} -o f-{name}.pt",
        )
        for name, rest in features.items()
    ]
    presets = ("feature-compression-dct", "feature-compression-dct-retrain", "feature-compression-dwt")
    made += [
        Planned(
            f"transform {name}",
            f"transform teacher.pt --target features --preset {name} {tuned} {LIMIT} -o {name}.pt",
        )
        for name in presets
    ]
    coded = f"transform teacher.pt --target features {tuned} {LIMIT}"
    return [
        *made,
        Planned(
            "transform corner",
            f"transform lenet.pt --layers linear --select corner --keep 0.25 --block 16 {LIMIT} -o corner.pt",
        ),
        Planned(
            "transform thesis",
            f"transform lenet.pt --preset thesis-basis --layers linear {LIMIT} -o thesis.pt",
        ),
        Planned(
            "transform allocated",
            f"{coded} --mean-shift --channel-klt --allocate --quality 50 -o allocated.pt",
        ),
        Planned(
            "transform table", f"{coded} --q-table steps.json --block 4 --report-file taps.csv -o table.pt"
        ),
        Planned("transform ratio", f"{coded} --target ratio=4 --report-file taps.json -o ratio.pt --json"),
        Planned("transform sweep", f"{coded} --taps layer3.* --sweep quality -o sweep.pt"),
        Planned("transform quantized", f"transform q-uint8.pt --layers all --keep 0.5 {LIMIT} -o xq.pt"),
        Planned("train coefficients again", f"train x-dct.pt {SMALL} --epochs 1 -o xt.pt"),
        Planned("train complex", f"train b-dft.pt {SMALL} --epochs 1 -o bt.pt"),
        Planned("prune coefficients", f"prune x-dst.pt --method l1 --rate 0.3 {LIMIT} -o xp.pt"),
        Planned("quantize coefficients", f"quantize x-klt.pt --method int5 {LIMIT} -o xk.pt"),
        Planned(
            "train coded",
            f"train f-dct.pt {SMALL} --epochs 1 --rate-weight 0.3 --freeze-norm --ema 0.9 --schedule "
            "constant -o ct.pt",
        ),
        Planned("prune coded", f"prune f-dwt.pt --method l1 --rate 0.3 {LIMIT} -o cp.pt"),
    ]


def _readings() -> list[Planned]:
    return [
        Planned("evaluate", f"evaluate teacher.pt {LIMIT}", process=True),
        Planned("evaluate validation", f"evaluate q-int4.pt --split validation --json {LIMIT}"),
        Planned("evaluate predictions", f"evaluate student.pt --predictions said.csv {LIMIT}"),
        Planned(
            "evaluate own",
            f"evaluate own.pt --arch net.py:make_net --metric net.py:errors --loss net.py:loss {LIMIT}",
        ),
        Planned("evaluate bitstream", f"evaluate f-dct.pt --bitstream maps {LIMIT}"),
        Planned(
            "evaluate through", f"evaluate f-dwt.pt --through-bitstream --report-file ev.json --json {LIMIT}"
        ),
        Planned("evaluate klt maps", f"evaluate allocated.pt --bitstream kmaps --through-bitstream {LIMIT}"),
        Planned("decode", "decode maps -o decoded", process=True),
        Planned("decode one", "decode kmaps/layer1.0.seg -o one --json"),
        Planned("export", f"export student.pt --format onnx {LIMIT}", process=True),
        Planned("export int8", f"export i8-mse.pt -o int8.onnx {LIMIT} --json"),
        Planned("export int4", f"export q-int4.pt --int4 -o int4.onnx {LIMIT}"),
        Planned("export coded", f"export f-dct.pt -o coded.onnx {LIMIT}"),
        Planned("export uncoded", f"export f-dwt.pt --without-codec -o uncoded.onnx {LIMIT}"),
        Planned("export coefficients", f"export x-klt.pt -o low.onnx {LIMIT}"),
        Planned("export pt2", f"export cut8.pt --format pt2 -o cut8.pt2 {LIMIT}"),
        Planned("export state", f"export p-l2.pt --format state-dict {LIMIT}"),
        Planned("export safetensors", f"export ada.pt -o ada.safetensors {LIMIT}"),
        Planned("analyze", "analyze p-slimming.pt --device cpu", process=True),
        Planned("analyze json", "analyze i8-entropy.pt --json --device cpu"),
        Planned("analyze files", f"analyze g-block.pt --macs --sparsity {LIMIT}"),
        Planned(
            "analyze named", "analyze mobile8.pt --macs-file macs.csv --sparsity-file zeros.json --device cpu"
        ),
        Planned("analyze onnx", f"analyze applied.pt --onnx {LIMIT}"),
        Planned("analyze history", "analyze cut2.pt --history"),
        Planned("analyze history json", "analyze steps.step2.pt --history --json"),
        Planned("analyze spec", "analyze f-klt.pt --spec"),
        Planned("analyze foreign", f"analyze ada.safetensors --arch lenet {LIMIT}"),
        Planned(
            "evaluate foreign",
            f"evaluate ada.safetensors --arch lenet --mean 0.3 --std 0.3 --data digits {LIMIT} --json",
        ),
        Planned("compare", f"compare teacher.pt p-l2.pt q-int4.pt student.pt {LIMIT}", process=True),
        Planned("compare json", f"compare lenet.pt x-dct.pt budget.pt --split validation --json {LIMIT}"),
        Planned("models", "models", process=True),
        Planned("models json", "models --json"),
        Planned("models torchvision", "models torchvision --json"),
        Planned("datasets", "datasets", process=True),
        Planned("datasets json", "datasets --json"),
        Planned("wrong rate", f"prune teacher.pt --rate 2 {LIMIT}", status=2),
        Planned("wrong word", f"quantize teacher.pt --method int9 {LIMIT}", status=2),
        Planned("missing file", f"evaluate nothing.pt {LIMIT}", status=1),
        Planned("existing file", f"quantize teacher.pt --method fp16 {LIMIT} -o q-fp16.pt", status=1),
        Planned(
            "pipeline",
            f"cctool prune student.pt --method slimming --rate 0.5 {LIMIT} | cctool quantize - --method "
            f"uint8 {LIMIT} "
            f"| cctool export - {LIMIT}",
            shell=True,
        ),
    ]


PLAN: tuple[Planned, ...] = (
    *_trainings(),
    *_prunings(),
    *_quantizations(),
    *_transforms(),
    *_readings(),
)
