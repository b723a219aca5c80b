"""Streams of coded maps: what is stated is written, and what is written decodes to what was passed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cctool.base.errors import BitstreamError, CheckpointError, UsageError
from cctool.base.runtime import Silent
from cctool.checkpoint.checkpoint import load
from cctool.cli.main import app
from cctool.data.sets.digits import open_digits
from cctool.operations.inspect import decode
from cctool.operations.registries import tables
from cctool.operations.transform import write_streams as bitstreams
from cctool.operations.transform.stream_index import Index, read_index, write_index
from cctool.options.common import DataOptions, Precision, RuntimeOptions
from cctool.options.inspect.decode import DecodeOptions
from cctool.transforms.codec.codec import CodecConfig
from cctool.transforms.codec.taps import CalibratedTap, recording, set_taps
from coded_toys import TAPS, evaluated, images, lenet_file, passed_maps, transformed, twice_passed

KERNELS: dict[str, dict[str, Any]] = {
    "dct": {},
    "dwt": {"levels": 2},
    "identity": {},
    "klt": {"channel_klt": True, "bits": 10},
}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lenet_file(tmp_path_factory.mktemp("streams"))


@pytest.fixture(scope="module")
def coded(net: Path) -> Path:
    return Path(transformed(net, net.with_name("coded.pt")).path)


@pytest.fixture(scope="module")
def written(coded: Path) -> Path:
    evaluated(coded, bitstream=str(coded.with_name("maps")))
    return coded.with_name("maps")


def decoded(source: Path, output: Path, *, force: bool = False) -> decode.DecodeReport:
    return decode.run(
        DecodeOptions((str(source),), str(output), force), RuntimeOptions(device="cpu"), Silent()
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_stated_bits_are_the_files(net: Path, kernel: str, tmp_path: Path) -> None:
    product = transformed(net, tmp_path / "c.pt", kernel, **KERNELS[kernel])
    report = evaluated(Path(product.path), bitstream=str(tmp_path / "maps"))
    assert [stream.tap for stream in report.streams] == list(TAPS)
    for stream, tap in zip(report.streams, report.taps, strict=True):
        size = Path(str(stream.file)).stat().st_size
        assert stream.payload_bits + stream.side_bits == 8 * stream.file_bytes == 8 * size
        # Counted from histograms alone, by code that writes nothing.
        assert (tap.bits, tap.payload_bits[tap.k], tap.side_bits) == (
            8 * size,
            stream.payload_bits,
            stream.side_bits,
        )
        assert stream.ratio_8bit == pytest.approx(tap.elements / size)
        assert stream.bits_per_element == pytest.approx(8 * size / tap.elements)
    maps = decoded(tmp_path / "maps", tmp_path / "npy").maps
    assert {found.verdict for found in maps} == {"identical"}
    passed = passed_maps(Path(product.path))
    for found in maps:
        assert np.array_equal(np.load(found.file), passed[found.name])


def test_another_process_decodes_identical_maps(coded: Path, written: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "cctool", "decode", str(written), "-o", str(tmp_path / "npy")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    files = [tmp_path / "npy" / f"{name}.npy" for name in TAPS]
    assert done.stdout.split() == list(map(str, files))
    assert done.stderr.count("identical") == len(TAPS)
    passed = passed_maps(coded)
    for name, file in zip(TAPS, files, strict=True):
        maps = np.load(file, mmap_mode="r")
        assert maps.dtype == np.float32
        assert np.array_equal(maps, passed[name])


def test_one_file_decodes_with_the_index_beside_it_and_without(written: Path, tmp_path: Path) -> None:
    (found,) = decoded(written / "features.5.seg", tmp_path / "a").maps
    assert (found.shape, found.verdict) == ((40, 16, 5, 5), "identical")
    alone = tmp_path / "alone.seg"
    alone.write_bytes((written / "features.5.seg").read_bytes())
    (other,) = decoded(alone, tmp_path / "b").maps
    assert other.verdict == "unverified, no index"
    assert np.array_equal(np.load(other.file), np.load(found.file))


def logits(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> torch.Tensor:
    """Logits of `evaluate`, by a look at what it counts."""
    from cctool.training import evaluate as training

    seen: list[torch.Tensor] = []
    outputs_of = training.outputs_of

    def spy(*arguments: Any) -> Any:
        for outputs, batch in outputs_of(*arguments):
            seen.append(outputs.clone())
            yield outputs, batch

    with monkeypatch.context() as patch:
        patch.setattr(training, "outputs_of", spy)
        evaluated(path, **options)
    return torch.cat(seen)


@pytest.mark.parametrize("precision", [Precision.FULL, Precision.BF16])
def test_through_the_bitstream_logits_are_identical(
    coded: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: Precision
) -> None:
    plain = logits(coded, monkeypatch, precision=precision)
    through = logits(coded, monkeypatch, precision=precision, through_bitstream=True)
    folder = str(tmp_path / "maps")
    both = logits(coded, monkeypatch, precision=precision, through_bitstream=True, bitstream=folder)
    assert torch.equal(through, plain)
    assert torch.equal(both, plain)
    assert {maps.verdict for maps in decoded(tmp_path / "maps", tmp_path / "npy").maps} == {"identical"}


def test_what_goes_on_comes_out_of_the_bytes(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logits(coded, monkeypatch)

    def spoiled(*arguments: Any) -> torch.Tensor:
        return bitstreams_decoded(*arguments) * 0.5

    bitstreams_decoded = bitstreams.decoded_maps
    monkeypatch.setattr(bitstreams, "decoded_maps", spoiled)
    assert torch.equal(logits(coded, monkeypatch), plain)
    assert not torch.allclose(logits(coded, monkeypatch, through_bitstream=True), plain)


def test_through_the_bitstream_alone_keeps_nothing(coded: Path, tmp_path: Path) -> None:
    before = sorted(coded.parent.iterdir())
    report = evaluated(coded, through_bitstream=True)
    assert sorted(coded.parent.iterdir()) == before
    assert all(stream.file is None and stream.file_bytes > 0 for stream in report.streams)
    assert report.written == ()


def test_a_module_that_is_passed_twice(tmp_path: Path) -> None:
    model = twice_passed()
    codec = CodecConfig(kernel="dct", table=(4.0,), mean_shift=True)
    set_taps(model, {"0": CalibratedTap(codec, (3, 12, 9), "", torch.tensor([0.0, 2.0]))})
    (tmp_path / "maps").mkdir()
    sink = bitstreams.Bitstreams(model, tmp_path / "maps", through=True)
    passed: list[torch.Tensor] = []
    model.get_submodule("0").register_forward_hook(lambda module, args, output: passed.append(output))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(n, 3, 12, 9, generator=generator) for n in (3, 1)]
    with torch.no_grad(), recording(model, sink):
        for images in sink.batches(batches):  # type: ignore[arg-type]
            model(images)
    figures, entries = sink.finish(tmp_path / "maps")
    write_index(Index(network="", data="", split="", made_with="", streams=entries), tmp_path / "maps")
    assert figures[0].elements == 2 * 4 * 3 * 12 * 9
    first, second = decoded(tmp_path / "maps", tmp_path / "npy").maps
    assert (Path(first.file).name, Path(second.file).name) == ("0.npy", "0.pass2.npy")
    for found, maps in ((first, passed[0::2]), (second, passed[1::2])):
        assert found.verdict == "identical"
        assert np.array_equal(np.load(found.file), torch.cat(maps).numpy())


def test_unlabelled_images_are_written_too(coded: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i, image in enumerate(open_digits("digits").split("test").images[:5]):
        Image.fromarray(image[0].numpy()).save(tmp_path / "photos" / f"{i}.png")
    data = DataOptions(data=f"folder:{tmp_path / 'photos'}", batch_size=2)
    report = evaluated(coded, data=data, bitstream=str(tmp_path / "maps"))
    assert report.metrics is None
    assert [maps.shape[0] for maps in decoded(tmp_path / "maps", tmp_path / "npy").maps] == [5, 5, 5]


def test_an_existing_folder_needs_force(coded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    first = evaluated(coded, bitstream=str(folder))
    with pytest.raises(CheckpointError, match="exists already"):
        evaluated(coded, bitstream=str(folder))
    again = evaluated(coded, bitstream=str(folder), force=True)
    assert again.streams == first.streams
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        evaluated(coded, bitstream=str(folder), force=True)


def test_a_network_without_taps_has_no_streams(net: Path, tmp_path: Path) -> None:
    for options in (
        {"bitstream": str(tmp_path / "maps")},
        {"through_bitstream": True},
        {"report_file": str(tmp_path / "a.csv")},
        {"histograms": str(tmp_path / "h")},
    ):
        with pytest.raises(UsageError, match="this network has none"):
            evaluated(net, **options)
    assert list(tmp_path.iterdir()) == []
    assert evaluated(net).taps == ()


def damaged(written: Path, tmp_path: Path, change: Any, *, index: bool) -> Path:
    folder = tmp_path / "damaged"
    folder.mkdir()
    data = bytearray((written / "features.5.seg").read_bytes())
    (folder / "features.5.seg").write_bytes(change(data))
    if index:
        entry = next(e for e in read_index(written).streams if e.tap == "features.5")
        write_index(Index(network="", data="", split="", made_with="", streams=(entry,)), folder)
    return folder / "features.5.seg"


def flip(place: float) -> Any:
    def change(data: bytearray) -> bytes:
        data[int(place * len(data))] ^= 4
        return bytes(data)

    return change


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        flip(0.0),
        flip(0.05),
        flip(0.5),
        flip(0.999),
        lambda d: bytes(d[:-1]),
        lambda d: bytes(d[:900]),
        bytes(0).join,
    ],
    ids=["magic", "header", "payload", "end", "cut by a byte", "cut", "empty"],
)
def test_damage_is_an_error_that_leaves_nothing(
    written: Path, tmp_path: Path, change: Any, *, index: bool
) -> None:
    change = (lambda d: b"") if change == bytes(0).join else change
    path = damaged(written, tmp_path, change, index=index)
    result = CliRunner().invoke(app, ["decode", str(path), "-o", str(tmp_path / "npy")])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "features.5.seg" in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]


def test_an_index_that_lies_is_refused(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lying"
    folder.mkdir()
    for file in written.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = json.loads((written / "index.json").read_text())
    for change, message in (
        (lambda d: d["streams"][1].update(file="../net.pt"), "no file beside it"),
        (lambda d: d["streams"][1].update(file="missing.seg"), "no file beside it"),
        (lambda d: d["streams"][1]["passes"][0].update(symbols="0" * 64), "other symbols"),
        (lambda d: d["streams"][1]["passes"][0].update(shape=[41, 16, 5, 5]), "other maps"),
        (lambda d: d["streams"][1].update(sha256="0" * 64), "altered or cut off"),
        (lambda d: d.update(run="rm"), "malformed at run"),
        (lambda d: d["streams"].append(d["streams"][1]), r"names .*\.seg twice"),
    ):
        found = json.loads(json.dumps(text))
        change(found)
        (folder / "index.json").write_text(json.dumps(found))
        with pytest.raises(BitstreamError, match=message):
            decoded(folder, tmp_path / "npy")
        assert not (tmp_path / "npy").exists()
    found = json.loads(json.dumps(text))
    found["streams"][1]["passes"][0]["maps"] = "0" * 64
    (folder / "index.json").write_text(json.dumps(found))
    verdicts = [maps.verdict for maps in decoded(folder, tmp_path / "npy").maps]
    assert verdicts == ["identical", "rounded otherwise", "identical"]


def test_a_stream_is_named_once(written: Path, tmp_path: Path) -> None:
    one = next(written.glob("*.seg"))
    for sources in ((one, one), (written, one), (written, written)):
        options = DecodeOptions(tuple(map(str, sources)), str(tmp_path / "npy"))
        with pytest.raises(UsageError, match="is named twice"):
            decode.run(options, RuntimeOptions(device="cpu"), Silent())
    assert not (tmp_path / "npy").exists()


def test_decode_wants_its_own_folder(written: Path, tmp_path: Path) -> None:
    decoded(written, tmp_path / "npy")
    with pytest.raises(CheckpointError, match="exists already"):
        decoded(written, tmp_path / "npy")
    decoded(written, tmp_path / "npy", force=True)
    with pytest.raises(UsageError, match="no such folder of streams"):
        decoded(tmp_path / "nowhere", tmp_path / "b")
    with pytest.raises(BitstreamError, match=r"has no index\.json"):
        decoded(tmp_path / "npy", tmp_path / "b")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["npy"]


def test_the_command_shows_taps_and_gives_json(coded: Path, tmp_path: Path) -> None:
    line = ["evaluate", str(coded), "--limit", "20", "--device", "cpu"]
    shown = CliRunner().invoke(app, line)
    assert "top-1" in shown.stdout
    assert "coded feature maps, test split" in shown.stderr
    done = CliRunner().invoke(app, [*line, "--bitstream", str(tmp_path / "maps"), "--json"])
    report = json.loads(done.stdout)
    assert [tap["name"] for tap in report["taps"]] == list(TAPS)
    assert "bands" not in report["taps"][0]
    assert report["streams"][0]["file_bytes"] == (tmp_path / "maps" / "features.2.seg").stat().st_size
    assert report["written"] == [str(tmp_path / "maps")]
    again = CliRunner().invoke(app, [*line, "--bitstream", str(tmp_path / "maps"), "--force"])
    assert again.stdout == f"{tmp_path / 'maps'}\n"
    line = ["decode", str(tmp_path / "maps"), "-o", str(tmp_path / "npy"), "--json"]
    document = json.loads(CliRunner().invoke(app, line).stdout)
    assert [maps["verdict"] for maps in document["maps"]] == ["identical"] * len(TAPS)


def test_the_streams_hold_no_more_than_their_batches(coded: Path, written: Path) -> None:
    # The toys' own batches are those of the command.
    assert [len(batch) for batch in images()] == [16, 16, 8]
    assert {entry.passes[0].shape[0] for entry in read_index(written).streams} == {40}
    assert load(coded, tables()).spec.input_shape == (1, 32, 32)
