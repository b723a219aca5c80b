"""`cctool transform --fold` from options to files, and every verb on what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import cctool
from cctool.base.errors import UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import masks_of
from cctool.cli.main import app
from cctool.operations.transform import fold
from cctool.options.transform.options import TransformOptions
from folding_toys import NETWORKS

TOYS = Path(__file__).parents[2] / "toys" / "folding_toys.py"
LIMIT = ("--limit", "48", "--batch-size", "16")
DATA = ("--data", "digits", *LIMIT)

Ran = Callable[..., Path]


def run(*words: str | Path) -> tuple[int, str, str]:
    """Run a command; its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


class Place:
    """A folder in which one network goes through commands."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.arch = f"{TOYS}:{name}"

    def run(self, verb: str, source: str | None, output: str, *words: str) -> Path:
        given = [] if source is None else [self.folder / source]
        arch = ("--arch", self.arch)
        code, _, said = run(verb, *given, *arch, *words, "-q", "-o", self.folder / output)
        assert code == 0, said
        return self.folder / output

    def refused(self, verb: str, source: str, *words: str) -> str:
        output = self.folder / "refused.pt"
        code, _, said = run(verb, self.folder / source, "--arch", self.arch, *words, "-q", "-o", output)
        assert code == 1
        assert not output.exists()
        return said

    def load(self, name: str) -> Checkpoint:
        return cctool.load(self.folder / name, arch=self.arch)


def trained(folder: Path, name: str) -> Place:
    """A trained network in ``start.pt``, and what folding makes of it in ``folded.pt``."""
    place = Place(folder, name)
    place.run("train", None, "start.pt", "--epochs", "1", "--weight-decay", "0", *DATA)
    place.run("transform", "start.pt", "folded.pt", "--fold", *LIMIT)
    return place


@pytest.fixture(scope="module")
def rep(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return trained(tmp_path_factory.mktemp("rep"), "rep")


def outputs(checkpoint: Checkpoint) -> torch.Tensor:
    x = torch.randn(8, *checkpoint.spec.input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = checkpoint.model.eval()(x)
    return result


def apart(place: Place, one: str, other: str) -> float:
    """Largest difference of the outputs of two files, of their range."""
    first, second = outputs(place.load(one)), outputs(place.load(other))
    return float((first - second).abs().max() / (first.max() - first.min()))


QUICK = ("rep", "over", "torch_pruned", "norms")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_a_folded_network_prunes_quantizes_and_exports(name: str, tmp_path: Path) -> None:
    place = trained(tmp_path, name)
    assert apart(place, "start.pt", "folded.pt") < 2e-6
    place.run("prune", "folded.pt", "pruned.pt", "--method", "l1", "--rate", "0.3", *LIMIT)
    place.run("quantize", "pruned.pt", "int8.pt", "--method", "int8", "--calibration", "48", *DATA)
    assert place.run("export", "int8.pt", "net.onnx").stat().st_size > 0
    before, after = (
        sum(p.numel() for p in place.load(n).model.parameters()) for n in ("folded.pt", "pruned.pt")
    )
    assert after < before


@pytest.mark.parametrize("name", ["over", "norms"])
def test_cuts_before_and_after_a_fold(name: str, tmp_path: Path) -> None:
    place = trained(tmp_path, name)
    rate = ("--method", "l1", "--rate", "0.3", *LIMIT)
    place.run("prune", "start.pt", "pruned.pt", *rate)
    place.run("transform", "pruned.pt", "once.pt", "--fold", *LIMIT)
    assert apart(place, "pruned.pt", "once.pt") < 2e-6
    place.run("prune", "once.pt", "twice.pt", *rate)
    place.run("transform", "twice.pt", "same.pt", "--fold", *LIMIT)
    assert apart(place, "twice.pt", "same.pt") == 0
    place.run("train", "twice.pt", "trained.pt", "--epochs", "1", *DATA)
    place.run("train", "once.pt", "other.pt", "--new-head", "--epochs", "1", *DATA)
    assert outputs(place.load("other.pt")).shape == (8, 10)
    place.run(
        "distill", "twice.pt", "taught.pt", "--teacher", str(tmp_path / "once.pt"), "--epochs", "1", *DATA
    )


def test_the_report_says_what_was_folded_and_what_it_saves(rep: Place) -> None:
    output = rep.folder / "told.pt"
    code, _, said = run(
        "transform", rep.folder / "start.pt", "--arch", rep.arch, "--fold", *LIMIT, "-o", output
    )
    assert code == 0
    assert "0.dense.0 batch norm 1, branch pointwise.0" in said
    assert "outputs differ by at most" in said
    inputs = "random inputs N(0, 1), these times 0.01, 0.1, 10, constants 0, 1, -1, other numbers and sizes"
    assert f"on {inputs}, 48 test images" in said
    assert "decides by" not in said
    assert "no batch norm is left" in said
    assert "test top-1" in said
    code, shown, _ = run(
        *(
            "transform",
            rep.folder / "start.pt",
            "--arch",
            rep.arch,
            "--fold",
            *LIMIT,
            "-o",
            rep.folder / "j.pt",
            "--json",
        )
    )
    (product,) = json.loads(shown)["products"]
    report = product["report"]
    first = report["layers"][0]
    assert (first["name"], first["parameters_before"], first["parameters_after"]) == ("0.dense.0", 112, 80)
    assert report["before"]["macs"] > report["after"]["macs"]
    assert report["before"]["bytes"] > report["after"]["bytes"]
    assert report["metrics_before"]
    assert report["metrics_after"]
    step = cctool.load(output, arch=rep.arch).history[-1]
    assert step.options["fold"] is True
    assert set(step.options) == {"fold", "data", "runtime"}
    assert step.metrics_before
    assert step.metrics_after


def test_folding_again_says_that_nothing_is_left(rep: Place) -> None:
    output = rep.folder / "again.pt"
    code, _, said = run(
        "transform", rep.folder / "folded.pt", "--arch", rep.arch, "--fold", *LIMIT, "-o", output
    )
    assert code == 0
    assert "nothing was folded: all that can be is folded already" in said
    assert torch.equal(outputs(rep.load("again.pt")), outputs(rep.load("folded.pt")))


def test_coefficients_are_named_where_nothing_else_can_be_folded(rep: Place) -> None:
    rep.run("transform", "start.pt", "dct.pt", *LIMIT)
    line = (
        "transform",
        rep.folder / "dct.pt",
        "--arch",
        rep.arch,
        "--fold",
        *LIMIT,
        "-o",
        rep.folder / "c.pt",
    )
    code, _, said = run(*line)
    assert code == 0
    assert "made of transform coefficients or basis functions; fold first" in said
    assert "nothing was folded: 0.dense.1, " in said
    assert "cannot be: each has its reason" in said


def test_a_network_without_anything_to_fold_is_told_so(tmp_path: Path) -> None:
    line = ("train", "--arch", "lenet", "--data", "digits", "--epochs", "0", "-q", "-o", tmp_path / "a.pt")
    assert run(*line)[0] == 0
    _, _, said = run("transform", tmp_path / "a.pt", "--fold", *LIMIT, "-o", tmp_path / "b.pt")
    assert "nothing was folded: the network has no batch norm, computed weights or parallel" in said


def test_slimming_and_recalibration_say_that_no_batch_norm_is_left(rep: Place) -> None:
    said = rep.refused("prune", "folded.pt", "--method", "slimming", "--rate", "0.3", *LIMIT)
    assert "no batch norm on these channels: rank them with --method l1 or l2" in said
    words = (
        "--method",
        "l1",
        "--rate",
        "0.3",
        "--recalibrate",
        "32",
        *LIMIT,
        "-o",
        rep.folder / "recalibrated.pt",
    )
    code, _, said = run("prune", rep.folder / "folded.pt", "--arch", rep.arch, *words)
    assert code == 0
    assert "the network has no batch norm with running statistics, so that nothing was estimated" in said


def test_quantizers_and_codecs_are_refused_with_the_way_out(rep: Place) -> None:
    rep.run("quantize", "start.pt", "int8.pt", "--method", "int8", "--calibration", "32", *DATA)
    assert "fold the float network, then quantize it" in rep.refused("transform", "int8.pt", "--fold", *LIMIT)
    rep.run(
        *(
            "transform",
            "start.pt",
            "coded.pt",
            "--target",
            "features",
            "--taps",
            "0",
            "--calibration",
            "16",
            *DATA,
        )
    )
    assert "fold first, then code" in rep.refused("transform", "coded.pt", "--fold", *LIMIT)


def test_masks_of_a_kernel_stay_and_masked_branches_are_not_merged(rep: Place) -> None:
    rep.run("prune", "start.pt", "masked.pt", "--granularity", "element", "--rate", "0.5", *LIMIT)
    rep.run("transform", "masked.pt", "both.pt", "--fold", *LIMIT)
    before, after = masks_of(rep.load("masked.pt").model), masks_of(rep.load("both.pt").model)
    assert before.keys() == after.keys()
    assert all(torch.equal(mask, after[name]) for name, mask in before.items())
    assert apart(rep, "masked.pt", "both.pt") < 2e-6
    code, _, said = run(
        *(
            "transform",
            rep.folder / "masked.pt",
            "--arch",
            rep.arch,
            "--fold",
            *LIMIT,
            "-o",
            rep.folder / "m.pt",
        )
    )
    assert code == 0
    assert "its parameters have masks, which other branches would fill" in said


def test_what_files_store_in_few_bits_is_folded_as_it_decodes(rep: Place) -> None:
    rep.run("quantize", "start.pt", "uint8.pt", "--method", "uint8", *LIMIT)
    rep.run("transform", "uint8.pt", "dense.pt", "--fold", *LIMIT)
    assert apart(rep, "uint8.pt", "dense.pt") < 2e-6
    product = rep.load("dense.pt")
    # The classifier took nothing in, and keeps its integers.
    assert [name for name in product.stored if name.endswith("weight")] == ["5.weight"]
    assert any("what they decode to was folded" in note for note in product.history[-1].notes)


def test_the_training_that_a_file_could_resume_is_left_out(tmp_path: Path) -> None:
    place = Place(tmp_path, "rep")
    place.run("train", None, "start.pt", "--epochs", "2", "--save-every", "1", *DATA)
    last = tmp_path / "start.run" / "last.pt"
    place.run("transform", str(last.relative_to(tmp_path)), "folded.pt", "--fold", *LIMIT)
    product = place.load("folded.pt")
    assert product.resume is None
    assert any("state of the optimizer" in note for note in product.history[-1].notes)


@pytest.mark.parametrize("name", ["normed", "old_spectral", "torch_pruned"])
def test_prune_names_the_way_out_of_computed_weights(name: str, tmp_path: Path) -> None:
    place = trained(tmp_path, name)
    # The older tools have parameters of the weight's shape, whose zeros are the weight's.
    masks = [("--granularity", "element")] if name == "normed" else []
    for words in (("--method", "l1"), *masks):
        said = place.refused("prune", "start.pt", *words, "--rate", "0.3", *LIMIT)
        assert "are computed at each call" in said
        assert "`cctool transform --fold` makes them plain" in said
        assert "constant" not in said
    if not masks:
        place.run("prune", "start.pt", "masked.pt", "--granularity", "element", "--rate", "0.3", *LIMIT)
        place.run("transform", "masked.pt", "folded.pt", "--fold", *LIMIT, "--force")
        report = place.load("folded.pt").history[-1]
        assert (
            masks_of(place.load("masked.pt").model).keys() == masks_of(place.load("folded.pt").model).keys()
        )
        assert report.options["fold"] is True


def test_the_python_function_folds(rep: Place) -> None:
    given = rep.load("start.pt")
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    product, report = cctool.transform(given, fold=True, data="digits", limit=48)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in product.model.modules())
    assert report.error < 1e-5
    assert report.double_error < 1e-9
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())
    assert torch.equal(outputs(product), outputs(rep.load("folded.pt")))


def test_what_only_the_images_show_is_left_out_and_named(tmp_path: Path) -> None:
    place = Place(tmp_path, "Gated")
    place.run("train", None, "start.pt", "--epochs", "1", *DATA)
    line = (
        "transform",
        tmp_path / "start.pt",
        "--arch",
        place.arch,
        "--fold",
        "-o",
        tmp_path / "f.pt",
        "--json",
    )
    code, shown, said = run(*line, *LIMIT)
    assert code == 0, said
    (product,) = json.loads(shown)["products"]
    report = product["report"]
    assert [item["name"] for item in report["stays"]] == ["norm"]
    assert [layer["name"] for layer in report["layers"]] == ["unit.0"]
    assert (report["images"], report["decides"]) == (48, [""])
    assert "the code of the network decides by the values of its input: other images may take" in said
    start, folded = (cctool.evaluate(place.load(name), data="digits") for name in ("start.pt", "f.pt"))
    assert start.metrics.values["top1"] == folded.metrics.values["top1"]


def test_a_fold_that_the_metrics_tell_from_the_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, "Gated")
    place.run("train", None, "start.pt", "--epochs", "8", "--lr", "0.1", "--data", "digits")
    # The images that are compared may happen to go the usual way.
    monkeypatch.setattr(fold, "some_images", lambda *_: iter(()))
    said = place.refused("transform", "start.pt", "--fold")
    assert "top-1 would go from" in said
    assert "nothing is written" in said


def test_without_images_a_network_that_decides_is_named(tmp_path: Path) -> None:
    place = Place(tmp_path, "Gated")
    place.run("train", None, "start.pt", "--epochs", "0", "--data", "digits")
    start = place.load("start.pt")
    start = replace(start, spec=start.spec.model_copy(update={"data": None}))
    _, report = cctool.transform(start, fold=True)
    assert report.images == 0
    assert any("images, which --data gives, may take another way" in note for note in report.notes)


@pytest.mark.parametrize("option", ["keep", "layers", "target", "kernel", "preset", "taps"])
def test_options_of_transforms_are_refused_with_fold(option: str) -> None:
    with pytest.raises(UsageError, match=f"--{option}: not with --fold"):
        TransformOptions.from_given({"fold": True, option: object()})
