"""The built-in data sets."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

__all__ = ["DATASETS", "DatasetInfo"]


class DatasetInfo(BaseModel):
    """A built-in data set, as far as it is known without loading it.

    Attributes:
        classes: number of classes; None where the experiment must give it.
        channels: number of channels of an image.
        size: height and width of an image; None where the experiment must give `image_size`.
        about: a description for the documentation.
        train: samples of the training split, where their number is known.
        test: samples of the test split.
        divided: whether both splits are drawn from one pool, so that more of one is less of the other.
    """

    model_config = ConfigDict(frozen=True)

    classes: int | None
    channels: int | None
    size: int | None
    about: str
    train: int | None = None
    test: int | None = None
    divided: bool = False

    @property
    def most_to_train_on(self) -> int | None:
        """The largest training set that leaves something to test on; None where the sizes are not known."""
        if self.train is None or self.test is None:
            return None
        return self.train + self.test - 1 if self.divided else self.train


DATASETS: Mapping[str, DatasetInfo] = {
    "digits": DatasetInfo(
        classes=10,
        channels=1,
        size=8,
        train=1_347,
        test=450,
        divided=True,
        about="scikit-learn's 1,797 handwritten digits; no download",
    ),
    "mnist": DatasetInfo(classes=10, channels=1, size=28, train=60_000, test=10_000, about="torchvision's MNIST"),
    "fashion_mnist": DatasetInfo(
        classes=10, channels=1, size=28, train=60_000, test=10_000, about="torchvision's Fashion-MNIST"
    ),
    "cifar10": DatasetInfo(classes=10, channels=3, size=32, train=50_000, test=10_000, about="torchvision's CIFAR-10"),
    "cifar100": DatasetInfo(
        classes=100, channels=3, size=32, train=50_000, test=10_000, about="torchvision's CIFAR-100"
    ),
    "imagenet": DatasetInfo(
        classes=1000,
        channels=3,
        size=None,
        train=1_281_167,
        test=50_000,
        about="torchvision's ImageNet; needs `image_size`",
    ),
    "image_folder": DatasetInfo(
        classes=None,
        channels=3,
        size=None,
        about="`root`/train/CLASS/* and `root`/test/CLASS/* (or val); needs `classes` and `image_size`",
    ),
}
