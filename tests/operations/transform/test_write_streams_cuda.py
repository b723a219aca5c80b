"""Streams of maps that a CUDA device computed."""

from pathlib import Path

import pytest

from cctool.base.runtime import Silent
from cctool.operations import pipeline
from cctool.operations.inspect import decode, evaluate
from cctool.options.common import RuntimeOptions
from cctool.options.inspect.decode import DecodeOptions
from cctool.options.inspect.evaluate import EvaluateOptions
from coded_toys import DATA, lenet_file, transformed

pytestmark = pytest.mark.cuda


def test_maps_go_through_bytes_and_decode_on_the_device(tmp_path: Path) -> None:
    coded = transformed(lenet_file(tmp_path), tmp_path / "c.pt")
    runtime = RuntimeOptions(device="cuda", deterministic=True)
    reports = [
        pipeline.read(
            evaluate.run,
            EvaluateOptions(data=DATA, **options),  # type: ignore[arg-type]
            pipeline.Request("evaluate", coded.path, runtime=runtime),
        )
        for options in ({}, {"through_bitstream": True, "bitstream": str(tmp_path / "maps")})
    ]
    assert reports[1].metrics == reports[0].metrics
    sizes = [stream.file_bytes for stream in reports[1].streams]
    assert [8 * size for size in sizes] == [tap.bits for tap in reports[0].taps]
    found = decode.run(
        DecodeOptions((str(tmp_path / "maps"),), str(tmp_path / "npy")), RuntimeOptions("cuda"), Silent()
    )
    assert {maps.verdict for maps in found.maps} == {"identical"}
