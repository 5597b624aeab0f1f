from __future__ import annotations

import math

import pytest
import torch

from codistill.config.methods import Dml
from server.methods.support import round_inputs, targets_of


class TestDml:
    def test_of_two_each_gets_the_others_probabilities(self) -> None:
        logits = torch.tensor([[[0.0, math.log(3)]], [[math.log(4), 0.0]]])
        made = targets_of(Dml(), round_inputs(logits, [0]))
        assert made.shared is None
        assert made.each is not None
        assert list(made.each) == ["ant", "bee"]
        torch.testing.assert_close(made.each["ant"]["probabilities"], torch.tensor([[0.8, 0.2]]))
        torch.testing.assert_close(made.each["bee"]["probabilities"], torch.tensor([[0.25, 0.75]]))
        for arrays in made.each.values():
            torch.testing.assert_close(arrays["divergence"], torch.zeros(1), atol=1e-7, rtol=0)

    def test_of_three_each_gets_the_mean_of_the_others_and_their_divergence(self) -> None:
        probabilities = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.2, 0.8]])
        made = targets_of(Dml(), round_inputs(probabilities.log()[:, None, :], [0]))
        assert made.each is not None
        torch.testing.assert_close(made.each["ant"]["probabilities"], torch.tensor([[0.5, 0.5]]))
        torch.testing.assert_close(made.each["bee"]["probabilities"], torch.tensor([[0.35, 0.65]]))
        # Of 0.8/0.2 and 0.2/0.8 around ½/½.
        expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
        assert made.each["ant"]["divergence"].tolist() == pytest.approx([expected], rel=1e-5)

    def test_a_missing_student_learns_from_all(self) -> None:
        probabilities = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
        made = targets_of(Dml(), round_inputs(probabilities.log()[:, None, :], [0], include_missing=True))
        assert made.shared is not None
        torch.testing.assert_close(made.shared["probabilities"], torch.tensor([[0.5, 0.5]]))
        expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
        assert made.shared["divergence"].tolist() == pytest.approx([expected], rel=1e-5)

    def test_a_missing_student_learns_from_all_at_the_methods_temperature(self) -> None:
        """Logits of 2·ln 4 and 0 are 0.8 and 0.2 at T = 2, and 16/17 and 1/17 at T = 1."""
        logits = torch.tensor([[[2 * math.log(4), 0.0]], [[0.0, 0.0]]])
        made = targets_of(Dml(temperature=2.0), round_inputs(logits, [0], include_missing=True))
        assert made.shared is not None
        torch.testing.assert_close(made.shared["probabilities"], torch.tensor([[0.65, 0.35]]))
        expected = (0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35)) / 2
        expected += 0.5 * (math.log(0.5 / 0.65) + math.log(0.5 / 0.35)) / 2
        assert made.shared["divergence"].tolist() == pytest.approx([expected], rel=1e-5)

    def test_temperature_softens_them(self) -> None:
        logits = torch.tensor([[[0.0, 0.0]], [[2 * math.log(4), 0.0]]])
        made = targets_of(Dml(temperature=2.0), round_inputs(logits, [0]))
        assert made.each is not None
        torch.testing.assert_close(made.each["ant"]["probabilities"], torch.tensor([[0.8, 0.2]]))
