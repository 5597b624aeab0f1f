"""Means over students, over all of them or over the peers of each: pure functions of arrays.

Inputs, dtypes and errors are as in :mod:`.kdcl`; there are no labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codistill_server.ensembles.inputs import checked_logits, checked_temperature

__all__ = ["mean_logits", "mean_probabilities", "peer_probabilities", "pooled_probabilities"]

_BLOCK_ELEMENTS = 1 << 17  # what is worked on at once stays in a core's cache


def mean_logits(logits: Tensor) -> Tensor:
    """Return (1/K)·Σ_i z_i.

    Args:
        logits: [K, B, C].

    Returns:
        [B, C].
    """
    logits = checked_logits(logits)
    total = logits[0].clone()
    for z in logits[1:]:
        total += z
    return total / len(logits)


def mean_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return (1/K)·Σ_i softmax(z_i/T).

    The shared target of cross-architecture distillation, after Gao et al. 2019 ('Multistructure-Based Collaborative
    Online Distillation').

    Args:
        logits: [K, B, C].
        temperature: T, positive and finite.

    Returns:
        [B, C]; rows sum to 1.

    Raises:
        ValueError: `temperature` is not positive and finite.
    """
    logits = checked_logits(logits)
    temperature = checked_temperature(temperature)
    total = torch.softmax(logits[0] / temperature, -1)
    for z in logits[1:]:
        total += torch.softmax(z / temperature, -1)
    return total / len(logits)


def peer_probabilities(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return, for each student, the mean of the others' probabilities and how far the others are from it.

    With p_l = softmax(z_l/T), student k's target is m_k = (1/(K−1))·Σ_{l≠k} p_l. Its constant is the
    Jensen-Shannon divergence of the others, J_k = (1/(K−1))·Σ_{l≠k} KL(p_l ‖ m_k) per sample, in nats. For any q,

        (1/(K−1))·Σ_{l≠k} KL(p_l ‖ q) = KL(m_k ‖ q) + J_k,

    so learning from m_k has the gradient of deep mutual learning's pairwise sum, and J_k gives back its value.

    Source: Zhang et al. 2018, 'Deep Mutual Learning', the loss of more than two students.

    Args:
        logits: [K, B, C], K ≥ 2.
        temperature: T, positive and finite.

    Returns:
        m [K, B, C], whose rows sum to 1, and J [K, B], which is 0 for K = 2.

    Raises:
        ValueError: there is one student only, or `temperature` is not positive and finite.
    """
    logits = checked_logits(logits)
    temperature = checked_temperature(temperature)
    K = len(logits)
    if K < 2:
        raise ValueError(f"logits: {K} student has no peers; allowed are 2 or more")
    means, constants = torch.empty_like(logits), logits.new_empty(logits.shape[:2])
    size = max(1, _BLOCK_ELEMENTS // (K * logits.shape[2]))
    for start in range(0, logits.shape[1], size):
        block = slice(start, start + size)
        p = torch.softmax(logits[:, block] / temperature, -1)
        m = _sum_of_others(p).div_(K - 1)
        others = _sum_of_others(_entropy(p)).div_(K - 1)
        means[:, block] = m
        constants[:, block] = (_entropy(m) - others).clamp_(min=0)
    return means, constants


def pooled_probabilities(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return what :func:`peer_probabilities` would give to one more student: all K are its peers.

    Args:
        logits: [K, B, C].
        temperature: T, positive and finite.

    Returns:
        m [B, C], the mean of the students' probabilities, and J [B], their Jensen-Shannon divergence in nats.

    Raises:
        ValueError: `temperature` is not positive and finite.
    """
    m = mean_probabilities(logits, temperature)
    p = torch.softmax(checked_logits(logits) / temperature, -1)
    return m, (_entropy(m) - _entropy(p).mean(0)).clamp_(min=0)


def _entropy(probabilities: Tensor) -> Tensor:
    """Return −Σ p·log p over the last dimension, in nats, with 0·log 0 = 0."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log_().mul_(probabilities).sum(-1).neg_()


def _sum_of_others(values: Tensor) -> Tensor:
    """Return, for each k, the sum of `values` over the first dimension without the k-th.

    What comes before and what comes after are summed apart: taking the k-th from the whole sum would lose small terms.
    """
    result = torch.zeros_like(values)
    before = values[0].clone()
    for k in range(1, len(values)):
        result[k] += before
        before += values[k]
    after = values[-1].clone()
    for k in range(len(values) - 2, -1, -1):
        result[k] += after
        after += values[k]
    return result
