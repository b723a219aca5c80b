"""Each verb and its options on a CUDA device, for networks of every task: products equal the CPU's."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

import cuda_toys as toys
from cctool.base.user_code import load
from cctool.models import registry
from cuda_toys import assert_equal_checkpoints, assert_same, on_both, ran, reports
from pretended_cuda.plugin import REAL
from segmentation_toys import YOLO, segmentation_set
from shade_toys import SHADES, picture_folder

pytestmark = pytest.mark.cuda

ARCH = {
    "class": "--arch net.py:classifier",
    "seg": "--arch net.py:masks",
    "reg": "--arch net.py:numbers",
    "custom": "--arch net.py:pictures --loss net.py:mse",
}
DATA = {
    "class": "--data digits --limit 64 --batch-size 32",
    "seg": "--data segment:set --batch-size 4",
    "reg": "--data net.py:poses --batch-size 16",
    "custom": "--data digits --limit 64 --batch-size 32",
}
TEACHER = " --teacher class.pt --teacher-arch net.py:classifier"
CODED = "transform class.pt --target features --taps stem --calibration 32"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained network of each task, one with quantizers, one with a codec."""
    folder = tmp_path_factory.mktemp("cuda")
    toys.write_networks(folder)
    segmentation_set(folder / "set")
    picture_folder(folder / "shades", SHADES)
    segmentation_set(folder / "pictures", side=32)
    (folder / "yolo.py").write_text(YOLO)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for task, data in DATA.items():
            line = f"train {ARCH[task]} {data} --epochs 2 --device cpu -o {task}.pt"
            ran(*line.split())
        net = f"{ARCH['class']} {DATA['class']} --device cpu"
        ran(*f"quantize class.pt {net} --method int8 --calibration 32 -o int8.pt".split())
        ran(*f"prune class.pt {net} --granularity element --rate 0.5 -o masked.pt".split())
        ran(*f"{CODED} {net} -o coded.pt".split())
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own with these inputs."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = {
    "ema, smoothing, clipping": "--ema 0.9 --label-smoothing 0.1 --clip-norm 1 --gamma-l1 1e-3",
    "sgd, warm-up": "--optimizer sgd --momentum 0.9 --nesterov --warmup linear --warmup-epochs 1 --decay all",
    "frozen statistics": "--optimizer adam --freeze-norm --no-augment",
    "deterministic": "--deterministic --schedule cosine",
}


@pytest.mark.parametrize("options", TRAIN.values(), ids=TRAIN)
def test_train_on_cuda(here: Path, options: str) -> None:
    line = f"train class.pt {ARCH['class']} {DATA['class']} --epochs 2 --lr 0.01 {options}"
    assert_equal_checkpoints(*on_both(line))


@pytest.mark.parametrize("source", ["int8", "masked", "coded"])
def test_train_what_other_verbs_made(here: Path, source: str) -> None:
    extra = " --rate-weight 1e-4" if source == "coded" else ""
    line = f"train {source}.pt {ARCH['class']} {DATA['class']} --epochs 1 --lr 0.01{extra}"
    assert_equal_checkpoints(*on_both(line))


@pytest.mark.parametrize("task", ARCH)
def test_train_for_every_task(here: Path, task: str) -> None:
    metric = " --metric net.py:psnr" if task == "custom" else ""
    assert_equal_checkpoints(*on_both(f"train {ARCH[task]} {DATA[task]} --epochs 1{metric}"))


@pytest.mark.parametrize("layers", ["basis:dct:linear", "basis:dft:linear", "coefficient:dwt:all"])
def test_train_swapped_layers(here: Path, layers: str) -> None:
    assert_equal_checkpoints(*on_both(f"train {ARCH['class']} {DATA['class']} --epochs 1 --swap {layers}"))


def test_train_from_files_with_workers(here: Path) -> None:
    line = f"train {ARCH['class']} --data folder:shades --workers 1 --batch-size 30 --epochs 1"
    assert_equal_checkpoints(*on_both(line))


