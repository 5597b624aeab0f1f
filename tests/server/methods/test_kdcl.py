from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codistill.config.methods import KDCL_ENSEMBLES, Kdcl
from codistill.methods.aggregator import RoundInputs, Targets
from codistill_server import ensembles
from codistill_server.ensembles import kdcl
from server.methods.support import STUDENTS, drawn, round_inputs, shared_logits, targets_of


@pytest.mark.parametrize("name", KDCL_ENSEMBLES)
def test_every_row_of_the_settings_has_a_function_and_a_target(name: str) -> None:
    assert name in kdcl.__all__
    logits, held_out = drawn(1, 3, 4, 5), {"logits": drawn(2, 3, 20, 5)}
    measured = {"held_out": held_out, "held_out_labels": torch.arange(20) % 5}
    inputs = round_inputs(logits, [0, 1, 2, 3], **(measured if KDCL_ENSEMBLES[name].held_out else {}))
    target = shared_logits(Kdcl.model_validate({"ensemble": name}), inputs)
    assert target.shape == (4, 5)
    assert bool(torch.isfinite(target).all())


class TestKdcl:
    # Sample 0 is of class 0, where the second student is surer; sample 1 of class 1, where the first is.
    LOGITS = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 1.5]]])

    def test_naive_takes_each_samples_best_student(self) -> None:
        target = shared_logits(Kdcl(ensemble="naive"), round_inputs(self.LOGITS, [0, 1]))
        assert target.tolist() == [[3.0, 0.0], [0.0, 2.0]]

    def test_min_logit_takes_the_least_margins(self) -> None:
        target = shared_logits(Kdcl(ensemble="min_logit"), round_inputs(self.LOGITS, [0, 1]))
        assert target.tolist() == [[0.0, -3.0], [-2.0, 0.0]]

    def test_linear_weighs_the_students_per_sample(self) -> None:
        # With two classes the best combination is the surer student alone, so here it is naive's.
        target = shared_logits(Kdcl(ensemble="linear"), round_inputs(self.LOGITS, [0, 1]))
        expected = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).softmax(-1)
        torch.testing.assert_close(target.softmax(-1), expected, atol=1e-5, rtol=0)

    def test_linear_finds_a_combination_between_students(self) -> None:
        # By symmetry the best of αz1 + (1−α)z2 for class 0 is the middle: [0, −1, −1].
        target = shared_logits(
            Kdcl(ensemble="linear"), round_inputs(torch.tensor([[[0.0, 0.0, -2.0]], [[0.0, -2.0, 0.0]]]), [0])
        )
        torch.testing.assert_close(target.softmax(-1), torch.tensor([[0.0, -1.0, -1.0]]).softmax(-1), atol=1e-3, rtol=0)

    @pytest.mark.parametrize("ensemble", ["naive", "linear", "min_logit"])
    def test_there_is_no_state(self, ensemble: str) -> None:
        assert targets_of(Kdcl.model_validate({"ensemble": ensemble}), round_inputs(self.LOGITS, [0, 1])).state == {}


class TestGeneral:
    METHOD = Kdcl(ensemble="general")
    LOGITS = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    HELD_OUT = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(2))
    HELD_OUT_LABELS = torch.arange(20) % 5

    def measured(self) -> Targets:
        held_out = {"held_out": {"logits": self.HELD_OUT}, "held_out_labels": self.HELD_OUT_LABELS}
        return targets_of(self.METHOD, round_inputs(self.LOGITS, [0, 1, 2, 3], **held_out))

    def test_weights_are_uniform_before_the_first_epoch(self) -> None:
        made = targets_of(self.METHOD, round_inputs(self.LOGITS, [0, 1, 2, 3]))
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
        later = targets_of(self.METHOD, round_inputs(self.LOGITS, [0, 1, 2, 3], state=first.state))
        assert first.shared is not None
        assert later.shared is not None
        assert torch.equal(later.shared["logits"], first.shared["logits"]), "bit for bit: float32 is what is journalled"
        assert later.state == first.state
        assert [(key, value.dtype) for key, value in first.state.items()] == [("covariance/ant,bee,cat", torch.float32)]

    def test_a_new_measurement_takes_the_place_of_the_old_one(self) -> None:
        held_out = {"held_out": {"logits": self.HELD_OUT}, "held_out_labels": self.HELD_OUT_LABELS}
        old = {"covariance/ant,bee": torch.eye(2)}
        made = targets_of(self.METHOD, round_inputs(self.LOGITS, [0, 1, 2, 3], state=old, **held_out))
        assert list(made.state) == ["covariance/ant,bee,cat"]

    def test_without_a_missing_student_the_weights_are_those_of_the_others_errors(self) -> None:
        state = self.measured().state
        without_bee = RoundInputs(
            ("ant", "cat"), {"logits": self.LOGITS[[0, 2]]}, torch.tensor([0, 1, 2, 3]), state=state
        )
        expected = torch.einsum("k,kbc->bc", self.weights_by_hand(0, 2), self.LOGITS[[0, 2]].double())
        torch.testing.assert_close(shared_logits(self.METHOD, without_bee).double(), expected, atol=1e-4, rtol=0)

    def test_a_student_that_was_not_measured_has_no_weight_unless_nobody_was(self) -> None:
        state = {"covariance/bee": torch.tensor([[0.5]])}
        target = shared_logits(self.METHOD, round_inputs(self.LOGITS, [0, 1, 2, 3], state=state))
        torch.testing.assert_close(target, self.LOGITS[1])
        state = {"covariance/dog": torch.tensor([[0.5]])}
        target = shared_logits(self.METHOD, round_inputs(self.LOGITS, [0, 1, 2, 3], state=state))
        torch.testing.assert_close(target, self.LOGITS.mean(0))


def test_kdcl_answers_with_the_ensembles_bits() -> None:
    logits = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(6))
    labels = torch.arange(8) % 6
    inputs = RoundInputs(STUDENTS, {"logits": logits}, labels)
    for ensemble in (ensembles.naive, ensembles.linear, ensembles.min_logit):
        method = Kdcl.model_validate({"ensemble": ensemble.__name__})
        assert torch.equal(shared_logits(method, inputs), ensemble(logits, labels))
