from pathlib import Path

import pytest
import torch

from cctool.base.errors import ArchitectureError
from cctool.models.architectures import ARCHITECTURES
from cctool.models.registry import build, defaults, input_shape, listing


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_parameter_counts() -> None:
    counts = {record.name: record.parameters for record in listing()}
    # lenet, alexnet: by hand from the layer sizes; resnet20: He et al. with 1x1 shortcuts; student: seed 003.
    assert counts["lenet"] == 61_706
    assert counts["alexnet"] == 23_272_266
    assert counts["resnet20"] == 272_474
    assert counts["mobilenet_student"] == 256_779


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet20", 3), ("resnet32", 5), ("resnet44", 7), ("resnet56", 9), ("resnet110", 18)],
)
def test_resnet_counts_follow_the_closed_formula(name: str, blocks: int) -> None:
    def convolution(a: int, b: int, k: int) -> int:
        return a * b * k * k + 2 * b  # with its batch norm

    expected = convolution(3, 16, 3) + 64 * 10 + 10
    for before, width in ((16, 16), (16, 32), (32, 64)):
        expected += convolution(before, width, 3) + (2 * blocks - 1) * convolution(width, width, 3)
        expected += convolution(before, width, 1) if before != width else 0
    assert count(build(name, {})) == expected


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("vgg11", [64, 128, 256, 256, 512, 512, 512, 512]),
        ("vgg16", [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6),
        ("vgg19", [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8),
    ],
)
def test_vgg_counts_follow_the_closed_formula(name: str, widths: list[int]) -> None:
    pairs = zip([3, *widths[:-1]], widths, strict=True)
    assert count(build(name, {})) == sum(9 * a * b + 3 * b for a, b in pairs) + 512 * 10 + 10


def test_densenet40_count_follows_the_closed_formula() -> None:
    channels, expected = 16, 3 * 16 * 9
    for block in range(3):
        for _ in range(12):
            expected += 2 * channels + channels * 12 * 9
            channels += 12
        if block < 2:
            expected += 2 * channels + channels * channels
    assert count(build("densenet40", {})) == expected + 2 * channels + channels * 10 + 10


@pytest.mark.parametrize(
    ("power", "expected"), [(1, 236_066), (2, 217_850), (3, 200_354), (4, 185_091), (5, 171_606)]
)
def test_student_width(power: int, expected: int) -> None:
    assert count(build("mobilenet_student", {"width": 0.95**power})) == expected


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("resnet20", {"base": 8}),
        ("densenet40", {"growth_rate": 6}),
        ("mobilenet_student", {"base": 8}),
        ("preact_resnet20", {"base": 8}),
        ("vgg11", {}),
        ("lenet", {}),
    ],
)
def test_arguments_change_the_network(name: str, own: dict[str, int]) -> None:
    first = next(
        parameter for parameter in build(name, {"in_channels": 2}).parameters() if parameter.dim() == 4
    )
    assert first.shape[1] == 2
    *_, last = build(name, {"num_classes": 7}).parameters()
    assert last.shape == (7,)
    for key, value in own.items():
        assert count(build(name, {key: value})) < count(build(name, {}))


def test_dropout_of_alexnet() -> None:
    found = [
        module.p
        for module in build("alexnet", {"dropout": 0.25}).modules()
        if isinstance(module, torch.nn.Dropout)
    ]
    assert found == [0.25, 0.25]


@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name not in ("resnet110", "resnet56", "resnet44")]
)
def test_forward_and_backward_at_the_smallest_size(name: str) -> None:
    architecture = ARCHITECTURES[name]
    size = architecture.minimum_size
    model = build(name, {"num_classes": 5})
    logits = model(torch.rand(2, architecture.input_shape[0], size, size))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if not entry.fixed_size])
def test_any_larger_size_passes(name: str) -> None:
    size = ARCHITECTURES[name].minimum_size + 9
    with torch.no_grad():
        assert build(name, {}).eval()(torch.rand(1, 3, size, size)).dim() == 2


