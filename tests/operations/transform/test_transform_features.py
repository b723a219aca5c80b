"""`transform --target features`: calibration, tables, sites, files, fine-tuning with codecs in the loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor, nn

from cctool.base.errors import SpecError, TransformError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations import registries as composition
from cctool.operations.context import Outcome
from cctool.operations.data import feed_of
from cctool.operations.inspect import evaluate
from cctool.operations.keep.calibrate import recalibrate_taps
from cctool.operations.registries import tables
from cctool.operations.train import run as train
from cctool.operations.transform import run as transform
from cctool.options.common import DataOptions, RuntimeOptions
from cctool.options.inspect.evaluate import EvaluateOptions, SplitName
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import TrainOptions
from cctool.options.transform.choices import Norm, Prequantizer, TransformPreset, TransformTarget
from cctool.options.transform.options import FeatureOptions, TransformOptions
from cctool.transforms.codec.steps import NEVER
from cctool.transforms.codec.taps import bypassed, drop_taps, recording, stale_taps, state_of, taps_of
from option_toys import asked
from procedure_toys import Listening, context, digits

DIGITS = DataOptions(data="digits", limit=64, batch_size=32)


def built(architecture: str = "resnet20", **arguments: Any) -> Checkpoint:
    torch.manual_seed(0)
    arguments = {"in_channels": 1, "num_classes": 10, "base": 4} | arguments
    model = registry.build(architecture, arguments).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    spec = ModelSpec(
        architecture=architecture,
        arguments=arguments,
        input_shape=(1, 32, 32),
        data="digits",
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    return Checkpoint(model, spec)


def options(kernel: str = "dct", **features: Any) -> TransformOptions:
    return TransformOptions(
        target=TransformTarget.FEATURES,
        kernel=kernel,
        features=FeatureOptions(**({"calibration": 32} | features)),
        data=DIGITS,
    )


def coded(checkpoint: Checkpoint | None = None, kernel: str = "dct", **features: Any) -> Outcome:
    (outcome,) = transform.run(checkpoint or built(), options(kernel, **features), context())
    return outcome


def codecs(outcome: Outcome) -> dict[str, Any]:
    return {name: hook.codec for name, hook in taps_of(outcome.checkpoint.model).items()}


def images(n: int = 4) -> Tensor:
    return torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_residual_block_of_a_resnet20_is_tapped() -> None:
    outcome = coded()
    assert list(codecs(outcome)) == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    shapes = [hook.shape for hook in taps_of(outcome.checkpoint.model).values()]
    assert shapes == [(4, 32, 32)] * 3 + [(8, 16, 16)] * 3 + [(16, 8, 8)] * 3
    assert [tap.name for tap in outcome.report.taps] == list(codecs(outcome))


def test_the_blocks_of_a_network_without_additions() -> None:
    outcome = coded(built("mobilenet_student", base=2))
    assert list(codecs(outcome)) == [f"cnn.{i}" for i in range(1, 8)]
    # Its pointwise convolutions have no ReLU behind them: minima are negative.
    assert {codec.prequantizer for codec in codecs(outcome).values()} == {"offset"}
    assert all(state_of(outcome.checkpoint.model, name).bounds[0] < 0 for name in codecs(outcome))
    assert any("negative" in note for note in outcome.notes)
    assert all(tap.sqnr_db is not None and tap.sqnr_db > 12 for tap in outcome.report.taps)


def test_ranges_are_those_of_the_uncoded_network_on_training_images() -> None:
    checkpoint = built()
    outcome = coded(checkpoint, calibration=10_000)
    seen: list[Tensor] = []
    block = checkpoint.model.get_submodule("layer2.1")
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        source = digits(limit=64)
        for batch in feed_of(checkpoint, source, DIGITS, context()).plain("train"):
            checkpoint.model(batch.images)
    handle.remove()
    bounds = state_of(outcome.checkpoint.model, "layer2.1").bounds
    maps = torch.cat(seen)
    assert bounds.tolist() == pytest.approx([float(maps.min()), float(maps.max())], rel=1e-5)
    assert codecs(outcome)["layer2.1"].images == 64


def test_the_chosen_order_has_the_fewest_bits() -> None:
    outcome = coded(calibration=64, quality=90.0)
    counts: dict[str, list[Tensor]] = {}
    model = outcome.checkpoint.model
    with (
        torch.no_grad(),
        recording(model, lambda name, s, x, y: counts.setdefault(name, []).extend(s.bands)),
    ):
        for batch in feed_of(outcome.checkpoint, digits(limit=64), DIGITS, context()).plain("train"):
            model(batch.images)
    for name, found in counts.items():
        values = np.concatenate([band.numpy().ravel() for band in found])
        u = np.where(values > 0, 2 * values, -2 * values - (values < 0)).astype(float)
        m, zeros = u[u > 0] - 1, (u == 0).sum()
        bits = [zeros + (2 + k + 2 * np.floor(np.log2(np.floor(m / 2**k) + 1))).sum() for k in range(6)]
        assert codecs(outcome)[name].k == int(np.argmin(bits))
    assert {codec.k for codec in codecs(coded(k=4)).values()} == {4}


def test_figures_are_those_of_the_maps() -> None:
    outcome = coded()
    (tap,) = [tap for tap in outcome.report.taps if tap.name == "layer1.1"]
    model, seen = outcome.checkpoint.model, []
    with torch.no_grad(), recording(model, lambda *found: seen.append(found)):
        for batch in feed_of(outcome.checkpoint, digits(limit=64), DIGITS, context()).plain("test"):
            model(batch.images)
    mine = [found[1:] for found in seen if found[0] == "layer1.1"]
    x, y = (torch.cat([found[i] for found in mine]).double().numpy() for i in (1, 2))
    symbols = np.concatenate([found[0].bands[0].numpy() for found in mine])
    assert outcome.report.split == "test"
    assert (tap.elements, tap.symbols, tap.samples) == (x.size, x.size, 64)
    assert tap.mean == pytest.approx(x.mean())
    assert (tap.minimum, tap.maximum) == pytest.approx((x.min(), x.max()))
    assert tap.zeros == pytest.approx(100 * (x == 0).mean())
    assert tap.zero_symbols == pytest.approx(100 * (symbols == 0).mean())
    assert tap.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), rel=1e-4)
    assert tap.signed
    _, counts = np.unique(symbols, return_counts=True)
    p = counts / counts.sum()
    assert tap.entropy_bits == pytest.approx(-symbols.size * (p * np.log2(p)).sum())
    assert tap.entropy_bits < min(tap.payload_bits)
    diagonal = np.add.outer(np.arange(32) % 8, np.arange(32) % 8)
    for band in tap.bands:
        assert sum(band.counts) == symbols[:, :, diagonal == int(band.name)].size
        assert band.counts[0] == (symbols[:, :, diagonal == int(band.name)] == 0).sum()


@pytest.mark.parametrize("kernel", ["dct", "dwt", "klt", "identity"])
def test_a_coded_network_goes_through_a_file(kernel: str, tmp_path: Path) -> None:
    channels = kernel != "dwt"
    outcome = coded(kernel=kernel, channel_klt=channels)
    composition.save(outcome.checkpoint, tmp_path / "c.pt")
    loaded = load(tmp_path / "c.pt", tables())
    with torch.no_grad():
        assert torch.equal(loaded.model(images()), outcome.checkpoint.model(images()))
    assert codecs(Outcome(loaded, None)) == codecs(outcome)
    assert stale_taps(loaded.model) == ()
    composition.save(outcome.checkpoint, tmp_path / "c.safetensors")
    assert torch.equal(load(tmp_path / "c.safetensors", tables()).model(images()), loaded.model(images()))


def test_calibrated_bases_compress_more_than_none() -> None:
    """The KLT's basis is that of scipy's eigenvectors of the blocks' rows."""
    outcome = coded(kernel="klt", taps=("layer1.0",), calibration=64)
    state = state_of(outcome.checkpoint.model, "layer1.0")
    maps = []
    with torch.no_grad(), recording(outcome.checkpoint.model, lambda n, s, x, y: maps.append(x)):
        for batch in feed_of(outcome.checkpoint, digits(limit=64), DIGITS, context()).plain("train"):
            outcome.checkpoint.model(batch.images)
    rows = torch.cat(maps).double().numpy().reshape(-1, 8)
    values, vectors = scipy.linalg.eigh(rows.T @ rows)
    for basis, expected in zip(state.bases["rows"].numpy(), vectors.T[::-1], strict=True):
        assert abs(basis @ expected) == pytest.approx(1, abs=0.02)
    assert values[-1] > values[0]
    dct, dst = (coded(kernel=kernel, taps=("layer1.0",)).report.taps[0] for kernel in ("dct", "dst"))
    assert outcome.report.taps[0].payload_bits[1] < dst.payload_bits[1]
    assert outcome.report.taps[0].payload_bits[1] < 1.05 * dct.payload_bits[1]


