"""A teacher's weights from every kind of file, and what is said of a file that holds none."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from codistill_worker import models
from codistill_worker.errors import ConfigurationError
from codistill_worker.training import weights
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore

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
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("plain.safetensors", "plain.pt", "old.pth"):
        assert same(dict(weights.read(tmp_path / name, "old")))


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_what_training_loops_put_around_weights_is_taken_off(key: str, prefix: str, tmp_path: Path) -> None:
    wrapped = {prefix + name: value for name, value in WEIGHTS.items()}
    torch.save({"epoch": 3, key: wrapped, "optimizer": {"lr": 0.1}}, tmp_path / "nested.pth")
    save_file(wrapped, tmp_path / "plain.safetensors")
    for name in ("nested.pth", "plain.safetensors"):
        assert same(dict(weights.read(tmp_path / name, "old")))


def test_names_that_a_wrapper_may_have_given_are_left_where_not_all_have_them(tmp_path: Path) -> None:
    torch.save({"module.weight": torch.ones(1), "bias": torch.ones(1)}, tmp_path / "own.pt")
    assert list(weights.read(tmp_path / "own.pt", "old")) == ["module.weight", "bias"]


def _nothing(path: Path) -> None:
    del path


class Code:
    """What runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, ("was-run",)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Code()))


def _saved_with_code(path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "args": Code()}, path)


def _cut(path: Path) -> None:
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none", _nothing, "is not there; give the folder of a run that trains the teacher"),
        ("a.safetensors", lambda path: path.write_bytes(b"no"), "cannot be read"),
        ("a.pt", lambda path: path.write_bytes(b"no"), "cannot be read"),
        ("a.pt", lambda path: path.write_bytes(b""), "cannot be read: it is damaged"),
        ("a.pt", _cut, "cannot be read: "),
        ("a.pt", lambda path: path.write_bytes(b"\x80\x02X\x05"), "cannot be read: it is damaged"),
        ("a.pt", lambda path: path.write_bytes(b"\x80\x02."), "cannot be read: it is damaged"),
        (
            "a.pt",
            _pickled,
            "cannot be read: it is damaged, or holds objects besides tensors, which are never unpickled; ",
        ),
        ("a.pt", _saved_with_code, "or holds objects besides tensors, which are never unpickled; allowed are a run's"),
        ("a.pt", lambda path: torch.save(nn.Linear(3, 2), path), "or holds objects besides tensors"),
        ("a.pt", lambda path: torch.save({0: torch.ones(1)}, path), "0 is no name of a tensor; allowed are"),
        ("a.pt", lambda path: torch.save([1], path), "holds a list"),
        ("a.pt", lambda path: torch.save({"epoch": 3}, path), "'epoch' is a int, no tensor"),
        ("empty", lambda path: path.mkdir(), "holds no checkpoint"),
        ("run", lambda path: save_run(path, "ab", "abc"), "is a run of the students ab, abc; give the folder of one"),
    ],
)
def test_what_is_none_is_named(
    name: str, make: Callable[[Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    with pytest.raises(ConfigurationError) as caught:
        weights.read(tmp_path / name, "old")
    assert str(caught.value).startswith(f"weights: {tmp_path / name}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ": ;" not in str(caught.value), "it says nothing"
    assert "weights_only" not in str(caught.value), "that is how to have code run"
    assert not Path("was-run").exists(), "code of the file was run"


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
    assert text.endswith("that it was trained with, on data of as many classes and images of its size")
    assert "\n" not in text


def as_densenet_was(name: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))", r"\1.", name)


@pytest.mark.parametrize(
    ("reference", "published"),
    [
        ("torchvision:resnet18", lambda names: names),
        ("torchvision:mnasnet0_5", lambda names: names),
        ("torchvision:densenet121", lambda names: {as_densenet_was(name): value for name, value in names.items()}),
        ("torchvision:googlenet", lambda names: {**names, "aux1.fc1.weight": torch.ones(1), "aux2.fc2.bias": torch.ones(1)}),
        ("torchvision:inception_v3", lambda names: {**names, "AuxLogits.fc.weight": torch.ones(1)}),
        ("timm:resnet10t", lambda names: names),
    ],
)  # fmt: skip
def test_files_as_they_are_published(reference: str, published: Any, tmp_path: Path) -> None:
    """Of models for large images; what torchvision published before it counted batches lacks the counters."""
    shape: dict[str, Any] = {"classes": 1000, "channels": 3, "size": 96, "args": {}}
    suffix = "safetensors" if reference.startswith("timm:") else "pth"
    trained, file = models.build(reference, **shape, seed=1).state_dict(), tmp_path / f"trained.{suffix}"
    counters = [name for name in trained if name.endswith("num_batches_tracked")]
    old = published({name: value for name, value in trained.items() if name not in counters})
    torch.save(old, file) if suffix == "pth" else save_file(old, file)
    model = models.build(reference, **shape, seed=2)
    weights.apply(weights.read(file, "old"), model, str(file), reference, 1000)
    assert counters
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items() if name not in counters)


def test_a_published_file_of_other_classes_says_so(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    torch.save(
        models.build("torchvision:resnet18", classes=1000, channels=3, size=128, args={}, seed=1).state_dict(), file
    )
    model = models.build("torchvision:resnet18", classes=10, channels=3, size=128, args={}, seed=1)
    with pytest.raises(ConfigurationError) as caught:
        weights.apply(weights.read(file, "old"), model, str(file), "torchvision:resnet18", 10)
    assert "with 10 classes: size mismatch for fc.weight: copying a param with shape torch.Size([1000, 512])" in str(
        caught.value
    )


def test_the_digest_is_of_names_and_values() -> None:
    first = weights.digest(WEIGHTS)
    assert first == weights.digest(dict(reversed(WEIGHTS.items())))
    assert first != weights.digest({**WEIGHTS, "bias": WEIGHTS["bias"] + 1})
    assert first != weights.digest({f"a.{name}": value for name, value in WEIGHTS.items()})
