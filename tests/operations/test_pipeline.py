"""Load, run, record, write."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cctool.base.errors import CheckpointError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load
from cctool.operations import pipeline
from cctool.operations.context import Context, Outcome
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, ModelOptions, Precision, RuntimeOptions

LENET = ModelOptions(arch="lenet")


@dataclass(frozen=True)
class Options:
    """Options of the test's own verb."""

    factor: float = 2.0
    labels: tuple[str, ...] = ("",)
    precision: Precision = Precision.FULL
    once: int = field(default=0, metadata={"recorded": False})
    data: DataOptions = field(default_factory=DataOptions)


def scale(checkpoint: Checkpoint, options: Options, context: Context) -> Iterator[Outcome]:
    for label in options.labels:
        with torch.no_grad():
            for parameter in checkpoint.model.parameters():
                parameter.mul_(options.factor)
        yield Outcome(replace(checkpoint), report={"label": label}, label=label, notes=("scaled",))


def run(tmp_path: Path, options: Any = Options(), **request: Any) -> list[pipeline.Product]:
    given = {"verb": "scale", "source": None, "model": LENET, "output": str(tmp_path / "a.pt")} | request
    return list(pipeline.write(scale, options, pipeline.Request(**given)))


def test_a_fresh_network_is_written_with_one_line_of_history(tmp_path: Path) -> None:
    (product,) = run(tmp_path)
    loaded = load(product.path, tables())
    (step,) = loaded.history
    assert step.verb == "scale"
    assert step.parent is None
    assert step.before is None
    assert step.after is not None
    assert step.after.parameters == 61_706
    assert step.options["factor"] == 2.0
    assert step.options["precision"] == "32"
    assert "once" not in step.options
    assert step.notes == ("scaled",)


def test_the_parent_is_named_by_both_hashes(tmp_path: Path) -> None:
    (first,) = run(tmp_path)
    (second,) = run(tmp_path, source=first.path, model=ModelOptions(), output=None)
    assert Path(second.path) == tmp_path / "a.scale.pt"
    history = load(second.path, tables()).history
    assert len(history) == 2
    parent = history[1].parent
    assert parent is not None
    assert parent.file == hashlib.sha256(Path(first.path).read_bytes()).hexdigest()
    assert parent.content == first.content
    assert history[1].before == history[0].after


def test_several_outcomes_get_labels_and_leave_the_source(tmp_path: Path) -> None:
    (first,) = run(tmp_path)
    before = Path(first.path).read_bytes()
    products = run(
        tmp_path, Options(labels=("step1", "step2")), source=first.path, model=ModelOptions(), output=None
    )
    assert [Path(p.path).name for p in products] == ["a.scale.step1.pt", "a.scale.step2.pt"]
    assert Path(first.path).read_bytes() == before


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match="--force"):
        run(tmp_path)
    run(tmp_path, force=True)


@pytest.mark.parametrize("name", ["a.onnx", "a", "a.txt"])
def test_an_unknown_suffix_is_refused_before_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="safetensors"):
        run(tmp_path, output=str(tmp_path / name))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="folder"):
        run(tmp_path, output=str(tmp_path / "missing" / "a.pt"))


def test_nonfinite_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        run(tmp_path, Options(factor=float("inf")))
    assert not (tmp_path / "a.pt").exists()
    (product,) = run(tmp_path, Options(factor=float("inf")), allow_nonfinite=True)
    with pytest.raises(CheckpointError, match="INPUT holds"):
        run(tmp_path, source=product.path, model=ModelOptions(), output=None)


def test_neither_input_nor_architecture_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--arch"):
        run(tmp_path, model=ModelOptions(), output=None)


def test_the_seed_decides_the_initial_weights(tmp_path: Path) -> None:
    def hash_of(seed: int, name: str) -> str | None:
        output = str(tmp_path / name)
        return run(tmp_path, output=output, runtime=RuntimeOptions(seed=seed))[0].content

    def weights_of(name: str) -> torch.Tensor:
        return next(iter(load(tmp_path / name, tables()).model.parameters())).detach()

    assert hash_of(1, "a.pt") == hash_of(1, "b.pt")
    hash_of(2, "c.pt")
    assert torch.equal(weights_of("a.pt"), weights_of("b.pt"))
    assert not torch.equal(weights_of("a.pt"), weights_of("c.pt"))


def test_safetensors_holds_the_same_content(tmp_path: Path) -> None:
    (dense,) = run(tmp_path)
    (other,) = run(tmp_path, output=str(tmp_path / "a.safetensors"))
    assert dense.content == other.content
    assert dense.file != other.file
