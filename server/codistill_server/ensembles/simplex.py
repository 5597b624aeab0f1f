"""Least cross-entropy over convex combinations of logits: the solver behind the `linear` ensemble.

For one sample with logits z_1 … z_K and label y, minimise over the simplex Δ = {α ≥ 0, Σ_i α_i = 1}

    CE(α) = −log softmax(Σ_i α_i z_i)[y] = log(1 + exp G(α)),   G(α) = log Σ_{j≠y} exp(Σ_i α_i d_i[j]),

with the margins d_i[j] = z_i[j] − z_i[y]. CE grows with G, so both have the same minimisers. The solver
descends G: unlike CE, it does not flatten out where the label is already likely. So Newton's method needs a handful of
passes over the logits, whatever their scale.

Each pass computes G, its gradient g and its Hessian at the samples' present weights. It minimises the quadratic model
over the simplex by an active-set method on [K, K] systems, and moves to that minimum. Where this does not lower G, it
moves to the least G on the way. A sample is done when its optimality gap

    gap = (1 − p_y)·max_i ⟨g, α − e_i⟩ = max_i ⟨∇CE(α), α − e_i⟩

is at most :data:`TOLERANCE`. CE is convex, so the gap bounds CE(α) − min CE. It is evaluated in float64 at the very
weights that are returned: a certificate, not an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "Solution", "solve"]

TOLERANCE = 5e-7
"""The optimality gap, in nats, at which a sample is done."""

_MAX_PASSES = 100
_PATIENCE = 5
_BLOCK_ELEMENTS = 1 << 17  # of float64; what is worked on at once then stays in a core's cache


@dataclass(frozen=True, slots=True)
class Solution:
    """Weights of least cross-entropy and how good they are, sample by sample."""

    weights: Tensor
    """float64 [B, K]; every row is in the simplex."""
    loss: Tensor
    """float64 [B]; the cross-entropy at the weights, in nats."""
    gap: Tensor
    """float64 [B]; no weights have a cross-entropy below `loss` − `gap`."""


def solve(logits: Tensor, labels: Tensor) -> Solution:
    """Return, for each sample, weights on the simplex of least cross-entropy.

    The combined margins Σ_i α_i d_i of the minimum are unique, since G and CE are strictly convex in them. So is the
    softmax of the combined logits, at any temperature. The weights are unique where the students' margins are affinely
    independent. Otherwise, as with identical students, they are those that the descent reaches from equal ones; do not
    rely on which these are. KL(p* ‖ p) ≤ gap, with p the softmax of the returned combination and p* that of the minimum.

    A sample's weights do not depend on the other samples, except by rounding: kernels may round otherwise in batches of
    another size. In any batch, its loss is within :data:`TOLERANCE` of the least.

    Rounding limits the gap that can be shown in float64, to about 1e-16·|z|²: up to |z| = 1e4 it reaches
    :data:`TOLERANCE`. Beyond that, the descent ends where neither loss nor gap improves any more, never with an error.
    The weights of the least gap seen are returned, and `gap` says what it is.

    Args:
        logits: float32 or float64 [K, B, C], finite, at most 1e30 in magnitude.
        labels: int64 [B], each from 0 to C − 1.
    """
    K, B, C = logits.shape
    weights = torch.full((B, K), 1 / K, dtype=torch.float64)
    if C == 1:
        return Solution(weights, weights.new_zeros(B), weights.new_zeros(B))
    problem = _Problem(logits, labels)
    rows, at = torch.arange(B), weights.clone()
    model = problem.model(rows, at)
    height, gap = model.height.clone(), weights.new_full((B,), torch.inf)
    lowest, stalls = height, torch.zeros(B, dtype=torch.int64)
    for _ in range(_MAX_PASSES):
        now = ((model.gradient * at).sum(-1) - model.gradient.amin(-1)) * torch.sigmoid(model.height)
        # Rounding can hide a step's gain in G and still leave a gain in the gap; a sample stalls when it hides both.
        gained = (now <= 0.9 * gap[rows]) | (model.height < lowest - 1e-15 * model.scale.sqrt())
        lowest, stalls = torch.minimum(lowest, model.height), torch.where(gained, 0, stalls + 1)
        better = torch.nonzero(now < gap[rows])[:, 0]
        best = rows[better]
        weights[best], height[best], gap[best] = at[better], model.height[better], now[better]
        left = torch.nonzero((now > TOLERANCE) & (stalls < _PATIENCE))[:, 0]
        if len(left) == 0:
            break
        if len(left) < len(rows):
            rows, at, model, lowest, stalls = rows[left], at[left], model.of(left), lowest[left], stalls[left]
        at, model = _step(problem, rows, at, model)
    return Solution(weights, torch.nn.functional.softplus(height, threshold=50), gap.clamp(min=0))


@dataclass(frozen=True, slots=True)
class _Model:
    """G to second order at the weights of n samples, in float64."""

    height: Tensor
    """[n]: G."""
    gradient: Tensor
    """[n, K]."""
    hessian: Tensor
    """[n, K, K]."""
    scale: Tensor
    """[n]: mean square of the margins, the largest of any student; what the Hessian's rounding is relative to."""

    def of(self, index: Tensor) -> _Model:
        return _Model(self.height[index], self.gradient[index], self.hessian[index], self.scale[index])

    def replaced(self, index: Tensor, other: _Model) -> _Model:
        """Return a copy that holds `other` at `index`."""
        pairs = (
            (self.height, other.height),
            (self.gradient, other.gradient),
            (self.hessian, other.hessian),
            (self.scale, other.scale),
        )
        return _Model(*(old.index_copy(0, index, new) for old, new in pairs))


