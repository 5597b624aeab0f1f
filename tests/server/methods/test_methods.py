from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from codistill.config.methods import Distillation, Dml, Independent, Kdcl
from codistill_server import ensembles, methods
from codistill_server.methods import RoundInputs

STUDENTS = ("ant", "bee", "cat")
EXCHANGING = [
    Dml(),
    Dml(temperature=3.0),
    Kdcl(ensemble="naive"),
    Kdcl(ensemble="linear"),
    Kdcl(ensemble="min_logit"),
    Kdcl(ensemble="general"),
]


def gathered(logits: Tensor, labels: list[int], **more: object) -> RoundInputs:
    return RoundInputs(STUDENTS[: len(logits)], {"logits": logits}, torch.tensor(labels), **more)  # type: ignore[arg-type]


def targets(distillation: Distillation, what: RoundInputs) -> methods.Targets:
    half = methods.create(distillation)
    assert half is not None
    return half.targets(what)


def shared(distillation: Distillation, what: RoundInputs) -> Tensor:
    made = targets(distillation, what)
    assert made.each is None
    assert made.shared is not None
    assert set(made.shared) == {"logits"}
    return made.shared["logits"]


def test_independent_has_no_server_half() -> None:
    assert methods.create(Independent()) is None


def test_only_linear_is_heavy() -> None:
    heavy = [each for each in EXCHANGING if (half := methods.create(each)) is not None and half.heavy]
    assert heavy == [Kdcl(ensemble="linear")]


class TestKdcl:
    # Sample 0 is of class 0, where the second student is surer; sample 1 of class 1, where the first is.
    LOGITS = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 1.5]]])

    def test_naive_takes_each_samples_best_student(self) -> None:
        target = shared(Kdcl(ensemble="naive"), gathered(self.LOGITS, [0, 1]))
        assert target.tolist() == [[3.0, 0.0], [0.0, 2.0]]

    def test_min_logit_takes_the_least_margins(self) -> None:
        target = shared(Kdcl(ensemble="min_logit"), gathered(self.LOGITS, [0, 1]))
        assert target.tolist() == [[0.0, -3.0], [-2.0, 0.0]]

    def test_linear_weighs_the_students_per_sample(self) -> None:
        # With two classes the best combination is the surer student alone, so here it is naive's.
        target = shared(Kdcl(ensemble="linear"), gathered(self.LOGITS, [0, 1]))
        expected = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).softmax(-1)
        torch.testing.assert_close(target.softmax(-1), expected, atol=1e-5, rtol=0)

    def test_linear_finds_a_combination_between_students(self) -> None:
        # By symmetry the best of αz1 + (1−α)z2 for class 0 is the middle: [0, −1, −1].
        target = shared(Kdcl(ensemble="linear"), gathered(torch.tensor([[[0.0, 0.0, -2.0]], [[0.0, -2.0, 0.0]]]), [0]))
        torch.testing.assert_close(target.softmax(-1), torch.tensor([[0.0, -1.0, -1.0]]).softmax(-1), atol=1e-3, rtol=0)

    @pytest.mark.parametrize("ensemble", ["naive", "linear", "min_logit"])
    def test_there_is_no_state(self, ensemble: str) -> None:
        assert targets(Kdcl.model_validate({"ensemble": ensemble}), gathered(self.LOGITS, [0, 1])).state == {}


class TestGeneral:
    METHOD = Kdcl(ensemble="general")
    LOGITS = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    HELD_OUT = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(2))
    HELD_OUT_LABELS = torch.arange(20) % 5

    def measured(self) -> methods.Targets:
        held_out = {"held_out": {"logits": self.HELD_OUT}, "held_out_labels": self.HELD_OUT_LABELS}
        return targets(self.METHOD, gathered(self.LOGITS, [0, 1, 2, 3], **held_out))

    def test_weights_are_uniform_before_the_first_epoch(self) -> None:
        made = targets(self.METHOD, gathered(self.LOGITS, [0, 1, 2, 3]))
        assert made.shared is not None
        torch.testing.assert_close(made.shared["logits"], self.LOGITS.mean(0))
        assert made.state == {}

    def weights_by_hand(self, *students: int) -> Tensor:
        probabilities, onehot = self.HELD_OUT.double().softmax(-1), torch.eye(5, dtype=torch.float64)
        errors = (probabilities - onehot[self.HELD_OUT_LABELS])[list(students)].reshape(len(students), -1)
        inverse = torch.linalg.inv(errors @ errors.T / 20)
        return inverse.sum(1) / inverse.sum()

    def test_weights_are_those_of_the_held_out_errors(self) -> None:
        made = self.measured()
        assert made.shared is not None
        expected = torch.einsum("k,kbc->bc", self.weights_by_hand(0, 1, 2), self.LOGITS.double())
        torch.testing.assert_close(made.shared["logits"].double(), expected, atol=1e-4, rtol=0)

    def test_the_errors_are_carried_from_round_to_round(self) -> None:
        first = self.measured()
        later = targets(self.METHOD, gathered(self.LOGITS, [0, 1, 2, 3], state=first.state))
        assert first.shared is not None
        assert later.shared is not None
        assert torch.equal(later.shared["logits"], first.shared["logits"]), "bit for bit: float32 is what is journalled"
        assert later.state == first.state
        assert [(key, value.dtype) for key, value in first.state.items()] == [("covariance/ant,bee,cat", torch.float32)]

    def test_a_new_measurement_takes_the_place_of_the_old_one(self) -> None:
        held_out = {"held_out": {"logits": self.HELD_OUT}, "held_out_labels": self.HELD_OUT_LABELS}
        old = {"covariance/ant,bee": torch.eye(2)}
        made = targets(self.METHOD, gathered(self.LOGITS, [0, 1, 2, 3], state=old, **held_out))
        assert list(made.state) == ["covariance/ant,bee,cat"]

    def test_without_an_absent_student_the_weights_are_those_of_the_others_errors(self) -> None:
        state = self.measured().state
        without_bee = RoundInputs(
            ("ant", "cat"), {"logits": self.LOGITS[[0, 2]]}, torch.tensor([0, 1, 2, 3]), state=state
        )
        expected = torch.einsum("k,kbc->bc", self.weights_by_hand(0, 2), self.LOGITS[[0, 2]].double())
        torch.testing.assert_close(shared(self.METHOD, without_bee).double(), expected, atol=1e-4, rtol=0)

    def test_a_student_that_was_not_measured_has_no_weight_unless_nobody_was(self) -> None:
        state = {"covariance/bee": torch.tensor([[0.5]])}
        target = shared(self.METHOD, gathered(self.LOGITS, [0, 1, 2, 3], state=state))
        torch.testing.assert_close(target, self.LOGITS[1])
        state = {"covariance/dog": torch.tensor([[0.5]])}
        target = shared(self.METHOD, gathered(self.LOGITS, [0, 1, 2, 3], state=state))
        torch.testing.assert_close(target, self.LOGITS.mean(0))