def test_fine_tuning_with_codecs_in_the_loop_improves(tmp_path: Path) -> None:
    """On the images that it trains on, so that a few steps show."""
    fit = FitOptions(epochs=3, optimizer="adam", lr=3e-3)
    data = DataOptions(data="digits", limit=96, batch_size=16)
    request = {"runtime": RuntimeOptions(device="cpu"), "force": True}
    spec = built().spec.model_copy(update={"architecture": "lenet", "arguments": {}})
    torch.manual_seed(0)
    composition.save(Checkpoint(registry.build("lenet", {}), spec), tmp_path / "m.pt")

    def command(verb: str, operation: Any, given: Any, source: str, output: str) -> None:
        paths = str(tmp_path / f"{source}.pt"), str(tmp_path / f"{output}.pt")
        list(pipeline.write(operation, given, pipeline.Request(verb, *paths, **request)))  # type: ignore[arg-type]

    command("train", train.run, TrainOptions(fit=fit, data=data), "m", "t")
    command("transform", transform.run, options(taps=("features.1", "features.5"), quality=3.0), "t", "c")
    command("train", train.run, TrainOptions(fit=fit, data=data), "c", "f")
    before, after = (load(tmp_path / f"{name}.pt", tables()) for name in "cf")
    assert codecs(Outcome(after, None)) == codecs(Outcome(before, None))
    loss = {
        name: pipeline.read(
            evaluate.run,
            EvaluateOptions(data=data, split=SplitName.TRAIN),
            pipeline.Request("evaluate", str(tmp_path / f"{name}.pt"), None, **request),  # type: ignore[arg-type]
        ).metrics.values["loss"]
        for name in "tcf"
    }
    assert loss["t"] < loss["c"]
    assert loss["f"] < 0.8 * loss["c"]
    # The layers before the taps learn, too: gradients pass the codecs.
    for name, value in after.model.named_parameters():
        assert not torch.equal(value, before.model.get_parameter(name)), name
    assert stale_taps(after.model) == tuple(codecs(Outcome(after, None)))
    assert stale_taps(before.model) == ()


