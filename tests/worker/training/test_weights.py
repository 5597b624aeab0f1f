"""A teacher's weights from every kind of file, and what is said of a file that holds none."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from codistill_worker import models
from codistill_worker.errors import ConfigurationError
from codistill_worker.training import weights
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore

WEIGHTS = nn.Linear(3, 2).state_dict()
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1}]}


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


def test_a_file_is_what_its_bytes_say(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.pth")
    torch.save(WEIGHTS, tmp_path / "b.safetensors")
    torch.save(WEIGHTS, tmp_path / "c.safetensors", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "b.safetensors", "c.safetensors"):
        assert same(dict(weights.read(tmp_path / name, "old")))


@pytest.mark.parametrize(
    "extra", [{"epoch": 3}, {"_metadata": {}}, {"n_averaged": torch.tensor(2)}, {"optimizer": OPTIMIZER}]
)
def test_what_training_loops_put_beside_weights_is_left_out(extra: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    torch.save({**WEIGHTS, **extra}, tmp_path / "a.pth")
    weights.apply(weights.read(tmp_path / "a.pth", "old"), model, "a.pth", "mine:net", 2)
    assert same(model.state_dict())


def test_of_an_average_and_its_model_both_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, 2)
    file = {"initted": torch.tensor(True), "step": torch.tensor(3), **under("ema_model.", 1), **under("online_model.")}
    weights.apply(file, model, "a.pt", "mine:net", 2)
    assert same(model.state_dict())
    assert (
        "those under 'online_model.' are taken; left out are those under 'ema_model.', which fit too, and 2 (initted, step) "
        "others of 6 names"
    ) in caplog.text


NORM = nn.BatchNorm1d(2).state_dict()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.ones(2, dtype=torch.int32), "'weight' is of torch.int32, and of torch.float32 in the model"),
        ("bias", torch.ones(2, dtype=torch.complex64), "'bias' is of torch.complex64, and of torch.float32"),
        ("running_var", torch.ones(2, dtype=torch.bool), "'running_var' is of torch.bool, and of torch.float32"),
        ("num_batches_tracked", torch.tensor(2.5), "'num_batches_tracked' is of torch.float32, and of torch.int64"),
        (
            "weight",
            torch.tensor([1.0, float("nan")]),
            "'weight' holds values that are not finite (NaN or infinity); the",
        ),
        ("running_mean", torch.tensor([1.0, float("inf")]), "'running_mean' holds values that are not finite"),
    ],
)
def test_values_that_the_model_cannot_have_are_refused_by_name(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        weights.apply({**NORM, name: value}, nn.BatchNorm1d(2), "a.pt", "mine:net", 2)
    assert str(caught.value).startswith(f"weights: a.pt: {message}")


@pytest.mark.parametrize(
    "file",
    [
        NORM,
        {name: value.half() for name, value in NORM.items()},
        {name: value.double() for name, value in NORM.items()},
    ],
)
def test_other_types_of_floats_and_of_whole_counts_are_taken(file: dict[str, torch.Tensor]) -> None:
    model = nn.BatchNorm1d(2)
    weights.apply({**file, "num_batches_tracked": torch.tensor(7, dtype=torch.int32)}, model, "a.pt", "mine:net", 2)
    assert model.state_dict()["num_batches_tracked"] == 7
    weights.apply(file, model, "a.pt", "mine:net", 2)


def test_a_mask_that_is_infinite_in_the_model_may_be_so(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    weights.apply(model.state_dict(), model, "a.pt", "mine:net", 2)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "params", "a_key_of_ones_own"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod."]
)
def test_what_training_loops_put_around_weights_is_taken_off(key: str, prefix: str, tmp_path: Path) -> None:
    wrapped = {prefix + name: value for name, value in WEIGHTS.items()}
    torch.save({"epoch": 3, key: wrapped, "optimizer": OPTIMIZER}, tmp_path / "nested.pth")
    torch.save({"a": 1, "checkpoint": {"epoch": 3, key: {"net": wrapped}}}, tmp_path / "deep.pth")
    save_file(wrapped, tmp_path / "plain.safetensors")
    for name in ("nested.pth", "deep.pth", "plain.safetensors"):
        assert same(dict(weights.read(tmp_path / name, "old")))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_what_an_averaged_model_counts_is_no_weight(prefix: str, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2)).state_dict()
    averaged.update({f"module.{name}": value for name, value in WEIGHTS.items()})
    torch.save({"model": {prefix + name: value for name, value in averaged.items()}}, tmp_path / "averaged.pth")
    assert same(dict(weights.read(tmp_path / "averaged.pth", "old")))


def test_of_several_weights_the_trained_are_taken_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ema = {name: value + 1 for name, value in WEIGHTS.items()}
    torch.save({"state_dict_ema": ema, "state_dict": WEIGHTS}, tmp_path / "both.pth")
    assert same(dict(weights.read(tmp_path / "both.pth", "old")))
    assert "those under 'state_dict' are taken; left out are those under state_dict_ema" in caplog.text
    torch.save({"epoch": 3, "state_dict_ema": ema}, tmp_path / "ema.pth")
    assert same(dict(weights.read(tmp_path / "ema.pth", "old")), 1)


def under(prefix: str, plus: int = 0) -> dict[str, torch.Tensor]:
    return {prefix + name: value + plus for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    "file",
    [
        under("model."),
        under("net.model.backbone."),
        under("model._orig_mod."),
        {**under("model."), "criterion.weight": torch.ones(10)},
        {**under("ema_model.module.", 1), **under("model."), "ema_model.n_averaged": torch.tensor(1)},
    ],
)
def test_names_below_a_prefix_that_the_model_does_not_have(file: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": file, "pytorch-lightning_version": "2"}, tmp_path / "a.ckpt")
    model = nn.Linear(3, 2)
    weights.apply(weights.read(tmp_path / "a.ckpt", "old"), model, "a.ckpt", "mine:net", 2)
    assert same(model.state_dict())


class Wrapping(nn.Module):
    """A model whose own part has the name that a wrapper gives."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"net": nn.Linear(3, 2)})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