def test_resume_as_if_never_stopped(here: Path) -> None:
    net = f"--arch net.py:dropping {DATA['class']}"
    line = f"train {net} --epochs 2 --eval-from 2 --deterministic --device cuda"
    ran(*line.split(), "-o", "whole.pt")
    ran(*line.split(), "-o", "parts.pt", "--stop-after", "1")
    ran(*line.split(), "-o", "parts.pt", "--resume", "--force")
    assert_equal_checkpoints(Path("whole.pt"), Path("parts.pt"))


def test_new_head(here: Path) -> None:
    line = f"train class.pt {ARCH['class']} --data folder:shades --input 1x32x32 --new-head --epochs 1"
    assert_equal_checkpoints(*on_both(line))


def test_processes_on_several_devices_are_refused_where_there_is_one(here: Path) -> None:
    data = "--data digits --limit 64 --batch-size 198"
    line = f"train class.pt {ARCH['class']} {data} --device cuda --devices 99 -o x.pt"
    assert "usable CUDA devices" in ran(*line.split(), says="--devices 99")


@pytest.mark.parametrize("task", ["class", "seg", "reg"])
def test_distill_on_cuda(here: Path, task: str) -> None:
    net = ARCH[task].split()[1]
    line = f"distill {ARCH[task]} --arg width=6 --teacher {task}.pt --teacher-arch {net} {DATA[task]}"
    assert_equal_checkpoints(*on_both(f"{line} --epochs 1 --lr 0.01"))


def test_distill_from_a_teacher_of_other_images(here: Path) -> None:
    """It sees images of other statistics and another size, and its classes are in another order."""
    bare = "export class.pt --arch net.py:classifier -o class.safetensors --device cpu"
    ran(*bare.split())
    other = (
        "--teacher class.safetensors --teacher-arch net.py:classifier --teacher-mean 0.3 --teacher-std 0.4"
    )
    line = f"distill {ARCH['class']} {other} --teacher-input 1x24x24 {DATA['class']} --epochs 1"
    assert_equal_checkpoints(*on_both(line))


PRUNE = {
    "taylor, fine-tuning": "class --method taylor --rate 0.3 --samples 32 --finetune-epochs 1 --lr 0.01",
    "hessian": "class --method hessian --rate 0.3 --samples 32",
    "gradient, apoz": "class --method gradient --rate 0.3 --samples 32",
    "apoz, recalibration": "class --method apoz --rate 0.3 --samples 32 --recalibrate 32",
    "activation, steps": "class --method activation --rate 0.4 --samples 32 --steps 2",
    "fpgm, fewer multiplications": "class --method fpgm --target macs=0.6",
    "lamp, budget": "class --method lamp --max-drop 20 --recalibrate 32",
    "elements": "class --granularity element --method taylor --rate 0.5 --samples 32 --finetune-epochs 1",
    "n of m": "class --granularity nm --pattern 2:4 --method l1 --finetune-epochs 1",
    "blocks": "class --granularity block --block 2x2 --method l1 --rate 0.5",
    "from scratch": "class --method l1 --rate 0.3 --from-scratch --finetune-epochs 1",
    "rewind": "class --method l1 --rate 0.3 --rewind class.pt --finetune-epochs 1",
    "gamma-l1": "class --method slimming --rate 0.3 --sparsify gamma-l1 --sparsify-epochs 1",
    "group-lasso": "class --method l2 --rate 0.3 --sparsify group-lasso --sparsify-epochs 1",
    "growing": "class --method l2 --rate 0.3 --sparsify growing --sparsify-epochs 1",
    "teacher": "class --method l1 --rate 0.3 --finetune-epochs 1" + TEACHER,
    "quantizers": "int8 --method l1 --rate 0.3 --finetune-epochs 1",
    "codec": "coded --method taylor --rate 0.3 --samples 32",
    "masks": "masked --apply-masks",
    "segmentation": "seg --method taylor --rate 0.3 --samples 8 --finetune-epochs 1",
    "regression": "reg --method gradient --samples 16 --max-drop 50%",
    "custom": "custom --method taylor --rate 0.3 --samples 16 --finetune-epochs 1",
}


def of(line: str) -> str:
    """Architecture and data of a line's input."""
    task = line.split()[0]
    task = task if task in ARCH else "class"
    return f"{ARCH[task]} {DATA[task]}"


