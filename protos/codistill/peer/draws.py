"""Random draws without state: every draw is a function of its names.

No generator is kept between two calls. A draw follows from the run's seed and its names (a student, a round, a sample's
id). So a checkpoint needs no generator's state, and a repeated round is the same round. Draws are computed in integers by
this module alone: they do not change with a library's version, the device or the number of threads.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["derive", "permutation", "uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio, odd: its multiples visit every 64-bit word


def derive(*parts: int | str) -> int:
    """Return a seed of 63 bits, a function of the parts alone.

    The parts are hashed with SHA-256, each with its type and length, so different lists of parts never look alike to the
    hash.

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
    """Return a permutation of 0..size-1 that follows from the seed.

    Every number gets a 64-bit key by counter-based mixing, and the numbers are sorted by key. The mixing is one-to-one, so
    no two keys are equal.

    Returns:
        int64 of shape [size], on the CPU.
    """
    keys = _keys(seed, np.arange(size, dtype=np.uint64))
    return torch.from_numpy(np.argsort(keys).astype(np.int64, copy=False))


def uniforms(seed: int, ids: torch.Tensor, draws: int) -> torch.Tensor:
    """Return uniform numbers for samples; each depends on the seed, its sample's id and its draw's number alone.

    Counter-based: the finaliser of splitmix64 mixes seed, id and draw, and the upper 53 bits make the number.

    Source: Steele, Lea & Flood 2014, 'Fast splittable pseudorandom number generators'.

    Args:
        seed: of 64 bits at most.
        ids: int64 of shape [B]; copied to the CPU from another device.
        draws: the number of draws for each sample.

    Returns:
        float64 of shape [B, draws] on the CPU, in [0, 1).
    """
    keys = _keys(seed, ids.cpu().numpy().astype(np.int64, copy=False).view(np.uint64))
    counters = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN
    mixed = _mix(keys[:, None] + counters)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _keys(seed: int, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a 64-bit key for each counter; different counters have different keys."""
    start = _mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64))
    return _mix(start + counters * _GOLDEN)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return splitmix64's finaliser of each word; it is one-to-one."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