def test_prefixes_that_the_model_has_stay(prefix: str, tmp_path: Path) -> None:
    torch.save({f"{prefix}module.net.{name}": value for name, value in WEIGHTS.items()}, tmp_path / "a.pth")
    model = Wrapping()
    weights.apply(weights.read(tmp_path / "a.pth", "old"), model, "a.pth", "mine:net", 2)
    assert same(model.module["net"].state_dict())


def test_weights_below_several_prefixes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"under several prefixes: student\., teacher\.; save those of the"):
        weights.apply({**under("student."), **under("teacher.")}, nn.Linear(3, 2), "a.pt", "mine:net", 2)


def test_other_names_are_shown_of_both_sides() -> None:
    file = {f"layers.{index}.weight": torch.ones(1) for index in range(5)}
    with pytest.raises(ConfigurationError) as caught:
        weights.apply(file, nn.Linear(3, 2), "a.pt", "mine:net", 2)
    assert (
        "of the file's 5 names the model does not have 5 (layers.0.weight, layers.1.weight, layers.2.weight, …); of the "
        "model's 2 names the file does not have 2 (weight, bias); give the model"
    ) in str(caught.value)


@pytest.mark.parametrize("name", ["a teacher's $HOME.pth"])
@pytest.mark.parametrize(("legacy", "arrays"), [(False, False), (True, False), (False, True)])
def test_the_line_that_keeps_the_weights_alone_does(name: str, legacy: bool, arrays: bool, tmp_path: Path) -> None:
    file = tmp_path / name
    held = {
        "model": {name: value.numpy() if arrays else value for name, value in under("module.").items()},
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "optimizer": OPTIMIZER,
    }
    torch.save(held, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConfigurationError) as caught:
        weights.read(file, "old")
    text = str(caught.value)
    assert "objects besides tensors, which are never unpickled: argparse.Namespace" in text
    assert legacy or "numpy" in text, "of an older format only the first object is known"
    command = text.partition("a file that you trust: ")[2]
    python = shlex.quote(sys.executable)
    subprocess.run(command.replace("python", python, 1), shell=True, check=True)  # noqa: S602 - as a reader does
    assert same(dict(weights.read(file.with_name(f"{file.stem}-weights.pth"), "old")))


