"""Randomness without state: every draw is a function of what it is for.

Nothing here keeps a generator between two calls. A draw follows from the run's seed and from what names it (a student,
a round, a sample's id), so a checkpoint needs no generator's state and a round that is repeated is the same round.
Orders and draws are computed in integers by this module alone: they do not change with the version of a library, the
device or the number of threads.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Order", "derive", "epoch_order", "permutation", "round_samples", "seed_forward", "uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio, odd: its multiples visit every 64-bit word


def derive(*parts: int | str) -> int:
    """Returns a seed of 63 bits that follows from the parts and from nothing else.

    The parts are hashed with SHA-256, each with its type and length, so that no two different lists of parts look alike
    to the hash.

    Example:
        >>> derive(0, "augment", "cnn", 7) == derive(0, "augment", "cnn", 7)
        True
        >>> derive("ab", "c") == derive("a", "bc")
        False
    """
    digest = hashlib.sha256()
    for part in parts:
        kind, text = (b"s", part.encode()) if isinstance(part, str) else (b"i", b"%d" % part)
        digest.update(kind + len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def permutation(seed: int, size: int) -> torch.Tensor:
    """Returns a permutation of 0..size-1 that follows from the seed.

    Every number gets a 64-bit key by counter-based mixing, and the numbers are sorted by key. The mixing is one-to-one,
    so no two keys are equal.

    Returns:
        int64 of shape [size], on the CPU.
    """
    keys = _keys(seed, np.arange(size, dtype=np.uint64))
    return torch.from_numpy(np.argsort(keys).astype(np.int64, copy=False))


def epoch_order(seed: int, epoch: int, size: int) -> torch.Tensor:
    """Returns the order in which an epoch visits the training samples.

    Args:
        seed: the run's.
        epoch: counted from 0.
        size: number of training samples.

    Returns:
        int64 of shape [size]: a permutation of 0..size-1.
    """
    return permutation(derive(seed, "epoch", epoch), size)


def round_samples(seed: int, round_number: int, size: int, batch_size: int) -> torch.Tensor:
    """Returns the ids of one round's samples, as :meth:`Order.samples`."""
    return Order(seed, size, batch_size).samples(round_number)


class Order:
    """The samples of every round, a pure function of the seed.

    An epoch has as many rounds as whole batches fit; what is left of its permutation is dropped. The current epoch's
    permutation is kept, so that rounds asked for in order cost a slice each.

    Args:
        seed: the run's.
        size: number of training samples.
        batch_size: samples of a round, at most `size`.

    Raises:
        ValueError: a batch is empty or larger than the training set.
    """

    def __init__(self, seed: int, size: int, batch_size: int) -> None:
        if not 1 <= batch_size <= size:
            raise ValueError(f"batch_size: {batch_size} is not allowed; it is from 1 to the {size} training samples")
        self._seed = seed
        self._size = size
        self._batch_size = batch_size
        self._kept: tuple[int, torch.Tensor] | None = None

    @property
    def rounds_per_epoch(self) -> int:
        """Whole batches in an epoch, at least 1."""
        return self._size // self._batch_size

    def epoch(self, round_number: int) -> int:
        """Returns the epoch that a round belongs to, both counted from 0."""
        return round_number // self.rounds_per_epoch

    def samples(self, round_number: int) -> torch.Tensor:
        """Returns the ids of a round's samples, int64 of shape [batch_size]."""
        epoch, position = divmod(round_number, self.rounds_per_epoch)
        if self._kept is None or self._kept[0] != epoch:
            self._kept = (epoch, epoch_order(self._seed, epoch, self._size))
        start = position * self._batch_size
        return self._kept[1][start : start + self._batch_size].clone()


def uniforms(seed: int, ids: torch.Tensor, draws: int) -> torch.Tensor:
    """Returns uniform numbers for samples; each depends on the seed, its sample's id and its draw's number only.

    Counter-based: seed, id and draw are mixed by the finaliser of splitmix64 (Steele, Lea & Flood 2014, 'Fast
    splittable pseudorandom number generators'), and the upper 53 bits make the number.

    Args:
        seed: of 64 bits at most.
        ids: int64 of shape [B], on the CPU (ids elsewhere are brought there).
        draws: numbers for each sample.

    Returns:
        float64 of shape [B, draws] on the CPU, in [0, 1).
    """
    own = _keys(seed, ids.cpu().numpy().astype(np.int64, copy=False).view(np.uint64))
    counters = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN
    mixed = _mix(own[:, None] + counters)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def seed_forward(seed: int, student: str, round_number: int) -> None:
    """Seeds torch's global generators, from which dropout draws, for one student's forward pass of one round.

    The generators are seeded directly: `torch.manual_seed` also records a traceback where CUDA was not started yet,
    which takes about 80 times as long (110 µs against 1.3 µs). CUDA's generators exist once CUDA was started, which a
    model on a GPU did.
    """
    value = derive(seed, "forward", student, round_number)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(value)


def _keys(seed: int, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns a 64-bit key for each counter; different counters have different keys."""
    start = _mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64))
    return _mix(start + counters * _GOLDEN)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns each word through splitmix64's finaliser, which is one-to-one."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
