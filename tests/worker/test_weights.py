"""A teacher's weights from every kind of file, and what is said of a file that holds none."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from codistill_worker import weights
from codistill_worker.checkpoints import Checkpoint, CheckpointStore
from codistill_worker.errors import ConfigurationError

WEIGHTS = nn.Linear(3, 2).state_dict()


def save_run(folder: Path, *students: str) -> Path:
    for student in students:
        store = CheckpointStore(folder / "students" / student)
        model = {name: value + len(student) for name, value in WEIGHTS.items()}
        store.save(Checkpoint(student, "{}", 1, model, {}, {}, extra={"0.weight": torch.ones(1)}))
    return folder


def same(found: object, plus: int = 0) -> bool:
    assert isinstance(found, dict)
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name] + plus) for name in WEIGHTS)


def test_of_a_run_the_student_of_the_teachers_name_or_the_only_one(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", "old", "ab")
    assert same(weights.read(run, "old"), 3), "and nothing that the method trained besides the model"
    assert same(weights.read(run / "students" / "ab", "old"), 2)
    assert same(weights.read(run / "students" / "ab" / "checkpoint.safetensors", "old"), 2)
    assert same(weights.read(save_run(tmp_path / "one", "ab"), "old"), 2)


def test_plain_files(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "plain.safetensors")
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": WEIGHTS}, tmp_path / "nested.pth")
    for name in ("plain.safetensors", "plain.pt", "nested.pth"):
        assert same(dict(weights.read(tmp_path / name, "old")))


def _nothing(path: Path) -> None:
    del path


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Path("x")))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none", _nothing, "is not there; give the folder of a run that trains the teacher"),
        ("a.safetensors", lambda path: path.write_bytes(b"no"), "cannot be read"),
        ("a.pt", lambda path: path.write_bytes(b"no"), "cannot be read"),
        ("a.pt", _pickled, "cannot be read"),
        ("a.pt", lambda path: torch.save([1], path), "holds a list"),
        ("a.pt", lambda path: torch.save({"epoch": 3}, path), "'epoch' is a int, no tensor"),
        ("empty", lambda path: path.mkdir(), "holds no checkpoint"),
        ("run", lambda path: save_run(path, "ab", "abc"), "is a run of the students ab, abc; give the folder of one"),
    ],
)
def test_what_is_none_is_named(name: str, make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(ConfigurationError) as caught:
        weights.read(tmp_path / name, "old")
    assert str(caught.value).startswith(f"weights: {tmp_path / name}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_applied_they_freeze_the_model() -> None:
    model = nn.Linear(3, 2)
    weights.apply(WEIGHTS, model, "a.pt", "mine:net", 2)
    assert same(model.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_another_models_or_other_classes_are_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        weights.apply(WEIGHTS, nn.Linear(3, 4), "a.pt", "mine:net", 4)
    text = str(caught.value)
    assert text.startswith("weights: a.pt does not fit model 'mine:net' with 4 classes: size mismatch for weight")
    assert text.endswith("that it was trained with, on data of as many classes")
    assert "\n" not in text


def test_the_digest_is_of_names_and_values() -> None:
    first = weights.digest(WEIGHTS)
    assert first == weights.digest(dict(reversed(WEIGHTS.items())))
    assert first != weights.digest({**WEIGHTS, "bias": WEIGHTS["bias"] + 1})
    assert first != weights.digest({f"a.{name}": value for name, value in WEIGHTS.items()})
