"""The losses: by hand, by loops in numpy, by finite differences, and against the mistakes of public implementations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from codistill_worker.methods import losses

B, C, D = 4, 5, 3

Term = Callable[[Tensor], Tensor]


def drawn(seed: int, *shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def labels_of(rows: int = B) -> Tensor:
    return torch.arange(rows) % C


def softmax(rows: Tensor) -> Tensor:
    return torch.softmax(rows, -1)


def numpy_softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def numpy_kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> float:
    """KL(target ‖ softmax(z/T)), one row and one class after the other."""
    total = 0.0
    for t, z in zip(target.numpy(), logits.detach().numpy(), strict=True):
        p = numpy_softmax(z / temperature)
        for c in range(len(t)):
            total += t[c] * (math.log(t[c]) - math.log(p[c]))
    return total / len(target)


def heads_of(first: Tensor) -> list[Tensor]:
    """Three stages, of which the tensor under test is one and in part another."""
    return [first, drawn(21, *first.shape, dtype=first.dtype) + 0.5 * first, drawn(22, *first.shape, dtype=first.dtype)]


def dense(heads: list[Tensor], **weights: float) -> Tensor:
    shape, dtype = (len(heads), *heads[0].shape), heads[0].dtype
    same, other = (softmax(drawn(seed, *shape, dtype=dtype)) for seed in (23, 24))
    return losses.dense_cross_layer(heads, labels_of(len(heads[0])), same_stage=same, other_stages=other, **weights)


def taught(logits: Tensor, *, teacher: bool = True) -> Tensor:
    shape, dtype = logits.shape, logits.dtype
    return losses.teacher_and_peer(
        logits,
        labels_of(len(logits)),
        teacher=drawn(25, *shape, dtype=dtype) if teacher else None,
        peer=softmax(drawn(26, *shape, dtype=dtype)),
        teacher_weight=0.7,
        peer_weight=0.4,
        temperature=3,
    )


def like(seed: int, logits: Tensor, scale: float = 2.0) -> Tensor:
    return drawn(seed, *logits.shape, scale=scale, dtype=logits.dtype)


TERMS: dict[str, Term] = {
    "cross_entropy": lambda z: losses.cross_entropy(z, labels_of(len(z))),
    "cross_entropy, smoothed": lambda z: losses.cross_entropy(z, labels_of(len(z)), 0.2),
    "distillation": lambda z: losses.distillation(z, target=like(1, z), temperature=4),
    "mimicry": lambda z: losses.mimicry(z, target=softmax(like(2, z)), temperature=2),
    "logit_regression": lambda z: losses.logit_regression(z, target=like(3, z)),
    "teacher_and_peer": taught,
    "teacher_and_peer, without teacher": lambda z: taught(z, teacher=False),
    "dense_cross_layer": lambda z: dense(heads_of(z), auxiliary_weight=0.5, same_weight=1.5, other_weight=0.3),
}
RELATIONS: dict[str, Callable[..., Tensor]] = {
    "distance": losses.relational_distance,
    "angle": losses.relational_angle,
}


# By hand.


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])  # softmax: ½ ¼ ¼
    assert losses.cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(math.log(2))
    # ε = 0.3: y' = 0.8, 0.1, 0.1, so 0.8·ln 2 + 0.2·ln 4 = 1.2·ln 2.
    assert losses.cross_entropy(logits, torch.tensor([0]), 0.3).item() == pytest.approx(1.2 * math.log(2))


def test_divergence_by_hand() -> None:
    """KL((½ ½) ‖ (¼ ¾)) = ½·ln 2 + ½·ln ⅔, and of a sure target (1 0) from (¼ ¾) ln 4; the mean over two rows."""
    student = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    value = losses.divergence(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), student)
    assert value.item() == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3) + math.log(4)) / 2)


def test_distillation_by_hand() -> None:
    """With T = 2 logits of 2·ln 3 and 0 soften to (¾ ¼): 4·KL((¾ ¼) ‖ (½ ½)) = 4·(¾·ln 3/2 + ¼·ln ½)."""
    value = losses.distillation(torch.zeros(1, 2), target=torch.tensor([[2 * math.log(3), 0.0]]), temperature=2)
    assert value.item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


def test_logit_regression_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 3.0]])
    assert losses.logit_regression(student, target=teacher).item() == pytest.approx((1 + 4 + 0 + 9) / 4)


def test_distances_by_hand() -> None:
    """Student at 0, 1, 3: distances 1, 2, 3, mean 2, ψ = ½, 1, 3/2. Teacher at (0,0), (0,4), (3,4): 4, 3, 5, mean 4.

    ψ of the teacher for the pairs 01, 12, 02: 1, ¾, 5/4. Differences −½, ¼, ¼; halves of their squares ⅛, 1/32, 1/32.
    Twice each, over 9.
    """
    value = losses.relational_distance(
        torch.tensor([[0.0], [1.0], [3.0]]), target=torch.tensor([[0.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
    )
    assert value.item() == pytest.approx(2 * (1 / 8 + 1 / 32 + 1 / 32) / 9)


def test_angles_by_hand() -> None:
    """A right angle at 1 against a flat one: cosines 0 and −1; at 0 and 2 the teacher's are 1, the student's 1/√2.

    Each counts twice, as (i, k) and (k, i), over 27; a point seen twice from another has cosine 1 in both.
    """
    value = losses.relational_angle(
        torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), target=torch.tensor([[-1.0], [0.0], [1.0]])
    )
    assert value.item() == pytest.approx(2 * (0.5 + 2 * 0.5 * (1 - math.sqrt(0.5)) ** 2) / 27)


def test_distances_beyond_one_count_linearly() -> None:
    """Student at 0, 1, 10: distances 1, 9, 10, mean 20/3, ψ = 0.15, 1.35, 1.5.

    Teacher at 0, 1, 0: distances 1, 1, 0, mean 2/3, ψ = 1.5, 1.5, 0. Differences −1.35, −0.15 and 1.5; the first counts
    1.35 − ½, the last 1.5 − ½.
    """
    value = losses.relational_distance(torch.tensor([[0.0], [1.0], [10.0]]), target=torch.tensor([[0.0], [1.0], [0.0]]))
    assert value.item() == pytest.approx(2 * (0.85 + 0.15**2 / 2 + 1) / 9)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_mean_distance_is_over_all_distinct_samples_those_that_coincide_too(swapped: bool) -> None:
    """At 0, 0, 1: distances 0, 1, 1, mean 2/3, ψ = 0, 3/2, 3/2. At 0, 1, 2: distances 1, 1, 2, mean 4/3, ψ = ¾, ¾, 3/2.

    Differences −¾, ¾, 0; halves of their squares 9/32 each, twice, over 9: ⅛. Without the pair at 0 it would be 0.09722.
    """
    pair = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    x, t = reversed(pair) if swapped else pair
    assert losses.relational_distance(x, target=t).item() == pytest.approx(0.125)


def test_variational_information_by_hand() -> None:
    """One channel, weights 1, map 2: μ = 2. Against 5 with σ² = 5: ½·(9/5 + ln 5)."""
    module = losses.VariationalInformation(1, 1)
    with torch.no_grad():
        for parameter in module.mean.parameters():
            parameter.fill_(1)
    assert module.variance().item() == pytest.approx(5)
    value = module(torch.full((2, 1, 3, 3), 2.0), target=torch.full((2, 1, 3, 3), 5.0))
    assert value.item() == pytest.approx(0.5 * (9 / 5 + math.log(5)))
    with torch.no_grad():
        module.alpha.fill_(-1e4)
    assert module.variance().item() == pytest.approx(1e-5)


def test_rising_weights_by_hand() -> None:
    def weights(rise: losses.Rise) -> list[float]:
        epochs = (9.9, 10, 12.5, 15, 17.5, 20, 99)
        return [losses.rising_weight(e, start=10, end=20, highest=2, rise=rise) for e in epochs]

    assert weights("linear") == [0, 0, 0.5, 1, 1.5, 2, 2]
    assert weights("step") == [0, 0.5, 1, 1.5, 2, 2, 2]
    # S(−2.5) = 0.07586, S(±5) = 0.99331 and 0.00669: 2·(0.07586 − 0.00669)/0.98661 = 0.14021.
    assert weights("sigmoid") == pytest.approx([0, 0, 0.14021, 1, 2 - 0.14021, 2, 2], abs=1e-5)


# By loops.


@pytest.mark.parametrize("coinciding", [(), (1, 3), (1, 3, 5)])
def test_distances_by_loops(coinciding: tuple[int, ...]) -> None:
    x, t = drawn(1, 6, D), drawn(2, 6, 7)
    for place in coinciding:
        x[place] = x[0]

    def relative(points: np.ndarray) -> np.ndarray:
        lengths = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in points] for a in points])
        return lengths / (lengths.sum() / (len(points) * (len(points) - 1)))

    difference = np.abs(relative(x.numpy()) - relative(t.numpy()))
    expected = np.where(difference <= 1, difference**2 / 2, difference - 0.5).mean()
    assert losses.relational_distance(x, target=t).item() == pytest.approx(expected)


def test_angles_by_loops() -> None:
    x, t = drawn(1, 6, D), drawn(2, 6, 7)
    x[3] = x[1]  # two that coincide

    def cosine(points: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = points[i] - points[j], points[k] - points[j]
        lengths = math.sqrt(a @ a) * math.sqrt(b @ b)
        return float(a @ b) / lengths if lengths else 0.0

    total = 0.0
    for i in range(6):
        for j in range(6):
            for k in range(6):
                difference = abs(cosine(x.numpy(), i, j, k) - cosine(t.numpy(), i, j, k))
                total += difference**2 / 2 if difference <= 1 else difference - 0.5
    assert losses.relational_angle(x, target=t).item() == pytest.approx(total / 6**3)


def test_teacher_and_peer_by_loops() -> None:
    z, teacher, peer = drawn(4, B, C), drawn(25, B, C), softmax(drawn(26, B, C))
    entropy = -sum(math.log(numpy_softmax(z[b].numpy())[b % C]) for b in range(B)) / B
    alone = entropy + 0.4 * numpy_kl(peer, z)
    assert taught(z, teacher=False).item() == pytest.approx(alone)
    assert taught(z).item() == pytest.approx(alone + 0.7 * 9 * numpy_kl(softmax(teacher / 3), z, 3))


def test_dense_cross_layer_is_the_sum_over_pairs_of_stages() -> None:
    """For one peer: the value of the paper's sums, but for a constant, and their gradient."""
    stages = 3
    peer = drawn(5, stages, B, C)
    own = drawn(6, stages, B, C).requires_grad_()
    p = softmax(peer)
    other = torch.stack([torch.stack([p[r] for r in range(stages) if r != q]).mean(0) for q in range(stages)])
    value = losses.dense_cross_layer(
        list(own),
        labels_of(),
        same_stage=p,
        other_stages=other,
        auxiliary_weight=0.5,
        same_weight=1.5,
        other_weight=0.3,
    )
    logs = torch.log_softmax(own, -1)
    entropies = torch.stack([functional.nll_loss(log, labels_of()) for log in logs])
    pairs = torch.stack([torch.stack([losses.divergence(p[r], logs[q]) for r in range(stages)]) for q in range(stages)])
    same = pairs.diagonal().sum()
    expected = entropies[-1] + 0.5 * entropies[:-1].sum() + 1.5 * same + 0.3 * (pairs.sum() - same)
    (ours,) = torch.autograd.grad(value, own)
    (theirs,) = torch.autograd.grad(expected, own)
    torch.testing.assert_close(ours, theirs)
    constant = 0.3 * sum(
        losses.divergence(p[r], other[q].log()) for q in range(stages) for r in range(stages) if r != q
    )
    assert value.item() + float(constant) == pytest.approx(expected.item())


