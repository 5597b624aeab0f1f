from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import kl_div

from codistill_server import ensembles
from server.ensembles.support import Problem, probabilities, problems, quick


@quick
@given(problems(scales=(4.0, 64.0), step=1 / 16, dtype=np.float32), st.data())
def test_a_constant_on_a_students_row_changes_no_softmax(problem: Problem, data: st.DataObject) -> None:
    logits, _ = problem
    shifts = data.draw(arrays(np.float32, (*logits.shape[:2], 1), elements=st.integers(-64, 64)))
    shifted = logits + torch.from_numpy(shifts)
    before, after = probabilities(ensembles.mean_logits(logits)), probabilities(ensembles.mean_logits(shifted))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        ensembles.mean_probabilities(shifted), ensembles.mean_probabilities(logits), rtol=0, atol=1e-5
    )
    if len(logits) > 1:
        for after, before in zip(
            ensembles.peer_probabilities(shifted), ensembles.peer_probabilities(logits), strict=True
        ):
            torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@quick
@given(problems(students=(2, 5)), st.data())
def test_permuting_students_permutes_answers_and_leaves_shared_targets(problem: Problem, data: st.DataObject) -> None:
    logits, _ = problem
    order = torch.tensor(data.draw(st.permutations(range(len(logits)))))
    moved = logits[order]
    atol = 1e-12 * max(1.0, float(logits.abs().max()))
    torch.testing.assert_close(ensembles.mean_logits(moved), ensembles.mean_logits(logits), rtol=0, atol=atol)
    torch.testing.assert_close(
        ensembles.mean_probabilities(moved), ensembles.mean_probabilities(logits), rtol=0, atol=atol
    )
    means, constants = ensembles.peer_probabilities(logits)
    moved_means, moved_constants = ensembles.peer_probabilities(moved)
    torch.testing.assert_close(moved_means, means[order], rtol=0, atol=atol)
    torch.testing.assert_close(moved_constants, constants[order], rtol=0, atol=atol)


@quick
@given(problems(students=(1, 1)), st.integers(1, 4))
def test_one_student_or_identical_ones_are_their_own_target(problem: Problem, copies: int) -> None:
    one, _ = problem
    logits = one.expand(copies, -1, -1)
    own = probabilities(one[0])
    torch.testing.assert_close(probabilities(ensembles.mean_logits(logits)), own, rtol=0, atol=1e-9)
    torch.testing.assert_close(ensembles.mean_probabilities(logits), own, rtol=0, atol=1e-12)
    if copies > 1:
        means, constants = ensembles.peer_probabilities(logits)
        torch.testing.assert_close(means, own.expand(copies, -1, -1), rtol=0, atol=1e-12)
        torch.testing.assert_close(constants, torch.zeros_like(constants), rtol=0, atol=1e-12)


@quick
@given(problems(students=(2, 5), scales=(1.0, 8.0, 30.0)), st.floats(0.5, 5.0), st.integers(0, 1000))
def test_the_peers_mean_and_constant_give_the_pairwise_sum(problem: Problem, temperature: float, seed: int) -> None:
    logits, _ = problem
    K = len(logits)
    q = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)
    p = torch.softmax(logits / temperature, -1)
    means, constants = ensembles.peer_probabilities(logits, temperature)
    for k in range(K):
        pairwise = [kl_div(q, p[other], reduction="none").sum(-1) for other in range(K) if other != k]
        together = kl_div(q, means[k], reduction="none").sum(-1) + constants[k]
        torch.testing.assert_close(together, torch.stack(pairwise).mean(0), rtol=1e-9, atol=1e-9)
        assert bool((constants[k] >= 0).all())


@quick
@given(problems(scales=(7.984375,), dtype=np.float32))
def test_float16_on_the_wire_moves_probabilities_by_less_than_a_thousandth(problem: Problem) -> None:
    logits, _ = problem
    wire = logits.half()
    before, after = ensembles.mean_logits(logits), ensembles.mean_logits(wire)
    torch.testing.assert_close(probabilities(after / 2), probabilities(before / 2), rtol=0, atol=1e-3)
    before, after = ensembles.mean_probabilities(logits, 2.0), ensembles.mean_probabilities(wire, 2.0)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)


