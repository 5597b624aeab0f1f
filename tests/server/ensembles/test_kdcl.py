from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from codistill_server import ensembles
from server.ensembles.support import Labelled, Problem, cross_entropies, probabilities, problems, quick

LABELLED: dict[str, Labelled] = {
    "naive": ensembles.naive,
    "linear": ensembles.linear,
    "min_logit": ensembles.min_logit,
}


@quick
@given(problems(scales=(1.0, 8.0, 100.0, 1e4)))
def test_cross_entropies_are_ordered_per_sample(problem: Problem) -> None:
    logits, labels = problem
    losses = {name: cross_entropies(ensemble(logits, labels), labels) for name, ensemble in LABELLED.items()}
    mean = cross_entropies(ensembles.mean_logits(logits), labels)
    assert bool((losses["min_logit"] <= losses["linear"] + 1e-9).all())
    assert bool((losses["linear"] <= losses["naive"] + 1e-6).all())
    assert bool((losses["linear"] <= mean + 1e-6).all())
    each = torch.stack([cross_entropies(z, labels) for z in logits])
    torch.testing.assert_close(losses["naive"], each.amin(0), rtol=0, atol=1e-9)


@quick
@given(problems(scales=(4.0, 64.0), step=1 / 16, dtype=np.float32), st.data())
def test_a_constant_on_a_students_row_changes_no_softmax(problem: Problem, data: st.DataObject) -> None:
    logits, labels = problem
    shifts = data.draw(arrays(np.float32, (*logits.shape[:2], 1), elements=st.integers(-64, 64)))
    shifted = logits + torch.from_numpy(shifts)
    for name, ensemble in LABELLED.items():
        before, after = probabilities(ensemble(logits, labels)), probabilities(ensemble(shifted, labels))
        # KL of linear's answer from the exact one is at most 5e-7, so their distance at most √(5e-7/2) each.
        torch.testing.assert_close(after, before, rtol=0, atol=1e-3 if name == "linear" else 1e-4)
    torch.testing.assert_close(
        ensembles.error_covariance(shifted, labels), ensembles.error_covariance(logits, labels), rtol=0, atol=1e-9
    )


@quick
@given(problems(students=(2, 5)), st.data())
def test_permuting_students_permutes_answers_and_leaves_shared_targets(problem: Problem, data: st.DataObject) -> None:
    logits, labels = problem
    order = torch.tensor(data.draw(st.permutations(range(len(logits)))))
    moved = logits[order]
    scale = max(1.0, float(logits.abs().max()))
    assert torch.equal(ensembles.min_logit(moved, labels), ensembles.min_logit(logits, labels))
    atol = 1e-12 * scale
    torch.testing.assert_close(
        probabilities(ensembles.linear(moved, labels)),
        probabilities(ensembles.linear(logits, labels)),
        rtol=0,
        atol=1e-3,
    )
    covariance = ensembles.error_covariance(logits, labels)
    torch.testing.assert_close(
        ensembles.error_covariance(moved, labels), covariance[order][:, order], rtol=0, atol=atol
    )
    weights = torch.linspace(-1, 2, len(logits), dtype=torch.float64)
    torch.testing.assert_close(
        ensembles.weighted_sum(moved, weights[order]), ensembles.weighted_sum(logits, weights), rtol=0, atol=atol
    )


@quick
@given(problems(students=(2, 5)), st.data())
def test_permuting_students_leaves_naive_where_no_two_tie(problem: Problem, data: st.DataObject) -> None:
    logits, labels = problem
    ordered = torch.stack([cross_entropies(z, labels) for z in logits]).sort(0).values
    assume(bool((ordered[1] - ordered[0] > 1e-9).all()))
    order = torch.tensor(data.draw(st.permutations(range(len(logits)))))
    assert torch.equal(ensembles.naive(logits[order], labels), ensembles.naive(logits, labels))


@quick
@given(problems(students=(1, 1)), st.integers(1, 4))
def test_one_student_or_identical_ones_are_their_own_target(problem: Problem, copies: int) -> None:
    one, labels = problem
    logits = one.expand(copies, -1, -1)
    own = probabilities(one[0])
    for ensemble in LABELLED.values():
        torch.testing.assert_close(probabilities(ensemble(logits, labels)), own, rtol=0, atol=1e-9)
    weights = ensembles.general_weights(logits, labels)
    torch.testing.assert_close(weights, torch.full((copies,), 1 / copies, dtype=torch.float64), rtol=0, atol=1e-9)