@pytest.mark.parametrize("line", PRUNE.values(), ids=PRUNE)
def test_prune_on_cuda(here: Path, line: str) -> None:
    source, _, options = line.partition(" ")
    cpu, cuda = on_both(f"prune {source}.pt {of(line)} {options}")
    if "--steps" in line:
        cpu, cuda = (path.with_stem(f"{path.stem}.step2") for path in (cpu, cuda))
    assert_equal_checkpoints(cpu, cuda)


def test_prune_to_a_latency_on_the_device(here: Path) -> None:
    line = f"prune class.pt {of('class')} --method l1 --target latency=0.9 --device cuda -o x.pt"
    ran(*line.split())


UNKNOWN = {
    "prune": "--data images:pictures --method apoz --rate 0.3 --samples 8 --recalibrate 8",
    "quantize": "--data images:pictures --method int8 --calibration 8",
    "transform": "--data images:pictures --target features --taps middle --calibration 8",
}


@pytest.mark.parametrize("verb", UNKNOWN)
def test_heads_in_a_dict_whose_task_is_unknown(here: Path, verb: str) -> None:
    torch.save(load("yolo.py:make")().state_dict(), "yolo.pth")
    named = "--arch yolo.py:make --input 3x32x32 --mean .5,.5,.5 --std .25,.25,.25"
    assert_equal_checkpoints(*on_both(f"{verb} yolo.pth {named} {UNKNOWN[verb]}"))


@pytest.mark.slow
@pytest.mark.parametrize("verb", UNKNOWN)
def test_detectors(here: Path, verb: str) -> None:
    torch.manual_seed(0)
    name = "torchvision:ssdlite320_mobilenet_v3_large"
    torch.save(registry.build(name, {}).state_dict(), "boxes.pth")
    options = UNKNOWN[verb].replace("middle", "backbone.features.0.4")
    assert_equal_checkpoints(*on_both(f"{verb} boxes.pth --arch {name} --mean 0,0,0 --std 1,1,1 {options}"))


QUANTIZE = {
    "int8, equalize, bias": "class --method int8 --equalize --bias-correction --calibration 32",
    "int8, asymmetric, percentile": "class --method int8 --asymmetric --observer percentile --calibration 32",
    "int8, entropy": "class --method int8 --observer entropy --calibration 32",
    "int4, adaround": "class --method int4 --rounding adaround --rounding-steps 20 --calibration 32",
    "int4, groups": "class --method int4 --weight-only --group-size 4",
    "bits within bytes": "class --method int4 --weight-only --target bytes=0.5",
    "bits within a budget": "class --method int8 --max-drop 20 --calibration 32",
    "qat": "class --method qat --epochs 1 --calibration 32",
    "lsq": "class --method lsq --weight-bits 4 --activation-bits 4 --epochs 1 --calibration 32",
    "pact": "class --method pact --epochs 1 --calibration 32",
    "apot": "class --method apot",
    "apot, trained": "class --method qat --weight-bits 4 --epochs 1 --calibration 32",
    "dorefa": "class --method dorefa --epochs 1 --calibration 32",
    "wrpn": "class --method wrpn --epochs 1 --calibration 32",
    "codebook": "class --method codebook --weight-bits 3 --epochs 1",
    "teacher": "class --method qat --epochs 1 --calibration 32" + TEACHER,
    "masks": "masked --method int8 --calibration 32",
    "codec": "coded --method int8 --calibration 32",
    "segmentation": "seg --method int8 --calibration 8",
    "regression": "reg --method int4 --rounding adaround --rounding-steps 5 --calibration 16",
    "custom": "custom --method qat --epochs 1 --calibration 16",
}


@pytest.mark.parametrize("line", QUANTIZE.values(), ids=QUANTIZE)
def test_quantize_on_cuda(here: Path, line: str) -> None:
    source, _, options = line.partition(" ")
    assert_equal_checkpoints(*on_both(f"quantize {source}.pt {of(line)} {options}"))