def test_recalibration_finds_new_ranges_and_keeps_the_rest() -> None:
    checkpoint = coded(quality=80.0).checkpoint
    with torch.no_grad():
        checkpoint.model.get_parameter("layer1.0.bn2.weight").mul_(3)
    before = {name: state_of(checkpoint.model, name) for name in taps_of(checkpoint.model)}
    assert len(stale_taps(checkpoint.model)) == 9
    again = recalibrate_taps(checkpoint, digits(limit=64), DIGITS, context())
    assert stale_taps(again.model) == ()
    for name, hook in taps_of(again.model).items():
        old = before[name].config
        assert hook.codec == old.model_copy(update={"k": hook.codec.k, "table": hook.codec.table})
        # The default table follows the spread of the maps: one factor for all of its steps.
        ratios = [new / step for new, step in zip(hook.codec.table, old.table, strict=True)]
        assert max(ratios) == pytest.approx(min(ratios))
    assert state_of(again.model, "layer1.0").bounds[1] > 1.5 * before["layer1.0"].bounds[1]
    assert {edit["fingerprint"] for edit in again.spec.edits} != {
        edit["fingerprint"] for edit in checkpoint.spec.edits
    }


def test_allocated_steps_go_where_they_matter_and_are_found_again(tmp_path: Path) -> None:
    checkpoint = coded(allocate=True, channel_klt=True).checkpoint
    last, usual = codecs(Outcome(checkpoint, None))["layer3.2"], codecs(coded())["layer3.2"]
    # What is averaged behind it needs the blocks' means alone.
    assert last.table[1] > 100 * last.table[0]
    assert usual.table[1] < 2 * usual.table[0]
    composition.save(checkpoint, tmp_path / "c.pt")
    again = load(tmp_path / "c.pt", tables())
    assert codecs(Outcome(again, None)) == codecs(Outcome(checkpoint, None))
    with torch.no_grad():
        again.model.get_parameter("layer3.0.bn1.weight").mul_(4)
    found = codecs(Outcome(recalibrate_taps(again, digits(limit=64), DIGITS, context()), None))
    assert found["layer1.0"].allocated
    assert found["layer3.0"].table != codecs(Outcome(checkpoint, None))["layer3.0"].table


