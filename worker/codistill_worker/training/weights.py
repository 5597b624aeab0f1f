"""Reads weights from files of several kinds, and loads them into models; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from codistill.rundir.layout import RunLayout
from codistill_worker.errors import ConfigurationError, is_devices_fault, is_out_of_memory
from codistill_worker.training import checkpoints
from codistill_worker.training.file_kinds import SAFETENSORS, TORCH, kind_of
from codistill_worker.training.unsafe_files import OBJECTS, objects_in, way_out
from codistill_worker.training.wrappers import COUNTER, difference, innermost, names_of_model, unwrapped

__all__ = ["apply", "digest", "load", "read"]

_ALLOWED = (
    "allowed are a run's folder, a checkpoint of one, a file of plain weights (.safetensors), or a state dict that "
    "torch.save wrote"
)


def read(path: Path, name: str) -> Mapping[str, torch.Tensor]:
    """Read weights, by their names in the model.

    Args:
        path: a run's folder, that of one of its students, a checkpoint, or a file of plain weights.
        name: the teacher's name, which chooses among the students of a run.

    Raises:
        ConfigurationError: there is no such file, or it holds no weights.
    """
    file = _file_at(path, name)
    if checkpoints.is_checkpoint(file):
        return checkpoints.read(file).model
    content = innermost(_content_of(file), file)
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"weights: {file} holds a {type(content).__name__}; {_ALLOWED}")
    weights = cast("dict[Any, Any]", content)
    others = [key for key, value in weights.items() if not isinstance(value, torch.Tensor)]
    if others and len(others) == len(weights):
        raise ConfigurationError(
            f"weights: {file}: {others[0]!r} is a {type(weights[others[0]]).__name__}, no tensor; {_ALLOWED}"
        )
    for key in others:  # training loops keep their progress beside the weights
        del weights[key]
    for key, value in weights.items():
        if not isinstance(key, str):
            raise ConfigurationError(f"weights: {file}: {key!r} is no name of a tensor; {_ALLOWED}")
        if fault := _fault_of(value):
            raise ConfigurationError(f"weights: {file}: {key!r} {fault}; save plain tensors with their values")
    return unwrapped(weights)


def _content_of(file: Path) -> Any:
    """Return what a file of safetensors or of torch.save holds, whatever its suffix; only tensors are unpickled."""
    try:
        kind = kind_of(file)
    except OSError as error:
        raise ConfigurationError(f"weights: {file} cannot be read: {error.strerror or error}; {_ALLOWED}") from error
    if kind not in (SAFETENSORS, TORCH):
        raise ConfigurationError(f"weights: {file} cannot be read: it is {kind}; {_ALLOWED}")
    try:
        if kind == SAFETENSORS:
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 - it is no mapping
        # Of a path torch looks at the suffix. The error below says in one line what is wrong with a foreign file.
        with warnings.catch_warnings(), file.open("rb") as opened:
            warnings.simplefilter("ignore")
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # torch may raise anything for a damaged file
        if is_out_of_memory(error):
            raise
        known = isinstance(error, SafetensorError | OSError | RuntimeError)
        # torch's own text on objects in a file advises to unpickle them.
        why = shorten(str(error), 200, placeholder=" …") if known and "weights_only" not in str(error) else OBJECTS
        if objects := objects_in(file, error):
            raise ConfigurationError(f"weights: {file} cannot be read: {way_out(file, objects, _ALLOWED)}") from error
        raise ConfigurationError(f"weights: {file} cannot be read: {why}; {_ALLOWED}") from error


def _fault_of(value: torch.Tensor) -> str:
    """Return why a tensor cannot be a weight, as the end of a sentence; nothing if it can."""
    if value.is_meta:
        return "is on the meta device and has no values"
    if value.is_nested or value.layout != torch.strided:
        return f"is {'nested' if value.is_nested else 'sparse'}, and not dense"
    return f"is quantised ({value.dtype})" if value.is_quantized else ""


def load(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights into a model with the same names.

    A state dict carries the versions of the model's code beside its tensors, and other files do not. Without them
    torchvision's MNASNet takes no weights, so the model's own are used. Counters of batches, which old files lack, stay as
    they are.

    Raises:
        RuntimeError, ValueError: the weights are of another model.
    """
    own = model.state_dict()
    state = OrderedDict((name, value) for name, value in own.items() if name.endswith(COUNTER))
    state.update(weights)
    versions = getattr(weights, "_metadata", None) or getattr(own, "_metadata")  # noqa: B009 - torch gives it no name
    setattr(state, "_metadata", versions)  # noqa: B010 - as above
    model.load_state_dict(state)


