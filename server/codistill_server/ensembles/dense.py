"""Soft targets for students with classifiers at several stages: pure functions of arrays.

Logits are [K, S, B, C]: K students in the experiment file's order, S stages with the final classifier last, B samples,
C classes. Dtypes, order of summation and errors are as in :mod:`.kdcl`. Targets are constants: no gradient flows
through these functions.

In dense cross-layer mutual distillation, the classifier at stage q of student k mimics two targets. One is made of its
peers' classifiers at the same stage, the other of those at all other stages. With p[l,r] = softmax(z[l,r]) at T = 1,
they are

    s[k,q] = (1/(K−1))·Σ_{l≠k} p[l,q],    o[k,q] = (1/(S−1))·Σ_{r≠q} s[k,r].

KL(s ‖ p) has the gradient of KL(p[l,q] ‖ p[k,q]), averaged over the peers. (S−1)·KL(o ‖ p) has that of the sum over
the other stages. The paper has two students; the mean over more peers than one is this project's choice.

Source: Yao & Sun 2020, 'Knowledge Transfer via Dense Cross-Layer Mutual-Distillation'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codistill_server.ensembles import peers

__all__ = ["dense_probabilities", "pooled_dense_probabilities"]


def dense_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each student and stage, the mean of its peers' probabilities there, and at the other stages.

    Args:
        logits: [K, S, B, C], K ≥ 2 and S ≥ 2.

    Returns:
        s and o, both [K, S, B, C]; rows sum to 1.

    Raises:
        ValueError: `logits` are not such.
    """
    same = torch.stack([peers.peer_probabilities(stage)[0] for stage in _stages(logits)])
    return same.transpose(0, 1), _mean_of_others(same).transpose(0, 1)


def pooled_dense_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`dense_probabilities` would give to one more student: all K are its peers.

    Args:
        logits: [K, S, B, C], S ≥ 2.

    Returns:
        s and o, both [S, B, C]; rows sum to 1.

    Raises:
        ValueError: `logits` are not such.
    """
    same = torch.stack([peers.mean_probabilities(stage) for stage in _stages(logits)])
    return same, _mean_of_others(same)


def _stages(logits: Tensor) -> tuple[Tensor, ...]:
    if logits.ndim != 4 or logits.shape[1] < 2:
        raise ValueError(f"logits: {list(logits.shape)} is not allowed; allowed is [K, S, B, C] of 2 stages or more")
    return logits.unbind(1)


def _mean_of_others(stages: Tensor) -> Tensor:
    """Return, for each stage, the mean of the others over the first dimension, summed from the first to the last."""
    means: list[Tensor] = []
    for own in range(len(stages)):
        total = torch.zeros_like(stages[0])
        for other, probabilities in enumerate(stages):
            if other != own:
                total += probabilities
        means.append(total / (len(stages) - 1))
    return torch.stack(means)
