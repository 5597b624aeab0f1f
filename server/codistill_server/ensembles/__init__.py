"""Soft targets from the logits of several students: pure functions of arrays, a module for each family.

Example:
    >>> import torch
    >>> logits = torch.tensor([[[2.0, 0.0, 1.0]], [[0.0, 1.0, 3.0]]])
    >>> min_logit(logits, torch.tensor([2]))
    tensor([[-3., -2.,  0.]])
"""

from __future__ import annotations

from codistill_server.ensembles.dense import dense_probabilities, pooled_dense_probabilities
from codistill_server.ensembles.kdcl import (
    error_covariance,
    general,
    general_weights,
    linear,
    linear_weights,
    min_logit,
    naive,
    weighted_sum,
    weights_from_covariance,
)
from codistill_server.ensembles.peers import (
    mean_logits,
    mean_probabilities,
    peer_probabilities,
    pooled_probabilities,
)

__all__ = [
    "dense_probabilities",
    "error_covariance",
    "general",
    "general_weights",
    "linear",
    "linear_weights",
    "mean_logits",
    "mean_probabilities",
    "min_logit",
    "naive",
    "peer_probabilities",
    "pooled_dense_probabilities",
    "pooled_probabilities",
    "weighted_sum",
    "weights_from_covariance",
]
