"""`cctool export` from options to files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from cctool.base.errors import CheckpointError, DataError, ExportError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.spec import ModelSpec
from cctool.cli.main import app
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.inspect.export import ExportReport, run
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.inspect.export import ExportFormat, ExportOptions

STATE_DICT = ExportFormat.STATE_DICT


def written_checkpoint(path: Path, *, nan: bool = False, **spec: Any) -> Path:
    torch.manual_seed(0)
    model = registry.build("lenet", {})
    if nan:
        with torch.no_grad():
            next(model.parameters()).view(-1)[3] = torch.nan
    save(Checkpoint(model, ModelSpec(architecture="lenet", input_shape=(1, 32, 32), **spec)), path, tables())
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return written_checkpoint(tmp_path / "net.pt")


DEFAULT = ExportOptions()


def exported(source: Path, options: ExportOptions = DEFAULT, **request: Any) -> ExportReport:
    given = {"verb": "export", "source": str(source), "runtime": RuntimeOptions(device="cpu")} | request
    return pipeline.read(run, options, pipeline.Request(**given))


@pytest.mark.parametrize(
    ("options", "name", "kind"),
    [
        ({"format": STATE_DICT}, "net.state.pt", STATE_DICT),
        ({"format": ExportFormat.SAFETENSORS}, "net.state.safetensors", ExportFormat.SAFETENSORS),
        ({"output": "bare.pth"}, "bare.pth", STATE_DICT),
        ({"output": "bare.safetensors"}, "bare.safetensors", ExportFormat.SAFETENSORS),
    ],
)
def test_format_and_name_follow_each_other(
    net: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], name: str, kind: ExportFormat
) -> None:
    monkeypatch.chdir(net.parent)
    (file,) = exported(net, ExportOptions(**options)).files
    path = net.parent / name
    assert (Path(file.path).resolve(), file.format) == (path, str(kind))
    read = torch.load(path, weights_only=True) if kind is STATE_DICT else safetensors.torch.load_file(path)
    expected = load(net, tables()).model.state_dict()
    assert set(read) == set(expected)
    assert all(torch.equal(read[key], value) for key, value in expected.items())


def test_the_default_is_onnx_compared_on_the_data_that_the_spec_remembers(tmp_path: Path) -> None:
    source = written_checkpoint(tmp_path / "net.pt", data="digits")
    options = ExportOptions(data=DataOptions(limit=12, batch_size=5))
    (file,) = exported(source, options).files
    assert Path(file.path) == tmp_path / "net.onnx"
    random, digits, *_ = file.agreements
    assert random.n == 256
    assert (digits.inputs, digits.n, digits.batch_sizes) == ("digits, test split", 12, (2, 5))
    assert digits.top1_agreement == 100.0
    about = {entry.key: entry.value for entry in onnx.load(file.path).metadata_props}
    assert about["cctool.source"] == "net.pt"
    assert about["cctool.source_content_sha256"] == load(source, tables()).origin.content  # type: ignore[union-attr]


def test_data_that_is_not_there_is_a_note_where_remembered_and_an_error_where_named(tmp_path: Path) -> None:
    source = written_checkpoint(tmp_path / "net.pt", data=f"folder:{tmp_path / 'gone'}")
    (file,) = exported(source).files
    assert all("random" in agreement.inputs for agreement in file.agreements)
    assert any("random inputs only" in note for note in file.notes)
    with pytest.raises(DataError):
        exported(source, ExportOptions(data=DataOptions(data=f"folder:{tmp_path / 'none'}")), force=True)


def test_contradictions_are_wrong_usage() -> None:
    with pytest.raises(UsageError, match=r"a name for onnx.*\.pt or \.pth"):
        ExportOptions(format=STATE_DICT, output="a.onnx")
    with pytest.raises(UsageError, match="names no format"):
        ExportOptions(output="a.txt")


def test_existing_files_are_kept_unless_forced_and_the_input_always(net: Path) -> None:
    path = net.parent / "bare.pt"
    path.write_text("mine")
    options = ExportOptions(format=STATE_DICT, output=str(path))
    with pytest.raises(CheckpointError, match="exists already"):
        exported(net, options)
    assert path.read_text() == "mine"
    exported(net, options, force=True)
    assert torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match="input itself"):
        exported(net, ExportOptions(format=STATE_DICT, output=str(net)), force=True)
    load(net, tables())


def test_weights_that_are_not_finite_need_permission(tmp_path: Path) -> None:
    source = written_checkpoint(tmp_path / "net.pt", nan=True)
    options = ExportOptions(format=STATE_DICT)
    with pytest.raises(ExportError, match=r"1 NaN.*--allow-nonfinite"):
        exported(source, options)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]
    exported(source, replace(options, allow_nonfinite=True))
    assert (tmp_path / "net.state.pt").exists()


def test_the_seed_chooses_the_random_inputs(net: Path) -> None:
    errors = []
    for seed in (0, 1):
        report = exported(net, runtime=RuntimeOptions(device="cpu", seed=seed), force=True)
        errors.append(report.files[0].agreements[0].output_range)
    assert errors[0] != errors[1]


def test_the_command_prints_the_path_alone_and_talks_on_stderr(net: Path) -> None:
    result = CliRunner().invoke(app, ["export", "-", "--device", "cpu"], input=f"{net}\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{net.with_suffix('.onnx')}\n"
    assert "max abs error" in result.stderr


def test_the_input_size_can_be_named(tmp_path: Path) -> None:
    model = registry.build("resnet20", {})
    save(
        Checkpoint(model, ModelSpec(architecture="resnet20", input_shape=(3, 32, 32))),
        tmp_path / "r.pt",
        tables(),
    )
    exported(tmp_path / "r.pt", model=ModelOptions(input_shape=(3, 16, 24)))
    dims = onnx.load(tmp_path / "r.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims][1:] == [3, 16, 24]


@pytest.mark.cuda
def test_a_gpu_gives_the_same_files(net: Path) -> None:
    for kind in ExportFormat:
        contents = []
        for device in ("cpu", "cuda"):
            report = exported(
                net, ExportOptions(format=kind), runtime=RuntimeOptions(device=device), force=True
            )
            contents.append(Path(report.files[0].path).read_bytes())
        assert contents[0] == contents[1]
