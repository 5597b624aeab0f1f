"""Reads weights from files of several kinds, and loads them into models; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import logging
import re
import shlex
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from codistill.rundir.layout import RunLayout
from codistill_worker.errors import ConfigurationError, is_out_of_memory
from codistill_worker.models.pretrained_keys import rename_keys
from codistill_worker.training import checkpoints

__all__ = ["apply", "digest", "load", "read"]

_log = logging.getLogger(__name__)

_NESTED = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "net_state_dict",
    "module",
    "params",
    "weights",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "params_ema",
    "ema",
)
"""Keys under which training loops keep weights; where a file has several, the first of these is taken."""

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Prefixes that DataParallel, torch.compile and others put before the names of a model's weights."""

_AVERAGED = "n_averaged"
"""A count that AveragedModel keeps beside the weights, whose names then begin with ``module.``."""

_INSIDE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_EMA = re.compile(r"(?:^|[._])(?:ema|averaged|swa)(?:[._]|$)")
_COUNTER = "num_batches_tracked"
_SHOWN = 3

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_COMMANDS = frozenset({"os", "posix", "nt", "sys", "subprocess", "runpy", "shutil"})
"""Modules whose functions no file of weights needs, and harmful ones call."""

_EVALUATING = frozenset(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in ("__import__", "compile", "eval", "exec", "execfile", "getattr", "open")
)

_KEEP = (
    "import sys, torch; "
    "k = lambda v: v.detach() if isinstance(v, torch.Tensor) else k(v.state_dict()) if isinstance(v, torch.nn.Module) "
    "else {n: w for n, x in v.items() if (w := k(x)) is not None} or None if isinstance(v, dict) else None; "
    'torch.save(k(torch.load(sys.argv[1], map_location="cpu", weights_only=False)), sys.argv[2])'
)
"""Python code that keeps the tensors of a file, by their keys; it runs whatever code the file holds."""

_OBJECTS = "it is damaged, or holds objects besides tensors, which are never unpickled"
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
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return _unwrapped({key: opened.get_tensor(key).clone() for key in opened.keys()})  # noqa: SIM118 - it is no mapping
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says in one line what is wrong with a foreign file
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch may raise anything for a damaged file
        if is_out_of_memory(error):
            raise
        known = isinstance(error, SafetensorError | OSError | RuntimeError)
        # torch's own text on objects in a file advises to unpickle them.
        why = " ".join(str(error).split())[:200] if known and "weights_only" not in str(error) else _OBJECTS
        if objects := _objects_in(file, error):
            raise ConfigurationError(f"weights: {file} cannot be read: {_way_out(file, objects)}") from error
        raise ConfigurationError(f"weights: {file} cannot be read: {why}; {_ALLOWED}") from error
    content = _innermost(content, file)
    if not isinstance(content, Mapping) or not content:
        raise ConfigurationError(f"weights: {file} holds a {type(content).__name__}; {_ALLOWED}")
    weights = cast("dict[Any, Any]", content)
    for key, value in weights.items():
        if not isinstance(key, str):
            raise ConfigurationError(f"weights: {file}: {key!r} is no name of a tensor; {_ALLOWED}")
        if not isinstance(value, torch.Tensor):
            raise ConfigurationError(f"weights: {file}: {key!r} is a {type(value).__name__}, no tensor; {_ALLOWED}")
    return _unwrapped(weights)


