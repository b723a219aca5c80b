"""A training that is under way is cut along with its network, and goes on."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cctool.checkpoint.checkpoint import Checkpoint, load
from cctool.cli.main import app
from cctool.operations.registries import tables
from cctool.training.resume.state import unflatten

DATA = ("--data", "digits", "--limit", "64", "--batch-size", "32", "--device", "cpu", "-q")


def run(*line: str) -> str:
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, f"{' '.join(line)}\n{result.output}\n{result.exception}"
    return result.stderr


def moments(checkpoint: Checkpoint, key: str) -> dict[str, torch.Tensor]:
    """The optimizer's moments by parameter; all parameters are in one group, in their order."""
    assert checkpoint.resume is not None
    optimizer = unflatten(checkpoint.resume.state["optimizer"], checkpoint.resume.tensors)
    (group,) = optimizer["param_groups"]
    names = [name for name, _ in checkpoint.model.named_parameters()]
    return {name: optimizer["state"][n][key] for name, n in zip(names, group["params"], strict=True)}


@pytest.mark.parametrize(("optimizer", "key"), [("sgd", "momentum_buffer"), ("adamw", "exp_avg_sq")])
def test_moments_are_cut_and_training_goes_on(tmp_path: Path, optimizer: str, key: str) -> None:
    net, thin = tmp_path / "net.pt", tmp_path / "thin.pt"
    options = ("--epochs", "3", "--optimizer", optimizer, *DATA)
    run("train", "--arch", "resnet20", "--arg", "base=8", *options, "--stop-after", "2", "-o", str(net))
    last = tmp_path / "net.run" / "last.pt"
    run("prune", str(last), "--method", "l1", "--rate", "0.5", "-q", "-o", str(thin))
    before, after = load(last, tables()), load(thin, tables())
    small = dict(after.model.named_parameters())
    found, dense = moments(after, key), moments(before, key)
    weights = dict(before.model.named_parameters())
    assert any(small[name].shape != weights[name].shape for name in small)
    for name, moment in found.items():
        assert moment.shape == small[name].shape
        # where weights are all different, those that stayed tell which moments had to
        places = {value: n for n, value in enumerate(weights[name].flatten().tolist())}
        if len(places) == weights[name].numel():
            chosen = [places[value] for value in small[name].flatten().tolist()]
            assert torch.equal(moment.flatten(), dense[name].flatten()[chosen]), name

    run("train", str(thin), "--resume", *options, "-o", str(tmp_path / "done.pt"))
    done = load(tmp_path / "done.pt", tables())
    assert [step.verb for step in done.history] == ["train", "prune", "train"]
    assert done.resume is None
    assert [p.shape for p in done.model.parameters()] == [p.shape for p in after.model.parameters()]
    assert any(
        not torch.equal(a, b) for a, b in zip(done.model.parameters(), after.model.parameters(), strict=True)
    )
    rows = (tmp_path / "done.run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 3


def test_other_options_are_refused_after_a_cut_too(tmp_path: Path) -> None:
    net, thin = tmp_path / "net.pt", tmp_path / "thin.pt"
    train = ("train", "--arch", "lenet", "--epochs", "3", *DATA)
    run(*train, "--stop-after", "1", "-o", str(net))
    run("prune", str(tmp_path / "net.run" / "last.pt"), "--method", "l1", "-q", "-o", str(thin))
    result = CliRunner().invoke(app, ["train", str(thin), "--resume", "--epochs", "3", "--lr", "0.5", *DATA])
    assert result.exit_code == 1
    assert "--resume goes on with the same options only: lr" in result.stderr


def test_moments_of_another_shape_are_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(
        "import torch\n"
        "class Factored(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        super().step(closure)\n"
        "        for group in self.param_groups:\n"
        "            for p in group['params']:\n"
        "                self.state[p]['rows'] = torch.ones(p.shape[0], 2)\n"
        "def make(groups, lr):\n"
        "    return Factored(groups, lr=lr)\n"
    )
    net, thin = tmp_path / "net.pt", tmp_path / "thin.pt"
    own = ("--optimizer", f"{tmp_path / 'my.py'}:make")
    run("train", "--arch", "lenet", "--epochs", "2", "--stop-after", "1", *own, *DATA, "-o", str(net))
    last = str(tmp_path / "net.run" / "last.pt")
    said = run("prune", last, "--method", "l1", "-q", "-o", str(thin))
    assert "the training that the file could resume is left out: rows of" in said
    assert load(thin, tables()).resume is None


def test_training_that_changed_the_weights_is_not_the_old_one(tmp_path: Path) -> None:
    net = tmp_path / "net.pt"
    run("train", "--arch", "lenet", "--epochs", "2", "--stop-after", "1", *DATA, "-o", str(net))
    last = str(tmp_path / "net.run" / "last.pt")
    for name, more in (("tuned", ("--finetune-epochs", "1")), ("fresh", ("--from-scratch",))):
        output = tmp_path / f"{name}.pt"
        run("prune", last, "--method", "l1", *more, *DATA, "-o", str(output))
        assert load(output, tables()).resume is None
