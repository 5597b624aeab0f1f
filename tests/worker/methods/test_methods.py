"""The objectives without teachers: by hand, by finite differences, and against the mistakes of public implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from codistill.config.methods import Distillation, Dml, Independent, Kdcl
from codistill.methods import Loss, Objective, RoundInputs, Step, StudentContext
from codistill_server import methods as server_methods
from codistill_worker.methods import create
from codistill_worker.methods.losses import divergence

B, C, K = 3, 4, 3


def drawn(seed: int, *shape: int, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels_of(seed: int, rows: int = B) -> torch.Tensor:
    return torch.randint(C, (rows,), generator=torch.Generator().manual_seed(seed))


def peers(logits: torch.Tensor, student: int, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """The targets of a DML student, by the definition: float64, one student after the other."""
    others = [each.double().div(temperature).softmax(-1) for index, each in enumerate(logits) if index != student]
    mean = sum(others, torch.zeros_like(others[0])) / len(others)
    apart = sum((functional.kl_div(mean.log(), p, reduction="none").sum(-1) for p in others), torch.zeros(len(mean)))
    return {"probabilities": mean.float(), "divergence": (apart / len(others)).float()}


def targets(settings: Distillation, seed: int = 5, rows: int = B) -> dict[str, torch.Tensor]:
    match settings:
        case Independent():
            return {}
        case Kdcl():
            return {"logits": drawn(seed, rows, C)}
        case Dml():
            return peers(drawn(seed, K, rows, C), 0, settings.temperature)


def objective_of(method: Distillation) -> Objective:
    return create(method, StudentContext("a", nn.Identity(), {"classes": C, "channels": 1, "size": 8}, dict))


METHODS: dict[str, Distillation] = {
    "independent": Independent(),
    "smoothed": Independent(label_smoothing=0.2),
    "dml": Dml(),
    "dml, T = 3": Dml(temperature=3, weight=0.7),
    "kdcl": Kdcl(),
    "kdcl, T = 5": Kdcl(temperature=5, weight=1.5),
}
DISTILLING = {name: method for name, method in METHODS.items() if method.exchanges}


def loss_by(objective: Objective, logits: torch.Tensor, labels: torch.Tensor, given: Any) -> Loss:
    return objective.loss(Step({"logits": logits}, labels, given))


def loss_of(method: Distillation, logits: torch.Tensor, labels: torch.Tensor, given: Any = None) -> Loss:
    return loss_by(objective_of(method), logits, labels, targets(method) if given is None else given)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, math.log(6), 0.0]])  # softmax: ½ ¼ ¼ and ⅛ ¾ ⅛
    labels = torch.tensor([0, 2])
    loss = loss_by(objective_of(Independent()), logits, labels, {})
    expected = (math.log(2) + math.log(8)) / 2
    assert loss.total.item() == pytest.approx(expected)
    assert loss.cross_entropy.item() == pytest.approx(expected)
    assert loss.distillation is None


def test_label_smoothing_by_hand() -> None:
    logits, labels, epsilon = torch.tensor([[math.log(2), 0.0, 0.0]]), torch.tensor([0]), 0.3
    loss = loss_by(objective_of(Independent(label_smoothing=epsilon)), logits, labels, {})
    wanted = (1 - epsilon + epsilon / 3) * math.log(2) + 2 * (epsilon / 3) * math.log(4)
    assert loss.total.item() == pytest.approx(wanted)
    assert loss.cross_entropy.item() == pytest.approx(math.log(2)), "what is reported has no smoothing in it"


def test_divergence_is_of_the_target_from_the_student_summed_over_classes_and_averaged_over_rows() -> None:
    target = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    student = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
    rows = [0.5 * math.log(2) + 0.5 * math.log(1), math.log(2)]
    assert divergence(target, student.log()).item() == pytest.approx(sum(rows) / 2)
    # The usual mistakes give other numbers: the other direction, a mean over classes too, a sum over rows.
    assert divergence(target, student.log()).item() != pytest.approx(sum(rows) / 6)
    assert divergence(target, student.log()).item() != pytest.approx(sum(rows))
    softened = torch.tensor([[0.5, 0.4, 0.1]])
    forward = divergence(softened, student[:1].log()).item()
    assert forward == pytest.approx((softened * (softened / student[:1]).log()).sum().item())
    assert forward != pytest.approx((student[:1] * (student[:1] / softened).log()).sum().item(), rel=1e-3)


def test_kdcl_by_hand() -> None:
    weight, temperature = 0.5, 2.0
    logits = torch.tensor([[2 * math.log(2), 0.0, 0.0]])  # at T = 2: ½ ¼ ¼
    target = {"logits": torch.tensor([[0.0, 2 * math.log(6), 0.0]])}  # at T = 2: ⅛ ¾ ⅛
    loss = loss_by(objective_of(Kdcl(weight=weight, temperature=temperature)), logits, torch.tensor([1]), target)
    term = 1 / 8 * math.log(1 / 4) + 3 / 4 * math.log(3) + 1 / 8 * math.log(1 / 2)
    assert loss.distillation is not None
    assert loss.distillation.item() == pytest.approx(weight * temperature**2 * term)
    assert loss.cross_entropy.item() == pytest.approx(math.log(6)), "the labels' part is taken at T = 1"
    assert loss.total.item() == pytest.approx(math.log(6) + weight * temperature**2 * term)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("student", range(K))
def test_dml_is_the_mean_over_the_pairs_in_value_and_gradient(student: int, temperature: float) -> None:
    logits, labels = drawn(1, K, 16, C), labels_of(1, 16)
    own = logits[student].clone().requires_grad_()
    loss = loss_by(objective_of(Dml(temperature=temperature)), own, labels, peers(logits, student, temperature))
    loss.total.backward()

    exact = logits[student].double().requires_grad_()
    own_log = (exact / temperature).log_softmax(-1)
    pairs = [
        functional.kl_div(own_log, (logits[other].double() / temperature).softmax(-1), reduction="batchmean")
        for other in range(K)
        if other != student
    ]
    mutual = temperature**2 * torch.stack(pairs).mean()
    (functional.cross_entropy(exact, labels) + mutual).backward()
    assert loss.distillation is not None
    assert loss.distillation.item() == pytest.approx(mutual.item(), abs=1e-6)
    assert own.grad is not None
    assert exact.grad is not None
    assert torch.allclose(own.grad.double(), exact.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("student", range(K))
def test_a_dml_student_that_missed_a_round_has_the_loss_and_gradient_of_its_peers_logits(
    student: int, temperature: float
) -> None:
    """The server's targets for who was absent, against the pairs in float64."""
    names, labels = ("a", "b", "c"), labels_of(1, 16)
    logits, settings = drawn(1, K, 16, C), Dml(temperature=temperature, weight=0.7)
    others = [place for place in range(K) if place != student]
    aggregator = server_methods.create(settings)
    assert aggregator is not None
    present = tuple(names[other] for other in others)
    made = aggregator.targets(RoundInputs(present, {"logits": logits[others]}, labels, include_missing=True))
    assert made.shared is not None

    own = logits[student].clone().requires_grad_()
    loss = loss_by(objective_of(settings), own, labels, made.shared)
    exact = logits[student].double().requires_grad_()
    own_log = exact / temperature - (exact / temperature).logsumexp(-1, keepdim=True)
    pairs: list[torch.Tensor] = []
    for other in others:
        p = (logits[other].double() / temperature).exp()
        p = p / p.sum(-1, keepdim=True)
        pairs.append((p * (p.log() - own_log)).sum(-1).mean())
    mutual = 0.7 * temperature**2 * sum(pairs, torch.zeros(())) / len(pairs)
    assert loss.distillation is not None
    assert loss.distillation.item() == pytest.approx(mutual.item(), rel=1e-5)
    (ours,) = torch.autograd.grad(loss.total, own)
    (theirs,) = torch.autograd.grad(functional.cross_entropy(exact, labels) + mutual, exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dml_targets_that_half_precision_has_rounded_still_sum_to_one(dtype: torch.dtype) -> None:
    """Where the student has the very probabilities that it is to mimic, nothing pulls it away from them."""
    many = 5000  # classes: what is rounded adds up
    logits = torch.zeros(1, many, dtype=torch.float64)
    rounded = (torch.full((1, many), 1 / many)).to(dtype)
    assert abs(rounded.double().sum().item() - 1) > 1e-4, "else this shows nothing"
    own = logits.float().requires_grad_()
    loss = loss_by(
        objective_of(Dml()), own, torch.tensor([0]), {"probabilities": rounded, "divergence": torch.zeros(1)}
    )
    assert loss.distillation is not None
    assert loss.distillation.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_against_finite_differences(method: str) -> None:
    logits, labels = drawn(2, B, C).double().requires_grad_(), labels_of(2)
    given = {name: value.double() for name, value in targets(METHODS[method]).items()}
    objective = objective_of(METHODS[method])
    assert torch.autograd.gradcheck(lambda z: loss_by(objective, z, labels, given).total, (logits,))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_square_of_the_temperature_keeps_the_gradient_at_the_difference_of_logits(temperature: float) -> None:
    """For small logits T²·KL has the gradient (z − t)/C per row whatever T is (Hinton et al. 2015, section 2.1)."""
    own = (drawn(3, B, C, scale=1e-3)).requires_grad_()
    target = drawn(4, B, C, scale=1e-3)
    objective, labels = objective_of(Kdcl(temperature=temperature)), labels_of(3)
    (loss_by(objective, own, labels, {"logits": target}).total - functional.cross_entropy(own, labels)).backward()
    centred = (own - target) - (own - target).mean(-1, keepdim=True)
    assert own.grad is not None
    assert torch.allclose(own.grad, centred.detach() / C / B, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_finite_and_exact_at_extreme_logits(method: str) -> None:
    extreme = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, 1e4, 1e4, -1e4], [1e4, 1e4, 1e4, 1e4]])
    labels = torch.tensor([1, 0, 2])
    given = targets(METHODS[method])
    if "logits" in given:
        given = {"logits": -extreme}
    elif given:
        given = peers(torch.stack([extreme, drawn(1, B, C), drawn(2, B, C)]), 0)
    own = extreme.clone().requires_grad_()
    loss = loss_of(METHODS[method], own, labels, given)
    loss.total.backward()
    exact = loss_of(METHODS[method], extreme.double(), labels, given).total
    assert torch.isfinite(loss.total)
    assert own.grad is not None
    assert torch.isfinite(own.grad).all()
    assert loss.total.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 1000), shift=st.floats(-100, 100))
