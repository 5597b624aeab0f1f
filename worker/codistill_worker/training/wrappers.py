"""Takes off what training loops put around weights: dictionaries, prefixes of wrappers, and averages' counts."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from codistill_worker.errors import ConfigurationError
from codistill_worker.models.pretrained_keys import rename_keys

__all__ = ["COUNTER", "difference", "innermost", "names_of_model", "unwrapped"]

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
COUNTER = "num_batches_tracked"
"""The end of the names of batch norms' counts, which older files do not have."""

_SHOWN = 3


def innermost(content: Any, file: Path) -> Any:
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
        left = ", ".join(
            str(key) for key, value in level.items() if key != chosen and (key in keys or _may_be_weight(value))
        )
        if left:
            _log.warning("weights: of %s those under %r are taken; left out are those under %s", file, chosen, left)
        content = level[chosen]
    return content


def _may_be_weight(value: Any) -> bool:
    """Return whether a value is no mere count or state of a generator."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0


def _holds_weights(value: Any) -> bool:
    """Return whether a value is a state dict, or a dictionary with one inside; the state of an optimiser is none."""
    if not isinstance(value, Mapping):
        return False
    level = cast("dict[Any, Any]", value)
    if "param_groups" in level or not all(isinstance(key, str) for key in level):
        return False
    return any(isinstance(each, torch.Tensor) or _holds_weights(each) for each in level.values())


def unwrapped(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return weights by their names in the model, without the prefixes of wrappers, until none is left."""
    while weights:
        names = [name for name in weights if name != _AVERAGED]
        prefix = next((each for each in _WRAPPERS if names and all(name.startswith(each) for name in names)), None)
        if prefix is None or (len(names) < len(weights) and prefix != "module."):
            break
        weights = {name.removeprefix(prefix): weights[name] for name in names}
    return weights


def names_of_model(
    own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], path: str, reference: str
) -> Mapping[str, torch.Tensor]:
    """Return weights by the names of a model, or as they are if no prefix makes them fit.

    Raises:
        ConfigurationError: the names below several prefixes fit, so that it is not known which are meant.
    """
    if not any(_is_average_count(name) for name in own):
        weights = {name: value for name, value in weights.items() if not _is_average_count(name)}
    plain = rename_keys(weights, reference)
    if not difference(own, plain):
        return plain
    lead = next(iter(own), "")
    for end in _ends_of_parts(lead):  # the model itself has a part of a wrapper's name
        if lead[:end].endswith(_WRAPPERS) and all(name.startswith(lead[:end]) for name in own):
            longer = {lead[:end] + name: value for name, value in weights.items()}
            if not difference(own, longer):
                return longer
    bare = {_INSIDE.sub("", name): value for name, value in weights.items()}
    if len(bare) < len(weights):
        bare = dict(weights)
    needed = sum(not name.endswith(COUNTER) for name in own)
    counts = Counter(name[:end] for name in bare for end in _ends_of_parts(name))
    counts[""] = len(bare)
    fitting: dict[str, Mapping[str, torch.Tensor]] = {}
    for prefix, count in counts.items():
        if count >= needed:
            below = {name.removeprefix(prefix): value for name, value in bare.items() if name.startswith(prefix)}
            renamed = rename_keys(below, reference)
            if not difference(own, renamed):
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
        fit_too = "".join(f"those under {prefix!r}, which fit too, and " for prefix in fitting if prefix != chosen[0])
        left = [name for name in bare if not name.startswith((*fitting,))]
        _log.warning(
            "weights: of %s those under %r are taken; left out are %s%s of %d names",
            path,
            chosen[0],
            fit_too,
            f"{_first(left)} others" if fit_too else _first(left),
            len(weights),
        )
    return fitting[chosen[0]]


def _is_average_count(name: str) -> bool:
    return name.rpartition(".")[2] == _AVERAGED


def _ends_of_parts(name: str) -> list[int]:
    return [position + 1 for position, letter in enumerate(name) if letter == "."]


def difference(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> str:
    """Return in words how the names of weights differ from a model's; nothing if they are the same."""
    missing = [name for name in own if name not in weights and not name.endswith(COUNTER)]
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
