"""A follower that only this test knows works through every command; events reach each kind in one order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from cctool.base.errors import CorruptCheckpointError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.spec import Edit
from cctool.checkpoint.tables import EditKind, Tables
from cctool.operations import pipeline
from cctool.operations.context import Context
from cctool.operations.inspect import evaluate, export
from cctool.operations.keep import events
from cctool.operations.keep.follower import Change, Cutting, Followed, Follower, sharing_copy
from cctool.operations.prune import run as prune
from cctool.operations.quantize import run as quantize
from cctool.operations.registries import load, save
from cctool.operations.train import run as train
from cctool.options.common import DataOptions
from cctool.options.inspect.evaluate import EvaluateOptions
from cctool.options.inspect.export import ExportFormat, ExportOptions
from cctool.options.prune.choices import Granularity, PruneMethod
from cctool.options.prune.options import PruneOptions
from cctool.options.quantize.choices import QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.quantize.parts import CalibrationOptions, TuningOptions
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import TrainOptions
from cctool.pruning.cut.surgery import CutPlan
from cctool.quantization.encodings.float16 import FP16
from cctool.training.constraints.base import Constraint
from procedure_toys import Listening, context, lenet_checkpoint

DATA = DataOptions(data="digits", limit=48, batch_size=16)
LAYERS = ("features.0", "features.3", "features.6", "classifier.0", "classifier.2")


class RowsEdit(Edit):
    """How many rows of a weight are told apart."""

    kind: Literal["rows"] = "rows"
    count: int = Field(ge=1)


def put(model: nn.Module, edit: RowsEdit) -> None:
    module = model.get_submodule(edit.module)
    module.register_buffer("row_number", torch.arange(edit.count))
    module.register_buffer("row_norm", torch.zeros(edit.count))


def check(model: nn.Module, edit: RowsEdit) -> None:
    if not bool((model.get_submodule(edit.module).row_number.diff() > 0).all()):
        raise CorruptCheckpointError(f"{edit.module}.row_number does not ascend")


class Rows(Follower):
    """The number that each row of a weight had at first, and its norm, which files hold in float16."""

    kind = "rows"
    edit = EditKind(record=RowsEdit, apply=put, order=15, check=check)

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        gone = {name for name in checkpoint.stored if name.endswith("row_norm")}
        for name, module in owners(checkpoint.model):
            for cut in cutting.plan.tensors.get(f"{name}.weight", ()):
                if cut.dim == 0:
                    module.row_number, module.row_norm = (
                        module.row_number[cut.keep],
                        module.row_norm[cut.keep],
                    )
        stored = {name: form for name, form in checkpoint.stored.items() if name not in gone}
        return Followed(self.said(replace(checkpoint, stored=stored)), ("rows were cut",))

    def after_change(self, checkpoint: Checkpoint, change: Change) -> Followed:
        return Followed(self.measured(checkpoint), ("rows were measured again",))

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        return Followed(self.measured(checkpoint), ("rows were measured after training",))

    def as_stored(self, checkpoint: Checkpoint, tables: Tables, *, settle: bool) -> Checkpoint:
        norms = {f"{name}.row_norm": module.row_norm for name, module in owners(checkpoint.model)}
        forms = {name: FP16.encode(norm.cpu(), {}) for name, norm in norms.items()}
        return replace(checkpoint, stored={**checkpoint.stored, **forms})

    def own_forms(self, checkpoint: Checkpoint) -> Collection[str]:
        return {f"{name}.row_norm" for name, _ in owners(checkpoint.model)}

    def plain(self, checkpoint: Checkpoint) -> Checkpoint:
        if not list(owners(checkpoint.model)):
            return checkpoint
        model = sharing_copy(checkpoint.model)
        for _, module in owners(model):
            del module.row_number, module.row_norm
        stored = {name: form for name, form in checkpoint.stored.items() if "row_norm" not in name}
        return self.said(replace(checkpoint, model=model, stored=stored))

    @staticmethod
    def said(checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint whose spec has these edits."""
        others = tuple(edit for edit in checkpoint.spec.edits if edit["kind"] != "rows")
        edits = tuple(RowsEdit(module=n, count=len(m.row_number)) for n, m in owners(checkpoint.model))
        return replace(
            checkpoint, spec=checkpoint.spec.model_copy(update={"edits": others}).with_edits(edits)
        )

    @staticmethod
    def measured(checkpoint: Checkpoint) -> Checkpoint:
        for _, module in owners(checkpoint.model):
            module.row_norm.copy_(norms_of(module.weight))
        return checkpoint


def owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "row_norm"))


@torch.no_grad()
def norms_of(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1).half().float()


def rowed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with rows."""
    for name in LAYERS:
        module = checkpoint.model.get_submodule(name)
        put(checkpoint.model, RowsEdit(module=name, count=len(module.weight)))
    return Rows.measured(Rows.said(checkpoint))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more line in the table: behind what settles weights, before what takes fingerprints of tensors."""
    names = [type(follower).__name__ for follower in events.FOLLOWERS]
    place = names.index("Codecs")
    table = (*events.FOLLOWERS[:place], Rows(), *events.FOLLOWERS[place:])
    monkeypatch.setattr(events, "FOLLOWERS", table)


def written(run: Any, options: Any, source: Path, name: str, verb: str) -> Checkpoint:
    """What a command makes of a file, read back from the file that it wrote."""
    output = source.with_name(name)
    request = pipeline.Request(verb, str(source), str(output))
    assert [product.path for product in pipeline.write(run, options, request)] == [str(output)]
    return load(output)


def in_line(checkpoint: Checkpoint) -> bool:
    """Whether every norm in the file is that of the weight in it, and is stored in float16."""
    found = list(owners(checkpoint.model))
    assert [name for name, _ in found] == list(LAYERS)
    assert {f"{name}.row_norm" for name in LAYERS} <= checkpoint.stored.keys()
    assert all(checkpoint.stored[f"{name}.row_norm"].encoding == "fp16" for name in LAYERS)
    return all(torch.equal(module.row_norm, norms_of(module.weight)) for _, module in found)


def started(folder: Path) -> Path:
    save(rowed(lenet_checkpoint()), folder / "start.pt")
    return folder / "start.pt"


@pytest.mark.usefixtures("known")
def test_a_follower_of_a_tests_own_goes_through_every_command(tmp_path: Path) -> None:
    start = started(tmp_path)
    options = TrainOptions(fit=FitOptions(epochs=1, lr=0.01), data=DATA)
    tuned = written(train.run, options, start, "tuned.pt", "train")
    assert in_line(tuned)
    first = load(start).model.get_submodule("features.0")
    assert not torch.equal(tuned.model.get_submodule("features.0").row_norm, first.row_norm)
    assert tuned.history[-1].notes == ("rows were measured after training",)

    cutting = PruneOptions(method=PruneMethod.L1, rate=0.5, data=DATA)
    cut = written(prune.run, cutting, tmp_path / "tuned.pt", "cut.pt", "prune")
    assert in_line(cut)
    rows = {name: module.row_number for name, module in owners(cut.model)}
    assert [len(rows[name]) for name in LAYERS] == [3, 8, 60, 42, 10]
    whole = tuned.model.get_parameter("features.3.weight")
    expected = whole[rows["features.3"]][:, rows["features.0"]]
    assert torch.equal(cut.model.get_parameter("features.3.weight"), expected)
    assert {edit["module"]: edit["count"] for edit in cut.spec.edits if edit["kind"] == "rows"} == {
        name: len(rows[name]) for name in LAYERS
    }
    assert [note for note in cut.history[-1].notes if "rows" in note] == [
        "rows were cut",
        "rows were measured again",
    ]

    wanted = QuantizeOptions(method=QuantizeMethod.INT8, data=DATA, calibration=CalibrationOptions(images=16))
    small = written(quantize.run, wanted, tmp_path / "cut.pt", "small.pt", "quantize")
    assert in_line(small)
    assert all(torch.equal(module.row_number, rows[name]) for name, module in owners(small.model))
    before, after = (c.model.get_submodule("features.3").row_norm for c in (cut, small))
    assert not torch.equal(before, after)
    where = context()
    evaluate.run(small, EvaluateOptions(data=DATA), where)
    assert isinstance(where.reporter, Listening)
    assert not [text for text in where.reporter.said if "other weights" in text]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("kind", [ExportFormat.ONNX, ExportFormat.STATE_DICT])