def test_one_stage_is_deep_mutual_learning() -> None:
    z, target = drawn(7, B, C), softmax(drawn(8, 1, B, C))
    value = losses.dense_cross_layer([z], labels_of(), same_stage=target, other_stages=target)
    assert torch.equal(value, losses.cross_entropy(z, labels_of()) + losses.mimicry(z, target=target[0]))


def test_variational_information_by_loops() -> None:
    torch.manual_seed(0)
    module = losses.VariationalInformation(2, 3).double()
    x, t = drawn(9, B, 2, 4, 4), drawn(10, B, 3, 4, 4)
    with torch.no_grad():
        module.alpha.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    weights = [w.detach().numpy()[:, :, 0, 0] for w in module.mean.parameters()]
    total = 0.0
    for b in range(B):
        for row in range(4):
            for column in range(4):
                value = x[b, :, row, column].numpy()
                for layer, weight in enumerate(weights):
                    value = weight @ (value if layer == 0 else np.maximum(value, 0))
                for c in range(3):
                    variance = math.log1p(math.exp(module.alpha[c].item())) + 1e-5
                    error = value[c] - t[b, c, row, column].item()
                    total += 0.5 * (error**2 / variance + math.log(variance))
    assert module(x, target=t).item() == pytest.approx(total / (B * 3 * 16))


