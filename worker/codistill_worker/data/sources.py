"""Images as a loader finds them, before they are split and placed: arrays in memory, or files to decode."""

from __future__ import annotations

import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
import torch

from codistill_worker.data.dataset import MemorySplit, Split, StreamedSplit
from codistill_worker.data.decoding import decode_image
from codistill_worker.data.digests import digest_of_files, digest_of_pixels

__all__ = ["Arrays", "Files", "Source"]

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_FILES_PER_JOB = 64


class Source(ABC):
    """Labelled images from which splits are made.

    Attributes:
        labels: int64 of shape [N], on the CPU.
    """

    labels: torch.Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    @property
    def decoded_bytes(self) -> int:
        """The bytes that the images take in memory as uint8."""
        return len(self) * math.prod(self.shape)

    @abstractmethod
    def select(self, ids: torch.Tensor) -> Source:
        """Return some of the samples, in the ids' order."""

    @abstractmethod
    def digest(self) -> str:
        """Return a SHA-256 in hexadecimal of the images as they are stored; see :mod:`codistill_worker.data.digests`.

        Raises:
            ConfigurationError: a file cannot be read.
        """

    @abstractmethod
    def split(self, device: torch.device, *, on_device: bool, threads: int) -> Split:
        """Return the samples as a split.

        Args:
            device: of the batches.
            on_device: whether to keep all images there.
            threads: the number of decoding threads, where images are streamed.
        """


@dataclass(frozen=True, eq=False)
class Arrays(Source):
    """Images in the host's memory.

    Attributes:
        pixels: uint8 of shape [N, C, H, W], on the CPU.
        labels: int64 of shape [N], on the CPU.
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def select(self, ids: torch.Tensor) -> Arrays:
        """Return some of the samples, copied, in the ids' order."""
        return Arrays(self.pixels[ids], self.labels[ids])

    def digest(self) -> str:
        """Return a SHA-256 in hexadecimal of the pixels, or of a sample of them."""
        return digest_of_pixels(self.pixels)

    def split(self, device: torch.device, *, on_device: bool, threads: int) -> Split:  # noqa: ARG002
        """Return the samples as a split in the device's memory, or in the host's."""
        pixels = self.pixels.contiguous()
        return MemorySplit(pixels.to(device) if on_device else pixels, self.labels, device)


@dataclass(frozen=True, eq=False)
class Files(Source):
    """Image files, decoded to RGB squares.

    Attributes:
        paths: of the files.
        labels: int64 of shape [N], on the CPU.
        size: height and width of every decoded image, in pixels.
    """

    paths: Sequence[str]
    labels: torch.Tensor
    size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, S, S)."""
        return 3, self.size, self.size

    def select(self, ids: torch.Tensor) -> Files:
        """Return some of the samples, in the ids' order."""
        chosen: list[int] = ids.tolist()
        return Files([self.paths[index] for index in chosen], self.labels[ids], self.size)

    def digest(self) -> str:
        """Return a SHA-256 in hexadecimal of the files, or of a sample of them."""
        return digest_of_files(self.paths)

    def split(self, device: torch.device, *, on_device: bool, threads: int) -> Split:
        """Return the samples as a split: all decoded now, or each when it is needed."""
        if on_device:
            return MemorySplit(self._decode_all().to(device), self.labels, device)
        return StreamedSplit(self._decode, self.shape, self.labels, device, threads)

    def _decode(self, index: int, out: np.ndarray) -> None:
        decode_image(self.paths[index], out)

    def _decode_some(self, out: np.ndarray, start: int) -> int:
        stop = min(start + _FILES_PER_JOB, len(self))
        for index in range(start, stop):
            self._decode(index, out[index])
        return stop - start

    def _decode_all(self) -> torch.Tensor:
        """Return all images, uint8 of shape [N, C, H, W] on the CPU; log progress every few seconds."""
        total = len(self)
        out = torch.empty((total, *self.shape), dtype=torch.uint8)
        pixels = out.numpy()
        began = logged = time.monotonic()
        done = 0
        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")
        try:
            jobs = [pool.submit(self._decode_some, pixels, start) for start in range(0, total, _FILES_PER_JOB)]
            for job in as_completed(jobs):
                done += job.result()
                now = time.monotonic()
                if now - logged >= _SECONDS_BETWEEN_LINES and done < total:
                    logged = now
                    left = (now - began) * (total - done) / done
                    _log.info("decoded %d of %d images, about %.0f s left", done, total, left)
        finally:
            pool.shutdown(cancel_futures=True)
        _log.debug("decoded %d images in %.1f s", total, time.monotonic() - began)
        return out