def apply(weights: Mapping[str, torch.Tensor], model: nn.Module, path: str, reference: str, classes: int) -> None:
    """Load a teacher's weights into a model, and freeze it.

    Names need not be the model's own. Where those below one prefix are, for example ``net.``, they are taken.

    Raises:
        ConfigurationError: the weights are of another model, or of other classes.
    """
    own = cast("dict[str, torch.Tensor]", model.state_dict())
    fitted = names_of_model(own, weights, path, reference)
    if differs := difference(own, fitted):
        raise ConfigurationError(
            f"weights: {path} does not fit model {reference!r} with {classes} classes: {differs}; give the model and "
            "the model_args that it was trained with, or a file with the model's names"
        )
    _require_values(model, fitted, path)
    try:
        load(model, fitted)
    except (RuntimeError, ValueError) as error:
        if is_devices_fault(error):
            raise
        lines = str(error).splitlines()
        why = " ".join((lines[1] if len(lines) > 1 else lines[0]).split())
        raise ConfigurationError(
            f"weights: {path} does not fit model {reference!r} with {classes} classes: {why[:300].rstrip('.')}; give the "
            "model and the model_args that it was trained with, on data of as many classes and images of its size"
        ) from error
    model.requires_grad_(False).eval()


def _require_values(model: nn.Module, weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Require that a model's parameters and buffers can have the values of a file without a loss.

    Raises:
        ConfigurationError: a value would be cut off, or is not finite; the text names the tensor.
    """
    own = cast("dict[str, torch.Tensor]", model.state_dict())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in weights.items():
        into: Any = own[name]
        if not isinstance(into, torch.Tensor):
            continue  # an extra state of the model
        if into.is_floating_point() != value.is_floating_point() or into.is_complex() != value.is_complex():
            # Counts that were saved in another type are whole numbers, and stay so.
            floats = into.is_floating_point() or into.is_complex() or value.is_complex()
            if floats or not bool((value == value.round()).all()):
                raise ConfigurationError(
                    f"weights: {path}: {name!r} is of {value.dtype}, and of {into.dtype} in the model; save it in the model's "
                    "type"
                )
        # A mask may be infinite in every model of its kind; a weight may not.
        if not _is_finite(value) and (name in parameters or _is_finite(into)):
            raise ConfigurationError(
                f"weights: {path}: {name!r} holds values that are not finite (NaN or infinity); the training that wrote it "
                "had diverged, or the file is damaged: give an earlier one"
            )


def _is_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point():
        return True
    wide = value.float() if value.element_size() == 1 else value  # types of 8 bits have no such test
    return bool(torch.isfinite(wide).all())


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 over weights and their names, in hexadecimal."""
    sha256 = hashlib.sha256()
    for name, value in sorted(weights.items()):
        sha256.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha256.update(value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _file_at(path: Path, name: str) -> Path:
    """Return the file that holds the weights."""
    if path.is_file():
        return path
    if not path.exists():
        raise ConfigurationError(
            f"weights: {path} is not there; give the folder of a run that trains the teacher, made by "
            f"`codistill run EXPERIMENT --run-dir {path}`, or a file"
        )
    folder = path
    layout = RunLayout(path)
    if layout.students.is_dir():
        students = sorted(path.name for path in layout.students.iterdir() if path.is_dir())
        chosen = name if name in students else students[0] if len(students) == 1 else None
        if chosen is None:
            raise ConfigurationError(
                f"weights: {path} is a run of the students {', '.join(students)}; give the folder of one of them, for "
                f"example {layout.student(students[0]).path}"
            )
        folder = layout.student(chosen).path
    newest = checkpoints.newest(folder)
    if newest is None:
        raise ConfigurationError(f"weights: {folder} holds no checkpoint; {_ALLOWED}")
    return newest
