"""What is gathered on images: whatever the batches, for every kind of layer, leaving nothing behind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.base.errors import DataError, PruningError
from cctool.data.serving.batches import Batch
from cctool.graph.channels import couple
from cctool.graph.ledger import Role
from cctool.options.prune.choices import NEEDS_DATA, PruneMethod
from cctool.pruning.scores.evidence import Evidence, gather
from criteria_toys import Chain, Residual, batches, gradient_of, images

METHODS = sorted(NEEDS_DATA)
FIELDS = {
    PruneMethod.TAYLOR: {"gradients", "contributions"},
    PruneMethod.HESSIAN: {"squares"},
    PruneMethod.GRADIENT: {"gradients"},
    PruneMethod.APOZ: {"zeros"},
    PruneMethod.ACTIVATION: {"activations"},
}


def look(
    model: nn.Module, x: Tensor, y: Tensor | None, method: PruneMethod, size: int = 4, samples: int = 10
) -> Evidence:
    return gather(model, batches(x, y, size), samples, method, loss=F.cross_entropy)


def flat(found: Evidence) -> dict[Any, Tensor]:
    return {
        (name, key): value
        for name in set().union(*FIELDS.values())
        for key, value in getattr(found, name).items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_needs_is_there(method: PruneMethod) -> None:
    found = look(Chain(), *images(), method)
    assert {name for name, _ in flat(found)} == FIELDS[method]
    assert (found.method, found.images) == (method, 10)
    assert not any(value.requires_grad for value in flat(found).values())


@pytest.mark.parametrize("method", METHODS)
def test_how_images_are_batched_changes_nothing(method: PruneMethod) -> None:
    model, (x, y) = Residual().double(), images(dtype=torch.float64)
    whole = flat(look(model, x, y, method, size=10))
    for size in (1, 3):
        parts = flat(look(model, x, y, method, size=size))
        assert parts.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(parts[key], value)


@pytest.mark.parametrize("method", METHODS)
def test_so_many_images_are_looked_at_and_no_more(method: PruneMethod) -> None:
    model, (x, y) = Chain(), images()
    found, expected = look(model, x, y, method, samples=7), look(model, x[:7], y[:7], method)
    assert found.images == expected.images == 7
    for key, value in flat(expected).items():
        torch.testing.assert_close(flat(found)[key], value)
    assert look(model, x, y, method, samples=99).images == 10


class Restless(Chain):
    """Counts its calls in a buffer, and draws."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(1)
        return super().forward(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(method: PruneMethod, fails: bool) -> None:
    model, (x, y) = Restless(), images(classes=4)
    model.train()
    model.conv2.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    if fails:
        x = x[:, :2]  # a channel too few
        with pytest.raises(RuntimeError):
            look(model, x, y, method)
    else:
        look(model, x, y, method)
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == modes
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.requires_grad
    assert model.conv1.weight.grad is None
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_frozen_parameters_are_looked_at_and_batch_norm_keeps_its_statistics() -> None:
    model, (x, y) = Chain(batch_norm=True), images(classes=4)
    expected = flat(look(model.eval(), x, y, PruneMethod.TAYLOR))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = flat(look(model.train(), x, y, PruneMethod.TAYLOR))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# ---- every kind of layer that reads ----------------------------------------------------------------------
class Net(nn.Module):
    """Modules by name, and a forward given as a function of them."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(i: int, o: int, **how: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **how)


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)  # sequence first


class Products(nn.Module):
    """Matrices used as x @ W, x @ W.t(), addmm and linear with a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(6, 5))
        self.c, self.bias = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7))
        self.d = nn.Parameter(torch.randn(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x.mean((2, 3)) @ self.a)
        x = torch.relu(x @ self.b.t())
        return F.linear(torch.addmm(self.bias, x, self.c).tanh(), self.d.T)


def windows(m: Net, x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    x = m.a(x).reshape(b, 8, 2, h // 2, 2, w // 2).permute(0, 2, 4, 3, 5, 1).reshape(b * 4, -1, 8)
    return m.fc(F.gelu(m.up(x)).reshape(b, -1, 12).mean(1))  # type: ignore[no-any-return]


def tied() -> nn.Module:
    model = Net(
        lambda m, x: m.fc(m.c(F.relu(m.b(F.relu(m.a(x))))).mean((2, 3))),
        a=conv(3, 6), b=conv(6, 6), c=conv(6, 6), fc=nn.Linear(6, 3),
    )  # fmt: skip
    model.c.weight = model.b.weight
    return model


READERS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "residual, flatten": Residual,
    "grouped and depthwise": lambda: Net(
        lambda m, x: m.fc(m.c(F.relu(m.b(F.relu(m.a(x), inplace=True)))).mean((2, 3))),
        a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 6, groups=2), fc=nn.Linear(6, 3),
    ),
    "transposed": lambda: Net(
        lambda m, x: m.fc(m.c(F.relu(m.b(F.relu(m.a(x))))).mean((2, 3))),
        a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2, stride=2), c=nn.ConvTranspose2d(6, 4, 2, groups=2),
        fc=nn.Linear(4, 3),
    ),
    "concatenation read twice": lambda: Net(
        lambda m, x: (lambda a: m.fc(m.c(torch.cat([a, F.relu(m.b(a))], 1)).mean((2, 3))))(F.relu(m.a(x))),
        a=conv(3, 4), b=conv(4, 5), c=conv(9, 6), fc=nn.Linear(6, 3),
    ),
    "shared": lambda: Net(
        lambda m, x: m.fc(F.relu(m.b(F.relu(m.b(m.a(x))))).mean((2, 3))),
        a=conv(3, 6), b=conv(6, 6), fc=nn.Linear(6, 3),
    ),
    "tied": tied,
    "products": Products,
    "windows before images": lambda: Net(windows, a=conv(3, 8), up=nn.Linear(8, 12), fc=nn.Linear(12, 3)),
    "sequence first": lambda: Net(
        lambda m, x: m.fc(m.layer(m.embed(x.flatten(2).permute(2, 0, 1))).mean(0)),
        embed=nn.Linear(3, 8), layer=attention(), fc=nn.Linear(8, 3),
    ),
    "no batch of one": lambda: Net(
        lambda m, x: m.fc(F.relu(m.a(x)).mean((2, 3), keepdim=True).squeeze()[:, :6].reshape(-1, 6)),
        a=conv(3, 6), fc=nn.Linear(6, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_contributions_are_the_sums_of_g_times_w_of_each_image(name: str) -> None:
    torch.manual_seed(2)
    model, (x, y) = READERS[name]().double().eval(), images(6, dtype=torch.float64)
    found = look(model, x, y, PruneMethod.TAYLOR, samples=6)
    consumers = {
        (place.tensor, place.dim)
        for family in couple(model, (x,)).families
        for place in family.places
        if place.role is Role.CONSUMER
    }
    assert consumers <= found.contributions.keys()
    assert consumers
    # a batch of the image twice has the image's own mean loss, for code that takes no batch of one
    single = [gradient_of(model, x[[n, n]], y[[n, n]]) for n in range(6)]
    for (weight, dim), values in found.contributions.items():
        parameter = model.get_parameter(weight).detach()
        others = [d for d in range(parameter.ndim) if d != dim]
        expected = torch.stack([(gradients[weight] * parameter).sum(others) for gradients in single])
        torch.testing.assert_close(values, expected, msg=lambda text, key=weight: f"{key}: {text}")
    squares = look(model, x, y, PruneMethod.HESSIAN, samples=6).squares
    mean = look(model, x, y, PruneMethod.GRADIENT, samples=6).gradients
    for weight, gradient in gradient_of(model, x, y).items():
        torch.testing.assert_close(mean[weight], gradient)
        torch.testing.assert_close(found.gradients[weight], gradient)
        expected = torch.stack([gradients[weight].square() for gradients in single]).mean(0)
        torch.testing.assert_close(squares[weight], expected)


def test_activations_of_a_grouped_layer_are_means_over_its_groups() -> None:
    model, (x, y) = READERS["grouped and depthwise"]().double().eval(), images(dtype=torch.float64)
    seen: list[Tensor] = []
    handle = model.get_submodule("c").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    handle.remove()
    found = look(model, x, y, PruneMethod.APOZ, size=3).zeros["c.weight", 1]
    expected = (seen[0] == 0).double().mean((0, 2, 3)).view(2, 4).mean(0)
    torch.testing.assert_close(found, expected)
    assert 0 < expected.mean() < 1


def test_what_runs_in_training_mode_only_is_not_there() -> None:
    model = Net(
        lambda m, x: m.fc(m.a(x).mean((2, 3))) + (m.aux(x.mean((2, 3))) if m.training else 0),
        a=conv(3, 6), aux=nn.Linear(3, 3), fc=nn.Linear(6, 3),
    )  # fmt: skip
    for method in (PruneMethod.GRADIENT, PruneMethod.TAYLOR):
        gradients = look(model.train(), *images(), method).gradients
        assert set(gradients) == {"a.weight", "a.bias", "fc.weight", "fc.bias"}


def test_a_batch_of_one_is_no_matter_where_the_code_takes_none() -> None:
    torch.manual_seed(2)
    model, (x, y) = READERS["no batch of one"]().double().eval(), images(5, dtype=torch.float64)
    for method in METHODS:
        whole, rest = (flat(look(model, x, y, method, size=size)) for size in (5, 4))
        for key, value in whole.items():
            torch.testing.assert_close(rest[key], value)


# ---- refusals --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_missing_labels_are_refused_where_gradients_need_them(method: PruneMethod) -> None:
    x, _ = images()
    if method in (PruneMethod.APOZ, PruneMethod.ACTIVATION):
        assert look(Chain(), x, None, method).images == 10
    else:
        with pytest.raises(DataError, match="labels"):
            look(Chain(), x, None, method)


@pytest.mark.parametrize("method", METHODS)
def test_no_images_and_no_finite_loss_are_refused(method: PruneMethod) -> None:
    with pytest.raises(DataError, match="empty"):
        gather(Chain(), list[Batch](), 4, method, loss=F.cross_entropy)
    if method not in (PruneMethod.APOZ, PruneMethod.ACTIVATION):
        x, y = images()
        with pytest.raises(PruningError, match="not finite"):
            look(Chain(), x * float("nan"), y, method)
        with pytest.raises(PruningError, match="no gradient"):
            gather(Chain(), batches(x, y), 4, method, loss=lambda out, labels: torch.zeros(()))


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_sees_what_a_cpu_sees(method: PruneMethod) -> None:
    model, (x, y) = Residual().double(), images(dtype=torch.float64)
    expected = flat(look(model, x, y, method))
    found = flat(look(model.cuda(), x.cuda(), y.cuda(), method))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value)
