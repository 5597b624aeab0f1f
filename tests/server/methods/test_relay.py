"""Targets from one teacher."""

from __future__ import annotations

from codistill.config.methods import Kd, RkdAngle, Vid
from codistill.methods.aggregator import EMBEDDING, FEATURES, NOTHING, RoundInputs, Targets
from server.methods.support import LABELS, PAIR, B, C, aggregator_of, drawn


def test_one_teachers_outputs_are_for_all() -> None:
    outputs = {"logits": drawn(1, B, C)}
    made = aggregator_of(Kd()).targets(RoundInputs(PAIR, {}, LABELS, teachers={"old": outputs}))
    assert made == Targets(shared=outputs)


def test_without_the_teacher_there_is_nothing() -> None:
    assert aggregator_of(Kd()).targets(RoundInputs(PAIR, {}, LABELS)) == NOTHING


def test_what_teachers_publish() -> None:
    assert aggregator_of(Vid(stages=3)).teacher == {f"features/{number}": FEATURES for number in (1, 2, 3)}
    assert aggregator_of(RkdAngle()).teacher == {"embedding": EMBEDDING}
    assert aggregator_of(Kd()).student == {}
