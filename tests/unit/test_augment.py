"""Transforms: sizes and values for evaluation, and augmentations that the generator alone decides."""

import numpy as np
import pytest
import torch

from nc_dist.data.augment import CropFlip, InputSpec, NoAugment, ResizedCropFlip, evaluation, keyed_random, normalise

RANDOM = torch.Generator().manual_seed(0)
IMAGE = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=RANDOM)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (40, 20), (100, 101), (3, 200)])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_evaluation_has_the_input_size(shape: tuple[int, int], crop: float) -> None:
    image = torch.full((3, *shape), 7, dtype=torch.uint8)
    out = evaluation(image, InputSpec(size=16, crop=crop))
    assert out.shape == (3, 16, 16) and out.dtype == torch.uint8
    assert set(out.unique().tolist()) == {7}


def test_evaluation_resizes_as_the_input_says() -> None:
    """A bicubic resize overshoots at an edge, a bilinear one never does."""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, :, 4:] = 200
    assert evaluation(image, InputSpec(size=32)).max() == 200
    assert evaluation(image, InputSpec(size=32, interpolation="bicubic")).max() > 200


def test_evaluation_takes_the_centre_and_leaves_an_image_of_the_size_alone() -> None:
    image = torch.zeros(3, 10, 30, dtype=torch.uint8)
    image[:, :, 10:20] = 9
    assert (evaluation(image, InputSpec(size=10)) == 9).all()
    assert evaluation(image, InputSpec(size=5))[:, :, 1:4].eq(9).all()
    same = IMAGE[:, :20, :20]
    assert evaluation(same, InputSpec(size=20, crop=0.5)) is same


def test_normalise_is_minus_mean_over_std_of_the_unit_range() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 2, 2)
    size = InputSpec(size=2, mean=(0.5, 0.2, 0.0), std=(0.25, 0.1, 1.0))
    out = normalise(images, size, torch.float64)
    assert out.dtype == torch.float64
    expected = torch.tensor([[-2, -2, 0], [-1.2, 0, 0.2], [2, 8, 1]], dtype=torch.float64)
    torch.testing.assert_close(out[:, :, 1, 1], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("augment", [NoAugment(), CropFlip(), CropFlip(pad=0), ResizedCropFlip()], ids=repr)
def test_an_augmentation_has_the_input_size_and_repeats_with_its_generator(
    augment: NoAugment | CropFlip | ResizedCropFlip,
) -> None:
    size = InputSpec(size=16)
    first, again = (augment.apply(IMAGE, size, keyed_random(1, 2, 3, 0)) for _ in range(2))
    assert first.shape == (3, 16, 16) and first.dtype == torch.uint8
    assert first.equal(again)


@pytest.mark.parametrize("augment", [CropFlip(), ResizedCropFlip()], ids=["crop_flip", "resized_crop_flip"])
def test_seed_epoch_position_and_view_each_change_the_image(augment: CropFlip | ResizedCropFlip) -> None:
    keys = [(1, 2, 3, 0), (9, 2, 3, 0), (1, 9, 3, 0), (1, 2, 9, 0), (1, 2, 3, 1)]
    images = {augment.apply(IMAGE, InputSpec(size=16), keyed_random(*key)).numpy().tobytes() for key in keys}
    assert len(images) == 5


def test_crop_flip_is_a_shifted_window_of_the_padded_image_mirrored_half_of_the_time() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 8, 8).expand(3, 8, 8)
    padded = torch.nn.functional.pad(image, [2] * 4)
    windows = [padded[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    mirrored = set()
    for position in range(60):
        out = CropFlip(pad=2).apply(image, InputSpec(size=8), keyed_random(0, 0, position, 0))
        plain, flipped = any(map(out.equal, windows)), any(map(out.flip(-1).equal, windows))
        assert plain != flipped
        mirrored.add(flipped)
        unflipped = CropFlip(pad=2, flip=False).apply(image, InputSpec(size=8), keyed_random(0, 0, position, 0))
        assert any(map(unflipped.equal, windows))
    assert mirrored == {False, True}


def test_resized_crop_keeps_its_area_and_its_place_inside_the_image() -> None:
    spec = ResizedCropFlip(min_area=0.3)
    for position in range(200):
        top, left, height, width = spec._box(20, 30, keyed_random(0, 0, position, 0))
        assert 0 <= top <= 20 - height and 0 <= left <= 30 - width
        assert height * width >= 0.3 * 600 * 0.85  # sides are rounded
    assert spec._box(100, 1, np.random.default_rng(0)) == (49, 0, 1, 1)  # no box fits: the centre