def test_resnet_names_are_torchvisions() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    theirs = ResNet(BasicBlock, [3, 3, 3, 1]).state_dict()
    ours = build("resnet20", {}).state_dict()
    # layer2 and layer3 open with a shortcut in both; layer4 is theirs alone.
    assert set(ours) == {name for name in theirs if not name.startswith("layer4.")}


def test_residual_branches_start_at_zero() -> None:
    model = build("resnet20", {})
    assert all(
        bool((block.bn2.weight == 0).all())
        for stage in (model.layer1, model.layer2, model.layer3)
        for block in stage
    )
    assert float(model.bn1.weight.detach().min()) == 1.0


def test_student_names() -> None:
    names = set(build("mobilenet_student", {}).state_dict())
    for index in range(1, 8):
        assert {f"cnn.{index}.0.weight", f"cnn.{index}.1.weight", f"cnn.{index}.3.weight"} <= names
    assert {"fc.weight", "cnn.0.0.weight", "cnn.0.1.running_mean"} <= names


def test_builders_work_with_parameters_on_meta() -> None:
    for name in ARCHITECTURES:
        with torch.device("meta"):
            assert all(parameter.is_meta for parameter in build(name, {}).parameters())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_class": 3}, "num_classes"),
        ({"num_classes": 0}, "at least 1"),
        ({"num_classes": "10"}, "whole number"),
        ({"num_classes": True}, "whole number"),
        ({"base": 2.5}, "whole number"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ArchitectureError, match=said):
        build("resnet20", arguments)


@pytest.mark.parametrize("width", [0, -1.0, 1.5, float("nan"), float("inf"), "wide", True])
def test_wrong_width_is_refused(width: object) -> None:
    with pytest.raises(ArchitectureError, match="width"):
        build("mobilenet_student", {"width": width})


@pytest.mark.parametrize("dropout", [1.0, -0.1])
def test_wrong_dropout_is_refused(dropout: float) -> None:
    with pytest.raises(ArchitectureError, match="dropout"):
        build("alexnet", {"dropout": dropout})


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet21", "resnet20"), ("ResNet20", "resnet20"), ("mobilenet_studnt", "mobilenet_student")],
)
def test_unknown_name_gets_a_near_miss(name: str, near: str) -> None:
    with pytest.raises(ArchitectureError, match=f"did you mean.*{near}"):
        build(name, {})


def test_defaults_of_a_data_set() -> None:
    assert defaults("resnet20", channels=1, classes=7) == {"in_channels": 1, "num_classes": 7}
    assert defaults("resnet20", channels=1, classes=7, arguments={"in_channels": 3, "base": 8}) == {
        "in_channels": 3,
        "num_classes": 7,
        "base": 8,
    }
    assert defaults("resnet20") == {}


def test_input_shapes() -> None:
    assert input_shape("lenet", {}) == (1, 32, 32)
    assert input_shape("mobilenet_student", {}) == (3, 256, 256)
    assert input_shape("resnet20", {}, (1, 28, 28)) == (1, 28, 28)
    assert input_shape("resnet20", {"in_channels": 3}, (1, 28, 28)) == (3, 28, 28)
    # VGG's five poolings need 32 pixels, and LeNet takes nothing else.
    assert input_shape("vgg16", {}, (1, 28, 28)) == (1, 32, 32)
    assert input_shape("lenet", {}, (1, 64, 64)) == (1, 32, 32)


def test_the_page_says_what_the_listing_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("| `")
    ]
    told = {
        row[0].strip("`"): (row[1].removesuffix(", fixed"), row[2], row[3]) for row in rows if len(row) == 5
    }
    records = {record.name: record for record in listing() if record.parameters}
    assert told.keys() == records.keys()
    for name, (shape, parameters, arguments) in told.items():
        assert shape == "x".join(map(str, records[name].input_shape))
        assert parameters == f"{records[name].parameters:,}"
        assert all(f"`{own}`" in arguments for own in records[name].arguments[2:])


def test_listing_covers_the_table() -> None:
    assert [record.name for record in listing()] == [*ARCHITECTURES, "torchvision:NAME", "timm:NAME"]
    assert all(name == architecture.name for name, architecture in ARCHITECTURES.items())