def test_variational_information_compares_maps_at_the_smaller_size() -> None:
    module = losses.VariationalInformation(2, 3)
    x, t = drawn(9, B, 2, 8, 4, dtype=torch.float32), drawn(10, B, 3, 4, 8, dtype=torch.float32)
    pooled = functional.avg_pool2d(x, (2, 1)), functional.avg_pool2d(t, (1, 2))
    torch.testing.assert_close(module(x, target=t), module(pooled[0], target=pooled[1]))


# Gradients.


@pytest.mark.parametrize("term", TERMS)
def test_gradients_are_those_of_finite_differences(term: str) -> None:
    assert gradcheck(TERMS[term], (drawn(11, B, C).requires_grad_(),))


@pytest.mark.parametrize("relation", RELATIONS)
def test_gradients_of_relations_are_those_of_finite_differences(relation: str) -> None:
    target = drawn(12, B, 7)
    assert gradcheck(lambda x: RELATIONS[relation](x, target=target), (drawn(13, B, D).requires_grad_(),))


@pytest.mark.parametrize("relation", RELATIONS)
def test_gradients_beside_embeddings_that_coincide_are_those_of_finite_differences(relation: str) -> None:
    target, same = drawn(12, B, 7), drawn(14, 1, D).expand(2, D)
    moving = drawn(13, B - 2, D).requires_grad_()
    assert gradcheck(lambda x: RELATIONS[relation](torch.cat([same, x]), target=target), (moving,))