@settings(max_examples=20)
def test_a_constant_added_to_a_row_changes_nothing(method: str, seed: int, shift: float) -> None:
    logits, labels = drawn(seed, B, C), labels_of(seed)
    given = targets(METHODS[method], seed + 1)
    shifts = torch.tensor([[shift], [0.0], [-shift]])
    moved = {name: value + shifts if name == "logits" else value for name, value in given.items()}
    before = loss_of(METHODS[method], logits, labels, given)
    after = loss_of(METHODS[method], logits + shifts, labels, moved)
    assert after.total.item() == pytest.approx(before.total.item(), abs=2e-4)


@pytest.mark.parametrize("method", DISTILLING)
def test_identical_students_have_nothing_to_learn_from_each_other(method: str) -> None:
    settings = DISTILLING[method]
    logits, labels = drawn(6, B, C), labels_of(6)
    given = (
        {"logits": logits} if isinstance(settings, Kdcl) else peers(logits.expand(K, B, C), 1, settings.temperature)  # type: ignore[union-attr]
    )
    own = logits.clone().requires_grad_()
    loss = loss_of(settings, own, labels, given)
    assert loss.distillation is not None
    assert loss.distillation.item() == pytest.approx(0, abs=1e-5)
    (loss.total - functional.cross_entropy(own, labels)).backward()
    assert own.grad is not None
    assert own.grad.abs().max() < 1e-6


