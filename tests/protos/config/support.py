"""The smallest experiment, and changes to it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from codistill.config.experiment import Experiment, ExperimentError, parse
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


A_NAME = "input should be up to 64 letters, digits, `_`, `.` and `-`, the first a letter or a digit"


def problems(text: str) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        parse(text, "file.yaml")
    lines = str(caught.value).splitlines()
    assert lines == [f"file.yaml: {problem}" for problem in caught.value.problems], "a line for each problem"
    assert caught.value.source == "file.yaml"
    return caught.value.problems
