"""Ten of the networks of `benchmarks/export_verdicts.py`: true files are accepted, planted faults refused."""

from pathlib import Path

import pytest

import verdict_faults as faults

NETWORKS = [
    ("classifier", 60, "float"), ("depthwise", 0, "float"), ("autoencoder", 60, "float"),
    ("offset", 0, "float"), ("tiny", 0, "float"), ("residual", 60, "int8"), ("unet", 0, "int8"),
    ("attention", 60, "int8"), ("normed", 60, "int4"), ("classifier", 60, "codec"),
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::cctool.CctoolWarning")


@pytest.mark.parametrize(("toy", "steps", "state"), NETWORKS)
def test_true_files_are_accepted_and_faults_are_not(toy: str, steps: int, state: str, tmp_path: Path) -> None:
    made = faults.exported(faults.checkpoint(toy, steps, state), tmp_path / "a.onnx")
    for seed in (3, 4):
        truth = faults.judged(made, made.path, seed)
        assert isinstance(truth, list), truth
    planted = 0
    for seed, fault in enumerate(faults.FAULTS):
        if not faults.plant(made, fault, tmp_path / "b.onnx", seed):
            continue
        planted += 1
        if isinstance(faults.judged(made, tmp_path / "b.onnx", seed), list):
            assert faults.moved(made, tmp_path / "b.onnx", truth) < 1, fault
    assert planted >= 2
