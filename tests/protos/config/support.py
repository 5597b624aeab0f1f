"""The smallest experiment, and changes to it."""

from __future__ import annotations

from typing import Any

import yaml

from codistill.config.experiment import Experiment, parse
from codistill.config.methods import METHODS

DATASET_NAMES = "digits, mnist, fashion_mnist, cifar10, cifar100, imagenet, image_folder"
TOP = "data, distillation, exchange, name, seed, students, teachers, training"
METHOD_ALLOWED = f"allowed: {', '.join(METHODS)}"


def document() -> dict[str, Any]:
    """Return the smallest experiment there is: everything else is default."""
    return {
        "name": "tiny",
        "data": {"dataset": "digits"},
        "training": {"epochs": 2},
        "students": [{"name": "ant", "model": "mlp"}, {"name": "bee", "model": "cnn"}],
    }


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the smallest experiment with values put at dotted paths; a number is a position in a list."""
    whole = document()
    for path, value in changes.items():
        *parents, last = path.split(".")
        place: Any = whole
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    return whole


def experiment(**changes: Any) -> Experiment:
    return parse(yaml.safe_dump(changed({key.replace("__", "."): value for key, value in changes.items()})))
