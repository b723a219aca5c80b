import pytest
import torch

from cctool.base.errors import DataError
from cctool.data.records import Augmentation, Crop, DataSource, Split
from cctool.data.registry import open_data
from cctool.data.serving.batches import batches
from cctool.data.serving.convert import convert

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def split(count: int = 23, shape: tuple[int, int, int] = (3, 8, 8)) -> Split:
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return Split("train", shape, images, torch.arange(count) % 5)


def serve(part: Split, **named: object) -> list[object]:
    return list(batches(part, **{"batch_size": 5, "mean": MEAN, "std": STD, **named}))  # type: ignore[arg-type]


def test_images_are_normalised_and_labels_go_with_them() -> None:
    part = split()
    found = serve(part)
    images = torch.cat([batch.images for batch in found])
    expected = (part.images.double() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1).double()) / torch.tensor(
        STD
    ).view(1, 3, 1, 1).double()
    torch.testing.assert_close(images.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat([batch.labels for batch in found]), part.labels)
    assert torch.cat([batch.indices for batch in found]).tolist() == list(range(23))
    assert [len(batch.images) for batch in found] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    assert serve(split(), dtype=dtype)[0].images.dtype == dtype


def test_one_value_of_mean_and_std_serves_all_channels() -> None:
    one = serve(split(), mean=(0.5,), std=(0.25,))[0].images
    assert torch.equal(one, serve(split(), mean=(0.5,) * 3, std=(0.25,) * 3)[0].images)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"mean": (0.5, 0.5)}, "mean has 2 values, but the images have 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "greater than 0"),
        ({"std": (1.0, float("nan"), 1.0)}, "greater than 0"),
    ],
)
def test_wrong_preprocessing(named: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        serve(split(), **named)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        serve(split(0))


def test_shuffling_is_a_permutation_of_seed_and_epoch() -> None:
    part = split()

    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(
            [batch.indices for batch in serve(part, shuffle=True, seed=seed, epoch=epoch)]
        ).tolist()

    torch.manual_seed(0)
    first = order(1, 1)
    torch.manual_seed(9)
    assert order(1, 1) == first
    assert sorted(first) == list(range(23))
    assert len({tuple(order(*pair)) for pair in ((1, 1), (1, 2), (2, 1), (11, 1), (1, 11))}) == 5


def test_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    serve(
        split(), shuffle=True, augmentation=Augmentation(crop=Crop.PADDED, padding=1, flip=True, rotation=5)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_iterating_twice_gives_the_same() -> None:
    found = batches(
        split(), batch_size=5, mean=MEAN, std=STD, shuffle=True, augmentation=Augmentation(flip=True)
    )
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, found, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [20, 21, 22, 23])
def test_each_image_is_evaluated_by_exactly_one_process(world: int, count: int) -> None:
    part = split(count)
    found = [
        torch.cat([batch.indices for batch in serve(part, rank=rank, world_size=world)])
        for rank in range(world)
    ]
    assert sorted(torch.cat(found).tolist()) == list(range(count))
    assert (
        sum(
            batches(part, batch_size=5, mean=MEAN, std=STD, rank=rank, world_size=world).samples
            for rank in range(world)
        )
        == count
    )


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_training_batch(world: int) -> None:
    part = split(40)
    kind = Augmentation(crop=Crop.PADDED, padding=2, flip=True, rotation=8)
    options = {"batch_size": 8, "shuffle": True, "augmentation": kind, "seed": 2, "epoch": 3}
    alone = serve(part, **options)
    together = [serve(part, rank=rank, world_size=world, **options) for rank in range(world)]
    assert {len(found) for found in together} == {len(alone)}
    for step, whole in enumerate(alone):
        pieces = [found[step] for found in together]
        assert torch.equal(torch.cat([piece.indices for piece in pieces]), whole.indices)
        torch.testing.assert_close(
            torch.cat([piece.images for piece in pieces]), whole.images, rtol=0, atol=1e-5
        )
        assert max(len(piece.indices) for piece in pieces) - min(len(piece.indices) for piece in pieces) <= 1


@pytest.mark.parametrize(
    ("count", "world", "drop_last", "expected"),
    [
        (21, 1, False, 20),  # a last batch of one image cannot be normalised
        (22, 1, False, 22),
        (23, 2, False, 20),
        (24, 2, False, 24),
        (24, 1, True, 20),
        (1, 1, False, 1),
        (3, 1, True, 3),
    ],
)
def test_last_training_batches(count: int, world: int, drop_last: bool, expected: int) -> None:
    part = split(count)
    found = [
        batches(
            part,
            batch_size=5,
            mean=MEAN,
            std=STD,
            shuffle=True,
            drop_last=drop_last,
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]
    assert sum(one.samples for one in found) == expected
    assert {len(one) for one in found} == {len(list(one)) for one in found}


def test_augmentation_is_the_same_whatever_the_batch_size() -> None:
    part = split()
    kind = Augmentation(crop=Crop.PADDED, padding=2, flip=True)
    by_index = []
    for size in (4, 23):
        found = serve(part, batch_size=size, augmentation=kind, shuffle=True, seed=7)
        order = torch.cat([batch.indices for batch in found]).argsort()
        by_index.append(torch.cat([batch.images for batch in found])[order])
    assert torch.equal(*by_index)
    assert not torch.equal(by_index[0], torch.cat([batch.images for batch in serve(part)]))


def test_unlabelled_batches() -> None:
    part = split()
    bare = Split("test", part.shape, part.images)
    assert all(batch.labels is None for batch in serve(bare))


def test_a_network_of_another_shape_gets_converted_images() -> None:
    source = open_data("digits", input_shape=(3, 16, 24), limit=6)
    assert source.notes == ("digits: gray images are repeated to RGB and resized from 32x32 to 16x24",)
    assert source.mean == open_data("digits").mean * 3
    batch = next(iter(batches(source.split("test"), batch_size=6, mean=(0.0,), std=(1 / 255,))))
    assert batch.images.shape == (6, 3, 16, 24)
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])


