"""The four ensembles of KDCL: pure functions of the students' logits.

Guo et al., 'Online Knowledge Distillation via Collaborative Learning', CVPR 2020. An ensemble returns logits [B, C]; a
student's loss on them is T²·KL(softmax(target/T) ‖ softmax(z/T)). An experiment's ``distillation.ensemble`` names the
function in this module: :func:`naive`, :func:`linear` and :func:`min_logit` take logits and labels, :func:`general`
logits and errors measured on held-out samples.

Per sample, by cross-entropy with the label, `min_logit` ≤ `linear` ≤ the least of `naive` and
:func:`.peers.mean_logits`, to `linear`'s tolerance and the rounding of the targets.

Logits are [K, B, C]: K students in the experiment file's order, B samples, C classes. float32 and float64 are computed
in as they are, float16 and bfloat16 in float32. Labels are int64 [B]. Targets are constants: no gradient flows through
any of these functions. Sums over students run from the first to the last, so the same inputs give the same bits.

Logits must have a floating dtype and K, B, C ≥ 1. They must be finite and at most 1e30 in magnitude. Labels must be
from 0 to C − 1. Every function raises ValueError for others.

Example:
    >>> import torch
    >>> logits = torch.tensor([[[2.0, 0.0, 1.0]], [[0.0, 1.0, 3.0]]])
    >>> min_logit(logits, torch.tensor([2]))
    tensor([[-3., -2.,  0.]])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codistill_server.ensembles import simplex
from codistill_server.ensembles.inputs import checked_labels, checked_logits, checked_tensor, describe

__all__ = [
    "error_covariance",
    "general",
    "general_weights",
    "linear",
    "linear_weights",
    "min_logit",
    "naive",
    "weighted_sum",
    "weights_from_covariance",
]

_BLOCK_ELEMENTS = 1 << 17  # what is worked on at once stays in a core's cache
_AGREEMENT = 1e-6


def naive(logits: Tensor, labels: Tensor) -> Tensor:
    """Return, per sample, the logits of the student with the lowest cross-entropy at T = 1.

    Students are compared by log Σ_{j≠y} exp(z[j] − z[y]), which orders them as the cross-entropy does. Unlike that, it
    does not round to 0 where all of them are sure of the label. A tie goes to the first student.

    Source: Guo et al. 2020, KDCL-Naive.

    Args:
        logits: [K, B, C].
        labels: int64 [B].

    Returns:
        [B, C], rows of `logits` as they are.
    """
    logits = checked_logits(logits)
    labels = checked_labels(labels, logits)
    column = labels[:, None]
    heights = [(z - z.gather(1, column)).scatter_(1, column, -torch.inf).logsumexp(-1) for z in logits]
    best = torch.zeros_like(labels)
    lowest = heights[0]
    for k, height in enumerate(heights[1:], 1):
        best.masked_fill_(height < lowest, k)
        lowest = torch.minimum(lowest, height)
    return logits[best, torch.arange(len(labels))]


def linear(logits: Tensor, labels: Tensor) -> Tensor:
    """Return, per sample, the convex combination of the students' logits of least cross-entropy.

    Σ_i α_i z_i with α = argmin over {α ≥ 0, Σ_i α_i = 1} of −log softmax(Σ_i α_i z_i)[y], at T = 1. The softmax of the
    answer is unique at any temperature, even where α is not; see :func:`linear_weights` for accuracy.

    Source: Guo et al. 2020, KDCL-Linear.

    Args:
        logits: [K, B, C].
        labels: int64 [B].

    Returns:
        [B, C].
    """
    logits = checked_logits(logits)
    labels = checked_labels(labels, logits)
    return _combined(logits, simplex.solve(logits, labels).weights.T[:, :, None])


def linear_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """Return, per sample, the weights that :func:`linear` combines logits with.

    The optimality gap max_i ⟨∇CE(α), α − e_i⟩ is under 1e-6 nats for |z| up to 1e4. It bounds CE(α) − min CE. It also
    bounds KL(p* ‖ p), the divergence of the answer's softmax p from the exact one p*. Beyond 1e4, rounding in float64
    limits what can be shown, and the answer is the best found. No input makes the solver fail.

    α is not unique where the students' logits are affinely dependent (up to a constant per row), as for identical
    students. The answer is then the one that the descent reaches from equal weights; the target is the same for all.
    One student has weight 1; with one class all weights are equal. A sample solved alone or within a batch has the same
    cross-entropy to 1e-6 nats.

    Args:
        logits: [K, B, C].
        labels: int64 [B].

    Returns:
        float64 [B, K], every row in the simplex.
    """
    logits = checked_logits(logits)
    return simplex.solve(logits, checked_labels(labels, logits)).weights


def min_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Return, per sample and class j, the least margin: min over students i of z_i[j] − z_i[y].

    The label's own entry is 0, and every other entry is as low as any student has it. So no convex combination of the
    students has a lower cross-entropy.

    Source: Guo et al. 2020, KDCL-MinLogit.

    Args:
        logits: [K, B, C].
        labels: int64 [B].

    Returns:
        [B, C].
    """
    logits = checked_logits(logits)
    column = checked_labels(labels, logits)[:, None]
    least = logits[0] - logits[0].gather(1, column)
    for z in logits[1:]:
        torch.minimum(least, z - z.gather(1, column), out=least)
    return least


