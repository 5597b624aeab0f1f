"""Checks of what an ensemble is given; each returns its argument as the ensembles compute with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["checked_labels", "checked_logits", "checked_temperature", "checked_tensor", "describe"]

_LIMIT = 1e30  # differences, and sums over any number of students, stay finite in float32


def checked_logits(logits: Tensor) -> Tensor:
    """Return logits [K, B, C], detached, in float32 or float64.

    Raises:
        ValueError: the type, dtype or shape is another, K, B or C is 0, or a value is not finite or exceeds 1e30.
    """
    checked_tensor(logits, "logits")
    if logits.ndim != 3 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"logits: {describe(logits)} is not allowed; allowed is a floating dtype [K, B, C] "
            "of at least one student, sample and class"
        )
    values = logits.detach()
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    low, high = torch.aminmax(values)
    if not (float(low) >= -_LIMIT and float(high) <= _LIMIT):
        student, sample, label = torch.nonzero(~(values.double().abs() <= _LIMIT))[0].tolist()
        raise ValueError(
            f"logits: student {student} has {values[student, sample, label].item()} for sample {sample}, class {label}; "
            f"allowed are finite values of magnitude up to {_LIMIT:g}"
        )
    return values


def checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the labels of checked logits [K, B, C].

    Raises:
        ValueError: they are not int64 [B] from 0 to C − 1.
    """
    _, B, C = logits.shape
    checked_tensor(labels, "labels")
    if labels.dtype != torch.int64 or labels.shape != (B,):
        raise ValueError(f"labels: {describe(labels)} is not allowed; allowed is int64 [{B}], one for each sample")
    wrong = torch.nonzero((labels < 0) | (labels >= C))
    if len(wrong) > 0:
        sample = int(wrong[0])
        raise ValueError(f"labels: {int(labels[sample])} of sample {sample} is not allowed; allowed are 0 to {C - 1}")
    return labels


def checked_temperature(temperature: float) -> float:
    """Return a temperature that is positive and finite.

    Raises:
        ValueError: it is not.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: {temperature} is not allowed; allowed are positive finite values")
    return temperature


def checked_tensor(value: object, name: str) -> Tensor:
    """Return an argument that is a tensor; `name` is the argument's.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise ValueError(  # noqa: TRY004 - one type of error for all that is wrong with an argument
            f"{name}: {type(value).__name__} is not allowed; allowed is a torch.Tensor, as torch.as_tensor makes it"
        )
    return value


def describe(tensor: Tensor) -> str:
    """Return dtype and shape for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
