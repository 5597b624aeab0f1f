"""Crops, flips and channel statistics, against one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codistill.config.data import Augment
from codistill.peer.draws import derive, uniforms
from codistill_worker.data.augmentation import augment, normalise


def some_images(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def by_hand(image: np.ndarray, sample: int, settings: Augment, seed: int) -> np.ndarray:
    padding = settings.crop_padding
    down, across, mirror = uniforms(seed, torch.tensor([sample]), 3)[0].tolist()
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    top, left = int(down * (2 * padding + 1)), int(across * (2 * padding + 1))
    cropped = padded[:, top : top + height, left : left + width]
    return cropped[:, :, ::-1] if settings.flip and mirror < 0.5 else cropped


@given(
    st.integers(1, 9),
    st.sampled_from([1, 3]),
    st.sampled_from([(4, 4), (8, 8), (5, 7)]),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 2**63 - 1),
)
def test_the_batch_is_what_each_image_is_alone(
    batch: int, channels: int, size: tuple[int, int], padding: int, flip: bool, seed: int
) -> None:
    images, ids = some_images(batch, channels, *size), torch.arange(batch) * 7 + 3
    settings = Augment(crop_padding=padding, flip=flip)
    result = augment(images, ids, settings, seed)
    assert result.dtype is torch.uint8
    for image, sample, varied in zip(images, ids.tolist(), result, strict=True):
        assert np.array_equal(varied.numpy(), by_hand(image.numpy(), sample, settings, seed))


def test_a_sample_is_varied_alike_in_any_batch() -> None:
    images, ids, settings = some_images(16, 3, 8, 8), torch.arange(16), Augment(crop_padding=2, flip=True)
    whole = augment(images, ids, settings, 5)
    some = torch.tensor([11, 3, 7])
    assert torch.equal(augment(images[some], ids[some], settings, 5), whole[some])


def test_students_and_steps_see_crops_of_their_own() -> None:
    images, ids, settings = some_images(16, 1, 8, 8), torch.arange(16), Augment(crop_padding=2, flip=True)
    seeds = [derive(0, "augment", student, number) for student in ("a", "b") for number in (0, 1)]
    assert len({augment(images, ids, settings, seed).numpy().tobytes() for seed in seeds}) == 4


def test_every_place_and_both_sides_come_up() -> None:
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 1] = 1  # one pixel shows where the image went, and its side
    count = 2000
    varied = augment(image.expand(count, -1, -1, -1), torch.arange(count), Augment(crop_padding=1, flip=True), 0)
    seen, times = varied.flatten(1).argmax(1).unique(return_counts=True)
    straight = {row * 5 + column for row in (1, 2, 3) for column in (0, 1, 2)}
    mirrored = {row * 5 + column for row in (1, 2, 3) for column in (2, 3, 4)}
    assert set(seen.tolist()) == straight | mirrored
    assert all(65 < each < 290 for each in times.tolist())  # expected 111, or 222 where both meet


def test_nothing_to_vary_gives_the_images_themselves() -> None:
    images = some_images(3, 1, 4, 4)
    assert augment(images, torch.arange(3), Augment(), 0) is images


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_normalised_values_have_the_statistics_taken_out(
    dtype: torch.dtype, tolerance: float, channels_last: bool
) -> None:
    images = some_images(4, 3, 6, 6)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    result = normalise(images, mean, std, dtype, channels_last=channels_last)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert result.dtype is dtype
    assert torch.allclose(result.double(), expected, rtol=tolerance, atol=tolerance)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)


def test_normalising_leaves_the_images_alone() -> None:
    images = some_images(2, 1, 4, 4)
    before = images.clone()
    normalise(images, (0.5,), (0.5,))
    assert torch.equal(images, before)
