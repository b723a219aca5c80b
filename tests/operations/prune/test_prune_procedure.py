"""`cctool prune` with what may stand around a cut: sparse training, rewinding, drawing anew, a teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import procedure_toys as toys
from cctool.base.errors import UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load
from cctool.checkpoint.spec import Step
from cctool.operations import pipeline
from cctool.operations.prune import run as prune
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, RuntimeOptions
from cctool.options.prune.choices import PruneMethod, Sparsifier, StepMode
from cctool.options.prune.options import PruneOptions, SparsifyOptions
from cctool.options.teacher import TeacherOptions

FEW = DataOptions(data="digits", limit=64, batch_size=32)


@pytest.fixture
def initial(tmp_path: Path) -> Path:
    return toys.saved(toys.lenet_checkpoint(), tmp_path / "init.pt")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return toys.saved(toys.shaken(toys.lenet_checkpoint()), tmp_path / "trained.pt")


def products(path: Path, name: str = "out.pt", seed: int = 0, **options: Any) -> list[Checkpoint]:
    request = pipeline.Request(
        verb="prune",
        source=str(path),
        output=str(path.with_name(name)),
        runtime=RuntimeOptions(seed=seed, device="cpu"),
        force=True,
    )
    wanted = PruneOptions(**{"method": PruneMethod.L2, "rate": 0.5, **options})
    return [load(product.path, tables()) for product in pipeline.write(prune.run, wanted, request)]


def product(path: Path, **options: Any) -> Checkpoint:
    (found,) = products(path, **options)
    return found


def first_weight(checkpoint: Checkpoint) -> Tensor:
    return next(checkpoint.model.parameters()).detach()


def step(checkpoint: Checkpoint) -> Step:
    return checkpoint.history[-1]


def survivors(path: Path, widths: Checkpoint) -> Tensor:
    """First filters of the file at `path` that the pruned network kept; their order tells which."""
    dense, kept = first_weight(load(path, tables())), first_weight(widths)
    found = [row for row in range(len(dense)) if any(torch.equal(dense[row], other) for other in kept)]
    return torch.tensor(found)


def test_rewound_filters_are_the_initial_ones_of_the_survivors(initial: Path, trained: Path) -> None:
    plain = product(trained)
    rewound = product(trained, rewind=str(initial))
    kept = survivors(trained, plain)
    assert 0 < len(kept) == len(first_weight(plain)) < 6
    assert torch.equal(first_weight(rewound), first_weight(load(initial, tables()))[kept])
    origin = load(initial, tables()).origin
    assert origin is not None
    assert step(rewound).others == {"rewind": origin}
    assert step(rewound).options["rewind"] == str(initial)
    assert not step(plain).others


def test_each_progressive_step_is_rewound(initial: Path, trained: Path) -> None:
    steps = products(
        trained, steps=2, step_mode=StepMode.PROGRESSIVE, rewind=str(initial), finetune_epochs=1, data=FEW
    )
    unrewound = products(trained, steps=2, step_mode=StepMode.PROGRESSIVE, finetune_epochs=1, data=FEW)
    assert [len(first_weight(one)) for one in steps] == [len(first_weight(one)) for one in unrewound]
    exact = products(trained, steps=2, step_mode=StepMode.PROGRESSIVE, rewind=str(initial))
    for one in exact:
        assert len(survivors(initial, one)) == len(first_weight(one))
    assert len(first_weight(exact[1])) < len(first_weight(exact[0]))
    assert not torch.equal(first_weight(steps[1]), first_weight(unrewound[1]))


def test_a_network_that_was_drawn_anew_has_nothing_of_the_old_one(trained: Path) -> None:
    scratch = product(trained, from_scratch=True)
    assert first_weight(scratch).shape == first_weight(product(trained)).shape
    assert not len(survivors(trained, scratch))
    assert torch.equal(first_weight(scratch), first_weight(product(trained, from_scratch=True)))
    assert not torch.equal(first_weight(scratch), first_weight(product(trained, from_scratch=True, seed=1)))


@pytest.mark.parametrize("method", [Sparsifier.GROUP_LASSO, Sparsifier.GROWING])
def test_sparse_training_comes_before_the_cut(trained: Path, method: Sparsifier) -> None:
    sparsify = SparsifyOptions(method, lr=0.01)
    sparse = product(trained, sparsify=sparsify, data=FEW)
    assert not len(survivors(trained, sparse))
    assert step(sparse).options["sparsify"] == {
        "method": method.value,
        "epochs": 1,
        "strength": None,
        "lr": 0.01,
    }
    with pytest.raises(UsageError, match="--sparsify needs data"):
        product(trained, sparsify=sparsify)


def test_the_input_teaches_what_was_cut_from_it(trained: Path) -> None:
    teacher = TeacherOptions(str(trained))
    alone = product(trained, finetune_epochs=1, data=FEW)
    taught = product(trained, finetune_epochs=1, data=FEW, teacher=teacher)
    assert not torch.equal(first_weight(alone), first_weight(taught))
    assert step(taught).others == {"teacher": step(taught).parent}