def test_gradients_of_variational_information_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    module = losses.VariationalInformation(2, 3).double()
    target = drawn(14, 2, 3, 2, 2)
    names = [name for name, _ in module.named_parameters()]

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, given, (x,), {"target": target})

    assert gradcheck(loss, (drawn(15, 2, 2, 4, 4).requires_grad_(), *module.parameters()))


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_values_and_gradients_are_finite_for_large_logits(term: str, sign: int) -> None:
    logits = torch.zeros(B, C)
    logits[:, 1] = sign * 1e4
    logits[0] = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0])
    value = TERMS[term](logits.requires_grad_())
    value.backward()
    assert bool(torch.isfinite(value))
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_a_large_target_is_a_sure_one() -> None:
    target = torch.tensor([[1e4, -1e4]])
    value = losses.distillation(torch.zeros(1, 2), target=target, temperature=1)
    assert value.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_finite_for_large_embeddings(relation: str) -> None:
    x = drawn(16, B, D, scale=1e4, dtype=torch.float32).requires_grad_()
    value = RELATIONS[relation](x, target=drawn(17, B, 7, scale=1e4, dtype=torch.float32))
    value.backward()
    assert x.grad is not None
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("equal", ["two", "all", "all of one side", "one sample"])
def test_embeddings_that_coincide_have_finite_gradients(relation: str, equal: str) -> None:
    x = drawn(18, B, D, dtype=torch.float32)
    target = drawn(19, B, 7, dtype=torch.float32)
    if equal == "two":
        x[1] = x[0]
    elif equal == "all":
        x[:], target[:] = x[0].clone(), target[0].clone()
    elif equal == "all of one side":
        x[:] = x[0].clone()
    else:
        x, target = x[:1], target[:1]
    x.requires_grad_()
    value = RELATIONS[relation](x, target=target)
    value.backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    if equal == "two":
        assert value.item() > 0
        assert bool((x.grad != 0).any())
    elif equal == "all of one side":
        assert value.item() > 0
        assert bool((x.grad == 0).all())
    else:
        assert value.item() == 0


# Properties.


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_scaling_an_embedding_changes_no_relation(relation: str, scale: float) -> None:
    x, t = drawn(1, B, D), drawn(2, B, 7)
    before = RELATIONS[relation](x, target=t)
    torch.testing.assert_close(RELATIONS[relation](x, target=t * scale), before)
    torch.testing.assert_close(RELATIONS[relation](x * scale, target=t), before)


