"""A data set as the trainer uses it: splits that give images by sample id."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch

from codistill_worker.data.augmentation import normalise
from codistill_worker.errors import ConfigurationError
from codistill_worker.transfers import host_buffer, upload

__all__ = ["Dataset", "MemorySplit", "Split", "StreamedSplit", "check_batch"]

_BATCHES_AHEAD = 2
_JOB_BYTES = 2**15  # of images; smaller jobs cost more to hand over than small images to read


class Split(ABC):
    """Labelled images; a sample's id is its position, from 0.

    Attributes:
        labels: int64 of shape [N], on the CPU.
    """

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return self.labels.shape[0]

    @abstractmethod
    def stream(self, id_batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the images of each batch of ids, in order.

        Batches may be taken from `id_batches` before they are needed, to read ahead. The stream begins and ends where the
        ids do. Close the iterator to stop early.

        Args:
            id_batches: tensors of ids, int64 of shape [B], on the CPU.

        Yields:
            uint8 of shape [B, C, H, W] on the split's device.

        Raises:
            ConfigurationError: a file cannot be decoded.
        """

    def images(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the images of some samples: uint8 of shape [B, C, H, W] on the split's device; see :meth:`stream`."""
        return next(self.stream([ids]))


class MemorySplit(Split):
    """Images in the memory of the device where batches are wanted.

    Args:
        images: uint8 of shape [N, C, H, W], on the device.
        labels: int64 of shape [N], on the CPU.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__(labels)
        self._images = images

    def stream(self, id_batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the images of each batch of ids, in order; nothing is read ahead."""
        for ids in id_batches:
            yield self._images.index_select(0, upload(ids, self._images.device))


class StreamedSplit(Split):
    """Images that stay off the device, read as they are needed by threads, a few batches ahead and never more.

    Decoding and copying leave Python's lock for most of their time, so threads keep several cores busy. Unlike processes
    they need no shared memory and no fork of a process with gRPC in it, and none can be lost. They end with the stream.

    Args:
        read: writes images, by ids, into a tensor on the CPU, uint8 of shape [B, C, H, W]; called by several threads at once.
        shape: (C, H, W).
        labels: int64 of shape [N], on the CPU.
        device: where batches are wanted.
        threads: the number of reading threads; 0 to read in the caller's thread.
    """

    def __init__(
        self,
        read: Callable[[torch.Tensor, torch.Tensor], None],
        shape: tuple[int, int, int],
        labels: torch.Tensor,
        device: torch.device,
        threads: int,
    ) -> None:
        super().__init__(labels)
        self._read = read
        self._shape = shape
        self._device = device
        self._threads = threads
        self._images_per_job = max(1, _JOB_BYTES // math.prod(shape))

    def stream(self, id_batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the images of each batch of ids, in order, reading two batches ahead of the one asked for."""
        if not self._threads:
            for ids in id_batches:
                batch = self._buffer(ids)
                self._read(ids, batch)
                yield upload(batch, self._device)
            return
        pending: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="read-images")
        try:
            for ids in id_batches:
                batch = self._buffer(ids)
                parts = zip(ids.split(self._images_per_job), batch.split(self._images_per_job), strict=True)
                pending.append((batch, [pool.submit(self._read, some, images) for some, images in parts]))
                if len(pending) > _BATCHES_AHEAD:
                    yield self._finished(*pending.popleft())
            pool.shutdown(wait=False)  # nothing follows, so the threads need not wait for the stream's reader
            while pending:
                yield self._finished(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _buffer(self, ids: torch.Tensor) -> torch.Tensor:
        return host_buffer((ids.shape[0], *self._shape), torch.uint8, self._device)

    def _finished(self, batch: torch.Tensor, jobs: list[Future[None]]) -> torch.Tensor:
        for job in jobs:
            job.result()
        return upload(batch, self._device)


@dataclass(frozen=True, eq=False)
class Dataset:
    """The images and labels of a run, and their statistics.

    Attributes:
        image_digests: of the images of `train`, `test` and `held_out` as they are stored, SHA-256 in hexadecimal; see
            :mod:`codistill_worker.data.digests`.
        classes: number of classes.
        train: the training samples.
        test: the test samples.
        held_out: training samples set aside to weigh an ensemble's members, or None.
        held_out_ids: the positions of those among the training samples before they were set aside, int64 of shape [N].
        mean: of each channel, of values scaled to 0..1.
        std: of each channel, likewise.
        channels: of an image.
        height: of an image, in pixels.
        width: of an image, in pixels.
    """

    image_digests: Mapping[str, str]
    classes: int
    train: Split
    test: Split
    held_out: Split | None
    held_out_ids: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    height: int
    width: int

    def normalise(self, images: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
        """Return images, uint8 of shape [B, C, H, W], as float32 with the data set's statistics taken out."""
        return normalise(images, self.mean, self.std, channels_last=channels_last)

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 in hexadecimal of the labels and shapes, and of each split's images, by what they cover.

        `labels` covers the training labels in order, the held-out ids and labels, the test labels, the number of classes
        and an image's shape.
        """
        held_out = self.held_out.labels if self.held_out else self.held_out_ids
        arrays = [self.train.labels, self.held_out_ids, held_out, self.test.labels]
        sizes = (self.classes, self.channels, self.height, self.width)
        labels = hashlib.sha256()
        for count in chain(sizes, (len(array) for array in arrays)):
            labels.update(count.to_bytes(8, "little"))
        for array in arrays:
            labels.update(array.numpy().astype("<i8").tobytes())
        images = {f"{name} images": digest for name, digest in sorted(self.image_digests.items())}
        return {"labels": labels.hexdigest(), **images}

    def fingerprint(self) -> str:
        """Return a SHA-256 in hexadecimal, which two workers share if their sample ids mean the same samples."""
        lines = [f"{name} {digest}\n" for name, digest in self.digests.items()]
        return hashlib.sha256("".join(["codistill data set\n", *lines]).encode()).hexdigest()


def check_batch(dataset: Dataset, batch_size: int) -> None:
    """Check that a step's batch can be taken from the training samples.

    Raises:
        ConfigurationError: the batch is larger than the training set.
    """
    count = len(dataset.train)
    if batch_size > count:
        held_out = f" (another {len(dataset.held_out)} are held out)" if dataset.held_out else ""
        raise ConfigurationError(
            f"training.batch_size: {batch_size} is larger than the {count} training samples{held_out}; "
            f"lower it to at most {count}, or train on more"
        )
