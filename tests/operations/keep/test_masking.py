"""Masks from command to command: pruned, trained, quantized, cut, exported, and stored small."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import pytest
import safetensors.torch
import torch
from torch import nn

from cctool.base.errors import PruningError, SpecError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.mask import masks_of
from cctool.checkpoint.spec import ModelSpec
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations import registries as composition
from cctool.operations.context import Context
from cctool.operations.data import open_source
from cctool.operations.inspect import analyze, compare, export
from cctool.operations.judge.size import stored_bytes
from cctool.operations.keep.masks import stored_with_masks
from cctool.operations.keep.packed import cut_stored, encoded_again
from cctool.operations.prune import run as prune
from cctool.operations.prune.masks import emptied_cut, mask_channels, mask_weights
from cctool.operations.quantize import run as quantize
from cctool.operations.registries import tables
from cctool.operations.train import run as train
from cctool.operations.train.finetune import finetune
from cctool.operations.train.run import distill
from cctool.options.common import DataOptions, RuntimeOptions
from cctool.options.inspect.analyze import AnalyzeOptions
from cctool.options.inspect.export import ExportFormat, ExportOptions
from cctool.options.prune.choices import Granularity, PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.options.prune.patterns import Block, Pattern
from cctool.options.quantize.choices import QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.train.distill import DistillOptions
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import RunOptions, TrainOptions
from cctool.pruning.cut.planner import plan_thinning

DIGITS = DataOptions(data="digits", limit=64, batch_size=16)


def built(architecture: str = "lenet", **arguments: Any) -> Checkpoint:
    torch.manual_seed(0)
    arguments = {"in_channels": 1, "num_classes": 10} | arguments
    model = registry.build(architecture, arguments).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return Checkpoint(
        model, ModelSpec(architecture=architecture, arguments=arguments, input_shape=(1, 32, 32))
    )


def run(verb: str, operation: Any, source: Path, options: Any) -> Path:
    """One command; its product lies beside the source."""
    output = source.with_name(f"{source.stem}.{verb}.pt")
    request = pipeline.Request(
        verb, str(source), str(output), force=True, runtime=RuntimeOptions(device="cpu")
    )
    (product,) = pipeline.write(operation, options, request)
    return Path(product.path)


def masked_file(path: Path, checkpoint: Checkpoint | None = None, **options: Any) -> Path:
    given = {"method": PruneMethod.L1, "granularity": Granularity.ELEMENT, "rate": 0.9} | options
    composition.save(checkpoint or built(), path / "m.pt")
    return run("prune", prune.run, path / "m.pt", PruneOptions(**given))


def assert_masked(checkpoint: Checkpoint, before: Checkpoint | None = None) -> None:
    """Every masked weight is exactly zero, and the masks are those of ``before``."""
    masks = masks_of(checkpoint.model)
    assert masks
    for name, mask in masks.items():
        assert not checkpoint.model.get_parameter(name)[~mask].any(), name
        if before is not None:
            assert torch.equal(mask, masks_of(before.model)[name])


@pytest.mark.parametrize(
    "fit",
    [
        {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        {"optimizer": "adam", "lr": 1e-3},
        {"optimizer": "adamw", "lr": 1e-3},
    ],
)
def test_three_epochs_of_training_revive_nothing(fit: dict[str, Any], tmp_path: Path) -> None:
    source = masked_file(tmp_path, rate=0.7)
    trained = run("train", train.run, source, TrainOptions(fit=FitOptions(epochs=3, **fit), data=DIGITS))
    before, after = load(source, tables()), load(trained, tables())
    assert_masked(after, before)
    for name, mask in masks_of(after.model).items():
        changed = after.model.get_parameter(name) != before.model.get_parameter(name)
        assert int(changed[mask].sum()) > 0.9 * int(mask.sum())


def test_two_of_four_holds_after_training(tmp_path: Path) -> None:
    source = masked_file(
        tmp_path, built("resnet20", base=8), granularity=Granularity.NM, pattern=Pattern(2, 4)
    )
    fit = FitOptions(epochs=3, optimizer="sgd", lr=0.05)
    after = load(run("train", train.run, source, TrainOptions(fit=fit, data=DIGITS)), tables())
    seen = 0
    for name, module in after.model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and f"{name}.weight" in masks_of(after.model):
            weight = (
                module.weight.detach().flatten(2) if module.weight.dim() == 4 else module.weight[:, :, None]
            )
            for start in range(0, weight.shape[1], 4):
                assert int((weight[:, start : start + 4] != 0).sum(1).max()) <= 2
            seen += 1
    assert seen == 21  # all but the stem, which reads one channel


USER = """
import torch

