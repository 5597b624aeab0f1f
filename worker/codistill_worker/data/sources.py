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

import torch

from codistill_worker.data.dataset import MemorySplit, Split, StreamedSplit
from codistill_worker.data.decoding import decode_image
from codistill_worker.data.digests import digest_of_files, digest_of_pixels

__all__ = ["Arrays", "Files", "Source"]

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_FILES_PER_JOB = 64
_MOST_THREADS = 16


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
    def read(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Write images into a tensor; several threads may call this at once.

        Args:
            ids: of the samples, int64 of shape [B], on the CPU.
            out: receives the images, uint8 of shape [B, C, H, W], on the CPU.

        Raises:
            ConfigurationError: a file cannot be decoded.
        """

    @abstractmethod
    def read_all(self) -> torch.Tensor:
        """Return all images, uint8 of shape [N, C, H, W], on the CPU.

        Raises:
            ConfigurationError: a file cannot be decoded.
        """

    def split(self, device: torch.device, *, on_device: bool, threads: int | None) -> Split:
        """Return the samples as a split.

        Args:
            device: of the batches.
            on_device: whether to keep all images there.
            threads: the number of reading threads, where images stay off the device; None for one of each core, at most 16.
        """
        if on_device:
            return MemorySplit(self.read_all().to(device), self.labels)
        return StreamedSplit(self.read, self.shape, self.labels, device, _threads() if threads is None else threads)


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

    def read(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Copy images into a tensor."""
        with (
            torch.inference_mode()
        ):  # `out` may be a tensor of the caller's inference mode, which each thread has for itself
            torch.index_select(self.pixels, 0, ids, out=out)

    def read_all(self) -> torch.Tensor:
        """Return the pixels."""
        return self.pixels.contiguous()

    def split(self, device: torch.device, *, on_device: bool, threads: int | None) -> Split:
        """Return the samples as a split; on the CPU they are where they should be, whatever their size."""
        return super().split(device, on_device=on_device or device.type == "cpu", threads=threads)


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

    def read(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Decode files into a tensor."""
        chosen: list[int] = ids.tolist()
        for index, image in zip(chosen, out.numpy(), strict=True):
            decode_image(self.paths[index], image)

    def _read_some(self, ids: torch.Tensor, out: torch.Tensor) -> int:
        self.read(ids, out)
        return len(ids)

    def read_all(self) -> torch.Tensor:
        """Decode all files; log progress every few seconds."""
        total = len(self)
        out = torch.empty((total, *self.shape), dtype=torch.uint8)
        parts = zip(torch.arange(total).split(_FILES_PER_JOB), out.split(_FILES_PER_JOB), strict=True)
        began = logged = time.monotonic()
        done = 0
        pool = ThreadPoolExecutor(_threads(), thread_name_prefix="read-images")
        try:
            jobs = [pool.submit(self._read_some, ids, images) for ids, images in parts]
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


def _threads() -> int:
    """Return one thread for each core that this process may run on, at most 16."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(_MOST_THREADS, len(allowed))