def load(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights into a model with the same names.

    A state dict carries the versions of the model's code beside its tensors, and other files do not. Without them
    torchvision's MNASNet takes no weights, so the model's own are used. Counters of batches, which old files lack, stay as
    they are.

    Raises:
        RuntimeError, ValueError: the weights are of another model.
    """
    own = model.state_dict()
    state = OrderedDict((name, value) for name, value in own.items() if name.endswith(_COUNTER))
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
    fitted = _by_names_of(own, weights, path, reference)
    if difference := _difference(own, fitted):
        raise ConfigurationError(
            f"weights: {path} does not fit model {reference!r} with {classes} classes: {difference}; give the model and "
            "the model_args that it was trained with, or a file with the model's names"
        )
    try:
        load(model, fitted)
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines()
        why = " ".join((lines[1] if len(lines) > 1 else lines[0]).split())
        raise ConfigurationError(
            f"weights: {path} does not fit model {reference!r} with {classes} classes: {why[:300].rstrip('.')}; give the "
            "model and the model_args that it was trained with, on data of as many classes and images of its size"
        ) from error
    model.requires_grad_(False).eval()


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 over weights and their names, in hexadecimal."""
    sha256 = hashlib.sha256()
    for name, value in sorted(weights.items()):
        sha256.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha256.update(value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _objects_in(file: Path, error: Exception) -> list[str]:
    """Return the names of the classes and functions for which torch refused a file; none if it is only damaged."""
    refused = _GLOBAL.findall(str(error))
    if not refused:
        return []
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # noqa: BLE001 - an older format, which torch does not look through
        found = []
    return sorted({*refused, *found})


def _way_out(file: Path, objects: list[str]) -> str:
    """Return what to do with a file that holds objects besides tensors."""
    if any(name.partition(".")[0] in _COMMANDS or name in _EVALUATING for name in objects):
        return f"{_OBJECTS}; {_ALLOWED}"
    kept = file.with_name(f"{file.stem}-weights.pth")
    line = shlex.join(["python", "-c", _KEEP, str(file), str(kept)])
    return (
        f"it holds objects besides tensors, which are never unpickled: {', '.join(objects[:_SHOWN])}"
        f"{' and others' if len(objects) > _SHOWN else ''}; give {kept} instead, to which this line writes the "
        f"weights alone; it runs the file's code, so use it only for a file that you trust: {line}"
    )


def _innermost(content: Any, file: Path) -> Any:
    """Return the state dict inside the dictionaries around it.

    At each level the first key of ``_NESTED`` below which weights lie is taken, or else the only key with weights.

    Raises:
        ConfigurationError: weights lie below several keys, none of them known.
    """
    while isinstance(content, Mapping):
        level = cast("dict[Any, Any]", content)
        keys = [key for key, value in level.items() if isinstance(key, str) and _holds_weights(value)]
        known = [key for key in _NESTED if key in keys]
        if not known and (not keys or any(isinstance(value, torch.Tensor) for value in level.values())):
            break
        if not known and len(keys) > 1:
            raise ConfigurationError(
                f"weights: {file} holds weights under several keys: {', '.join(keys)}; save those of the teacher alone, "
                f"or under one of {', '.join(_NESTED)}"
            )
        chosen = known[0] if known else keys[0]
        if len(keys) > 1:
            left = ", ".join(key for key in keys if key != chosen)
            _log.warning("weights: of %s those under %r are taken; left out are those under %s", file, chosen, left)
        content = level[chosen]
    return content


def _holds_weights(value: Any) -> bool:
    """Return whether a value is a state dict, or a dictionary with one inside; the state of an optimiser is none."""
    if not isinstance(value, Mapping):
        return False
    level = cast("dict[Any, Any]", value)
    if "param_groups" in level or not all(isinstance(key, str) for key in level):
        return False
    return any(isinstance(each, torch.Tensor) or _holds_weights(each) for each in level.values())


def _unwrapped(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return weights by their names in the model, without the prefixes of wrappers, until none is left."""
    while weights:
        names = [name for name in weights if name != _AVERAGED]
        prefix = next((each for each in _WRAPPERS if names and all(name.startswith(each) for name in names)), None)
        if prefix is None or (len(names) < len(weights) and prefix != "module."):
            break
        weights = {name.removeprefix(prefix): weights[name] for name in names}
    return weights


def _by_names_of(
    own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], path: str, reference: str
) -> Mapping[str, torch.Tensor]:
    """Return weights by the names of a model, or as they are if no prefix makes them fit.

    Raises:
        ConfigurationError: the names below several prefixes fit, so that it is not known which are meant.
    """
    plain = rename_keys(weights, reference)
    if not _difference(own, plain):
        return plain
    lead = next(iter(own), "")
    for end in _ends_of_parts(lead):  # the model itself has a part of a wrapper's name
        if lead[:end].endswith(_WRAPPERS) and all(name.startswith(lead[:end]) for name in own):
            longer = {lead[:end] + name: value for name, value in weights.items()}
            if not _difference(own, longer):
                return longer
    bare = {_INSIDE.sub("", name): value for name, value in weights.items()}
    if len(bare) < len(weights):
        bare = dict(weights)
    needed = sum(not name.endswith(_COUNTER) for name in own)
    counts = Counter(name[:end] for name in bare for end in _ends_of_parts(name))
    counts[""] = len(bare)
    fitting: dict[str, Mapping[str, torch.Tensor]] = {}
    for prefix, count in counts.items():
        if count >= needed:
            below = {name.removeprefix(prefix): value for name, value in bare.items() if name.startswith(prefix)}
            renamed = rename_keys(below, reference)
            if not _difference(own, renamed):
                fitting[prefix] = renamed
    if len(fitting) > 1:  # a student of other widths has the teacher's names, and is not meant
        shaped = {
            prefix: below
            for prefix, below in fitting.items()
            if all(value.shape == getattr(own[name], "shape", None) for name, value in below.items())
        }
        fitting = shaped or fitting
    chosen = [prefix for prefix in fitting if not _EMA.search(prefix)] if len(fitting) > 1 else list(fitting)
    if len(fitting) > 1 and len(chosen) != 1:
        raise ConfigurationError(
            f"weights: {path} holds weights of model {reference!r} under several prefixes: {', '.join(sorted(fitting))}; "
            "save those of the teacher alone"
        )
    if not chosen:
        return plain
    if len(fitting[chosen[0]]) < len(weights):
        _log.warning(
            "weights: of %s those under %r are taken; left out are %d of %d names",
            path,
            chosen[0],
            len(weights) - len(fitting[chosen[0]]),
            len(weights),
        )
    return fitting[chosen[0]]


def _ends_of_parts(name: str) -> list[int]:
    return [position + 1 for position, letter in enumerate(name) if letter == "."]


def _difference(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> str:
    """Return in words how the names of weights differ from a model's; nothing if they are the same."""
    missing = [name for name in own if name not in weights and not name.endswith(_COUNTER)]
    unknown = [name for name in weights if name not in own]
    if not missing and not unknown:
        return ""
    return (
        f"of the file's {len(weights)} names the model does not have {_first(unknown)}; of the model's {len(own)} names "
        f"the file does not have {_first(missing)}"
    )


def _first(names: Iterable[str]) -> str:
    """Return the number of names, and the first of them."""
    listed = list(names)
    more = ", …" if len(listed) > _SHOWN else ""
    return f"{len(listed)} ({', '.join(listed[:_SHOWN])}{more})" if listed else "0"


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