@pytest.mark.parametrize("method", DISTILLING)
def test_no_gradient_flows_into_the_targets(method: str) -> None:
    given = {name: value.requires_grad_() for name, value in targets(DISTILLING[method]).items()}
    own = drawn(7, B, C).requires_grad_()
    loss_of(DISTILLING[method], own, labels_of(7), given).total.backward()
    assert own.grad is not None
    assert all(value.grad is None for value in given.values())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_reported_adds_up_and_carries_no_gradient(method: str) -> None:
    own, labels = drawn(8, B, C).requires_grad_(), labels_of(8)
    loss = loss_of(METHODS[method], own, labels)
    assert loss.total.requires_grad
    assert not loss.cross_entropy.requires_grad
    assert loss.cross_entropy.item() == pytest.approx(functional.cross_entropy(own, labels).item())
    if loss.distillation is None:
        assert not METHODS[method].exchanges
        return
    assert not loss.distillation.requires_grad
    assert loss.distillation >= 0
    if isinstance(METHODS[method], Kdcl):  # DML's has a constant in it that is not minimised
        assert (loss.cross_entropy + loss.distillation).item() == pytest.approx(loss.total.item())


@pytest.mark.parametrize("method", METHODS)
def test_repeating_the_batch_changes_nothing(method: str) -> None:
    """All terms are means over rows: a sum, or a mean over classes, in one of them would change their proportion."""
    logits, labels, given = drawn(9, B, C), labels_of(9), targets(METHODS[method])
    once = loss_of(METHODS[method], logits, labels, given)
    twice = loss_of(
        METHODS[method],
        logits.repeat(2, 1),
        labels.repeat(2),
        {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in given.items()},
    )
    assert twice.total.item() == pytest.approx(once.total.item(), rel=1e-5)


def test_targets_in_half_precision_are_computed_with_in_float32() -> None:
    logits, labels, target = drawn(10, B, C), labels_of(10), drawn(11, B, C).half()
    half, full = (loss_of(Kdcl(), logits, labels, {"logits": value}).total for value in (target, target.float()))
    assert half.dtype is torch.float32
    assert torch.equal(half, full)


def test_objectives_are_chosen_by_the_method() -> None:
    def traits(objective: Objective) -> tuple[bool, bool]:
        return bool(objective.publishes), objective.measures_held_out

    assert traits(objective_of(Independent())) == (False, False)
    assert traits(objective_of(Dml())) == (True, False)
    assert traits(objective_of(Kdcl(ensemble="linear"))) == (True, False)
    assert traits(objective_of(Kdcl(ensemble="general"))) == (True, True)