@settings(max_examples=30)
@given(problems(scales=(1e4,), dtype=np.float32, students=(2, 4)))
def test_extreme_logits_give_finite_targets(problem: Problem) -> None:
    logits, _ = problem
    mean = ensembles.mean_logits(logits)
    assert bool(torch.isfinite(mean).all())
    assert bool(torch.isfinite(torch.softmax(mean, -1)).all())
    means, constants = ensembles.peer_probabilities(logits)
    assert bool(torch.isfinite(constants).all())
    for rows in (means, ensembles.mean_probabilities(logits)):
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), rtol=0, atol=1e-5)


@quick
@given(problems(dtype=np.float32, students=(2, 4)))
def test_the_same_inputs_give_the_same_bits(problem: Problem) -> None:
    logits, _ = problem
    assert torch.equal(ensembles.mean_logits(logits), ensembles.mean_logits(logits.clone()))
    assert torch.equal(ensembles.peer_probabilities(logits)[0], ensembles.peer_probabilities(logits.clone())[0])


def test_means_by_hand() -> None:
    logits = torch.tensor([[[math.log(3), 0.0]], [[0.0, 0.0]]])  # probabilities (¾, ¼) and (½, ½)
    torch.testing.assert_close(ensembles.mean_logits(logits), torch.tensor([[math.log(3) / 2, 0.0]]))
    torch.testing.assert_close(ensembles.mean_probabilities(logits), torch.tensor([[0.625, 0.375]]))
    # At T = ½ the first becomes (9/10, 1/10).
    torch.testing.assert_close(ensembles.mean_probabilities(logits, 0.5), torch.tensor([[0.7, 0.3]]))


def test_peer_probabilities_by_hand() -> None:
    # Probabilities (½, ½), (¼, ¾), (¾, ¼). The first's peers have the mean (½, ½) and each the entropy h(¼), so the
    # constant is ln 2 − h(¼); the second's have the mean (⅝, ⅜) and the constant h(⅝) − (ln 2 + h(¼))/2.
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(3)]], [[math.log(3), 0.0]]])
    means, constants = ensembles.peer_probabilities(logits)
    torch.testing.assert_close(means, torch.tensor([[[0.5, 0.5]], [[0.625, 0.375]], [[0.375, 0.625]]]))

    def h(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    second = h(0.625) - (math.log(2) + h(0.25)) / 2
    expected = torch.tensor([[math.log(2) - h(0.25)], [second], [second]])
    torch.testing.assert_close(constants, expected, rtol=0, atol=1e-6)


def test_a_pairs_peer_is_the_other_one_and_the_constant_zero() -> None:
    logits = torch.randn(2, 300, 400, generator=torch.Generator().manual_seed(0)) * 5
    means, constants = ensembles.peer_probabilities(logits, 3.0)
    assert torch.equal(means, torch.softmax(logits / 3, -1).flip(0))
    assert torch.equal(constants, torch.zeros(2, 300))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_pooled_probabilities_are_what_one_more_student_gets_of_its_peers(temperature: float) -> None:
    logits = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(9))
    one_more = torch.cat([logits, torch.zeros(1, 6, 4)])
    m, constant = ensembles.pooled_probabilities(logits, temperature)
    peers, constants = ensembles.peer_probabilities(one_more, temperature)
    torch.testing.assert_close(m, peers[-1])
    torch.testing.assert_close(constant, constants[-1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(m.sum(-1), torch.ones(6))


def test_one_student_has_no_peers() -> None:
    with pytest.raises(ValueError, match="logits: 1 student has no peers; allowed are 2 or more"):
        ensembles.peer_probabilities(torch.zeros(1, 3, 4))


def test_the_mean_is_memory_of_its_own() -> None:
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    ensembles.mean_logits(logits).zero_()
    assert torch.equal(logits, before)
