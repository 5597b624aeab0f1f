"""Splits that stream, the fingerprint of a data set, and the size of a batch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from codistill_worker.data import Dataset, check_batch
from codistill_worker.data.dataset import MemorySplit, StreamedSplit
from codistill_worker.errors import ConfigurationError
from worker.data.support import CPU, digits, everything


def test_a_batch_must_fit_the_training_samples() -> None:
    data = digits(train_size=60, held_out=20)
    check_batch(data, 40)
    with pytest.raises(
        ConfigurationError, match=r"batch_size: 41 is larger than the 40 training samples \(another 20 are"
    ):
        check_batch(data, 41)
    with pytest.raises(ConfigurationError, match="batch_size: 61 is larger than the 60 training samples; lower it"):
        check_batch(digits(train_size=60), 61)


def test_the_fingerprint_tells_what_differs() -> None:
    data = digits(train_size=50, test_size=40, held_out=5)
    swapped = data.train.labels.clone()
    swapped[[0, 1]] = torch.tensor([int(swapped[1]) + 1, int(swapped[0]) + 1]) % 10
    train = MemorySplit(everything(data.train), swapped, CPU)
    changes: list[dict[str, Any]] = [
        {"train": train},
        {"test": train},
        {"classes": 11},
        {"channels": 3},
        {"height": 9},
        {"width": 9},
        {"held_out_ids": data.held_out_ids + 1},
        {"held_out": None, "held_out_ids": data.held_out_ids[:0]},
        {"image_digests": {**data.image_digests, "test": "0" * 64}},
    ]
    prints = {Dataset(**{**vars(data), **change}).fingerprint() for change in changes}
    assert len({data.fingerprint(), *prints}) == len(changes) + 1
    assert len(data.fingerprint()) == 64


def counted(decode: Callable[[int, np.ndarray], None], threads: int) -> StreamedSplit:
    return StreamedSplit(decode, (1, 2, 2), torch.zeros(1000, dtype=torch.int64), CPU, threads)


def test_a_stream_reads_two_batches_ahead_and_no_more() -> None:
    asked: list[int] = []

    def batches() -> Iterator[torch.Tensor]:
        for number in itertools.count():
            asked.append(number)
            yield torch.tensor([number, number + 1])

    stream = counted(lambda index, out: out.fill(index), 2).stream(batches())
    for number in range(4):
        assert next(stream)[:, 0, 0, 0].tolist() == [number, number + 1]
        assert len(asked) == number + 3
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_stream_that_is_closed_leaves_no_thread() -> None:
    def decoders() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]

    stream = counted(lambda index, out: out.fill(index), 3).stream(
        torch.tensor([number]) for number in itertools.count()
    )
    next(stream)
    assert decoders()
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not decoders()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_cannot_be_decoded_fails_in_its_turn(threads: int) -> None:
    def decode(index: int, out: np.ndarray) -> None:
        if index == 2:
            raise ConfigurationError("data.root: 2.png cannot be decoded")
        out.fill(index)

    stream = counted(decode, threads).stream(torch.tensor([number]) for number in range(5))
    assert [int(next(stream)[0, 0, 0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(ConfigurationError, match=r"2\.png"):
        next(stream)
