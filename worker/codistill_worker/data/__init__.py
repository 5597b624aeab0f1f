"""Data sets, as bytes on a device or streamed from disk.

* :mod:`.loading` turns the experiment's `data` section into a :class:`Dataset`.
* :mod:`.dataset` is the trainer's view: a :class:`Dataset` of :class:`Split`.
* :mod:`.sources` has the loaders' results: arrays or files, from which splits are made.
* :mod:`.builtin`, :mod:`.folders` and :mod:`.callables` are the loaders.
* :mod:`.augmentation` crops, flips and normalises images.
"""

from __future__ import annotations

from codistill_worker.data.dataset import Dataset, MemorySplit, Split, check_batch
from codistill_worker.data.loading import check, image_of, load

__all__ = ["Dataset", "MemorySplit", "Split", "check", "check_batch", "image_of", "load"]