def test_other_programs_get_the_network_without_it(kind: ExportFormat, tmp_path: Path) -> None:
    start = started(tmp_path)
    options = QuantizeOptions(
        method=QuantizeMethod.INT8, data=DATA, calibration=CalibrationOptions(images=16)
    )
    written(quantize.run, options, start, "small.pt", "quantize")
    output = tmp_path / ("small.onnx" if kind is ExportFormat.ONNX else "bare.pt")
    request = pipeline.Request("export", str(tmp_path / "small.pt"), str(output))
    pipeline.read(export.run, ExportOptions(format=kind, output=str(output), data=DATA), request)
    if kind is ExportFormat.ONNX:
        names = {tensor.name for tensor in onnx.load(output).graph.initializer}
    else:
        names = set(torch.load(output, weights_only=True))
    assert names
    assert not [name for name in names if "row_" in name]


@pytest.mark.usefixtures("known")
def test_it_is_stored_as_it_was_beside_kept_storage_and_masks(tmp_path: Path) -> None:
    start = started(tmp_path)
    small = written(quantize.run, QuantizeOptions(data=DATA), start, "small.pt", "quantize")
    assert small.stored["classifier.0.weight"].encoding == "affine-u8"
    options = PruneOptions(
        granularity=Granularity.ELEMENT,
        method=PruneMethod.L1,
        rate=0.5,
        finetune_epochs=1,
        lr=0.01,
        keep_storage=True,
        data=DATA,
    )
    masked = written(prune.run, options, tmp_path / "small.pt", "masked.pt", "prune")
    assert in_line(masked)
    assert masked.stored["classifier.0.weight"].parameters["inner"] == "affine-u8"
    assert [note for note in masked.history[-1].notes if "rows" in note] == [
        "rows were measured again",
        "rows were measured after training",
    ]


@pytest.mark.usefixtures("known")
def test_files_with_it_are_checked_as_its_edit_says(tmp_path: Path) -> None:
    checkpoint = rowed(lenet_checkpoint())
    checkpoint.model.get_submodule("classifier.2").row_number[0] = 5
    save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(CorruptCheckpointError, match=r"classifier\.2\.row_number does not ascend"):
        load(tmp_path / "a.pt")


EVENTS = ("cut", "after_cut", "after_masking", "after_change", "after_training", "as_stored")


