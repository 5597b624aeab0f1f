"""Soft targets from the logits of several students: pure functions of arrays.

Logits are [K, B, C]: K students in the experiment file's order, B samples, C classes. float32 and float64 are computed
in as they are, float16 and bfloat16 in float32. Labels are int64 [B]. Targets are constants: no gradient flows through
any of these functions. Sums over students run from the first to the last, so the same inputs give the same bits.

KDCL's four ensembles (Guo et al., 'Online Knowledge Distillation via Collaborative Learning', CVPR 2020) answer with
logits: :func:`naive`, :func:`linear`, :func:`min_logit`, and `general` as :func:`general_weights` with
:func:`weighted_sum`. A student's loss on them is T²·KL(softmax(target/T) ‖ softmax(z/T)). Per sample, by cross-entropy
with the label, `min_logit` ≤ `linear` ≤ the least of `naive` and :func:`mean_logits`, to `linear`'s tolerance and the
rounding of the targets.

Every function raises ValueError for logits that are not [K, B, C] of a floating dtype with K, B, C ≥ 1, that are not
finite or exceed 1e30 in magnitude, and for labels that are not int64 [B] from 0 to C − 1.

Example:
    >>> import torch
    >>> logits = torch.tensor([[[2.0, 0.0, 1.0]], [[0.0, 1.0, 3.0]]])
    >>> min_logit(logits, torch.tensor([2]))
    tensor([[-3., -2.,  0.]])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codistill_server.ensembles import simplex

__all__ = [
    "error_covariance",
    "general_weights",
    "linear",
    "linear_weights",
    "mean_logits",
    "mean_probabilities",
    "min_logit",
    "naive",
    "peer_probabilities",
    "pooled_probabilities",
    "weighted_sum",
    "weights_from_covariance",
]

_LIMIT = 1e30  # differences, and sums over any number of students, stay finite in float32
_BLOCK_ELEMENTS = 1 << 17  # what is worked on at once stays in a core's cache
_AGREEMENT = 1e-6


def naive(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns, per sample, the logits of the student with the lowest cross-entropy at T = 1.

    Students are compared by log Σ_{j≠y} exp(z[j] − z[y]), which orders them as the cross-entropy does and does not
    round to 0 where all of them are sure of the label. A tie goes to the first student.

    Source: Guo et al. 2020, KDCL-Naive.

    Args:
        logits: [K, B, C].
        labels: int64 [B].

    Returns:
        [B, C], rows of `logits` as they are.
    """
    logits = _checked_logits(logits)
    labels = _checked_labels(labels, logits)
    column = labels[:, None]
    heights = [(z - z.gather(1, column)).scatter_(1, column, -torch.inf).logsumexp(-1) for z in logits]
    best = torch.zeros_like(labels)
    lowest = heights[0]
    for k, height in enumerate(heights[1:], 1):
        best.masked_fill_(height < lowest, k)
        lowest = torch.minimum(lowest, height)
    return logits[best, torch.arange(len(labels))]