def test_presets_with_tables_of_their_own_take_no_allocation() -> None:
    chosen = asked(TransformOptions, TransformPreset.FEATURE_COMPRESSION_DWT, data=DIGITS, allocate=True)
    with pytest.raises(UsageError, match="--allocate chooses the steps that --preset"):
        next(transform.run(built(), chosen, context()))
    for other in ({"norm": Norm.NONE}, {"q_table": "t.csv"}):
        with pytest.raises(UsageError, match="--allocate"):
            FeatureOptions(allocate=True, **other)  # type: ignore[arg-type]


def test_taps_that_are_there_are_replaced() -> None:
    first = coded(quality=2.0)
    second = coded(first.checkpoint, taps=("layer3.2",), quality=95.0)
    assert list(codecs(second)) == ["layer3.2"]
    assert any("9 taps" in note for note in second.notes)
    assert second.metrics_before == first.metrics_after
    assert len(codecs(first)) == 9  # what came in stays


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "dst"},
        {"kernel": "haar"},
        {"taps": ("layer2.*",)},
        {"bits": 5},
        {"symbol_bits": 3},
        {"norm": Norm.NONE},
        {"mean_shift": True},
        {"block": 4},
        {"prequantizer": Prequantizer.SIGNED},
        {"quality": 20.0},
        {"dead_zone": 0.3},
        {"channel_klt": True},
        {"allocate": True},
        {"calibration": 2},
        {"k": 5},
    ],
)
def test_every_option_changes_the_bits(change: dict[str, Any]) -> None:
    checkpoint = built()
    before, after = coded(checkpoint).report, coded(checkpoint, **change).report
    assert before.ratio_8bit != after.ratio_8bit


def test_levels_change_the_bits() -> None:
    assert coded(kernel="haar", levels=1).report.ratio_8bit != coded(kernel="haar").report.ratio_8bit


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("flat.json", "[7]", {"layer1.0": (7.0,), "layer3.2": (7.0,)}),
        ("flat.csv", "7\n", {"layer1.0": (7.0,), "layer3.2": (7.0,)}),
        ("rows.json", json.dumps([[2.0] * 8] * 8), {"layer1.0": (2.0,) * 64}),
        ("rows.csv", "\n".join([",".join(["2"] * 8)] * 8), {"layer1.0": (2.0,) * 64}),
        (
            "patterns.json",
            json.dumps({"layer3.2": [5] + [1e6] * 14, "layer1.*": [3]}),
            {"layer3.2": (5.0, *(NEVER,) * 14), "layer1.0": (3.0,)},
        ),
        ("patterns.csv", "layer3.2,4\nlayer1.*,3\n", {"layer3.2": (4.0,), "layer1.0": (3.0,)}),
    ],
)
def test_tables_come_from_files(name: str, text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    outcome = coded(q_table=str(tmp_path / name))
    found = codecs(outcome)
    assert {tap: found[tap].table for tap in expected} == expected
    if "patterns" in name:
        assert found["layer2.0"].table == codecs(coded())["layer2.0"].table


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.json", "[1, 2]", r"2 steps; 1 or 15 or 64"),
        ("t.json", "{}", "no numbers"),
        ("t.json", "[]", "0 steps"),
        ("t.json", "[-1]", "positive"),
        ("t.json", "[NaN]", "positive"),
        ("t.json", '{"*": "x"}', "a list of numbers"),
        ("t.json", "[", "Expecting"),
        ("t.csv", "a,b\n", "could not convert"),
        ("t.csv", "\xff", "0 steps"),
    ],
)
def test_bad_tables_are_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words):
        coded(q_table=str(tmp_path / name))


def test_a_table_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="No such file"):
        coded(q_table="nowhere.json")