def general(logits: Tensor, covariance: Tensor, measured: Sequence[int]) -> Tensor:
    """Return the sum of the students' logits, weighted by their errors on held-out samples.

    Source: Guo et al. 2020, KDCL-General.

    Args:
        logits: [K, B, C].
        covariance: float64 [M, M], the mean or sum of :func:`error_covariance` over held-out samples.
        measured: which of the K students its M rows are of. The others have weight 0.

    Returns:
        [B, C].

    Raises:
        ValueError: `covariance` is not such a matrix.
    """
    weights = torch.zeros(len(logits), dtype=torch.float64)
    weights[list(measured)] = weights_from_covariance(covariance)
    return weighted_sum(logits, weights)


def general_weights(held_out_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the weights that :func:`general` gives students by their errors on held-out samples.

    They minimise wᵀCw over Σ_i w_i = 1: w = C⁻¹1 / (1ᵀC⁻¹1). C_ij is the mean of ⟨f_i − t, f_j − t⟩ over samples, with
    f_i = softmax(z_i) at T = 1 and t the one-hot label. A round's target is then the students' :func:`weighted_sum`.

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
    """Return Σ over samples of ⟨f_i − t, f_j − t⟩ for each pair of students.

    Sums of chunks add up to the sum of the whole, to rounding in float64; divide by the number of samples for
    :func:`general_weights`'s mean.

    Args:
        logits: [K, N, C].
        labels: int64 [N].

    Returns:
        float64 [K, K], symmetric.
    """
    logits = checked_logits(logits)
    labels = checked_labels(labels, logits)
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
    """Return the weights w, Σ_i w_i = 1, of least wᵀCw: C⁻¹1 / (1ᵀC⁻¹1) where C is invertible.

    Each student's errors are first scaled to size 1: with s_i = √C_ii, R_ij = C_ij/(s_i·s_j) and d_i = 1/s_i, scaled to
    ‖d‖ = 1. The weights are w_i = d_i·v_i/Σ_j d_j·v_j, with v from the pseudo-inverse of Rv + νd = 0, dᵀv = 1. Its
    cut-off, 1e-6 of the largest singular value, then tells whether students agree, however weak another one is.

    Where students agree, R is singular, and of all minima the one of least Σ_i C_ii·w_i² is returned: identical students
    get equal weights. If a combination of students has no error at all, that combination is returned.

    A student with C_ii = 0 has no error on the held-out samples. Such students share the weight equally, and the others
    get 0. C_ii below 2.3e-308 of the largest entry counts as 0.

    Weights may be negative. The scale of C does not matter: sums and means over samples give the same weights.

    Args:
        covariance: float64 [K, K], symmetric and positive semi-definite, finite.

    Returns:
        float64 [K].

    Raises:
        ValueError: `covariance` is not such a matrix.
    """
    C = checked_tensor(covariance, "covariance").detach()
    if C.dtype != torch.float64 or C.ndim != 2 or C.shape[0] != C.shape[1] or len(C) == 0:
        raise ValueError(f"covariance: {describe(C)} is not allowed; allowed is float64 [K, K] with K at least 1")
    if not bool(torch.isfinite(C).all()) or bool((C.diagonal() < 0).any()) or not _is_symmetric(C):
        raise ValueError(
            f"covariance: {C.tolist()} is not allowed; allowed are finite symmetric sums of squared errors"
        )
    K = len(C)
    largest = C.abs().amax()
    scaled = C / torch.where(largest > 0, largest, 1)
    errorless = scaled.diagonal() < torch.finfo(C.dtype).tiny
    if bool(errorless.any()):
        return errorless.double() / errorless.sum()
    inverse = scaled.diagonal().rsqrt()
    system = C.new_zeros(K + 1, K + 1)
    # One factor after the other, as their product may overflow. No correlation is beyond 1, but for rounding.
    system[:K, :K] = (scaled * inverse[:, None] * inverse).clamp(-1, 1).fill_diagonal_(1)
    inverse = inverse / inverse.amax()
    inverse = inverse / inverse.norm()
    system[:K, K] = system[K, :K] = inverse
    right = C.new_zeros(K + 1)
    right[K] = 1
    weights = (torch.linalg.pinv(system, rtol=_AGREEMENT, hermitian=True) @ right)[:K] * inverse
    return weights / weights.sum()


def weighted_sum(logits: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_i w_i z_i.

    Args:
        logits: [K, B, C].
        weights: [K] of a floating dtype, finite; they may be negative and need not sum to 1.

    Returns:
        [B, C].

    Raises:
        ValueError: `weights` are not such.
    """
    logits = checked_logits(logits)
    weights = checked_tensor(weights, "weights").detach()
    if not weights.is_floating_point() or weights.shape != logits.shape[:1]:
        raise ValueError(f"weights: {describe(weights)} is not allowed; allowed is a floating dtype [{len(logits)}]")
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(f"weights: {weights.tolist()} are not allowed; allowed are finite values")
    return _combined(logits, weights[:, None, None])


def _is_symmetric(C: Tensor) -> bool:
    """Return whether C equals its transpose, to rounding beside the students' own errors."""
    size = C.diagonal().sqrt()
    return bool(((C - C.T).abs() <= 1e-5 * C.abs() + 1e-8 * size[:, None] * size).all())


def _combined(logits: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_i w_i z_i, with weights [K, B or 1, 1]."""
    weights = weights.to(logits.dtype)
    total = logits[0] * weights[0]
    for z, w in zip(logits[1:], weights[1:], strict=True):
        total.addcmul_(z, w)
    return total
