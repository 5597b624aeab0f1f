"""Data sets: subsets, held-out samples and statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from codistill_worker.data import loading
from codistill_worker.errors import ConfigurationError
from worker.data.support import digits, everything


def test_three_quarters_of_the_digits_are_trained_on_by_default() -> None:
    data = digits()
    assert (len(data.train), len(data.test)) == (1347, 450)


def test_a_smaller_subset_is_part_of_a_larger_one() -> None:
    small, large = digits(train_size=100), digits(train_size=200)
    rows = {bytes(image) for image in everything(large.train).flatten(1).numpy()}
    assert all(bytes(image) in rows for image in everything(small.train).flatten(1).numpy())


def test_subsets_follow_from_the_split_seed() -> None:
    same = digits(train_size=100, held_out=20)
    assert digits(train_size=100, held_out=20).fingerprint() == same.fingerprint()
    assert digits(train_size=100, held_out=20, split_seed=1).fingerprint() != same.fingerprint()


def test_held_out_samples_come_out_of_the_training_samples() -> None:
    whole, data = digits(train_size=100), digits(train_size=100, held_out=30)
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out), len(data.test)) == (70, 30, 1697)
    kept = [index for index in range(100) if index not in set(data.held_out_ids.tolist())]
    assert torch.equal(everything(data.held_out), whole.train.images(data.held_out_ids))
    assert torch.equal(everything(data.train), whole.train.images(torch.tensor(kept)))
    assert torch.equal(data.held_out.labels, whole.train.labels[data.held_out_ids])
    assert torch.equal(data.train.labels, whole.train.labels[kept])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_size": 1797}, "data.train_size: 1797 leaves nothing of the 1797 digits to test on"),
        (
            {"train_size": 1700, "test_size": 98},
            "data.test_size: 98 is more than the 97 of 1797 digits that data.train_size: 1700",
        ),
        (
            {"train_size": 50, "held_out": 50},
            "data.held_out: 50 leaves nothing of the 50 training samples; .* at most 49",
        ),
        ({"image_size": 16}, "data.image_size: 16, but digits has images of 8×8"),
        (
            {"normalize": {"mean": [0, 0, 0], "std": [1, 1, 1]}},
            "data.normalize: 3 channels, but the images of digits have 1",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        digits(**settings)


def test_statistics_are_those_of_the_training_samples() -> None:
    data = digits(train_size=300, held_out=50)
    values = everything(data.train).double() / 255
    assert data.mean == pytest.approx((values.mean().item(),), rel=1e-12)
    assert data.std == pytest.approx((values.std(correction=0).item(),), rel=1e-12)


def test_given_statistics_are_taken() -> None:
    data = digits(normalize={"mean": [0.5], "std": [0.25]})
    assert (data.mean, data.std) == ((0.5,), (0.25,))


def test_a_large_set_is_measured_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_MEASURED_IMAGES", 100)
    monkeypatch.setattr(loading, "_MEASURED_VALUES_AT_ONCE", 640)  # ten images
    data, other = digits(), digits(split_seed=1)
    assert data.mean == pytest.approx((everything(data.train).double().mean().item() / 255,), rel=0.1)
    assert data.mean != other.mean