def test_conversion_equals_pil() -> None:
    from PIL import Image

    pixels = split(1, (3, 24, 20)).images
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    gray = torch.tensor(list(image.convert("L").tobytes())).view(24, 20)
    assert float((convert(pixels, (1, 24, 20))[0, 0] - gray).abs().max()) <= 1.0
    small = torch.tensor(list(image.resize((10, 12), Image.Resampling.BILINEAR).tobytes())).view(12, 10, 3)
    assert float((convert(pixels, (3, 12, 10))[0].permute(1, 2, 0) - small).abs().max()) <= 1.0
    assert convert(pixels, (3, 24, 20)) is pixels


def test_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 channels and the network takes 4"):
        open_data("digits", input_shape=(4, 32, 32))


def test_rgb_to_gray_converts_the_preprocessing() -> None:
    import dataclasses

    from cctool.data import registry

    source: DataSource = dataclasses.replace(
        open_data("digits"), shape=(3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5)
    )
    gray = registry._serve(source, (1, 8, 8))
    assert gray.mean == pytest.approx((0.299 * 0.1 + 0.587 * 0.2 + 0.114 * 0.3,))
    assert gray.std == pytest.approx((0.5,))


@pytest.mark.cuda
def test_cuda_gives_what_the_cpu_gives() -> None:
    part = split(64)
    kind = Augmentation(crop=Crop.PADDED, padding=2, flip=True)
    options = {"shuffle": True, "augmentation": kind, "seed": 1}
    for here, there in zip(serve(part, **options), serve(part, device="cuda", **options), strict=True):
        assert there.images.is_cuda
        assert there.labels.is_cuda
        torch.testing.assert_close(here.images, there.images.cpu(), rtol=0, atol=1e-6)
    turned = {**options, "augmentation": Augmentation(rotation=20)}
    for here, there in zip(serve(part, **turned), serve(part, device="cuda", **turned), strict=True):
        # bilinear weights of 0..255 levels, divided by a std of 0.1: a thousandth of a level
        torch.testing.assert_close(here.images, there.images.cpu(), rtol=0, atol=5e-3)
