"""Digests of a split's images, as they are stored: two machines compare them to find that they hold other pixels.

Decoded pixels are not compared, as decoders differ in the last bit from machine to machine. Of a large split a sample is
read, evenly spaced over its samples, so that every machine reads the same ones.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from codistill_worker.errors import ConfigurationError

__all__ = ["digest_of_files", "digest_of_pixels"]

_MOST_FILES = 1024
_MOST_BYTES_OF_A_FILE = 2**20
_MOST_BYTES_OF_PIXELS = 2**26
_BYTES_AT_ONCE = 2**22


def digest_of_files(paths: Sequence[str]) -> str:
    """Return a SHA-256 in hexadecimal over files, in order: of each its size and its first MiB.

    Of more than 1,024 files so many are read, evenly spaced.

    Raises:
        ConfigurationError: a file cannot be read.
    """
    sample = [paths[index] for index in _evenly_spaced(len(paths), _MOST_FILES)]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="digest") as pool:
        for of_file in pool.map(_digest_of_file, sample):
            digest.update(of_file)
    return digest.hexdigest()


def digest_of_pixels(pixels: torch.Tensor) -> str:
    """Return a SHA-256 in hexadecimal over images, in order.

    Of more than 64 MiB so many are read, evenly spaced.

    Args:
        pixels: uint8 of shape [N, C, H, W], on the CPU.
    """
    size = max(1, math.prod(pixels.shape[1:]))
    ids = torch.tensor(_evenly_spaced(len(pixels), max(1, _MOST_BYTES_OF_PIXELS // size)), dtype=torch.int64)
    digest = hashlib.sha256()
    for chunk in ids.split(max(1, _BYTES_AT_ONCE // size)):
        digest.update(pixels[chunk].contiguous().numpy().data)
    return digest.hexdigest()


def _evenly_spaced(size: int, most: int) -> list[int]:
    count = min(size, most)
    return [position * size // count for position in range(count)]


def _digest_of_file(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES_OF_A_FILE)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConfigurationError(
            f"data.root: {path} cannot be read: {error.strerror}; make it readable, replace or remove it"
        ) from error
    return hashlib.sha256(size.to_bytes(8, "little") + content).digest()