@quick
@given(problems(), st.data())
def test_general_in_chunks_is_general_at_once(problem: Problem, data: st.DataObject) -> None:
    logits, labels = problem
    logits, labels = logits.repeat(1, 3, 1), labels.repeat(3)
    cut = data.draw(st.integers(1, len(labels) - 1))
    whole = ensembles.error_covariance(logits, labels)
    parts = ensembles.error_covariance(logits[:, :cut], labels[:cut])
    parts = parts + ensembles.error_covariance(logits[:, cut:], labels[cut:])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_general_in_chunks_gives_the_same_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 500, 700, generator=generator)  # 1.4 million values: several blocks
    labels = torch.randint(700, (500,), generator=generator)
    logits[:, torch.arange(500), labels] += torch.tensor([3.0, 4.0, 5.0, 6.0])[:, None]
    total = torch.zeros(4, 4, dtype=torch.float64)
    for start in range(0, 500, 77):
        total += ensembles.error_covariance(logits[:, start : start + 77], labels[start : start + 77])
    at_once = ensembles.general_weights(logits, labels)
    torch.testing.assert_close(ensembles.weights_from_covariance(total), at_once, rtol=0, atol=1e-10)
    torch.testing.assert_close(ensembles.weights_from_covariance(total / 500), at_once, rtol=0, atol=1e-10)
    errors = torch.softmax(logits.double(), -1) - torch.nn.functional.one_hot(labels, 700)
    covariance = torch.einsum("inc,jnc->ij", errors, errors) / 500
    inverse = torch.linalg.inv(covariance).sum(-1)
    torch.testing.assert_close(at_once, inverse / inverse.sum(), rtol=0, atol=1e-8)


def test_general_is_the_sum_by_the_weights_of_those_that_were_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, held_out = torch.randn(3, 4, 5, generator=generator), torch.randn(2, 20, 5, generator=generator)
    labels = torch.arange(20) % 5
    target = ensembles.general(logits, ensembles.error_covariance(held_out, labels), (2, 0))
    weights = ensembles.general_weights(held_out, labels)
    torch.testing.assert_close(target, ensembles.weighted_sum(logits[[2, 0]], weights))


@quick
@given(problems(scales=(7.984375,), dtype=np.float32))
def test_float16_on_the_wire_moves_min_logit_by_less_than_a_thousandth(problem: Problem) -> None:
    logits, labels = problem
    before, after = ensembles.min_logit(logits, labels), ensembles.min_logit(logits.half(), labels)
    torch.testing.assert_close(probabilities(after / 2), probabilities(before / 2), rtol=0, atol=1e-3)


@pytest.mark.parametrize("K", [2, 4])
def test_float16_on_the_wire_moves_linear_by_less_than_a_thousandth(K: int) -> None:
    generator = torch.Generator().manual_seed(K)
    logits = torch.randn(K, 200, 10, generator=generator)
    labels = torch.randint(10, (200,), generator=generator)
    before, after = ensembles.linear(logits, labels), ensembles.linear(logits.half(), labels)
    torch.testing.assert_close(probabilities(after / 2), probabilities(before / 2), rtol=0, atol=1e-3)


@settings(max_examples=30)
@given(problems(scales=(1e4,), dtype=np.float32, students=(2, 4)))
def test_extreme_logits_give_finite_targets(problem: Problem) -> None:
    logits, labels = problem
    for ensemble in LABELLED.values():
        target = ensemble(logits, labels)
        assert bool(torch.isfinite(target).all())
        assert bool(torch.isfinite(torch.softmax(target, -1)).all())
    assert bool(torch.isfinite(ensembles.general_weights(logits, labels)).all())


@quick
@given(problems(dtype=np.float32, students=(2, 4)))
def test_the_same_inputs_give_the_same_bits(problem: Problem) -> None:
    logits, labels = problem
    for ensemble in LABELLED.values():
        assert torch.equal(ensemble(logits, labels), ensemble(logits.clone(), labels.clone()))


