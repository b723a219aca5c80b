"""Foreign files, user code and what the command line may say of a file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from cctool.base.errors import (
    ArchitectureError,
    CheckpointError,
    SpecError,
    UnsafeCheckpointError,
    UsageError,
)
from cctool.base.runtime import Silent
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.models import registry
from cctool.operations.opening import open_checkpoint, parse_arguments
from cctool.operations.registries import load, tables
from cctool.options.common import ModelOptions

NET = """
from pathlib import Path
from torch import nn
import helper

class Net(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.body = nn.Conv2d(3, helper.WIDTH, 3)
        self.fc = nn.Linear(helper.WIDTH, num_classes)
    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

def make_net(num_classes=4):
    Path("ran.txt").touch()
    return Net(num_classes)
"""


def opened(path: Path, **options: object) -> Checkpoint:
    model = ModelOptions(**options)  # type: ignore[arg-type]
    named = frozenset({model.arch} if model.arch else ())
    return open_checkpoint(path, model, tables(named), named, Silent())


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("WIDTH = 5\n")
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def test_a_bare_state_dict_takes_its_classes_and_channels_from_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "r.pth"
    model = registry.build("resnet20", {"num_classes": 7, "in_channels": 1})
    torch.save(model.state_dict(), path)
    checkpoint = opened(path, arch="resnet20")
    assert checkpoint.spec.arguments["num_classes"] == 7
    assert checkpoint.spec.arguments["in_channels"] == 1
    assert checkpoint.spec.input_shape == (1, 32, 32)
    assert checkpoint.spec.preprocessing is None
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(checkpoint.model(x), model.eval()(x))


def test_a_torchvision_state_dict_of_eleven_classes(tmp_path: Path) -> None:
    path = tmp_path / "r.pth"
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in resnet18(num_classes=11).state_dict().items()}}, path
    )
    checkpoint = opened(path, arch="torchvision:resnet18", mean=(0.5,) * 3, std=(0.25,) * 3)
    assert checkpoint.spec.arguments == {"num_classes": 11}
    assert checkpoint.spec.input_shape == (3, 224, 224)
    assert checkpoint.spec.preprocessing is not None
    assert checkpoint.spec.preprocessing.std == (0.25,) * 3


def test_the_wrong_architecture_names_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "r.pth"
    torch.save(registry.build("resnet20", {}).state_dict(), path)
    with pytest.raises(SpecError, match=r"layer1\.3"):
        opened(path, arch="resnet32")


def test_a_foreign_file_without_arch_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "r.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="--arch"):
        opened(path)


def test_user_code_runs_only_when_named(net: Path) -> None:
    named = "net.py:make_net"
    registries = tables({named})
    spec = ModelSpec(architecture=named, arguments={"num_classes": 4}, input_shape=(3, 8, 8))
    model = registries.build(named, {"num_classes": 4})
    save(Checkpoint(model, spec), net / "a.pt", registries)
    (net / "ran.txt").unlink()
    with pytest.raises(ArchitectureError, match=r"--arch net.py:make_net"):
        opened(net / "a.pt")
    assert not (net / "ran.txt").exists()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(opened(net / "a.pt", arch=named).model(x), model.eval()(x))
    # Named by another path: the file may have moved.
    assert torch.equal(opened(net / "a.pt", arch=str(net / "net.py:make_net")).model(x), model(x))
    assert torch.equal(load(net / "a.pt", arch=named).model(x), model(x))


def test_the_library_loads_moved_user_code_and_foreign_files(net: Path) -> None:
    named = "net.py:make_net"
    spec = ModelSpec(architecture=named, arguments={"num_classes": 4}, input_shape=(3, 8, 8))
    model = tables({named}).build(named, {"num_classes": 4})
    save(Checkpoint(model, spec), net / "a.pt", tables({named}))
    (net / "moved").mkdir()
    for name in ("net.py", "helper.py"):
        (net / name).rename(net / "moved" / name)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(load(net / "a.pt", arch="moved/net.py:make_net").model(x), model.eval()(x))
    torch.save(registry.build("lenet", {}).state_dict(), net / "foreign.pt")
    with pytest.raises(CheckpointError, match="--arch"):
        load(net / "foreign.pt")
    assert load(net / "foreign.pt", arch="lenet").spec.input_shape == (1, 32, 32)


def test_a_pickled_module_loads_only_with_trust_and_arch(net: Path) -> None:
    named = "net.py:make_net"
    code = "import torch, net; torch.manual_seed(0); torch.save(net.make_net(), 'whole.pth')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=net)
    (net / "ran.txt").unlink()
    with pytest.raises(UnsafeCheckpointError, match=r"net\.Net.*--trust-pickle"):
        opened(net / "whole.pth", arch=named)
    assert not (net / "ran.txt").exists()
    checkpoint = opened(net / "whole.pth", arch=named, trust_pickle=True)
    assert checkpoint.spec.architecture == named
    assert checkpoint.spec.input_shape == (3, 32, 32)


def test_a_module_pickled_by_its_own_script_finds_its_class(net: Path) -> None:
    script = (net / "net.py").read_text() + "\nimport torch\ntorch.save(make_net(), 'whole.pth')\n"
    (net / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], check=True, cwd=net)
    checkpoint = opened(net / "whole.pth", arch="net.py:make_net", trust_pickle=True)
    assert checkpoint.model.fc.out_features == 4
    assert not hasattr(sys.modules["__main__"], "Net")


def test_the_command_line_may_not_contradict_the_file(tmp_path: Path) -> None:
    spec = ModelSpec(architecture="lenet", arguments={"num_classes": 10}, input_shape=(1, 32, 32))
    save(Checkpoint(registry.build("lenet", {"num_classes": 10}), spec), tmp_path / "a.pt", tables())
    with pytest.raises(UsageError, match="holds lenet"):
        opened(tmp_path / "a.pt", arch="resnet20")
    with pytest.raises(UsageError, match="num_classes"):
        opened(tmp_path / "a.pt", arguments=("num_classes=3",))
    with pytest.raises(UsageError, match="holds lenet"):
        opened(tmp_path / "a.pt", arch="torchvision:resnet18")
    assert opened(tmp_path / "a.pt", arch="lenet", arguments=("num_classes=10",)).spec == spec


def test_a_library_network_is_not_taken_for_another(tmp_path: Path) -> None:
    spec = ModelSpec(architecture="torchvision:squeezenet1_0", arguments={}, input_shape=(3, 64, 64))
    model = registry.build("torchvision:squeezenet1_0", {})
    save(Checkpoint(model, spec), tmp_path / "a.pt", tables())
    with pytest.raises(UsageError, match="holds torchvision:squeezenet1_0"):
        opened(tmp_path / "a.pt", arch="torchvision:squeezenet1_1")


def test_a_spec_file_builds_a_bare_state_dict(tmp_path: Path) -> None:
    spec = ModelSpec(architecture="lenet", arguments={"num_classes": 3}, input_shape=(1, 32, 32))
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    torch.save(registry.build("lenet", {"num_classes": 3}).state_dict(), tmp_path / "bare.pth")
    assert opened(tmp_path / "bare.pth", spec=str(tmp_path / "spec.json")).spec == spec


def test_arguments_are_json_where_they_can_be() -> None:
    assert parse_arguments(("a=1", "b=[2, 3]", "c=text", "d=1.5", "e=")) == {
        "a": 1, "b": [2, 3], "c": "text", "d": 1.5, "e": "",
    }  # fmt: skip


def test_statistics_of_a_file_are_not_contradicted(tmp_path: Path) -> None:
    registries = tables(())
    model = registries.build("lenet", {})
    spec = ModelSpec(
        architecture="lenet", arguments={}, input_shape=(1, 32, 32), preprocessing=statistics(0.5, 0.25)
    )
    save(Checkpoint(model, spec), tmp_path / "a.pt", registries)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    (tmp_path / "s.json").write_text(spec.model_dump_json())
    bare = {"spec": str(tmp_path / "s.json")}
    for name, more, whose in (("a.pt", {}, "a.pt"), ("bare.pth", bare, "s.json")):
        for mean, std in ((0.5, 0.2), (0.4, 0.25)):
            with pytest.raises(UsageError, match=rf"{whose} says that inputs .* mean 0\.5 and std 0\.25"):
                opened(tmp_path / name, mean=(mean,), std=(std,), **more)
        assert opened(tmp_path / name, mean=(0.5,), std=(0.25,), **more).spec == spec


def test_statistics_complete_a_file_that_has_none(tmp_path: Path) -> None:
    registries = tables(())
    spec = ModelSpec(architecture="lenet", arguments={}, input_shape=(1, 32, 32))
    save(Checkpoint(registries.build("lenet", {}), spec), tmp_path / "a.pt", registries)
    found = opened(tmp_path / "a.pt", mean=(0.5,), std=(0.25,)).spec
    assert found.preprocessing == statistics(0.5, 0.25)


def statistics(mean: float, std: float) -> Preprocessing:
    return Preprocessing(mean=(mean,), std=(std,))
