"""The experiment file's `data` section."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from codistill.config.base import OPERATIONAL, REFERENCE, Section, require_whole_path
from codistill.config.datasets import DATASETS, DatasetInfo
from codistill.config.errors import NOT_EMPTY

__all__ = ["Augment", "Data", "Normalize"]


class Augment(Section):
    """How training images are varied."""

    crop_padding: int = Field(
        default=0,
        ge=0,
        le=16,
        description="Pixels of zero padding around an image, before a random crop to the image's size; 0 for none.",
    )
    flip: bool = Field(default=False, description="Mirror an image left to right with probability ½.")
    view: Literal["auto", "own", "shared"] = Field(
        default="auto",
        description="`own`: every student draws its own crop and flip of the same sample. `shared`: all see the same. `auto`: `shared` if a teacher teaches, otherwise `own`.",
    )


class Normalize(Section):
    """Channel statistics, of pixel values scaled to 0..1."""

    mean: tuple[float, ...] = Field(description="Mean of each channel.", min_length=1, strict=False)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        description="Standard deviation of each channel.", min_length=1, strict=False
    )

    @model_validator(mode="after")
    def _same_length(self) -> Normalize:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std has {len(self.std)}; give as many of each")
        return self


class Data(Section):
    """The data set that the students learn."""

    dataset: str = Field(
        description="One of `"
        + "`, `".join(DATASETS)
        + "`, or `package.module:callable`. Every process calls it, and it must return the same in each. What it draws from `random`, `numpy.random` and torch follows `split_seed`; seed generators of its own."
    )
    root: str = Field(
        default="data",
        pattern=NOT_EMPTY,
        description="Folder that holds the data set's files; not used by `digits`.",
        json_schema_extra=OPERATIONAL,
    )
    download: bool = Field(
        default=False,
        description="Let torchvision download the data set into `root` if it is not there.",
        json_schema_extra=OPERATIONAL,
    )
    classes: int | None = Field(
        default=None,
        ge=2,
        le=1_000_000,
        description="Number of classes; known for the built-in sets, needed for the others.",
    )
    image_size: int | None = Field(
        default=None, ge=4, le=1024, description="Height and width to which images from files are resized and cropped."
    )
    train_size: int | None = Field(
        default=None,
        ge=1,
        description="Train on this many samples, drawn by `split_seed`; all by default. `digits` has no separate test split: it trains on 1,347 by default and tests on the rest.",
    )
    test_size: int | None = Field(
        default=None, ge=1, description="Test on this many samples, drawn by `split_seed`; all by default."
    )
    held_out: int = Field(
        default=0,
        ge=0,
        description="Training samples set aside. `kdcl` with the `general` ensemble measures its weights on them once an epoch.",
    )
    split_seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of `train_size`, `test_size` and `held_out`. It is separate from `seed`, so that runs with other seeds use the same split.",
    )
    augment: Augment = Field(default_factory=Augment, description="How training images are varied.")
    normalize: Normalize | None = Field(
        default=None,
        description="Channel statistics; measured on the training samples by default (ImageNet's for `imagenet`).",
    )
    memory_limit_gib: float = Field(
        default=4.0,
        gt=0,
        description="Decoded images up to this size are kept on the device as uint8. Of a larger set, files stream from disk and arrays from the host's memory.",
        json_schema_extra=OPERATIONAL,
    )
    loader_workers: int | None = Field(
        default=None,
        ge=0,
        le=256,
        description="Threads of each participant that read images if they are not kept on the device; 0 for none of its own. By default one for each core, at most 16.",
        json_schema_extra=OPERATIONAL,
    )

    _whole = field_validator("root")(require_whole_path)

    @field_validator("dataset")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in DATASETS or REFERENCE.fullmatch(value):
            return value
        close = difflib.get_close_matches(value, DATASETS, 1)
        hint = f"did you mean {close[0]!r}? Allowed" if close else "allowed"
        raise ValueError(f"unknown data set; {hint}: {', '.join(DATASETS)}, or package.module:callable")

    @model_validator(mode="after")
    def _complete(self) -> Data:
        known = DATASETS.get(self.dataset)
        if known is not None and known.classes is not None and self.classes not in (None, known.classes):
            raise ValueError(f"classes: {self.classes}, but {self.dataset} has {known.classes}; leave it out")
        if (known is None or known.classes is None) and self.classes is None:
            raise ValueError(f"dataset {self.dataset} needs `classes`, its number of classes")
        if known is not None and known.size is None and self.image_size is None:
            raise ValueError(f"dataset {self.dataset} needs `image_size`, the height and width to resize images to")
        return self

    @property
    def class_count(self) -> int:
        """The number of classes, given or known."""
        known = DATASETS.get(self.dataset)
        count = self.classes or (known.classes if known else None)
        assert count is not None  # noqa: S101 - _complete has checked it
        return count

    @property
    def training_samples(self) -> int | None:
        """The number of samples to train on. None where it is not known without loading the set, or is not there."""
        known = DATASETS.get(self.dataset)
        available = known.train if known is not None else None
        if self.train_size is None:
            return None if available is None or self.held_out >= available else available - self.held_out
        if known is not None and known.most_to_train_on is not None and self.train_size > known.most_to_train_on:
            return None
        return max(self.train_size - self.held_out, 0)

    def size_problems(self, batch_size: int) -> Iterator[str]:
        """Yield what does not fit the data set, as far as its size is known without loading it.

        Args:
            batch_size: the experiment's; it is checked too, as no more samples fit a batch than are trained on.

        Yields:
            A line for each problem, with its path in the experiment.
        """
        known = DATASETS.get(self.dataset)
        if known is not None:
            yield from self._known_size_problems(known)
        available = known.train if known is not None else None
        samples = self.training_samples
        if samples is not None and samples < batch_size:
            total = "data.train_size" if self.train_size else f"{available} of {self.dataset}"
            yield (
                f"training.batch_size: {batch_size} is larger than the {samples} training samples ({total} less "
                "data.held_out)"
            )

    def _known_size_problems(self, known: DatasetInfo) -> Iterator[str]:
        if self.normalize is not None and known.channels is not None and len(self.normalize.mean) != known.channels:
            yield (
                f"data.normalize: {len(self.normalize.mean)} channels, but the images of {self.dataset} have "
                f"{known.channels}"
            )
        if known.train is None or known.test is None or known.most_to_train_on is None:
            return
        wanted = self.train_size or known.train
        if wanted > known.most_to_train_on:
            yield (
                f"data.train_size: {wanted} is more than {self.dataset} has to train on; allowed: 1 to "
                f"{known.most_to_train_on}"
            )
            return
        left = known.train + known.test - wanted if known.divided else known.test
        if (self.test_size or 0) > left:
            yield f"data.test_size: {self.test_size} is more than {self.dataset} has to test on; allowed: 1 to {left}"
        if self.train_size is None and self.held_out >= known.train:
            yield (
                f"data.held_out: {self.held_out} leaves nothing of {known.train} training samples; allowed: 0 to "
                f"{known.train - 1}"
            )