def test_naive_takes_the_surest_student_of_each_sample() -> None:
    # Label 0. Margins over the label: sample 0, students 0 and 1: 1 − 2 = −1 and 0 − 3 = −3; sample 1: −2 and 1.
    logits = torch.tensor([[[2.0, 1.0], [0.0, -2.0]], [[3.0, 0.0], [0.0, 1.0]]])
    assert ensembles.naive(logits, torch.tensor([0, 0])).tolist() == [[3.0, 0.0], [0.0, -2.0]]


def test_naive_ties_go_to_the_first_student() -> None:
    logits = torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]], [[0.0, 1.0]]])  # the first two have the same margin
    assert ensembles.naive(logits, torch.tensor([0])).tolist() == [[1.0, 0.0]]


def test_naive_tells_students_apart_that_are_both_sure() -> None:
    # Both cross-entropies are 0 in float32: exp(−40) and exp(−60).
    logits = torch.tensor([[[40.0, 0.0]], [[60.0, 0.0]]])
    assert ensembles.naive(logits, torch.tensor([0])).tolist() == [[60.0, 0.0]]


def test_min_logit_by_hand() -> None:
    # Label 2: the students' margins are (1, −1, 0) and (−3, −2, 0).
    logits = torch.tensor([[[2.0, 0.0, 1.0]], [[0.0, 1.0, 3.0]]])
    assert ensembles.min_logit(logits, torch.tensor([2])).tolist() == [[-3.0, -2.0, 0.0]]


def test_linear_by_hand() -> None:
    # Label 0, mirrored students: α = ½ each, the logits cancel and the cross-entropy is ln 3.
    logits = torch.tensor([[[0.0, 2.0, -2.0]], [[0.0, -2.0, 2.0]]])
    assert ensembles.linear_weights(logits, torch.tensor([0])).tolist() == [[0.5, 0.5]]
    target = ensembles.linear(logits, torch.tensor([0]))
    assert target.tolist() == [[0.0, 0.0, 0.0]]
    assert float(cross_entropies(target, torch.tensor([0]))) == pytest.approx(math.log(3))


def test_linear_of_unequal_students_by_hand() -> None:
    # Margins to label 0: (3, −1) and (−1, 1); 4·exp(4α − 1) = 2·exp(1 − 2α) where α = (2 − ln 2)/6.
    logits = torch.tensor([[[0.0, 3.0, -1.0]], [[1.0, 0.0, 2.0]]])
    alpha = (2 - math.log(2)) / 6
    weights = ensembles.linear_weights(logits, torch.tensor([0]))
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, torch.tensor([[alpha, 1 - alpha]]).double(), rtol=0, atol=1e-4)
    expected = torch.tensor([[1 - alpha, 3 * alpha, 2 - 3 * alpha]])
    torch.testing.assert_close(ensembles.linear(logits, torch.tensor([0])), expected, rtol=0, atol=1e-3)