class Drifting(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.001)

def make(parameters, lr):
    return Drifting(parameters, lr=lr, momentum=0.9, weight_decay=0.01)
"""


def test_an_optimizer_of_the_users_revives_nothing(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(USER)
    source, optimizer = masked_file(tmp_path), f"{tmp_path}/own.py:make"
    options = TrainOptions(fit=FitOptions(epochs=1, optimizer=optimizer, lr=0.01), data=DIGITS)
    output = str(tmp_path / "t.pt")
    request = pipeline.Request("train", str(source), output, user_code=(optimizer,))
    (product,) = pipeline.write(train.run, options, request)
    assert_masked(load(product.path, tables()), load(source, tables()))


def test_resumed_training_and_distilling_keep_masks(tmp_path: Path) -> None:
    source = masked_file(tmp_path)
    before, output = load(source, tables()), str(tmp_path / "t.pt")
    fit = FitOptions(epochs=2, optimizer="sgd", lr=0.05)
    for options, resumes in ((RunOptions(stop_after=1), False), (RunOptions(resume=True), True)):
        request = pipeline.Request("train", str(source), output, resumes=resumes)
        (product,) = pipeline.write(train.run, TrainOptions(fit=fit, run=options, data=DIGITS), request)
        found = load(product.path, tables())
        assert_masked(found, before)
        assert found.stored.keys() == before.stored.keys()
    options = DistillOptions(teacher=str(tmp_path / "m.pt"), fit=FitOptions(epochs=1), data=DIGITS)
    assert_masked(load(run("distill", distill, source, options), tables()), before)


@pytest.mark.slow
def test_training_in_two_processes_keeps_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = masked_file(tmp_path, built("resnet20", base=8))
    options = TrainOptions(
        fit=FitOptions(epochs=2, optimizer="sgd", lr=0.05), run=RunOptions(devices=2), data=DIGITS
    )
    assert_masked(load(run("train", train.run, source, options), tables()), load(source, tables()))


def context() -> Context:
    from cctool.base.runtime import Silent

    return Context(
        device=torch.device("cpu"),
        runtime=RuntimeOptions(device="cpu"),
        model_options=pipeline.ModelOptions(),
        tables=tables(),
        user_code=frozenset(),
        reporter=Silent(),
        output=Path("unused.pt"),
        force=False,
        stamp=lambda outcome: outcome.checkpoint,
    )


def test_finetuning_keeps_masks_and_storage_may_be_kept(tmp_path: Path) -> None:
    source = masked_file(tmp_path)
    small = load(run("quantize", quantize.run, source, QuantizeOptions()), tables())
    found = open_source(DIGITS, small, context())
    assert found is not None
    trained = finetune(small, found, FitOptions(epochs=1, optimizer="sgd", lr=0.05), DIGITS, context())
    trained.model.to("cpu")
    assert trained.stored == {}
    assert_masked(trained, small)
    again = stored_with_masks(encoded_again(trained, small, context()))
    assert {n: form.parameters for n, form in again.stored.items()} == {
        n: form.parameters for n, form in small.stored.items()
    }
    save(again, tmp_path / "again.pt", tables())
    assert_masked(load(tmp_path / "again.pt", tables()), small)


def test_a_sparse_file_is_a_quarter_of_the_dense_one(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        dense = built("resnet20")
        composition.save(dense, tmp_path / f"dense{suffix}")
        options = PruneOptions(method=PruneMethod.L1, granularity=Granularity.ELEMENT, rate=0.9)
        masked, report = mask_weights(dense, options)
        composition.save(masked, tmp_path / f"sparse{suffix}")
        sizes = [(tmp_path / f"{name}{suffix}").stat().st_size for name in ("dense", "sparse")]
        assert sizes[0] >= 4 * sizes[1], sizes
        assert report.sparsity_after == pytest.approx(90, abs=0.1)
        # A bit a weight and the values that are left, the bits once.
        weights = sum(p.numel() for n, p in masked.model.named_parameters() if n in masks_of(masked.model))
        kept, rest = report.kept, 4 * sum(p.numel() for p in masked.model.parameters()) - 4 * weights
        buffers = sum(
            b.numel() * b.element_size() for n, b in masked.model.named_buffers() if "mask" not in n
        )
        expected = 4 * kept + weights / 8 + rest + buffers
        assert stored_bytes(masked) == pytest.approx(expected, rel=0.01)
        again = load(tmp_path / f"sparse{suffix}", tables())
        assert stored_bytes(again) == stored_bytes(masked)


ELSEWHERE = """
import sys
import torch
import cctool
from cctool.checkpoint.edits.mask import masks_of

