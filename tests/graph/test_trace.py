"""The traced pass: what it records, and that it leaves nothing behind."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.graph.trace import trace


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.norm(self.stem(x)))
        x += 1
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_calls_carry_names_shapes_and_settings() -> None:
    result = trace(Toy(), (torch.randn(2, 3, 9, 9),))
    names = [call.function for call in result.calls]
    assert names == [
        "conv2d",
        "batch_norm",
        "conv2d",
        "relu",
        "add",
        "adaptive_avg_pool2d",
        "flatten",
        "linear",
    ]
    grouped = result.calls[2]
    assert (grouped.module, grouped.module_type) == ("block.0", "Conv2d")
    assert grouped.parameters == ("block.0.weight", "block.0.bias")
    assert grouped.input_shapes == ((2, 8, 7, 7), (8, 2, 3, 3), (8,))
    assert grouped.tensor_names == ("", "block.0.weight", "block.0.bias")
    assert grouped.output_shapes == ((2, 8, 4, 4),)
    assert grouped.attributes["groups"] == 4
    assert grouped.attributes["stride"] == (2, 2)
    assert result.calls[1].parameters == (
        "norm.running_mean", "norm.running_var", "norm.weight", "norm.bias",
    )  # fmt: skip
    assert result.calls[4].module == ""
    assert result.output_shapes == ((2, 5),)


def test_pass_restores_flags_statistics_and_random_state() -> None:
    model = Toy().train()
    model.norm.eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, (torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)),))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_raising_forward_leaves_no_hooks_and_flags() -> None:
    from torch.nn.modules import module as internals

    model = Toy().train()
    with pytest.raises(RuntimeError):
        trace(model, (torch.randn(2, 4, 9, 9),))
    assert model.training
    assert model.block[0].training
    assert not internals._global_forward_hooks
    assert not internals._global_forward_pre_hooks
    assert all(not module._forward_hooks for module in model.modules())
    assert model(torch.randn(2, 3, 9, 9)).requires_grad


def test_attention_shows_its_operations() -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    class SelfAttention(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.inner, nn.MultiheadAttention):
                return self.inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
            return self.inner(x)  # type: ignore[no-any-return]

    for inner, linears in ((attention, 2), (layer, 4)):
        calls = trace(SelfAttention(inner.eval()), (torch.randn(1, 7, 16),)).calls
        names = [call.function for call in calls]
        assert names.count("linear") == linears
        assert names.count("scaled_dot_product_attention") == 1


def test_shared_module_is_seen_twice_and_tied_weight_has_one_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))  # type: ignore[no-any-return]

    calls = trace(Tied(), (torch.randn(1, 4),)).calls
    assert [call.module for call in calls] == ["a", "a", "b"]
    assert calls[2].parameters == ("a.weight", "b.bias")


def test_scripted_module_is_one_call() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=FutureWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 2))
    assert [c.function for c in trace(model, (torch.randn(1, 4),)).calls] == [
        "linear",
        "script_module",
        "linear",
    ]


@pytest.mark.slow
def test_every_torchvision_classifier_is_traced() -> None:
    from torchvision import models

    for name in models.list_models(module=models):
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        # Built on the meta device to be counted, regnets fail: their constructors read tensors.
        if next(iter(models.get_model_weights(name))).meta["num_params"] > 100e6:
            continue
        model = models.get_model(name, weights=None, **extra)
        size = 299 if name == "inception_v3" else 224
        result = trace(model, (torch.randn(1, 3, size, size),))
        used = {parameter for call in result.calls for parameter in call.parameters}
        unused = {name for name, _ in model.named_parameters()} - used
        # auxiliary heads do not run in evaluation mode
        assert all(name.lower().startswith("aux") for name in unused), name
        assert result.output_shapes[0] == (1, 1000)


@pytest.mark.cuda
def test_cuda_trace_equals_the_cpu_trace() -> None:
    model, x = Toy(), torch.randn(2, 3, 9, 9)
    on_cpu = trace(model, (x,))
    assert trace(model.cuda(), (x.cuda(),)) == on_cpu