def test_general_weights_by_hand() -> None:
    # Probabilities (.8, .2) and (.5, .5) with label 0, (.5, .5) and (.4, .6) with label 1. Errors of the first sample
    # (−.2, .2) and (−.5, .5), of the second (.5, −.5) and (.4, −.4). Sums: C11 = .08 + .5, C12 = .2 + .4,
    # C22 = .5 + .32; w is in the ratio of C22 − C12 = .22 to C11 − C12 = −.02.
    p = torch.tensor([[[0.8, 0.2], [0.5, 0.5]], [[0.5, 0.5], [0.4, 0.6]]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    covariance = ensembles.error_covariance(p.log(), labels)
    torch.testing.assert_close(covariance, torch.tensor([[0.58, 0.6], [0.6, 0.82]]).double(), rtol=0, atol=1e-7)
    weights = ensembles.general_weights(p.log(), labels)
    torch.testing.assert_close(weights, torch.tensor([1.1, -0.1]).double(), rtol=0, atol=1e-7)


def exact_weights(covariance: Tensor) -> list[float]:
    """Return C⁻¹1 / (1ᵀC⁻¹1) by elimination in exact fractions, for a C that is invertible."""
    rows = [[*map(Fraction, row), Fraction(1)] for row in covariance.tolist()]
    for k in range(len(rows)):
        pivot = max(range(k, len(rows)), key=lambda row: abs(rows[row][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [value / rows[k][k] for value in rows[k]]
        for other in range(len(rows)):
            if other != k:
                rows[other] = [a - rows[other][k] * b for a, b in zip(rows[other], rows[k], strict=True)]
    total = sum(row[-1] for row in rows)
    return [float(row[-1] / total) for row in rows]


def errors_of_different_size(seed: int, students: int) -> tuple[Tensor, Tensor]:
    """Return a covariance of students whose errors differ by up to twelve orders of magnitude, and those sizes."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.randn(students, 3 * students, generator=generator, dtype=torch.float64)
    errors += 2 * torch.rand(1, generator=generator).double() * errors[:1].clone()  # they agree in part
    errors *= 10 ** (8 * torch.rand(students, 1, generator=generator).double() - 6)
    covariance = errors @ errors.T
    return (covariance + covariance.T) / 2, errors.norm(dim=1)


@pytest.mark.parametrize(
    ("diagonal", "weights"),
    [
        ([1, 1e-8, 4e-8], [8e-9, 0.8, 0.2]),
        ([1e-8, 1, 4e-8], [0.8, 8e-9, 0.2]),
        ([1, 1e-15, 1e-15], [5e-16, 0.5, 0.5]),
        ([3e-30, 1e-30, 1], [0.25, 0.75, 7.5e-31]),
        ([1e-200, 1e200], [1, 0]),
    ],
)
def test_a_much_weaker_student_leaves_the_others_their_weights(diagonal: list[float], weights: list[float]) -> None:
    """Without correlations w_i is 1/C_ii over their sum: 1, 1e8 and 2.5e7 of 125,000,001 in the first."""
    found = ensembles.weights_from_covariance(torch.diag(torch.tensor(diagonal, dtype=torch.float64)))
    assert found.tolist() == pytest.approx(weights, rel=1e-7, abs=1e-20)


@pytest.mark.parametrize("students", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(40))
def test_weights_are_those_of_exact_arithmetic(students: int, seed: int) -> None:
    covariance, sizes = errors_of_different_size(100 * students + seed, students)
    weights = ensembles.weights_from_covariance(covariance)
    expected = torch.tensor(exact_weights(covariance), dtype=torch.float64)
    own = expected * sizes  # each in the size of its errors, as a weak student's weight is small and still has digits
    torch.testing.assert_close(weights * sizes, own, rtol=1e-9, atol=1e-10 * float(own.abs().max()))
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_copies_of_a_student_share_its_exact_weight_and_order_and_scale_do_not_matter(seed: int) -> None:
    covariance, sizes = errors_of_different_size(seed, 3)
    expected = torch.tensor(exact_weights(covariance), dtype=torch.float64)
    copies = torch.tensor([0, 1, 1, 2, 0, 1])
    shared = (expected / torch.tensor([2, 3, 1]))[copies]
    repeated = covariance[copies][:, copies]
    own = (shared * sizes[copies]).abs().max()
    for order in (torch.arange(6), torch.randperm(6, generator=torch.Generator().manual_seed(seed))):
        for scale in (1, 1e-150, 3e100):
            weights = ensembles.weights_from_covariance(scale * repeated[order][:, order])
            off = (weights - shared[order]) * sizes[copies][order]
            assert off.abs().max().item() < 1e-9 * own.item()


def test_a_combination_without_error_is_found_beside_a_weak_student() -> None:
    """The second's errors are twice the first's, so 2·f₁ − f₂ has none; the third is weaker by far, and unlike them."""
    covariance = torch.tensor([[1e-8, 2e-8, 0.0], [2e-8, 4e-8, 0.0], [0.0, 0.0, 1.0]]).double()
    weights = ensembles.weights_from_covariance(covariance)
    assert weights.tolist() == pytest.approx([2, -1, 0], abs=1e-7)


@pytest.mark.parametrize("weak", [1e-12, 1.0, 1e12])
def test_students_without_error_share_the_weight_equally(weak: float) -> None:
    covariance = torch.zeros(4, 4, dtype=torch.float64)
    covariance[1, 1], covariance[3, 3] = weak, 4.0
    covariance[1, 3] = covariance[3, 1] = weak**0.5
    assert ensembles.weights_from_covariance(covariance).tolist() == [0.5, 0, 0.5, 0]


def test_general_tells_strong_students_apart_beside_a_weak_one() -> None:
    """Two classes, and three samples that one student each is wrong about.

    The others are sure, so the sums of squared errors are 2·(1 − p)² with no covariance: 1 − p = ½, 1e-4 and 2e-4.
    """
    wrong = torch.tensor([0.5, 1e-4, 2e-4], dtype=torch.float64)
    logits = torch.zeros(3, 3, 2, dtype=torch.float64)
    logits[:, :, 0] = 1e3
    for student, p in enumerate(wrong):
        logits[student, student, 0] = ((1 - p) / p).log()
    weights = ensembles.general_weights(logits, torch.zeros(3, dtype=torch.int64))
    inverse = 1 / wrong**2
    assert weights.tolist() == pytest.approx((inverse / inverse.sum()).tolist(), rel=1e-9)


def test_students_that_agree_share_their_weight() -> None:
    # Students 1 and 2 are the same: as one student, w = (2, 1)/3 for errors 1 and 2; the first's part is halved.
    covariance = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]).double()
    weights = ensembles.weights_from_covariance(covariance)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1.0]).double() / 3, rtol=0, atol=1e-12)
    pseudo = torch.linalg.pinv(covariance).sum(-1)
    torch.testing.assert_close(weights, pseudo / pseudo.sum(), rtol=0, atol=1e-12)


def test_a_student_without_error_gets_all_the_weight() -> None:
    weights = ensembles.weights_from_covariance(torch.diag(torch.tensor([3.0, 0.0])).double())
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-12)


def test_students_without_any_error_share_equally() -> None:
    weights = ensembles.weights_from_covariance(torch.zeros(4, 4, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.full((4,), 0.25).double(), rtol=0, atol=1e-12)


def test_a_sure_students_error_keeps_its_digits() -> None:
    # 1 − p_y = e/(1 + e) with e = exp(−50), lost in float64 as a difference; the squared error is 2·(1 − p_y)².
    covariance = ensembles.error_covariance(torch.tensor([[[50.0, 0.0]]]), torch.tensor([0]))
    assert float(covariance) == pytest.approx(2 * math.exp(-100), rel=1e-9)


def test_weighted_sum_by_hand() -> None:
    logits = torch.tensor([[[1.0, 2.0]], [[4.0, -2.0]]])
    assert ensembles.weighted_sum(logits, torch.tensor([1.5, -0.5]).double()).tolist() == [[-0.5, 4.0]]


@pytest.mark.parametrize("name", LABELLED)
def test_answers_are_memory_of_their_own(name: str) -> None:
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    LABELLED[name](logits, torch.tensor([0, 1])).zero_()
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"weights: float32 \[3\] is not allowed; allowed is a floating dtype \[2\]"),
        (torch.ones(2, dtype=torch.int64), r"weights: int64 \[2\]"),
        (torch.tensor([0.5, math.nan]), r"weights: \[0.5, nan\] are not allowed; allowed are finite values"),
    ],
)
def test_bad_weights_are_refused(weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ensembles.weighted_sum(torch.zeros(2, 3, 4), weights)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.eye(2), r"covariance: float32 \[2, 2\] is not allowed; allowed is float64 \[K, K\]"),
        (torch.ones(2, 3).double(), r"covariance: float64 \[2, 3\]"),
        (torch.ones(0, 0).double(), r"K at least 1"),
        (torch.tensor([[1.0, math.inf], [math.inf, 1.0]]).double(), r"finite symmetric"),
        (torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double(), r"finite symmetric"),
        (torch.tensor([[1e-20, 1e-20], [0.0, 1e-20]]).double(), r"finite symmetric"),
        (torch.tensor([[-1.0, 0.0], [0.0, 1.0]]).double(), r"sums of squared errors"),
    ],
)
def test_bad_covariances_are_refused(covariance: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ensembles.weights_from_covariance(covariance)
