"""Which images the data-driven pruning methods are shown, and what is refused."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cctool.base.errors import DataError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.data.records import DataSource
from cctool.data.registry import open_data
from cctool.models import registry
from cctool.operations.context import Context, Outcome
from cctool.operations.prune.images import evidence_for
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.prune.choices import NEEDS_DATA, PruneMethod
from cctool.options.prune.options import PruneOptions

T = TypeVar("T")
MEAN, STD = (0.5,), (0.25,)


class Notes:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.totals: list[int | None] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        self.totals.append(total)
        yield from items


def unstamped(outcome: Outcome) -> Checkpoint:
    return outcome.checkpoint


def context(reporter: Notes | None = None, seed: int = 0) -> Context:
    return Context(
        device=torch.device("cpu"),
        runtime=RuntimeOptions(seed=seed),
        model_options=ModelOptions(),
        tables=tables(),
        user_code=frozenset(),
        reporter=reporter or Notes(),
        output=Path("unused.pt"),
        force=False,
        stamp=unstamped,
    )


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_channels": 1}
    spec = ModelSpec(
        architecture="lenet",
        arguments=arguments,
        input_shape=(1, 32, 32),
        preprocessing=Preprocessing(mean=MEAN, std=STD),
    )
    return Checkpoint(registry.build("lenet", arguments), spec)


@pytest.fixture
def source() -> DataSource:
    return open_data("digits", input_shape=(1, 32, 32), limit=96)


def options(method: PruneMethod, **given: Any) -> PruneOptions:
    data = DataOptions(data="digits", limit=96, batch_size=given.pop("batch_size", 16))
    return PruneOptions(method=method, data=data, **given)


def without(source: DataSource, *splits: str) -> DataSource:
    def refuse() -> Any:
        raise AssertionError("this split must not be touched")

    return replace(source, loaders={**source.loaders, **dict.fromkeys(splits, refuse)})


def test_methods_without_images_need_no_data(checkpoint: Checkpoint) -> None:
    for method in set(PruneMethod) - NEEDS_DATA:
        assert evidence_for(checkpoint, None, options(method), context()) is None


@pytest.mark.parametrize("method", sorted(NEEDS_DATA))
def test_training_images_alone_are_looked_at(
    checkpoint: Checkpoint, source: DataSource, method: PruneMethod
) -> None:
    reporter = Notes()
    found = evidence_for(
        checkpoint, without(source, "validation", "test"), options(method, samples=40), context(reporter)
    )
    assert found is not None
    assert (found.method, found.images) == (method, 40)
    assert reporter.totals == [3]
    assert reporter.notes == []


def test_images_are_unvaried_normalised_shuffled_and_of_the_seed(
    checkpoint: Checkpoint, source: DataSource
) -> None:
    def gradient(seed: int, **given: Any) -> Tensor:
        found = evidence_for(checkpoint, source, options(PruneMethod.GRADIENT, **given), context(seed=seed))
        assert found is not None
        return next(iter(found.gradients.values()))

    few = [gradient(seed, samples=20) for seed in (0, 0, 1)]
    torch.testing.assert_close(few[0], few[1])
    assert not torch.allclose(few[0], few[2])
    torch.testing.assert_close(gradient(0, samples=20, batch_size=7), few[0])
    # of all images the order is no matter: by hand, from the stored bytes
    split = source.split("train")
    assert split.images is not None
    assert split.labels is not None
    scaled = split.images.float() / 255
    if scaled.shape[-2:] != (32, 32):
        pytest.fail("digits are served in the size that the network takes")
    model = checkpoint.model.eval()
    F.cross_entropy(model((scaled - MEAN[0]) / STD[0]), split.labels).backward()
    expected = next(iter(model.parameters())).grad
    torch.testing.assert_close(gradient(0, samples=len(split.images)), expected, rtol=1e-4, atol=1e-6)


def test_fewer_images_than_asked_for_are_told(checkpoint: Checkpoint, source: DataSource) -> None:
    reporter = Notes()
    found = evidence_for(checkpoint, source, options(PruneMethod.APOZ, samples=5000), context(reporter))
    images = source.split("train").images
    assert found is not None
    assert images is not None
    assert found.images == len(images) < 5000
    assert reporter.notes == [f"apoz: {len(images)} training images were there to look at"]


def test_what_is_missing_is_refused_with_the_way_out(checkpoint: Checkpoint, source: DataSource) -> None:
    with pytest.raises(UsageError, match=r"--method taylor .*--data"):
        evidence_for(checkpoint, None, options(PruneMethod.TAYLOR), context())
    foreign = replace(checkpoint, spec=checkpoint.spec.model_copy(update={"preprocessing": None}))
    with pytest.raises(UsageError, match=r"--method apoz .*--mean and --std"):
        evidence_for(foreign, source, options(PruneMethod.APOZ), context())


def test_unlabelled_images_serve_activations_alone(checkpoint: Checkpoint, source: DataSource) -> None:
    split = replace(source.split("train"), labels=None)
    fresh = open_data("digits", input_shape=(1, 32, 32), limit=96)  # splits that were read are kept
    unlabelled = replace(fresh, loaders={**fresh.loaders, "train": lambda: split})
    assert evidence_for(checkpoint, unlabelled, options(PruneMethod.ACTIVATION), context()) is not None
    with pytest.raises(DataError, match="labels"):
        evidence_for(checkpoint, unlabelled, options(PruneMethod.TAYLOR), context())
