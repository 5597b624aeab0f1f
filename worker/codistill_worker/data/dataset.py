"""A data set as the trainer uses it: splits that give images by sample id."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from codistill_worker.data.augmentation import normalise
from codistill_worker.errors import ConfigurationError

__all__ = ["Dataset", "MemorySplit", "Split", "StreamedSplit", "check_batch"]

_BATCHES_AHEAD = 2


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

        Batches may be taken from `id_batches` before they are needed, to decode ahead. The stream begins and ends where the
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
    """Images in memory: the device's, or the host's where they are too large for the device.

    Args:
        images: uint8 of shape [N, C, H, W], on `device` or on the CPU.
        labels: int64 of shape [N], on the CPU.
        device: where batches are wanted.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> None:
        super().__init__(labels)
        self._images = images
        self._device = device

    def stream(self, id_batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the images of each batch of ids, in order; nothing is read ahead."""
        for ids in id_batches:
            yield self._images.index_select(0, ids.to(self._images.device)).to(self._device)


class StreamedSplit(Split):
    """Images decoded as they are needed, by threads, a few batches ahead and never more.

    Decoding leaves Python's lock for most of its time, so threads keep several cores busy. Unlike processes they need no
    shared memory and no fork of a process with gRPC in it, and none can be lost.

    Args:
        decode: writes one sample's image, by id, into an array uint8 of shape [C, H, W].
        shape: (C, H, W).
        labels: int64 of shape [N], on the CPU.
        device: where batches are wanted.
        threads: the number of decoding threads; 0 to decode in the caller's thread.
    """

    def __init__(
        self,
        decode: Callable[[int, np.ndarray], None],
        shape: tuple[int, int, int],
        labels: torch.Tensor,
        device: torch.device,
        threads: int,
    ) -> None:
        super().__init__(labels)
        self._decode = decode
        self._shape = shape
        self._device = device
        self._threads = threads

    def stream(self, id_batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the images of each batch of ids, in order, decoding two batches ahead of the one asked for."""
        if not self._threads:
            for ids in id_batches:
                batch = self._buffer(ids)
                for image, index in zip(batch.numpy(), ids.tolist(), strict=True):
                    self._decode(index, image)
                yield self._on_device(batch)
            return
        pending: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        try:
            for ids in id_batches:
                batch = self._buffer(ids)
                places = zip(batch.numpy(), ids.tolist(), strict=True)
                pending.append((batch, [pool.submit(self._decode, index, image) for image, index in places]))
                if len(pending) > _BATCHES_AHEAD:
                    yield self._finished(*pending.popleft())
            while pending:
                yield self._finished(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _buffer(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.empty((ids.shape[0], *self._shape), dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _finished(self, batch: torch.Tensor, jobs: list[Future[None]]) -> torch.Tensor:
        for job in jobs:
            job.result()
        return self._on_device(batch)

    def _on_device(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.to(self._device, non_blocking=True)


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
