from __future__ import annotations

from typing import Any

import pytest
import torch

from codistill.config.methods import Fddml, Hddml
from codistill.methods.aggregator import NOTHING, RoundInputs
from server.methods.support import LABELS, PAIR, B, C, aggregator_of, drawn


@pytest.mark.parametrize(("settings", "with_teacher"), [(Fddml(), PAIR), (Hddml(), ("bee",))])
def test_two_students_and_whom_the_teacher_teaches(settings: Any, with_teacher: tuple[str, ...]) -> None:
    logits, outputs = drawn(3, 2, B, C), {"logits": drawn(4, B, C)}
    made = aggregator_of(settings).targets(RoundInputs(PAIR, {"logits": logits}, LABELS, teachers={"old": outputs}))
    assert made.each is not None
    for position, student in enumerate(PAIR):
        peer = logits[1 - position].softmax(-1)
        torch.testing.assert_close(made.each[student]["probabilities"], peer)
        assert ("logits" in made.each[student]) is (student in with_teacher)
        assert made.each[student].get("logits", outputs["logits"]) is outputs["logits"]


@pytest.mark.parametrize("arrived", [("ant", "bee"), ("bee", "ant")])
def test_the_half_that_is_taught_is_the_second_student_of_the_experiment(arrived: tuple[str, str]) -> None:
    """The survey's eq. 16: the teacher guides the second student, and the first learns from its peer alone."""
    logits, teacher = {"ant": torch.zeros(B, C), "bee": torch.ones(B, C)}, {"logits": drawn(4, B, C)}
    stacked = torch.stack([logits[student] for student in arrived])
    made = aggregator_of(Hddml()).targets(RoundInputs(arrived, {"logits": stacked}, LABELS, teachers={"old": teacher}))
    assert made.each is not None
    assert set(made.each["ant"]) == {"probabilities"}
    assert set(made.each["bee"]) == {"probabilities", "logits"}


def test_two_students_without_their_teacher_have_each_other_and_one_alone_has_nothing() -> None:
    logits = drawn(3, 2, B, C)
    made = aggregator_of(Fddml()).targets(RoundInputs(PAIR, {"logits": logits}, LABELS))
    assert made.each is not None
    assert [set(each) for each in made.each.values()] == [{"probabilities"}] * 2
    alone = RoundInputs(("bee",), {"logits": logits[:1]}, LABELS, teachers={"old": {"logits": logits[0]}})
    assert aggregator_of(Fddml()).targets(alone) == NOTHING
