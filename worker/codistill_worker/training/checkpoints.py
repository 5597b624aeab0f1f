"""A student's checkpoints: one safetensors file each, written atomically; nothing is ever unpickled.

The file holds the model's and the optimiser's tensors, and everything else as JSON in its header. The header has a digest of
it all: safetensors has none, and would load a flipped bit as another weight. The newest two are kept. If the newest is torn
or damaged (a full disk, a power cut, a bad disk), the one before it is used.

A process writes to a file of its own, and renames it. So two processes of one student, one of which is superseded, cannot
mix their checkpoints. The file is locked while it is written; an unlocked one was left by a process that died, and is
removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from codistill.config.fingerprint import difference, extends
from codistill.rundir.files import remove_abandoned_parts, write_atomically
from codistill.rundir.layout import ParticipantLayout
from codistill.rundir.storage import FolderGuard
from codistill_worker.errors import ConfigurationError, is_out_of_memory

__all__ = ["Checkpoint", "CheckpointStore", "is_checkpoint", "newest", "read", "serialize"]

_log = logging.getLogger(__name__)
_FORMAT = 3


@dataclass(frozen=True)
class Checkpoint:
    """A student between two steps.

    Attributes:
        student: its name.
        identity: the :func:`codistill.config.fingerprint.identity` of its experiment.
        step: the first step that it has not trained.
        model: the model's state dict.
        extra: the state dict of the modules that the method trains besides the model.
        optimizer: the optimiser's state dict.
        progress: measurements that the next report needs; plain JSON values.
    """

    student: str
    identity: str
    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    progress: Mapping[str, Any]
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


class _OtherFormatError(ConfigurationError):
    """A checkpoint was written by a version with another format."""

    def __init__(self, path: Path, found: object) -> None:
        self.fact = f"checkpoint {path} has format {found}; this version reads {_FORMAT}"
        super().__init__(f"{self.fact}; use the version that wrote it")


class CheckpointStore:
    """The checkpoints of one student, in the student's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._layout = ParticipantLayout(folder)
        self._steps: list[int] = []
        self._torn = False
        self._process = secrets.token_hex(4)  # a process id is another's too, in another container
        self._guard: FolderGuard | None = None

    @property
    def durable_step(self) -> int:
        """The first step that the student needs again after going back to the older checkpoint kept."""
        return self._steps[0] if len(self._steps) > 1 else 0

    @property
    def holds_newest(self) -> bool:
        """Whether the newest checkpoint is in its place."""
        return self._layout.checkpoint.exists()

    def check(self) -> None:
        """Check that the folder is the one that the student began with, and can be written.

        Raises:
            StorageError: it is not; the text says what happened and what is lost.
            OSError: it cannot be made.
        """
        if self._guard is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._guard = FolderGuard("folder", self.folder, f"the checkpoints of student {self.folder.name!r}")
        self._guard.check()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and keep the one before it.

        A checkpoint of a later step is not replaced. A newer worker of the student wrote it, and the server may have
        forgotten the rounds before it.

        Raises:
            StorageError: the folder is gone, or can no longer be written.
            OSError: it could not be written; the checkpoints before it stay.
        """
        self.check()
        newest = self._layout.checkpoint
        saved_step = None if self._torn else _step_of(newest)
        if saved_step is not None and saved_step > checkpoint.step:
            raise OSError(errno.EEXIST, f"a newer worker has saved step {saved_step} there", str(newest))
        # A torn one must not take the place of the good one before it.
        self._write(newest, checkpoint, previous=None if self._torn else self._layout.previous_checkpoint)
        self._torn = False
        if not self._steps or self._steps[-1] != checkpoint.step:
            self._steps = [*self._steps[-1:], checkpoint.step]

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Write the best weights so far, without the optimiser's state.

        Raises:
            StorageError: the folder is gone, or can no longer be written.
            OSError: they could not be written; the weights before them stay.
        """
        self.check()
        self._write(self._layout.best_weights, checkpoint)

    def load(self, student: str, identity: str) -> Checkpoint | None:
        """Return the newest checkpoint that can be read, or None without one; remove the files of dead processes.

        Raises:
            ConfigurationError: none of the checkpoints can be read, or they are of another student or experiment.
        """
        if self.folder.is_dir():
            remove_abandoned_parts(self.folder)
        problems: dict[Path, ConfigurationError] = {}
        readable: dict[Path, Checkpoint] = {}
        for path in (self._layout.checkpoint, self._layout.previous_checkpoint):
            if not path.exists():
                continue
            try:
                readable[path] = read(path)
            except ConfigurationError as error:
                problems[path] = error
        if not readable:
            for problem in problems.values():
                if isinstance(problem, _OtherFormatError):
                    raise ConfigurationError(
                        f"{problem.fact}; finish the run with the version that began it, or choose another run folder"
                    )
            if problems:
                listed = "; ".join(map(str, problems.values()))
                raise ConfigurationError(f"{listed}; remove {self.folder} to start from the beginning")
            return None
        path, newest = next(iter(readable.items()))
        for problem in problems.values():
            _log.warning("%s; going on from %s, at step %d", problem, path.name, newest.step)
        same = newest.identity == identity or extends(newest.identity, identity)
        if newest.student != student or not same:
            why = (
                f"student {newest.student!r}, not {student!r}"
                if newest.student != student
                else (difference(newest.identity, identity) or "")
                .replace("the run has", "it has")
                .replace("this worker has", "this run has")
            )
            raise ConfigurationError(f"checkpoint {path} is of another run: {why}; choose another run folder")
        self._torn = self._layout.checkpoint in problems
        self._steps = [checkpoint.step for checkpoint in reversed(readable.values())]
        return newest

    def load_best(self) -> Checkpoint | None:
        """Return the best weights, or None if there are none.

        Raises:
            ConfigurationError: the file cannot be read.
        """
        path = self._layout.best_weights
        return read(path) if path.exists() else None

    def _write(self, path: Path, checkpoint: Checkpoint, previous: Path | None = None) -> None:
        """Write a checkpoint to its place; safetensors itself would hide the disk's errors."""
        write_atomically(path, serialize(checkpoint), writer=self._process, previous=previous)


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a student's folder, or None if there is none."""
    layout = ParticipantLayout(folder)
    return next((path for path in (layout.checkpoint, layout.previous_checkpoint) if path.exists()), None)


