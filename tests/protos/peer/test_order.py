"""The samples of each step follow from the seed."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codistill.peer.order import Order, epoch_order

SEEDS = st.integers(0, 2**63 - 1)


def test_an_epochs_order_never_changes() -> None:
    # Runs that were stopped must resume with the numbers they began with, so these values are part of the format.
    assert epoch_order(0, 0, 6).tolist() == [3, 4, 0, 2, 1, 5]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def in_another_language(seed: int, size: int, batch_size: int, step: int) -> list[int]:
    """Return a step's samples by the rule in docs/protocol.md, with integers and a hash alone."""

    def mixed(word: int) -> int:
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    def part(letter: bytes, text: bytes) -> bytes:
        return letter + len(text).to_bytes(8, "little") + text

    epoch, position = divmod(step, size // batch_size)
    hashed = hashlib.sha256(part(b"i", b"%d" % seed) + part(b"s", b"epoch") + part(b"i", b"%d" % epoch)).digest()
    start = mixed(int.from_bytes(hashed[:8], "little") >> 1)
    order = sorted(range(size), key=lambda sample: mixed((start + sample * 0x9E3779B97F4A7C15) % 2**64))
    return order[position * batch_size : (position + 1) * batch_size]


def test_another_language_finds_the_same_samples() -> None:
    order = Order(7, 103, 10)
    for step in range(25):
        assert order.samples(step).tolist() == in_another_language(7, 103, 10, step)


@given(SEEDS, st.integers(1, 40), st.integers(1, 40), st.integers(0, 200))
def test_a_step_is_a_slice_of_its_epoch(seed: int, size: int, batch_size: int, step: int) -> None:
    if batch_size > size:
        with pytest.raises(ValueError, match=f"batch_size: {batch_size} is not allowed; it is from 1 to the {size}"):
            Order(seed, size, batch_size)
        return
    order = Order(seed, size, batch_size)
    assert order.steps_per_epoch == size // batch_size
    epoch, position = divmod(step, order.steps_per_epoch)
    assert order.epoch(step) == epoch
    expected = epoch_order(seed, epoch, size)[position * batch_size : (position + 1) * batch_size]
    assert torch.equal(order.samples(step), expected)
    assert len(expected) == batch_size


def test_steps_may_be_asked_for_in_any_order() -> None:
    forward, order = Order(3, 20, 6), Order(3, 20, 6)
    expected = [forward.samples(step).tolist() for step in range(9)]
    assert [order.samples(step).tolist() for step in reversed(range(9))] == expected[::-1]


def test_what_a_caller_does_to_a_step_stays_with_it() -> None:
    order = Order(3, 20, 6)
    before = order.samples(1).tolist()
    order.samples(1).zero_()
    assert order.samples(1).tolist() == before