TRANSFORM = {
    "klt": "class --kernel klt --keep 0.5",
    "wavelet, threshold": "class --kernel haar --threshold 0.05",
    "basis": "class --mode basis --layers linear --normalize-gradients",
    "features, channel klt": "class --target features --taps stem --channel-klt --mean-shift",
    "features, zones": "class --target features --taps stem --dead-zone 0.2 --norm none --calibration 32",
    "features, allocation": "class --target features --taps stem --taps body --allocate --calibration 32",
    "features, sweep": "class --target features --taps stem --sweep quality --calibration 32",
    "quantizers": "int8 --target features --taps stem --calibration 32",
    "segmentation": "seg --target features --taps down --calibration 8",
    "custom": "custom --target features --taps 2 --calibration 16",
}


@pytest.mark.parametrize("line", TRANSFORM.values(), ids=TRANSFORM)
def test_transform_on_cuda(here: Path, line: str) -> None:
    source, _, options = line.partition(" ")
    assert_equal_checkpoints(*on_both(f"transform {source}.pt {of(line)} {options}"))


@pytest.mark.parametrize("source", ["class", "seg", "reg", "custom", "int8", "coded"])
def test_evaluate_on_cuda(here: Path, source: str) -> None:
    line = f"evaluate {source}.pt {of(source)}"
    classes = " --per-class --csv {0}.csv --confusion {0}.confusion.csv" if source in ("class", "seg") else ""
    metric = " --metric net.py:psnr" if source == "custom" else ""
    rows = " --predictions {0}.rows.csv" if source != "custom" else ""
    found = [reports(line + metric + (classes + rows).format(device), device) for device in ("cpu", "cuda")]
    assert_same(*found)
    for end in [".csv", ".confusion.csv"][: 2 if classes else 0] + [".rows.csv"][: bool(rows)]:
        cells = [list(csv.reader(Path(device + end).read_text().splitlines())) for device in ("cpu", "cuda")]
        assert [len(row) for row in cells[0]] == [len(row) for row in cells[1]]
        assert_same(*([[as_number(cell) for cell in row] for row in table] for table in cells))


@pytest.mark.parametrize("source", ["class", "int8", "coded"])
def test_evaluate_in_bfloat16(here: Path, source: str) -> None:
    line = f"evaluate {source}.pt {of(source)} --precision bf16"
    assert_same(*(reports(line, device) for device in ("cpu", "cuda")))


def test_figures_of_taps(here: Path) -> None:
    line = f"evaluate coded.pt {of('coded')} --report-file {{0}}.csv"
    assert_same(*(reports(line.format(device), device) for device in ("cpu", "cuda")))
    if not REAL:
        assert Path("cpu.csv").read_text() == Path("cuda.csv").read_text()


def as_number(cell: str) -> object:
    try:
        return float(cell)
    except ValueError:
        return cell


def test_evaluate_through_streams_and_decode(here: Path) -> None:
    line = f"evaluate coded.pt {of('coded')} --split test"
    for device in ("cpu", "cuda"):
        reports(f"{line} --bitstream {device} --through-bitstream --report-file {device}.json", device)
    if not REAL:
        # Only the index names the device.
        files = list(toys.differing_bytes(Path("cpu"), Path("cuda")))
        assert all(name.endswith(".json") for name in files), files
    assert "identical" in json.dumps(reports("decode cuda -o maps", "cuda"))


@pytest.mark.parametrize("source", ["class", "seg", "int8", "coded", "masked"])
def test_analyze_on_cuda(here: Path, source: str) -> None:
    line = f"analyze {source}.pt {of(source).partition('--data')[0]}".replace("--loss net.py:mse", "")
    assert_same(*(reports(line, device) for device in ("cpu", "cuda")))


@pytest.mark.parametrize("source", ["class", "seg"])
def test_compare_on_cuda(here: Path, source: str) -> None:
    line = f"compare {source}.pt {source}.pt {of(source)} --latency"
    assert_same(*(reports(line, device) for device in ("cpu", "cuda")))


@pytest.mark.parametrize(
    ("source", "suffix"),
    [("int8", ".onnx"), ("class", ".pt2"), ("class", ".safetensors")],
)
def test_export_on_cuda(here: Path, source: str, suffix: str) -> None:
    line = f"export {source}.pt {ARCH['class']} --data digits --limit 32"
    cpu, cuda = on_both(line, suffix)
    if suffix != ".pt2":
        assert cpu.read_bytes() == cuda.read_bytes()
    assert cuda.stat().st_size == pytest.approx(cpu.stat().st_size, rel=0.01)