def linear(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns, per sample, the convex combination of the students' logits of least cross-entropy.

    Σ_i α_i z_i with α = argmin over {α ≥ 0, Σ_i α_i = 1} of −log softmax(Σ_i α_i z_i)[y], at T = 1. The softmax of the
    answer is unique at any temperature, even where α is not; see :func:`linear_weights` for accuracy.

    Source: Guo et al. 2020, KDCL-Linear.

    Args:
        logits: [K, B, C].
        labels: int64 [B].

    Returns:
        [B, C].
    """
    logits = _checked_logits(logits)
    labels = _checked_labels(labels, logits)
    return _combined(logits, simplex.solve(logits, labels).weights.T[:, :, None])


def linear_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns, per sample, the weights that :func:`linear` combines logits with.

    The optimality gap max_i ⟨∇CE(α), α − e_i⟩, which bounds CE(α) − min CE and the divergence KL(p* ‖ p) of the
    answer's softmax p from the exact one p*, is under 1e-6 nats for |z| up to 1e4. Beyond, rounding in float64 limits
    what can be shown, and the answer is the best found; no input makes the solver fail.

    Where the students' logits are affinely dependent (up to a constant per row), as for identical students, α is not
    unique; the answer is the one that the descent reaches from equal weights, and the target is the same for all. One
    student has weight 1; with one class all weights are equal. A sample solved alone or within a batch has the same
    cross-entropy to 1e-6 nats.

    Args:
        logits: [K, B, C].
        labels: int64 [B].

    Returns:
        float64 [B, K], every row in the simplex.
    """
    logits = _checked_logits(logits)
    return simplex.solve(logits, _checked_labels(labels, logits)).weights


def min_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns, per sample and class j, the least margin: min over students i of z_i[j] − z_i[y].

    The label's own entry is 0 and every other as low as any student has it, so no convex combination of the students
    has a lower cross-entropy.

    Source: Guo et al. 2020, KDCL-MinLogit.

    Args:
        logits: [K, B, C].
        labels: int64 [B].

    Returns:
        [B, C].
    """
    logits = _checked_logits(logits)
    column = _checked_labels(labels, logits)[:, None]
    least = logits[0] - logits[0].gather(1, column)
    for z in logits[1:]:
        torch.minimum(least, z - z.gather(1, column), out=least)
    return least


def general_weights(held_out_logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the weights of the students by their errors on held-out samples.

    The minimum of wᵀCw over Σ_i w_i = 1, where C_ij is the mean over samples of ⟨f_i − t, f_j − t⟩, f_i = softmax(z_i)
    at T = 1 and t the one-hot label: w = C⁻¹1 / (1ᵀC⁻¹1). The target of a round is then :func:`weighted_sum`.

    Source: Guo et al. 2020, KDCL-General; the formula is that of Perrone & Cooper 1993. That f is the probability and
    not the logit is this project's reading.

    Args:
        held_out_logits: [K, N, C].
        labels: int64 [N].

    Returns:
        float64 [K], as :func:`weights_from_covariance`.
    """
    return weights_from_covariance(error_covariance(held_out_logits, labels))


def error_covariance(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns Σ over samples of ⟨f_i − t, f_j − t⟩ for each pair of students.

    Sums of chunks add up to the sum of the whole, to rounding in float64; divide by the number of samples for
    :func:`general_weights`'s mean.

    Args:
        logits: [K, N, C].
        labels: int64 [N].

    Returns:
        float64 [K, K], symmetric.
    """
    logits = _checked_logits(logits)
    labels = _checked_labels(labels, logits)
    K, N, C = logits.shape
    total = torch.zeros(K, K, dtype=torch.float64)
    size = max(1, _BLOCK_ELEMENTS // (K * C))
    for start in range(0, N, size):
        errors = torch.softmax(logits[:, start : start + size].double(), -1)
        index = labels[None, start : start + size, None].expand(K, -1, 1)
        # 1 − p is summed from the other classes, so that a sure student's error keeps its digits.
        rest = errors.scatter(2, index, 0).sum(-1, keepdim=True)
        rows = errors.scatter_(2, index, -rest).reshape(K, -1)
        total += rows @ rows.T
    return (total + total.T) / 2


def weights_from_covariance(covariance: Tensor) -> Tensor:
    """Returns the weights w, Σ_i w_i = 1, of least wᵀCw: C⁻¹1 / (1ᵀC⁻¹1) where C is invertible.

    They are taken from the pseudo-inverse of the equations Cw + ν1 = 0, 1ᵀw = 1. Where students agree, C is singular
    and of all minima the one of least norm is returned: identical students get equal weights. This is C⁺1 / (1ᵀC⁺1)
    except where some combination of students has no error at all; that combination is then returned, where C⁺ alone
    would leave it out. Directions that have less than 1e-6 of the largest error count as agreement. Weights may be
    negative. The scale of C does not matter: sums and means over samples give the same weights.

    Args:
        covariance: float64 [K, K], symmetric and positive semi-definite, finite.

    Returns:
        float64 [K].

    Raises:
        ValueError: `covariance` is not such a matrix.
    """
    C = _checked_tensor(covariance, "covariance").detach()
    if C.dtype != torch.float64 or C.ndim != 2 or C.shape[0] != C.shape[1] or len(C) == 0:
        raise ValueError(f"covariance: {_describe(C)} is not allowed; allowed is float64 [K, K] with K at least 1")
    if not bool(torch.isfinite(C).all()) or not torch.allclose(C, C.T) or bool((C.diagonal() < 0).any()):
        raise ValueError(
            f"covariance: {C.tolist()} is not allowed; allowed are finite symmetric sums of squared errors"
        )
    K = len(C)
    system = C.new_ones(K + 1, K + 1)
    largest = C.abs().amax()
    system[:K, :K] = C / largest if largest > 0 else 0
    system[K, K] = 0
    right = C.new_zeros(K + 1)
    right[K] = 1
    weights = (torch.linalg.pinv(system, rtol=_AGREEMENT, hermitian=True) @ right)[:K]
    return weights / weights.sum()


def weighted_sum(logits: Tensor, weights: Tensor) -> Tensor:
    """Returns Σ_i w_i z_i.

    Args:
        logits: [K, B, C].
        weights: [K] of a floating dtype, finite; they may be negative and need not sum to 1.

    Returns:
        [B, C].

    Raises:
        ValueError: `weights` are not such.
    """
    logits = _checked_logits(logits)
    weights = _checked_tensor(weights, "weights").detach()
    if not weights.is_floating_point() or weights.shape != logits.shape[:1]:
        raise ValueError(f"weights: {_describe(weights)} is not allowed; allowed is a floating dtype [{len(logits)}]")
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(f"weights: {weights.tolist()} are not allowed; allowed are finite values")
    return _combined(logits, weights[:, None, None])


def mean_logits(logits: Tensor) -> Tensor:
    """Returns (1/K)·Σ_i z_i.

    Args:
        logits: [K, B, C].

    Returns:
        [B, C].
    """
    logits = _checked_logits(logits)
    total = logits[0].clone()
    for z in logits[1:]:
        total += z
    return total / len(logits)


def mean_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns (1/K)·Σ_i softmax(z_i/T).

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
    logits = _checked_logits(logits)
    temperature = _checked_temperature(temperature)
    total = torch.softmax(logits[0] / temperature, -1)
    for z in logits[1:]:
        total += torch.softmax(z / temperature, -1)
    return total / len(logits)


def peer_probabilities(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns, for each student, the mean of the others' probabilities and how far the others are from it.

    With p_l = softmax(z_l/T), student k's target is m_k = (1/(K−1))·Σ_{l≠k} p_l, and its constant is the
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
    logits = _checked_logits(logits)
    temperature = _checked_temperature(temperature)
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
    """Returns what :func:`peer_probabilities` would give to one more student: all K are its peers.

    Args:
        logits: [K, B, C].
        temperature: T, positive and finite.

    Returns:
        m [B, C], the mean of the students' probabilities, and J [B], their Jensen-Shannon divergence in nats.

    Raises:
        ValueError: `temperature` is not positive and finite.
    """
    m = mean_probabilities(logits, temperature)
    p = torch.softmax(_checked_logits(logits) / temperature, -1)
    return m, (_entropy(m) - _entropy(p).mean(0)).clamp_(min=0)


def _entropy(probabilities: Tensor) -> Tensor:
    """Returns −Σ p·log p over the last dimension, in nats, with 0·log 0 = 0."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log_().mul_(probabilities).sum(-1).neg_()


def _sum_of_others(values: Tensor) -> Tensor:
    """Returns, for each k, the sum of `values` over the first dimension without the k-th.

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


def _combined(logits: Tensor, weights: Tensor) -> Tensor:
    """Returns Σ_i w_i z_i, with weights [K, B or 1, 1]."""
    weights = weights.to(logits.dtype)
    total = logits[0] * weights[0]
    for z, w in zip(logits[1:], weights[1:], strict=True):
        total.addcmul_(z, w)
    return total


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _checked_tensor(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(  # noqa: TRY004 - one type of error for all that is wrong with an argument
            f"{name}: {type(value).__name__} is not allowed; allowed is a torch.Tensor, as torch.as_tensor makes it"
        )
    return value


def _checked_logits(logits: Tensor) -> Tensor:
    _checked_tensor(logits, "logits")
    if logits.ndim != 3 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"logits: {_describe(logits)} is not allowed; allowed is a floating dtype [K, B, C] "
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


def _checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    _, B, C = logits.shape
    _checked_tensor(labels, "labels")
    if labels.dtype != torch.int64 or labels.shape != (B,):
        raise ValueError(f"labels: {_describe(labels)} is not allowed; allowed is int64 [{B}], one for each sample")
    wrong = torch.nonzero((labels < 0) | (labels >= C))
    if len(wrong) > 0:
        sample = int(wrong[0])
        raise ValueError(f"labels: {int(labels[sample])} of sample {sample} is not allowed; allowed are 0 to {C - 1}")
    return labels


def _checked_temperature(temperature: float) -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: {temperature} is not allowed; allowed are positive finite values")
    return temperature