model = cctool.load(sys.argv[1]).model
masks = masks_of(model)
revived = sum(int((model.get_parameter(name)[~mask] != 0).sum()) for name, mask in masks.items())
with torch.no_grad():
    print(len(masks), revived, float(model(torch.ones(1, 1, 32, 32)).sum()))
"""


def test_another_process_loads_it(tmp_path: Path) -> None:
    source = masked_file(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(source)], capture_output=True, text=True, check=True
    )
    masks, revived, total = done.stdout.split()
    assert (int(masks), int(revived)) == (5, 0)
    with torch.no_grad():
        here = float(load(source, tables()).model(torch.ones(1, 1, 32, 32)).sum())
    assert float(total) == pytest.approx(here, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "per_channel"),
    [(QuantizeMethod.FP16, False), (QuantizeMethod.UINT8, False), (QuantizeMethod.UINT8, True)],
)
def test_quantizing_keeps_zeros_and_masks(method: QuantizeMethod, per_channel: bool, tmp_path: Path) -> None:
    source = masked_file(tmp_path)
    before = load(source, tables())
    options = QuantizeOptions(method=method, per_channel=per_channel, include_1d=True)
    after = load(run("quantize", quantize.run, source, options), tables())
    assert_masked(after, before)
    assert stored_bytes(after) < stored_bytes(before)
    name = max(masks_of(after.model), key=lambda n: masks_of(after.model)[n].numel())
    assert after.stored[name].encoding == "masked"
    assert after.stored[name].parts["bits"] is after.stored[f"{name}_mask"].parts["bits"]
    kept = masks_of(after.model)[name]
    with torch.no_grad():
        found, was = after.model.get_parameter(name), before.model.get_parameter(name)
        error = float((found - was)[kept].abs().max())
        assert 0 < error < 0.01 * float(was.abs().max())


def test_from_command_to_command(tmp_path: Path) -> None:
    """Prune elements -> quantize -> prune channels -> train -> export, and the masks hold throughout."""
    source = masked_file(tmp_path, built("resnet20", base=8), rate=0.6)
    small = run("quantize", quantize.run, source, QuantizeOptions(per_channel=True))
    thin = run("prune", prune.run, small, PruneOptions(method=PruneMethod.L2, rate=0.5))
    cut, whole = load(thin, tables()), load(small, tables())
    assert_masked(cut)
    name = "layer1.0.conv1.weight"
    assert masks_of(cut.model)[name].shape == cut.model.get_parameter(name).shape == (4, 4, 3, 3)
    assert whole.model.get_parameter(name).shape == (8, 8, 3, 3)
    # Stored levels were cut, never rounded again.
    assert cut.stored[name].encoding == "masked"
    assert set(cut.model.get_parameter(name).flatten().tolist()) <= set(
        whole.model.get_parameter(name).flatten().tolist()
    )
    kinds = [(edit["kind"], edit["module"]) for edit in cut.spec.edits]
    assert ("thin", "layer1.0.conv1") in kinds
    assert ("mask", "layer1.0.conv1") in kinds
    fit = FitOptions(epochs=1, optimizer="sgd", lr=0.05)
    trained = run("train", train.run, thin, TrainOptions(fit=fit, data=DIGITS))
    final = load(trained, tables())
    assert_masked(final, cut)
    exported = export.run(
        final, ExportOptions(output=str(tmp_path / "e.pt"), format=ExportFormat.STATE_DICT), context()
    )
    bare = torch.load(tmp_path / "e.pt", weights_only=True)
    assert bare.keys() == {n for n in final.model.state_dict() if not n.endswith("_mask")}
    assert torch.equal(bare[name], final.model.get_parameter(name))
    notes = " ".join(exported.files[0].notes)
    assert "masks are left out" in notes
    assert "was edited" in notes


def test_a_bare_safetensors_export_has_no_masks_and_fits_the_architecture(tmp_path: Path) -> None:
    checkpoint = load(masked_file(tmp_path), tables())
    options = ExportOptions(output=str(tmp_path / "e.safetensors"), format=ExportFormat.SAFETENSORS)
    (written,) = export.run(checkpoint, options, context()).files
    bare = safetensors.torch.load_file(tmp_path / "e.safetensors")
    registry.build("lenet", checkpoint.spec.arguments).load_state_dict(bare)
    # It fits: only masked, nothing was cut.
    assert not any("was edited" in note for note in written.notes)


def test_onnx_holds_the_zeros(tmp_path: Path) -> None:
    checkpoint = load(masked_file(tmp_path), tables())
    export.run(
        checkpoint, ExportOptions(output=str(tmp_path / "m.onnx"), format=ExportFormat.ONNX), context()
    )
    graph = onnx.load(tmp_path / "m.onnx").graph
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    assert not any("mask" in name for name in arrays)
    zeros = sum(int((a == 0).sum()) for a in arrays.values() if a.ndim >= 2 and a.dtype.kind == "f")
    expected = sum(int((p == 0).sum()) for p in checkpoint.model.parameters() if p.dim() >= 2)
    assert zeros == expected > 30_000


def test_analyze_honours_masks(tmp_path: Path) -> None:
    checkpoint = load(masked_file(tmp_path, only=("features.3", "classifier.0"), rate=0.5), tables())
    names = list(masks_of(checkpoint.model))
    found = analyze.run(checkpoint, AnalyzeOptions(), context()).analysis
    assert found is not None
    layers = {layer.name: layer for layer in found.layers.layers}
    assert found.layers.masked == tuple(name.rpartition(".")[0] for name in names)
    for name in names:
        sums = layers[name.rpartition(".")[0]].sums
        mask = masks_of(checkpoint.model)[name]
        assert sums.masked == int((~mask).sum())
        assert sums.effective_macs == round(sums.macs * int(mask.sum()) / mask.numel())
    assert found.layers.totals.masked == sum(int((~m).sum()) for m in masks_of(checkpoint.model).values())
    assert found.layers.totals.effective_macs < found.layers.totals.macs
    assert found.layers.totals.bytes == stored_bytes(checkpoint)
    dense = compare.run(built(), compare.CompareOptions(), context())
    assert compare.run(checkpoint, compare.CompareOptions(), context()).parameters == dense.parameters


def test_masking_again_keeps_levels_and_narrows_masks(tmp_path: Path) -> None:
    small = load(run("quantize", quantize.run, masked_file(tmp_path, rate=0.5), QuantizeOptions()), tables())
    levels = {n: set(p.flatten().tolist()) for n, p in small.model.named_parameters()}
    first = {name: mask.clone() for name, mask in masks_of(small.model).items()}
    options = PruneOptions(method=PruneMethod.L1, granularity=Granularity.ELEMENT, rate=0.5)
    again, report = mask_weights(small, options)
    for name, mask in masks_of(again.model).items():
        assert not (mask & ~first[name]).any()
        assert set(again.model.get_parameter(name).flatten().tolist()) <= levels[name] | {0.0}
        assert again.stored[name].parameters["inner"] == "affine-u8"
    assert report.sparsity_before == pytest.approx(50, abs=0.5)
    assert report.sparsity_after == pytest.approx(75, abs=0.5)
    save(again, tmp_path / "again.pt", tables())


def test_masked_channels_are_cut_later_by_what_they_left_empty(tmp_path: Path) -> None:
    composition.save(built("resnet20", base=8), tmp_path / "m.pt")
    options = PruneOptions(method=PruneMethod.L2, rate=0.5, mask=True)
    source = run("prune", prune.run, tmp_path / "m.pt", options)
    dense, masked = load(tmp_path / "m.pt", tables()), load(source, tables())
    assert_masked(masked)
    shapes = [p.shape for p in masked.model.parameters()]
    assert shapes == [p.shape for p in dense.model.parameters()]
    thin = run("prune", prune.run, source, PruneOptions(apply_masks=True))
    at_once = run("prune", prune.run, tmp_path / "m.pt", PruneOptions(method=PruneMethod.L2, rate=0.5))
    cut, plain = load(thin, tables()), load(at_once, tables())
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(cut.model.get_parameter(name), parameter)
    # Nothing is left for the masks to take away.
    assert masks_of(cut.model) == {}
    assert not any(edit["kind"] == "mask" for edit in cut.spec.edits)
    assert cut.stored == {}
    inputs = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(cut.model(inputs), masked.model(inputs), rtol=1e-4, atol=1e-5)
    again = run("prune", prune.run, thin, PruneOptions(apply_masks=True))
    assert any("no channel is empty" in note for note in load(again, tables()).history[-1].notes)


def test_patterns_keep_the_width_of_empty_channels(tmp_path: Path) -> None:
    composition.save(built("resnet20", base=8), tmp_path / "m.pt")
    options = PruneOptions(method=PruneMethod.L2, rate=0.5, mask=True)
    masked = load(run("prune", prune.run, tmp_path / "m.pt", options), tables())

    def cut(**patterns: Any) -> set[str]:
        found = replace(masked, model=deepcopy(masked.model))
        _, report = emptied_cut(found, context(), **patterns)
        return {name for name, _, _ in report.families if name.endswith("conv1")}

    everything = cut()
    assert cut(exclude=("layer1.0.conv1",)) == everything - {"layer1.0.conv1"}
    assert cut(only=("layer1.0.conv1",)) == {"layer1.0.conv1"}
    with pytest.raises(UsageError, match="layer9"):
        cut(only=("layer9",))


def test_bits_are_one_part_after_a_cut_too() -> None:
    options = PruneOptions(method=PruneMethod.L1, granularity=Granularity.ELEMENT, rate=0.5)
    masked, _ = mask_weights(built("resnet20", base=8), options)
    inputs = (torch.randn(2, 1, 32, 32),)
    plan = plan_thinning(masked.model, inputs, PruneOptions(method=PruneMethod.L2, rate=0.5)).plan
    stored = cut_stored(masked.stored, plan, context())
    for name, form in stored.items():
        if form.encoding == "masked":
            assert form.shape != masked.stored[name].shape or name not in plan.tensors
            assert form.parts["bits"] is stored[f"{name}_mask"].parts["bits"]


def test_nothing_to_mask_is_an_error() -> None:
    checkpoint = built("resnet20", base=8)
    inputs = (torch.randn(2, 1, 32, 32),)
    fewer = plan_thinning(checkpoint.model, inputs, PruneOptions(method=PruneMethod.L2, rate=0.01))
    with pytest.raises(PruningError, match="nothing to mask"):
        mask_channels(checkpoint, fewer, PruneOptions())


def test_a_table_of_rates_decides(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text('{"features.3": 0.25, "classifier.0.weight": 0.75}')
    masked = load(masked_file(tmp_path, rates=str(tmp_path / "rates.json")), tables())
    gone = {name: float((~mask).float().mean()) for name, mask in masks_of(masked.model).items()}
    assert gone == pytest.approx({"features.3.weight": 0.25, "classifier.0.weight": 0.75}, abs=1e-3)


def test_a_rate_below_one_block_stores_no_mask_and_says_so(tmp_path: Path) -> None:
    source = built()
    masked, report = mask_weights(
        source, PruneOptions(method=PruneMethod.L1, granularity=Granularity.BLOCK, block=Block(1000, 1000))
    )
    assert not masks_of(masked.model)
    assert not masked.stored
    assert report.kept == report.total
    assert "nothing was masked" in " ".join(report.notes)
    assert {row.note for row in report.tensors} == {"nothing is to go: the rate is below one of its parts"}


@pytest.mark.parametrize("granularity", [Granularity.CHANNEL, Granularity.ELEMENT])
def test_the_history_holds_the_table_of_rates(granularity: Granularity, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text('{"features.3": 0.25}')
    changed = load(
        masked_file(tmp_path, rates=str(tmp_path / "rates.json"), granularity=granularity), tables()
    )
    assert "rates: features.3 0.25" in changed.history[-1].notes


def test_the_report_tells_each_tensor_and_why_not(tmp_path: Path) -> None:
    options = PruneOptions(method=PruneMethod.L1, granularity=Granularity.NM, exclude=("classifier.0",))
    checkpoint = built()
    (planned,) = prune.plan(checkpoint, options, context())
    assert masks_of(checkpoint.model) == {}
    masked, report = mask_weights(checkpoint, options)
    assert report == planned.masks
    assert (report.pattern, report.pattern_holds) == ("2:4", True)
    notes = {tensor.name: tensor.note for tensor in report.tensors}
    assert notes["classifier.0.weight"] == "excluded"
    assert "one input channel" in notes["features.0.weight"]
    for tensor in report.tensors:
        mask = masks_of(masked.model).get(tensor.name)
        assert tensor.kept == (tensor.total if mask is None else int(mask.sum()))
        assert (mask is None) == bool(tensor.note)
    weights = [p for p in masked.model.parameters() if p.dim() >= 2]
    assert report.total == sum(p.numel() for p in weights)
    assert report.sparsity_after == 100 * sum(int((p == 0).sum()) for p in weights) / report.total
    _, other = mask_weights(built(), replace(options, pattern=Pattern(1, 4)))
    assert other.pattern == "1:4"
    assert other.kept < report.kept


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1024, 10)
        self.fc.register_buffer("weight_mask", torch.ones(10, 1024))

    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.fc.weight * self.fc.weight_mask, self.fc.bias)

def make():
    return Net()
"""