class TestDml:
    def test_of_two_each_gets_the_others_probabilities(self) -> None:
        logits = torch.tensor([[[0.0, math.log(3)]], [[math.log(4), 0.0]]])
        made = targets(Dml(), gathered(logits, [0]))
        assert made.shared is None
        assert made.each is not None
        assert list(made.each) == ["ant", "bee"]
        torch.testing.assert_close(made.each["ant"]["probabilities"], torch.tensor([[0.8, 0.2]]))
        torch.testing.assert_close(made.each["bee"]["probabilities"], torch.tensor([[0.25, 0.75]]))
        for arrays in made.each.values():
            torch.testing.assert_close(arrays["divergence"], torch.zeros(1), atol=1e-7, rtol=0)

    def test_of_three_each_gets_the_mean_of_the_others_and_their_divergence(self) -> None:
        probabilities = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.2, 0.8]])
        made = targets(Dml(), gathered(probabilities.log()[:, None, :], [0]))
        assert made.each is not None
        torch.testing.assert_close(made.each["ant"]["probabilities"], torch.tensor([[0.5, 0.5]]))
        torch.testing.assert_close(made.each["bee"]["probabilities"], torch.tensor([[0.35, 0.65]]))
        # Of 0.8/0.2 and 0.2/0.8 around ½/½.
        expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
        assert made.each["ant"]["divergence"].tolist() == pytest.approx([expected], rel=1e-5)

    def test_an_outsider_learns_from_all(self) -> None:
        probabilities = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
        made = targets(Dml(), gathered(probabilities.log()[:, None, :], [0], include_absent=True))
        assert made.shared is not None
        torch.testing.assert_close(made.shared["probabilities"], torch.tensor([[0.5, 0.5]]))
        expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
        assert made.shared["divergence"].tolist() == pytest.approx([expected], rel=1e-5)

    def test_temperature_softens_them(self) -> None:
        logits = torch.tensor([[[0.0, 0.0]], [[2 * math.log(4), 0.0]]])
        made = targets(Dml(temperature=2.0), gathered(logits, [0]))
        assert made.each is not None
        torch.testing.assert_close(made.each["ant"]["probabilities"], torch.tensor([[0.8, 0.2]]))


@pytest.mark.parametrize("method", EXCHANGING, ids=lambda method: f"{method.title}-{method.temperature}")
def test_students_may_come_in_any_order(method: Dml | Kdcl) -> None:
    logits = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(3))
    labels = [0, 1, 2, 3, 0, 1]
    held_out = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(4))
    order = [2, 0, 1]

    def of(positions: list[int]) -> dict[str, dict[str, Tensor]]:
        names = tuple(STUDENTS[position] for position in positions)
        what = RoundInputs(
            names,
            {"logits": logits[positions]},
            torch.tensor(labels),
            {"logits": held_out[positions]},
            torch.arange(9) % 4,
        )
        made = targets(method, what)
        return {name: dict(made.shared if made.shared is not None else (made.each or {})[name]) for name in names}

    straight, turned = of([0, 1, 2]), of(order)
    for name, arrays in straight.items():
        for key, value in arrays.items():
            one, other = value, turned[name][key]
            if key == "logits":
                one, other = one.softmax(-1), other.softmax(-1)
            torch.testing.assert_close(one, other, atol=2e-3 if method.title == "kdcl/linear" else 1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", EXCHANGING, ids=lambda method: f"{method.title}-{method.temperature}")
@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_targets_stay_finite_whatever_is_let_in(method: Dml | Kdcl, magnitude: float) -> None:
    """The coordinator lets in logits up to 1e30, the ensembles' limit."""
    signs = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(5)).sign()
    logits = signs * torch.nextafter(torch.tensor(magnitude), torch.tensor(0.0))
    made = targets(method, RoundInputs(STUDENTS, {"logits": logits}, torch.tensor([0, 1, 2, 3, 0, 1])))
    arrays = [made.shared] if made.shared is not None else list((made.each or {}).values())
    assert arrays
    for each in arrays:
        for name, value in each.items():
            assert bool(torch.isfinite(value).all()), name


def test_kdcl_answers_with_the_ensembles_bits() -> None:
    logits = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(6))
    labels = torch.arange(8) % 6
    what = RoundInputs(STUDENTS, {"logits": logits}, labels)
    for ensemble in (ensembles.naive, ensembles.linear, ensembles.min_logit):
        method = Kdcl.model_validate({"ensemble": ensemble.__name__})
        assert torch.equal(shared(method, what), ensemble(logits, labels))