class Spy(Follower):
    """Writes down what reaches it."""

    def __init__(self, name: str, heard: list[tuple[str, str]]) -> None:
        self.name, self.heard = name, heard

    def cut(self, model: nn.Module, plan: CutPlan) -> Collection[str]:
        self.heard.append(("cut", self.name))
        return ()

    def after_cut(self, checkpoint: Checkpoint, cutting: Cutting) -> Followed:
        self.heard.append(("after_cut", self.name))
        assert cutting.before.keys() >= cutting.plan.tensors.keys()
        return Followed(checkpoint, (f"cut: {self.name}",))

    def after_masking(self, checkpoint: Checkpoint) -> Checkpoint:
        self.heard.append(("after_masking", self.name))
        return checkpoint

    def constraints(self, checkpoint: Checkpoint, forms: Mapping[str, EncodedTensor]) -> Sequence[Constraint]:
        self.heard.append(("constraints", self.name))
        return ()

    def after_change(self, checkpoint: Checkpoint, change: Change) -> Followed:
        self.heard.append(("after_change", self.name))
        return Followed(checkpoint, (f"changed: {self.name}",))

    def after_training(self, checkpoint: Checkpoint, change: Change) -> Followed:
        self.heard.append(("after_training", self.name))
        assert change.source is not None
        return Followed(checkpoint, (f"trained: {self.name}",))

    def as_stored(self, checkpoint: Checkpoint, tables: Tables, *, settle: bool) -> Checkpoint:
        self.heard.append(("as_stored", self.name))
        return checkpoint


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A spy before, and one behind, all others; what they hear."""
    heard: list[tuple[str, str]] = []
    table = (Spy("first", heard), *events.FOLLOWERS, Spy("last", heard))
    monkeypatch.setattr(events, "FOLLOWERS", table)
    return heard


def twice(*names: str) -> list[tuple[str, str]]:
    return [(name, who) for name in names for who in ("first", "last")]


PRUNE = {"method": PruneMethod.L1, "rate": 0.3, "data": DATA}
VERBS: dict[str, tuple[Any, Any, list[tuple[str, str]]]] = {
    "train": (
        train.run,
        TrainOptions(fit=FitOptions(epochs=1, lr=0.01), data=DATA),
        twice("constraints", "after_training", "as_stored"),
    ),
    "prune": (prune.run, PruneOptions(**PRUNE), twice("cut", "after_cut", "after_change", "as_stored")),
    "prune and tune": (
        prune.run,
        PruneOptions(**PRUNE, finetune_epochs=1, lr=0.01),
        twice("cut", "after_cut", "after_change", "constraints", "after_training", "as_stored"),
    ),
    "mask": (
        prune.run,
        PruneOptions(rate=0.5, granularity=Granularity.ELEMENT, method=PruneMethod.L1, data=DATA),
        twice("after_masking", "after_change", "as_stored"),
    ),
    "quantize": (quantize.run, QuantizeOptions(data=DATA), twice("after_change", "as_stored")),
    "int8": (
        quantize.run,
        QuantizeOptions(method=QuantizeMethod.INT8, data=DATA, calibration=CalibrationOptions(images=16)),
        twice("after_change", "as_stored"),
    ),
    "qat": (
        quantize.run,
        QuantizeOptions(
            method=QuantizeMethod.QAT,
            tuning=TuningOptions(epochs=1),
            data=DATA,
            calibration=CalibrationOptions(images=16),
        ),
        twice("constraints", "after_training", "as_stored"),
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_each_event_reaches_each_follower_once_a_product(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options, expected = VERBS[name]
    start = tmp_path / "start.pt"
    save(lenet_checkpoint(), start)
    heard = spied(monkeypatch)
    written(run, options, start, "product.pt", name.partition(" ")[0])
    # Pruning cuts copies, too, to try what it plans.
    assert [event for event in heard if event[0] != "cut"] == [e for e in expected if e[0] != "cut"]
    assert ("cut", "first") in heard or ("cut", "first") not in expected


def test_followers_speak_in_the_order_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = tmp_path / "start.pt"
    save(lenet_checkpoint(), start)
    spied(monkeypatch)
    options = PruneOptions(**PRUNE, finetune_epochs=1, lr=0.01)
    product = written(prune.run, options, start, "product.pt", "prune")
    assert [note for note in product.history[-1].notes if note.endswith(("first", "last"))] == [
        *("cut: first", "cut: last", "changed: first", "changed: last", "trained: first", "trained: last")
    ]


def test_the_order_of_the_table_is_the_documented_one() -> None:
    order = [type(follower).__name__ for follower in events.FOLLOWERS]
    assert len(set(order)) == len(order)
    before = [
        ("PackedTensors", "Quantizers"),
        ("Quantizers", "Codecs"),
        ("Codecs", "Ranges"),
        ("SwappedLayers", "Codecs"),
    ]
    assert all(order.index(one) < order.index(other) for one, other in before)
    assert order[-1] == "Masks"
    kinds = [follower.kind for follower in events.FOLLOWERS if follower.edit is not None]
    assert (
        sorted(kinds)
        == sorted(events.edit_kinds())
        == [*("fold", "head", "mask", "quantize", "swap", "tap", "thin")]
    )


def test_what_nobody_announced_is_stored_without_changing_a_weight(tmp_path: Path) -> None:
    checkpoint, where = lenet_checkpoint(), context()
    assert isinstance(where, Context)
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    found = events.stored(checkpoint, where.tables, settle=False)
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())
    assert events.forms_of(found) == {}
    assert events.plain_checkpoint(found) is found
    assert events.for_programs(found) is found