@pytest.mark.parametrize("preset", [preset for preset in TransformPreset if preset != "thesis-basis"])
def test_presets_have_the_published_tables(preset: TransformPreset) -> None:
    made = asked(TransformOptions, preset, data=DIGITS, calibration=32)
    (outcome,) = transform.run(built(), made, context())
    found = codecs(outcome)
    first, last = found["layer1.0"], found["layer3.2"]
    assert first.symbol_bits == last.symbol_bits == 8
    if preset is TransformPreset.FEATURE_COMPRESSION_DWT:
        assert (first.kernel, first.levels, first.mean_shift, first.original_units) == ("dwt", 3, True, True)
        assert first.table == (0.1,) * 4
        assert last.table == (NEVER,) * 3 + (1.0,)
    elif preset is TransformPreset.FEATURE_COMPRESSION_DCT:
        assert (first.kernel, first.norm, first.mean_shift) == ("dct", "none", False)
        assert first.table == (25.0,) * 8 + (50.0,) * 6 + (100.0,)
        assert last.table == (25.0,) + (NEVER,) * 14
    else:
        assert first.table == (150.0,) + (50.0,) * 7 + (100.0,) * 6 + (200.0,)
        assert last.table == (150.0,) + (NEVER,) * 14
    assert {codec.table for codec in list(found.values())[:-1]} == {first.table}


def test_the_published_inference_table_saturates_and_ours_does_not() -> None:
    made = asked(TransformOptions, TransformPreset.FEATURE_COMPRESSION_DCT, data=DIGITS, calibration=32)
    (published,) = transform.run(built(), made, context())
    assert sum(tap.clamped_symbols for tap in published.report.taps) > 0
    assert any("saturate" in note for note in published.notes)
    assert sum(tap.clamped_symbols for tap in coded().report.taps) == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kernel": "fft"}, UsageError, "kernel fft"),
        ({"taps": ("nothing",)}, UsageError, "no module has such a name"),
        ({"taps": ("fc",)}, TransformError, r"fc returns \[2, 10\]"),
        ({"kernel": "identity", "quality": 30.0}, UsageError, "one quantizer"),
        ({"kernel": "haar", "norm": Norm.NONE}, UsageError, "norm none"),
        ({"kernel": "identity", "allocate": True}, UsageError, "one quantizer"),
    ],
)
def test_what_cannot_be_coded_is_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        coded(**change)


def test_a_network_without_blocks_says_so() -> None:
    with pytest.raises(UsageError, match="no residual blocks; name modules"):
        coded(
            Checkpoint(registry.build("lenet", {}), built().spec.model_copy(update={"architecture": "lenet"}))
        )


def test_values_outside_of_the_range_are_told() -> None:
    notes = coded(built("mobilenet_student", base=2), prequantizer=Prequantizer.UNSIGNED).notes
    assert any("outside of the integers' range" in note for note in notes)


def test_without_data_nothing_is_calibrated() -> None:
    checkpoint = built()
    checkpoint = Checkpoint(checkpoint.model, checkpoint.spec.model_copy(update={"data": None}))
    made = TransformOptions(target=TransformTarget.FEATURES)
    with pytest.raises(UsageError, match="needs data"):
        list(transform.run(checkpoint, made, context()))


def test_a_file_that_says_something_else_of_its_taps_is_refused(tmp_path: Path) -> None:
    outcome = coded(channel_klt=True)
    checkpoint = outcome.checkpoint
    edits = list(checkpoint.spec.edits)
    edits[0] = edits[0] | {"codec": edits[0]["codec"] | {"channel_klt": False}}  # type: ignore[operator]
    wrong = Checkpoint(checkpoint.model, checkpoint.spec.model_copy(update={"edits": tuple(edits)}))
    composition.save(wrong, tmp_path / "c.pt")
    with pytest.raises(SpecError, match="unexpected"):
        load(tmp_path / "c.pt", tables())


def test_notes_and_tables_are_said() -> None:
    report = coded().report
    ((title, columns, rows),) = report.tables()
    assert "dct" in title
    assert len(rows) == 10
    assert all(len(row) == len(columns) for row in rows)
    assert rows[-1][0] == "all"
    listening = context().reporter
    assert isinstance(listening, Listening)


def test_dropping_taps_gives_the_network_back() -> None:
    checkpoint = built()
    model = coded(checkpoint).checkpoint.model
    with torch.no_grad():
        with bypassed(model):
            assert torch.equal(model(images()), checkpoint.model(images()))
        drop_taps(model)
        assert torch.equal(model(images()), checkpoint.model(images()))