def is_checkpoint(path: Path) -> bool:
    """Return whether a file was written as a checkpoint; :func:`read` also verifies it."""
    try:
        with safe_open(path, framework="pt") as file:
            return "codistill" in (cast("dict[str, str] | None", file.metadata()) or {})
    except (SafetensorError, OSError):
        return False


def read(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ConfigurationError: it cannot be read, or is no checkpoint of codistill.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = cast("dict[str, str] | None", file.metadata()) or {}
            if "codistill" not in header:
                raise ConfigurationError(f"checkpoint {path} was not written by codistill")
            about = json.loads(header["codistill"])
            if about["format"] != _FORMAT:
                raise _OtherFormatError(path, about["format"])
            # Copies, as these lie in the mapped file, which others may cut short.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if header.get("digest") != _digest(header["codistill"], tensors):
            raise ConfigurationError(
                f"checkpoint {path} is damaged: its content does not have the digest that it was written with"
            )
        return Checkpoint(
            student=about["student"],
            identity=about["identity"],
            step=about["step"],
            model=_under("model.", tensors),
            extra=_under("extra.", tensors),
            optimizer=_restore(about["optimizer"], tensors),
            progress=about["progress"],
        )
    except ConfigurationError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigurationError(f"checkpoint {path} cannot be read: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"checkpoint {path} was not written by codistill") from error


def _step_of(path: Path) -> int | None:
    """Return a checkpoint's step from its header alone; None if it cannot be read."""
    step = _from_header(path, "step")
    return step if isinstance(step, int) else None


def read_identity(path: Path) -> str | None:
    """Return the identity of a checkpoint's experiment from its header alone; None if it cannot be read."""
    identity = _from_header(path, "identity")
    return identity if isinstance(identity, str) else None


def _from_header(path: Path, key: str) -> object:
    try:
        with safe_open(path, framework="pt") as file:
            header = cast("dict[str, str] | None", file.metadata()) or {}
        return json.loads(header["codistill"])[key]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def serialize(checkpoint: Checkpoint) -> bytes:
    """Return a checkpoint as the content of its file."""
    tensors = {f"model.{name}": _on_host(value) for name, value in checkpoint.model.items()}
    tensors |= {f"extra.{name}": _on_host(value) for name, value in checkpoint.extra.items()}
    optimizer = _flatten(checkpoint.optimizer, "optimizer", tensors)
    about = {
        "format": _FORMAT,
        "student": checkpoint.student,
        "identity": checkpoint.identity,
        "step": checkpoint.step,
        "optimizer": optimizer,
        "progress": checkpoint.progress,
    }
    text = json.dumps(about)
    return save(tensors, {"codistill": text, "digest": _digest(text, tensors)})


def _on_host(value: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy in the host's memory, made without memory of the device.

    Each has its own storage: tied weights are one storage under two names, which safetensors refuses.
    """
    if value.device.type == "cpu":
        return value.detach().clone(memory_format=torch.contiguous_format)
    # A copy to another memory layout would be laid out on the device first, in more of its memory.
    return value.detach().to("cpu").contiguous()


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with a prefix, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _digest(about: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 over a checkpoint's header and its tensors on the CPU, in hexadecimal."""
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` as JSON, and add copies of its tensors to `tensors` by their paths."""
    if isinstance(value, torch.Tensor):
        tensors[path] = _on_host(value)
        return {"tensor": path}
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {"map": [[key, _flatten(item, f"{path}.{key}", tensors)] for key, item in items]}
    if isinstance(value, list | tuple):
        sequence = cast("list[Any]", value)
        return {"list": [_flatten(item, f"{path}.{index}", tensors) for index, item in enumerate(sequence)]}
    return {"value": value}


def _restore(value: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    match value:
        case {"tensor": path}:
            return tensors[path]
        case {"map": items}:
            return {key: _restore(item, tensors) for key, item in items}
        case {"list": items}:
            return [_restore(item, tensors) for item in items]
        case _:
            return value["value"]
