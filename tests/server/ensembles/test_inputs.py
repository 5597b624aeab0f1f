"""The inputs of every ensemble, the dtypes of its output, and its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codistill_server import ensembles
from server.ensembles.support import Labelled

LABELLED: dict[str, Labelled] = {
    "naive": ensembles.naive,
    "linear": ensembles.linear,
    "min_logit": ensembles.min_logit,
}
PLAIN: dict[str, Callable[[Tensor], object]] = {
    "mean_logits": ensembles.mean_logits,
    "mean_probabilities": ensembles.mean_probabilities,
    "peer_probabilities": ensembles.peer_probabilities,
    "weighted_sum": lambda logits: ensembles.weighted_sum(logits, torch.full(logits.shape[:1], 0.5)),
}
NEEDS_LABELS: dict[str, Labelled] = {
    **LABELLED,
    "linear_weights": ensembles.linear_weights,
    "error_covariance": ensembles.error_covariance,
    "general_weights": ensembles.general_weights,
}


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_of_answers(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(given_dtype).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3])
    targets = [ensemble(logits, labels) for ensemble in LABELLED.values()]
    targets.append(ensembles.mean_logits(logits))
    targets += [ensembles.mean_probabilities(logits), *ensembles.peer_probabilities(logits)]
    targets.append(ensembles.weighted_sum(logits, torch.ones(3, dtype=torch.float64)))
    assert all(target.dtype == dtype and not target.requires_grad for target in targets)
    assert all(target.shape == (4, 5) for target in targets[:5])
    for exact in (ensembles.linear_weights, ensembles.general_weights, ensembles.error_covariance):
        assert exact(logits, labels).dtype == torch.float64


@pytest.mark.parametrize("function", [*NEEDS_LABELS.values(), *PLAIN.values()], ids=[*NEEDS_LABELS, *PLAIN])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 3), r"logits: float32 \[2, 3\] is not allowed; allowed is a floating dtype \[K, B, C\]"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"logits: int64 \[2, 3, 4\]"),
        (torch.zeros(0, 3, 4), r"logits: float32 \[0, 3, 4\]"),
        (torch.zeros(2, 0, 4), r"at least one student, sample and class"),
        (torch.zeros(2, 3, 4).index_fill_(1, torch.tensor(2), math.nan), r"student 0 has nan for sample 2, class 0"),
        (torch.zeros(2, 3, 4).index_fill_(2, torch.tensor(3), -math.inf), r"student 0 has -inf for sample 0, class 3"),
        (torch.zeros(2, 3, 4).index_fill_(0, torch.tensor(1), 2e30), r"finite values of magnitude up to 1e\+30"),
    ],
)
def test_bad_logits_are_refused(function: Callable[..., object], logits: Tensor, message: str) -> None:
    arguments = (logits, torch.zeros(3, dtype=torch.int64)) if function in NEEDS_LABELS.values() else (logits,)
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("function", NEEDS_LABELS.values(), ids=NEEDS_LABELS)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"labels: int64 \[2\] is not allowed; allowed is int64 \[3\]"),
        (torch.zeros(3), r"labels: float32 \[3\]"),
        (torch.zeros(3, 1, dtype=torch.int64), r"labels: int64 \[3, 1\]"),
        (torch.tensor([0, 4, 0]), r"labels: 4 of sample 1 is not allowed; allowed are 0 to 3"),
        (torch.tensor([0, 0, -1]), r"labels: -1 of sample 2"),
    ],
)
def test_bad_labels_are_refused(function: Labelled, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 3, 4), labels)


@pytest.mark.parametrize("function", [ensembles.mean_probabilities, ensembles.peer_probabilities])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperatures_are_refused(function: Callable[[Tensor, float], object], temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature: {temperature} is not allowed; allowed are positive"):
        function(torch.zeros(2, 3, 4), temperature)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda array: ensembles.naive(array, torch.zeros(2, dtype=torch.int64)), "logits"),
        (lambda array: ensembles.min_logit(torch.zeros(3, 2, 5), array), "labels"),
        (lambda array: ensembles.weighted_sum(torch.zeros(3, 2, 5), array), "weights"),
        (ensembles.weights_from_covariance, "covariance"),
    ],
    ids=["logits", "labels", "weights", "covariance"],
)
def test_what_is_no_tensor_is_refused(call: Callable[[Any], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: ndarray is not allowed; allowed is a torch.Tensor"):
        call(np.zeros((3, 2, 5)))
