"""Rewinding: surviving weights get exactly their earlier values, and what does not fit is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import procedure_toys as toys
from cctool.base.errors import ArchitectureError, CheckpointError, PruningError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load
from cctool.checkpoint.edits.mask import add_masks
from cctool.checkpoint.spec import ModelSpec
from cctool.operations.pipeline import Request, write
from cctool.operations.prune.rewind import open_earlier, rewound
from cctool.operations.quantize.run import run as quantize
from cctool.operations.registries import tables
from cctool.options.quantize.options import QuantizeOptions
from cctool.pruning.cut.surgery import CutPlan

NETWORK = """
from torch import nn


def make(width=6):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 4, 3), nn.Flatten())
"""


def states(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in checkpoint.model.state_dict().items()}


def by_hand(earlier: Checkpoint, plans: list[CutPlan]) -> dict[str, Tensor]:
    """Each dim of each tensor indexed one after the other."""
    state = states(earlier)
    for plan in plans:
        for name, cuts in plan.tensors.items():
            for piece in cuts:
                index = [slice(None)] * state[name].dim()
                index[piece.dim] = piece.keep
                state[name] = state[name][tuple(index)]
    return state


def equal(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> bool:
    found = checkpoint.model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


@pytest.fixture
def initial() -> Checkpoint:
    return toys.residual_checkpoint()


def test_an_earlier_state_that_is_no_numbers_is_refused(tmp_path: Path, initial: Checkpoint) -> None:
    spoilt = toys.shaken(initial)
    next(spoilt.model.parameters()).data.flatten()[0] = float("nan")
    path = str(toys.saved(spoilt, tmp_path / "nan.pt"))
    with pytest.raises(CheckpointError, match=r"--rewind .*nan.pt holds 1 NaN .* --allow-nonfinite goes on"):
        open_earlier(initial, path, toys.context())
    allowed = replace(toys.context(), given=frozenset({"allow_nonfinite"}))
    open_earlier(initial, path, allowed)


def test_survivors_get_their_earlier_values(tmp_path: Path, initial: Checkpoint) -> None:
    path, trained = toys.saved(initial, tmp_path / "init.pt"), toys.shaken(initial)
    thinned, found = toys.cut(trained)
    earlier = open_earlier(trained, str(path), toys.context())
    result = rewound(thinned, earlier, [found.plan])
    assert equal(result, by_hand(initial, [found.plan]))
    # Statistics of batch norms and their counters, too.
    assert result.model.bn1.num_batches_tracked == initial.model.bn1.num_batches_tracked
    assert result.model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert earlier.origin is not None
    assert earlier.origin.path == "init.pt"
    assert earlier.origin.content is not None


def test_progressive_cuts_are_followed_in_order(tmp_path: Path, initial: Checkpoint) -> None:
    path, trained = toys.saved(initial, tmp_path / "init.pt"), toys.shaken(initial)
    once, first = toys.cut(trained, 0.3)
    twice, second = toys.cut(once, 0.4)
    result = rewound(twice, open_earlier(trained, str(path), toys.context()), [first.plan, second.plan])
    assert equal(result, by_hand(initial, [first.plan, second.plan]))
    with pytest.raises(PruningError, match="made for another model"):
        rewound(twice, open_earlier(trained, str(path), toys.context()), [second.plan, first.plan])


def test_a_bare_state_dict_needs_no_name(tmp_path: Path, initial: Checkpoint) -> None:
    torch.save(initial.model.state_dict(), tmp_path / "init.pth")
    thinned, found = toys.cut(toys.shaken(initial))
    result = rewound(thinned, open_earlier(initial, str(tmp_path / "init.pth"), toys.context()), [found.plan])
    assert equal(result, by_hand(initial, [found.plan]))


def test_a_second_command_rewinds_to_the_same_widths(tmp_path: Path, initial: Checkpoint) -> None:
    earlier, first = toys.cut(initial, 0.3)
    path = toys.saved(earlier, tmp_path / "thin.pt")
    trained = toys.shaken(earlier)
    again, second = toys.cut(trained, 0.3)
    result = rewound(again, open_earlier(trained, str(path), toys.context()), [second.plan])
    assert equal(result, by_hand(initial, [first.plan, second.plan]))


def test_masked_weights_stay_zero(tmp_path: Path, initial: Checkpoint) -> None:
    path, trained = toys.saved(initial, tmp_path / "init.pt"), toys.shaken(initial)
    mask = torch.rand_like(trained.model.conv1.weight) > 0.5
    add_masks(trained.model, {"conv1.weight": mask})
    result = rewound(trained, open_earlier(trained, str(path), toys.context()), [])
    before = initial.model.state_dict()
    assert torch.equal(result.model.conv1.weight, before["conv1.weight"] * mask)
    assert torch.equal(result.model.conv1.weight_mask, mask)
    assert torch.equal(result.model.layer1[0].conv1.weight, before["layer1.0.conv1.weight"])


def test_stored_forms_of_what_changed_are_dropped(tmp_path: Path, initial: Checkpoint) -> None:
    path = toys.saved(toys.shaken(initial), tmp_path / "trained.pt")
    request = Request("quantize", str(path), str(tmp_path / "q.pt"))
    (product,) = write(quantize, QuantizeOptions(), request)
    stored = load(product.path, tables())
    assert "conv1.weight" in stored.stored
    same = open_earlier(stored, product.path, toys.context())
    assert rewound(stored, same, []).stored == stored.stored
    other = open_earlier(stored, str(toys.saved(initial, tmp_path / "init.pt")), toys.context())
    assert "conv1.weight" not in rewound(stored, other, []).stored


def test_plans_that_do_not_lead_to_these_widths_are_refused(tmp_path: Path, initial: Checkpoint) -> None:
    earlier = open_earlier(initial, str(toys.saved(initial, tmp_path / "init.pt")), toys.context())
    thinned, _ = toys.cut(initial)
    with pytest.raises(PruningError, match=r"conv1\.weight cannot be set: it has shape \[2, 1, 3, 3\]"):
        rewound(thinned, earlier, [])


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        (lambda: replace(toys.residual_checkpoint(), spec=other_depth()), "holds resnet32"),
        (lambda: toys.residual_checkpoint(base=6), r"built with .*'base': 6.* this network with .*'base': 4"),
        (
            lambda: toys.cut(toys.residual_checkpoint())[0],
            r"conv1\.weight is \[2, 1, 3, 3\] there and \[4, 1, 3, 3\]",
        ),
    ],
    ids=["architecture", "arguments", "widths"],
)
def test_other_networks_are_refused(
    tmp_path: Path, initial: Checkpoint, earlier: object, message: str
) -> None:
    made = earlier()  # type: ignore[operator]
    if made.spec.architecture == "resnet32":
        from cctool.models import registry

        made = replace(made, model=registry.build("resnet32", made.spec.arguments))
    path = toys.saved(made, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=message):
        open_earlier(initial, str(path), toys.context())


def other_depth() -> ModelSpec:
    return toys.residual_checkpoint().spec.model_copy(update={"architecture": "resnet32"})


def test_a_state_dict_of_another_network_is_refused(tmp_path: Path, initial: Checkpoint) -> None:
    torch.save(toys.residual_checkpoint(base=6).model.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        UsageError, match=r"wide\.pth is not an earlier state of this network: .*conv1\.weight"
    ):
        open_earlier(initial, str(tmp_path / "wide.pth"), toys.context())


def test_user_code_runs_only_if_it_is_named(tmp_path: Path) -> None:
    from cctool.base import user_code

    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    arch = f"{tmp_path / 'net.py'}:make"
    named = toys.context(arch=arch)
    spec = ModelSpec(architecture=arch, input_shape=(1, 8, 8))
    source = Checkpoint(user_code.load(arch)(), spec)
    path = toys.saved(source, tmp_path / "init.pt", named)
    assert equal(open_earlier(source, str(path), named), states(source))
    with pytest.raises(ArchitectureError, match="user code, which runs only when it is named"):
        open_earlier(source, str(path), toys.context())
    (tmp_path / "moved").mkdir()
    (tmp_path / "net.py").rename(tmp_path / "moved" / "net.py")
    arch = f"{tmp_path / 'moved' / 'net.py'}:make"
    moved = replace(source, spec=spec.model_copy(update={"architecture": arch}))
    assert equal(open_earlier(moved, str(path), toys.context(arch=arch)), states(source))