def test_a_network_with_masks_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    reference = f"{tmp_path}/own.py:make"
    model = registry.build(reference, {}, user_code=frozenset({reference}))
    checkpoint = Checkpoint(model, ModelSpec(architecture=reference, input_shape=(1, 32, 32)))
    options = PruneOptions(method=PruneMethod.L1, granularity=Granularity.ELEMENT)
    with pytest.raises(SpecError, match="fc has a 'weight_mask' of its own"):
        mask_weights(checkpoint, options)


@pytest.mark.cuda
def test_on_the_gpu_masks_are_those_of_the_cpu_and_stay(tmp_path: Path) -> None:
    options = PruneOptions(method=PruneMethod.L1, granularity=Granularity.ROW, rate=0.5)
    here, _ = mask_weights(built("resnet20", base=8), options)
    there = built("resnet20", base=8)
    there.model.to("cuda")
    there, _ = mask_weights(there, options)
    for name, mask in masks_of(there.model).items():
        assert mask.device.type == "cuda"
        assert torch.equal(mask.cpu(), masks_of(here.model)[name])
    _, cut = emptied_cut(there, context())
    assert cut.families == emptied_cut(here, context())[1].families
    source = masked_file(tmp_path, built("resnet20", base=8))
    request = pipeline.Request(
        "train", str(source), str(tmp_path / "t.pt"), runtime=RuntimeOptions(device="cuda")
    )
    fit = FitOptions(epochs=1, optimizer="sgd", lr=0.05)
    (product,) = pipeline.write(train.run, TrainOptions(fit=fit, data=DIGITS), request)
    assert_masked(load(product.path, tables()), load(source, tables()))
