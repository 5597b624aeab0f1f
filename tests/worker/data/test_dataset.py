"""Splits that stream, the fingerprint of a data set, and the size of a batch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from codistill_worker.data import Dataset, check_batch, dataset
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
    train = MemorySplit(everything(data.train), swapped)
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


def number_each(ids: torch.Tensor, out: torch.Tensor) -> None:
    out.numpy()[:] = ids.numpy()[:, None, None, None]


def counted(read: Callable[[torch.Tensor, torch.Tensor], None], threads: int) -> StreamedSplit:
    return StreamedSplit(read, (1, 2, 2), torch.zeros(1000, dtype=torch.int64), CPU, threads)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-images")]


def test_a_stream_reads_two_batches_ahead_and_no_more() -> None:
    asked: list[int] = []

    def batches() -> Iterator[torch.Tensor]:
        for number in itertools.count():
            asked.append(number)
            yield torch.tensor([number, number + 1])

    stream = counted(number_each, 2).stream(batches())
    for number in range(4):
        assert next(stream)[:, 0, 0, 0].tolist() == [number, number + 1]
        assert len(asked) == number + 3
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_stream_that_is_closed_leaves_no_thread() -> None:
    stream = counted(number_each, 3).stream(torch.tensor([number]) for number in itertools.count())
    next(stream)
    assert readers()
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not readers()


def test_the_threads_of_a_stream_end_with_its_last_batch_though_nobody_closes_it() -> None:
    stream = counted(number_each, 3).stream(torch.tensor([number]) for number in range(5))
    for number in range(5):
        assert next(stream).unique().tolist() == [number]
    for thread in readers():
        thread.join(30)
        assert not thread.is_alive()
    assert next(stream, None) is None


def test_a_batch_is_read_in_parts_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_JOB_BYTES", 12)  # three images
    both = threading.Barrier(2)
    parts: list[list[int]] = []

    def read(ids: torch.Tensor, out: torch.Tensor) -> None:
        both.wait(30)
        number_each(ids, out)
        parts.append(ids.tolist())

    batch = next(counted(read, 2).stream([torch.tensor([4, 9, 2, 7])]))
    assert batch[:, 0, 0, 0].tolist() == [4, 9, 2, 7]
    assert sorted(parts) == [[4, 9, 2], [7]]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_cannot_be_decoded_fails_in_its_turn(threads: int) -> None:
    def read(ids: torch.Tensor, out: torch.Tensor) -> None:
        if ids.tolist() == [2]:
            raise ConfigurationError("data.root: 2.png cannot be decoded")
        number_each(ids, out)

    stream = counted(read, threads).stream(torch.tensor([number]) for number in range(5))
    assert [int(next(stream)[0, 0, 0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(ConfigurationError, match=r"2\.png"):
        next(stream)