@pytest.mark.parametrize("relation", RELATIONS)
def test_turning_and_moving_an_embedding_changes_no_relation(relation: str) -> None:
    x, t = drawn(1, B, D), drawn(2, B, 7)
    turn, _ = torch.linalg.qr(drawn(3, 7, 7))
    before = RELATIONS[relation](x, target=t)
    torch.testing.assert_close(RELATIONS[relation](x, target=t @ turn + drawn(4, 7)), before)
    assert RELATIONS[relation](x, target=x @ torch.eye(D, 9, dtype=x.dtype)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("term", [term for term in TERMS if term != "logit_regression"])
def test_a_constant_on_a_row_of_logits_changes_no_loss(term: str) -> None:
    z = drawn(5, B, C)
    shift = drawn(6, B, 1)
    torch.testing.assert_close(TERMS[term](z + shift), TERMS[term](z))


def test_a_student_that_agrees_loses_nothing() -> None:
    z = drawn(5, B, C)
    assert losses.distillation(z, target=z, temperature=3).item() == pytest.approx(0, abs=1e-12)
    assert losses.mimicry(z, target=softmax(z)).item() == pytest.approx(0, abs=1e-12)
    assert losses.logit_regression(z, target=z).item() == 0


def test_the_mean_of_probabilities_has_the_gradient_of_the_pairs() -> None:
    own, others = drawn(5, B, C, dtype=torch.float32).requires_grad_(), drawn(6, 3, B, C, dtype=torch.float32)
    pairs = torch.stack([losses.distillation(own, target=other, temperature=1) for other in others]).mean()
    mean = losses.mimicry(own, target=softmax(others).mean(0))
    (ours,), (theirs,) = torch.autograd.grad(mean, own), torch.autograd.grad(pairs, own)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_with_in_float32(dtype: torch.dtype) -> None:
    z, t, x = drawn(5, B, C).to(dtype), drawn(6, B, C).to(dtype), drawn(7, B, D).to(dtype)
    for half, full in (
        (
            losses.distillation(z, target=t, temperature=2),
            losses.distillation(z.float(), target=t.float(), temperature=2),
        ),
        (losses.mimicry(z, target=softmax(t)), losses.mimicry(z.float(), target=softmax(t).float())),
        (losses.relational_angle(x, target=t), losses.relational_angle(x.float(), target=t.float())),
        (losses.relational_distance(x, target=t), losses.relational_distance(x.float(), target=t.float())),
    ):
        assert half.dtype is torch.float32
        assert torch.equal(half, full)


@pytest.mark.parametrize("rise", ["linear", "sigmoid", "step"])
def test_weights_rise_from_nothing_to_the_highest(rise: losses.Rise) -> None:
    weights = [losses.rising_weight(e / 10, start=2, end=7, highest=3, rise=rise) for e in range(100)]
    assert weights == sorted(weights)
    assert weights[:20] == [0] * 20
    assert weights[70:] == pytest.approx([3] * 30)
    assert len(set(weights)) > 4


# The mistakes of public implementations, each with a planted one that its check finds.

Distilling = Callable[..., Tensor]
Z, TARGET = drawn(31, B, C, dtype=torch.float32), drawn(32, B, C, dtype=torch.float32)


def planted(
    *,
    divisor: Callable[[Tensor], int] = len,
    power: int = 2,
    reverse: bool = False,
    leak: bool = False,
    normalised: bool = True,
) -> Distilling:
    """Distillation with at most one mistake."""

    def loss(logits: Tensor, *, target: Tensor, temperature: float) -> Tensor:
        target = target if leak else target.detach()
        aims, own = target / temperature, logits / temperature
        if reverse:
            aims, own = own, aims
        wanted = softmax(aims) if normalised else aims.sigmoid()
        total = functional.kl_div(torch.log_softmax(own, -1), wanted, reduction="sum")
        return temperature**power * total / divisor(logits)

    return loss


def divides_by_rows_alone(loss: Distilling) -> bool:
    """A class that nobody believes in adds nothing; a mean over classes would shrink."""
    none = torch.full((B, 1), -1e4)
    wider = loss(torch.cat([Z, none], 1), target=torch.cat([TARGET, none], 1), temperature=2)
    return bool(torch.isclose(wider, loss(Z, target=TARGET, temperature=2)))


def repeats_as_a_mean(loss: Distilling) -> bool:
    twice = loss(Z.repeat(2, 1), target=TARGET.repeat(2, 1), temperature=2)
    return bool(torch.isclose(twice, loss(Z, target=TARGET, temperature=2)))


def keeps_its_gradient_at_any_temperature(loss: Distilling) -> bool:
    """For large T the gradient tends to (z − t)/(B·C) with both centred, and not to 0."""
    own = Z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(own, target=TARGET, temperature=1000), own)
    difference = Z - TARGET
    limit = (difference - difference.mean(-1, keepdim=True)) / (B * C)
    return bool(torch.allclose(gradient, limit, rtol=0.02, atol=1e-3))


