from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import cross_entropy

from codistill_server.ensembles.simplex import TOLERANCE, solve

PROMISED = 1e-6


def gap_of(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and optimality gap at some weights, by autograd through plain operations."""
    alpha = weights.clone().requires_grad_()
    losses = cross_entropy(torch.einsum("bk,kbc->bc", alpha, logits.double()), labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), alpha)
    return losses.detach(), (gradient * weights).sum(-1) - gradient.amin(-1)


def in_simplex(weights: torch.Tensor) -> bool:
    return bool((weights >= 0).all()) and bool(((weights.sum(-1) - 1).abs() < 1e-12).all())


@st.composite
def problems(draw: st.DrawFn, scales: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 7)))
    scale = draw(st.sampled_from(scales))
    logits = draw(arrays(np.float32, shape, elements=st.floats(-scale, scale, width=32)))
    labels = draw(arrays(np.int64, shape[1:2], elements=st.integers(0, shape[2] - 1)))
    return torch.from_numpy(logits), torch.from_numpy(labels)


@settings(max_examples=80)
@given(problems(scales=(1.0, 32.0, 1024.0)))
def test_every_sample_is_solved_to_the_promised_gap(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = problem
    solution = solve(logits, labels)
    losses, gaps = gap_of(logits, labels, solution.weights)
    assert in_simplex(solution.weights)
    assert float(gaps.max()) < PROMISED
    assert float(solution.gap.max()) <= TOLERANCE
    torch.testing.assert_close(solution.loss, losses, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("kind", ["dense", "signs", "coarse", "twins", "dependent", "sparse", "ranges"])
def test_hard_shapes_are_solved_at_every_scale(kind: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    for K, C in ((2, 3), (4, 12), (9, 30)):
        logits = torch.rand(K, 4, C, generator=generator) * 2 - 1
        labels = torch.randint(C, (4,), generator=generator)
        match kind:
            case "signs":
                logits = logits.sign()
            case "coarse":
                logits = logits.round(decimals=1)
            case "twins":
                logits = torch.cat((logits[: K - K // 2], logits[: K // 2]))
            case "dependent":
                logits[-1] = logits[:-1].mean(0)
            case "sparse":
                logits = torch.where(torch.rand(logits.shape, generator=generator) < 0.5, 0.0, logits)
            case "dense":
                pass
            case _:
                logits = logits * 10 ** (-8 * torch.rand(K, 1, 1, generator=generator))
        solution = solve(logits * scale, labels)
        _, gaps = gap_of(logits * scale, labels, solution.weights)
        assert in_simplex(solution.weights)
        assert float(gaps.max()) < PROMISED


def test_two_students_against_a_grid() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 40, 6, generator=generator, dtype=torch.float64) * 4
    labels = torch.randint(6, (40,), generator=generator)
    first = torch.linspace(0, 1, 4001, dtype=torch.float64)
    grid = torch.stack((first, 1 - first))
    combined = torch.einsum("kg,kbc->bgc", grid, logits)
    losses = combined.logsumexp(-1) - combined.gather(2, labels[:, None, None].expand(-1, len(first), 1))[..., 0]
    solution = solve(logits, labels)
    assert bool((solution.loss <= losses.amin(-1) + PROMISED).all())
    assert bool((solution.loss >= losses.amin(-1) - 1e-4).all())
    # Only where the grid's minimum is sharp does its place say something.
    best = first[losses.argmin(-1)]
    sharp = (losses <= losses.amin(-1, keepdim=True) + 1e-5).sum(-1) < 20
    assert int(sharp.sum()) > 10
    torch.testing.assert_close(solution.weights[sharp, 0], best[sharp], rtol=0, atol=5e-3)


def test_three_students_against_a_grid() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 30, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(5, (30,), generator=generator)
    n = 150
    grid = torch.tensor([(i / n, j / n, (n - i - j) / n) for i in range(n + 1) for j in range(n + 1 - i)]).double().T
    combined = torch.einsum("kg,kbc->bgc", grid, logits)
    losses = combined.logsumexp(-1) - combined.gather(2, labels[:, None, None].expand(-1, grid.shape[1], 1))[..., 0]
    solution = solve(logits, labels)
    assert bool((solution.loss <= losses.amin(-1) + PROMISED).all())
    assert bool((solution.loss >= losses.amin(-1) - 2e-2).all())


def test_an_interior_minimum_by_hand() -> None:
    # Margins to label 0: (3, −1) and (−1, 1). With α on the first, t = (4α − 1, 1 − 2α) and the derivative
    # 4·exp(t1) − 2·exp(t2) vanishes where t2 − t1 = ln 2: α = (2 − ln 2)/6.
    logits = torch.tensor([[[0.0, 3.0, -1.0]], [[5.0, 4.0, 6.0]]])
    alpha = (2 - math.log(2)) / 6
    solution = solve(logits, torch.tensor([0]))
    torch.testing.assert_close(solution.weights, torch.tensor([[alpha, 1 - alpha]]).double(), rtol=0, atol=1e-4)
    loss = math.log(1 + math.exp(4 * alpha - 1) + math.exp(1 - 2 * alpha))
    assert float(solution.loss) == pytest.approx(loss, abs=PROMISED)


def test_a_corner_is_reached_exactly() -> None:
    # The first student's margins are below the second's in every class.
    logits = torch.tensor([[[2.0, 0.0, 0.0]], [[1.0, 0.5, 0.0]]])
    assert solve(logits, torch.tensor([0])).weights.tolist() == [[1.0, 0.0]]


def test_identical_students_share_equally() -> None:
    logits = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    torch.testing.assert_close(solve(logits, torch.arange(5)).weights, torch.full((5, 3), 1 / 3).double())


def test_permuting_students_permutes_unique_weights() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 64, 10, generator=generator) * 3
    labels = torch.randint(10, (64,), generator=generator)
    order = torch.tensor([2, 0, 3, 1])
    weights = solve(logits, labels).weights
    assert float(weights.std()) > 0.1
    torch.testing.assert_close(solve(logits[order], labels).weights, weights[:, order], rtol=0, atol=1e-6)


def test_a_sample_is_solved_alike_alone_and_in_a_batch() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 70, 1000, generator=generator) * 3
    labels = torch.randint(1000, (70,), generator=generator)
    together = solve(logits, labels)
    for sample in (0, 31, 32, 33, 69):
        alone = solve(logits[:, sample : sample + 1], labels[sample : sample + 1])
        torch.testing.assert_close(alone.loss[0], together.loss[sample], rtol=0, atol=PROMISED)
        torch.testing.assert_close(alone.weights[0], together.weights[sample], rtol=0, atol=1e-6)


def test_the_same_inputs_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(5, 33, 20, generator=generator) * 30
    labels = torch.randint(20, (33,), generator=generator)
    assert torch.equal(solve(logits, labels).weights, solve(logits.clone(), labels.clone()).weights)


def test_the_inputs_are_left_alone() -> None:
    logits, labels = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(6)), torch.tensor([0, 1, 2, 3])
    before = logits.clone(), labels.clone()
    solve(logits, labels)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


@pytest.mark.parametrize("scale", [1e6, 1e12, 1e30])
def test_beyond_what_rounding_allows_the_best_found_is_returned(scale: float) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = (torch.rand(5, 20, 9, generator=generator) * 2 - 1) * scale
    solution = solve(logits, torch.randint(9, (20,), generator=generator))
    assert in_simplex(solution.weights)
    assert bool(torch.isfinite(solution.loss).all())
    assert bool(torch.isfinite(solution.gap).all())


def test_one_class_has_no_loss() -> None:
    solution = solve(
        torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(9)), torch.zeros(3, dtype=torch.int64)
    )
    assert solution.weights.tolist() == [[0.5, 0.5]] * 3
    assert solution.loss.tolist() == [0.0] * 3
    assert solution.gap.tolist() == [0.0] * 3