class _Problem:
    """The logits and labels of a batch, read a block of samples at a time."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self._logits = logits
        self._labels = labels
        self._label_logits = logits.gather(2, labels.expand(len(logits), -1)[:, :, None])

    def _blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield slices of `rows` with their margins [n, K, C] and labels [n, 1, 1].

        The margins lie in one buffer: they hold until the next block is asked for.
        """
        K, B, C = self._logits.shape
        size = min(len(rows), max(1, _BLOCK_ELEMENTS // (K * C)))
        buffer = torch.empty(size, K, C, dtype=torch.float64)
        for start in range(0, len(rows), size):
            block = slice(start, min(start + size, len(rows)))
            some = rows[block]
            if len(rows) == B:
                z, z_y = self._logits[:, block], self._label_logits[:, block]
            else:
                z, z_y = self._logits.index_select(1, some), self._label_logits.index_select(1, some)
            margins = buffer[: len(some)].copy_(z.transpose(0, 1)).sub_(z_y.transpose(0, 1))
            yield block, margins, self._labels[some][:, None, None]

    def model(self, rows: Tensor, weights: Tensor) -> _Model:
        """Return G to second order at weights [n, K] of the samples `rows` [n]."""
        n, K = weights.shape
        height, gradient, second = weights.new_empty(n), weights.new_empty(n, K), weights.new_empty(n, K, K)
        for block, margins, labels in self._blocks(rows):
            t = torch.bmm(weights[block, None], margins).scatter_(2, labels, -torch.inf)
            top = t.amax(-1, keepdim=True)
            p = t.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            p.div_(total)
            height[block] = (top + total.log())[:, 0, 0]
            weighted = margins * p
            torch.sum(weighted, -1, out=gradient[block])
            torch.bmm(weighted, margins.mT, out=second[block])
        hessian = second - gradient[:, :, None] * gradient[:, None]
        return _Model(height, gradient, hessian, second.diagonal(dim1=1, dim2=2).amax(-1))

    def search(self, rows: Tensor, weights: Tensor, direction: Tensor, slope: Tensor) -> Tensor:
        """Return the step in (0, 1) of least G along `direction`, to a hundredth of the slope at 0.

        Newton's method on the slope, kept inside a shrinking bracket by bisection; G is convex along the line and
        must rise at its end.
        """
        n, C = len(rows), self._logits.shape[2]
        base, along = weights.new_empty(n, C), weights.new_empty(n, C)
        for block, margins, labels in self._blocks(rows):
            base[block] = torch.bmm(weights[block, None], margins).scatter_(2, labels, -torch.inf)[:, 0]
            along[block] = torch.bmm(direction[block, None], margins)[:, 0]
        low, high = torch.zeros_like(slope), torch.ones_like(slope)
        step, done = 0.5 * high, torch.zeros(n, dtype=torch.bool)
        for _ in range(60):
            p = torch.softmax(base + step[:, None] * along, -1)
            rise = (p * along).sum(-1)
            done |= rise.abs() <= 0.01 * slope.abs()
            if bool(done.all()):
                break
            low = torch.where(rise < 0, step, low)
            high = torch.where(rise < 0, high, step)
            newton = step - rise / (p * (along - rise[:, None]).square_()).sum(-1)
            margin = 0.01 * (high - low)
            inside = (newton > low + margin) & (newton < high - margin)
            step = torch.where(done, step, torch.where(inside, newton, 0.5 * (low + high)))
        return step


def _step(problem: _Problem, rows: Tensor, at: Tensor, model: _Model) -> tuple[Tensor, _Model]:
    """Return the weights after one Newton step on the simplex, and G's model there."""
    goal = _model_minimum(model, at)
    direction = goal - at
    slope = (model.gradient * direction).sum(-1)
    reached = problem.model(rows, goal)
    rounding = 1e-14 * (model.height.abs() + 1e-2 * model.scale.sqrt())
    short = torch.nonzero(~(reached.height <= model.height + 1e-4 * slope + rounding))[:, 0]
    if len(short) == 0:
        return goal, reached
    step = problem.search(rows[short], at[short], direction[short], slope[short])
    goal[short] = at[short] + step[:, None] * direction[short]
    return goal, reached.replaced(short, problem.model(rows[short], goal[short]))


def _model_minimum(model: _Model, at: Tensor) -> Tensor:
    """Return the minimum over the simplex of the model around weights `at` [n, K].

    A primal active-set method, all samples in step. Each turn solves for the free weights. If one of them would become
    negative, the turn goes as far as the first that does, and fixes it at 0. Otherwise it frees the fixed weight of the
    most negative multiplier.

    The model gets a little more curvature than G has, above the rounding of its Hessian, so that it has one minimum.
    Where G does not say how to share a weight, as between identical students, the weight stays shared as it was.
    """
    n, K = at.shape
    hessian = model.hessian.clone()
    hessian.diagonal(dim1=1, dim2=2).add_((1e-12 * model.scale + 1e-10)[:, None])
    unit = torch.maximum(hessian.diagonal(dim1=1, dim2=2).amax(-1), model.gradient.abs().amax(-1))[:, None]
    hessian.div_(unit[:, :, None])
    gradient, slack = model.gradient / unit, -(1e-9 / unit[:, 0]).clamp(min=1e-13)
    # The unknown is the step, not the weights that it leads to: its rounding then shrinks with it.
    answer, origin, move, free, index = at.clone(), at, torch.zeros_like(at), at > 0, torch.arange(n)
    fixed_rows = torch.eye(K, K + 1, dtype=at.dtype)
    sum_row = (torch.arange(K + 1) < K).to(at.dtype).expand(n, 1, -1)
    free_rows = torch.cat((hessian, at.new_ones(n, K, 1)), -1)
    for _ in range(4 * K + 4):
        # Karush, Kuhn and Tucker's equations: of each free weight, of each fixed one, and of the sum.
        system = torch.cat((torch.where(free[:, :, None], free_rows, fixed_rows), sum_row[: len(index)]), 1)
        right = torch.cat((torch.where(free, -gradient, -origin), origin.new_zeros(len(index), 1)), -1)
        solved = torch.linalg.solve_ex(system, right)[0]
        wanted = solved[:, :K]
        blocks = torch.where(free & (origin + wanted < 0), (origin + move) / (move - wanted), torch.inf)
        fraction, first = blocks.min(-1)
        blocked = fraction < 1
        move = torch.lerp(move, wanted, fraction.clamp(0, 1)[:, None])
        slopes = torch.bmm(free_rows, torch.cat((move, solved[:, K:]), -1)[:, :, None])[:, :, 0].add_(gradient)
        least, steepest = slopes.masked_fill_(free, 0).min(-1)
        changes = blocked | (least < slack)
        which = torch.where(blocked, first, steepest)[:, None]
        at_bound = torch.where(changes[:, None], -origin.gather(1, which), move.gather(1, which))
        move.scatter_(1, which, at_bound)
        free.scatter_(1, which, torch.where(changes[:, None], ~blocked[:, None], free.gather(1, which)))
        answer[index] = origin + move
        left = torch.nonzero(changes)[:, 0]
        if len(left) == 0:
            break
        if len(left) < len(index):
            index, origin, move, free, slack = index[left], origin[left], move[left], free[left], slack[left]
            gradient, free_rows = gradient[left], free_rows[left]
    answer.clamp_(min=0)
    total = answer.sum(-1, keepdim=True)
    # A system too ill-conditioned to solve leaves its sample where it was.
    return torch.where((total > 0.5) & (total < 2), answer / total, at)
