"""The samples of each step, in order: a pure function of the seed."""

from __future__ import annotations

import torch

from codistill.peer.draws import derive, permutation

__all__ = ["Order", "epoch_order"]


def epoch_order(seed: int, epoch: int, size: int) -> torch.Tensor:
    """Return the order in which an epoch visits the training samples.

    Args:
        seed: of the run.
        epoch: counted from 0.
        size: number of training samples.

    Returns:
        int64 of shape [size]: a permutation of 0..size-1.
    """
    return permutation(derive(seed, "epoch", epoch), size)


class Order:
    """The samples of every step, a pure function of the seed.

    An epoch has as many steps as whole batches; the rest of its permutation is dropped. The current epoch's permutation is
    cached, so steps in sequence cost a slice each.

    Args:
        seed: of the run.
        size: number of training samples.
        batch_size: samples of a step, at most `size`.

    Raises:
        ValueError: a batch is empty or larger than the training set.
    """

    def __init__(self, seed: int, size: int, batch_size: int) -> None:
        if not 1 <= batch_size <= size:
            raise ValueError(f"batch_size: {batch_size} is not allowed; it is from 1 to the {size} training samples")
        self._seed = seed
        self._size = size
        self._batch_size = batch_size
        self._cached: tuple[int, torch.Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch, at least 1."""
        return self._size // self._batch_size

    def epoch(self, step: int) -> int:
        """Return the epoch that a step belongs to, both counted from 0."""
        return step // self.steps_per_epoch

    def samples(self, step: int) -> torch.Tensor:
        """Return the ids of a step's samples, int64 of shape [batch_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, epoch_order(self._seed, epoch, self._size))
        start = position * self._batch_size
        return self._cached[1][start : start + self._batch_size].clone()