def test_names_that_a_wrapper_may_have_given_are_left_where_not_all_have_them(tmp_path: Path) -> None:
    torch.save({"module.weight": torch.ones(1), "bias": torch.ones(1)}, tmp_path / "own.pt")
    assert list(weights.read(tmp_path / "own.pt", "old")) == ["module.weight", "bias"]


def _nothing(path: Path) -> None:
    del path


class Code:
    """An object that runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, ("was-run",)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Code()))


def _saved_with_code(path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "args": Code()}, path)


def _cut(path: Path) -> None:
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-200])


def _exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)), path.with_suffix(".pt2"))
    path.with_suffix(".pt2").replace(path)
    save_file(WEIGHTS, path.with_suffix(".safetensors"))


def _script(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save does, which torch is about to drop
        for name in ("data/0", "data.pkl", "code/__torch__/torch/nn/modules/linear.py", "constants.pkl", "version"):
            archive.writestr(f"a/{name}", b"x")


def _cut_header(path: Path) -> None:
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none", _nothing, "is not there; give the folder of a run that trains the teacher"),
        ("a.safetensors", lambda path: path.write_bytes(b"no"), "cannot be read"),
        ("a.pt", lambda path: path.write_bytes(b"no"), "cannot be read"),
        ("a.pt", lambda path: path.write_bytes(b""), "cannot be read: it is an empty file; allowed are"),
        ("a.pt", _cut, "cannot be read: "),
        (
            "a.pt",
            lambda path: path.write_bytes(b"\x80\x02X\x05"),
            "it is a pickle that torch.save did not write, or is damaged",
        ),
        (
            "a.pt",
            lambda path: path.write_bytes(b"\x80\x02."),
            "it is a pickle that torch.save did not write, or is damaged",
        ),
        (
            "a.pt",
            _pickled,
            "cannot be read: it is a pickle that torch.save did not write, or is damaged; it is never unpickled; allowed are",
        ),
        ("a.pt2", _exported, "a.pt2 cannot be read: it is an exported program; give "),
        ("a.pt", _exported, "a.safetensors beside it; allowed are"),
        (
            "a.pt2",
            _script,
            "it is a TorchScript program; save the state_dict() of the model that it was made from; allowed",
        ),
        ("a.npz", lambda path: np.savez(path, weight=np.ones(2)), "it is an archive of NumPy arrays; allowed are"),
        ("a.pth", lambda path: path.write_text("no weights: \u20ac"), "it is a text file; allowed are"),
        (
            "a.pth",
            lambda path: path.write_text("<!DOCTYPE html>"),
            "it is a web page; get the file itself; allowed are",
        ),
        (
            "a.pth",
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
            "it is a pointer of Git LFS",
        ),
        ("a.pt", _cut, "it is damaged: a zip archive that is cut off or changed; get it again"),
        ("a.safetensors", _cut_header, "it is cut off within the header of safetensors; get it again"),
        (
            "a.pt",
            lambda path: torch.save({"w": torch.ones(3).to_sparse()}, path),
            "'w' is sparse, and not dense; save plain",
        ),
        (
            "a.pt",
            lambda path: torch.save({"w": torch.ones(3, device="meta")}, path),
            "'w' is on the meta device and has no",
        ),
        ("a.pt", _saved_with_code, "or holds objects besides tensors, which are never unpickled; allowed are a run's"),
        (
            "a.pt",
            lambda path: torch.save(nn.Linear(3, 2), path),
            "it holds objects besides tensors, which are never unpickled: torch.nn.modules.linear.Linear",
        ),
        (
            "a.pt",
            lambda path: torch.save({"student": WEIGHTS, "teacher": WEIGHTS, "optimizer": OPTIMIZER}, path),
            "holds weights under several keys: student, teacher; save those of the teacher alone",
        ),
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
    advice = str(caught.value).partition("use it only for a file that you trust")[0]
    assert "weights_only" not in advice, "that is how to have code run"
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


def test_memory_of_the_device_that_is_short_is_no_error_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, error = nn.Linear(2, 2), torch.OutOfMemoryError("CUDA out of memory.")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(weights, "load", fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        weights.apply(model.state_dict(), model, "w.safetensors", "own", 2)
    assert caught.value is error