def has_the_target_first(loss: Distilling) -> bool:
    """A target sure of the first class, and a student who has no idea: ln 2. The other way round it is large."""
    value = loss(torch.zeros(1, 2), target=torch.tensor([[40.0, -40.0]]), temperature=1)
    return bool(torch.isclose(value, torch.tensor(math.log(2))))


def leaves_the_target_alone(loss: Distilling) -> bool:
    """The target as it would come from another student in the same process, with its graph."""
    own, peers = Z.clone().requires_grad_(), TARGET.clone().requires_grad_()
    loss(own, target=peers * 1, temperature=2).backward()
    return own.grad is not None and peers.grad is None


def has_a_target_that_sums_to_one(loss: Distilling) -> bool:
    """Only then does the gradient, (p − t)/B, sum to 0 over classes and vanish where both agree."""
    own = TARGET.clone().requires_grad_()
    value = loss(own, target=TARGET, temperature=1)
    (gradient,) = torch.autograd.grad(value, own)
    return bool(gradient.abs().max() < 1e-6) and abs(value.item()) < 1e-6


MISTAKES: dict[str, tuple[Distilling, Callable[[Distilling], bool]]] = {
    "divided by B·C": (planted(divisor=torch.numel), divides_by_rows_alone),
    "summed over rows": (planted(divisor=lambda _: 1), repeats_as_a_mean),
    "T instead of T²": (planted(power=1), keeps_its_gradient_at_any_temperature),
    "without T²": (planted(power=0), keeps_its_gradient_at_any_temperature),
    "reverse": (planted(reverse=True), has_the_target_first),
    "gradients leak into another student": (planted(leak=True), leaves_the_target_alone),
    "targets that do not sum to 1": (planted(normalised=False), has_a_target_that_sums_to_one),
}


def by_probabilities(logits: Tensor, *, target: Tensor, temperature: float) -> Tensor:
    return losses.mimicry(logits, target=softmax(target / temperature), temperature=temperature)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("loss", [losses.distillation, by_probabilities])
def test_a_known_mistake_is_not_made(mistake: str, loss: Distilling) -> None:
    _, right = MISTAKES[mistake]
    assert right(loss)
    assert right(planted())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_would_be_found(mistake: str) -> None:
    wrong, right = MISTAKES[mistake]
    assert not right(wrong)


def test_a_target_that_rounding_moved_is_made_a_distribution_again() -> None:
    target = softmax(drawn(33, B, C, dtype=torch.float32))
    assert torch.allclose(losses.mimicry(Z, target=target * 1.01), losses.mimicry(Z, target=target), atol=1e-6)
    own = target.log().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.mimicry(own, target=target.half()), own)
    assert gradient.sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda t: losses.distillation(Z, target=t, temperature=2), id="distillation"),
        pytest.param(lambda t: losses.divergence(softmax(t), torch.log_softmax(Z, -1)), id="divergence"),
        pytest.param(lambda t: losses.mimicry(Z, target=softmax(t)), id="mimicry"),
        pytest.param(lambda t: losses.logit_regression(Z, target=t), id="logit_regression"),
        pytest.param(lambda t: losses.relational_distance(Z, target=t), id="relational_distance"),
        pytest.param(lambda t: losses.relational_angle(Z, target=t), id="relational_angle"),
        pytest.param(
            lambda t: losses.VariationalInformation(1, 1)(Z[:, None, None], target=t[:, None, None]), id="variational"
        ),
        pytest.param(
            lambda t: losses.teacher_and_peer(
                Z, labels_of(), teacher=t, peer=softmax(t), teacher_weight=1, peer_weight=1, temperature=2
            ),
            id="teacher_and_peer",
        ),
        pytest.param(
            lambda t: losses.dense_cross_layer(
                [Z, Z], labels_of(), same_stage=softmax(t.expand(2, B, C)), other_stages=softmax(t.expand(2, B, C))
            ),
            id="dense_cross_layer",
        ),
    ],
)
def test_no_gradient_reaches_a_target(loss: Term) -> None:
    target = TARGET.clone().requires_grad_()
    value = loss(target)
    value = value + 0 * target.sum()  # so that there is a graph to go back through, in any case
    (gradient,) = torch.autograd.grad(value, target)
    assert bool((gradient == 0).all())
