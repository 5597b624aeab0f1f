"""Targets from teachers, and from classifiers at several stages: who gets what, and what is done without somebody."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from codistill.config.methods import BornAgain, CrossArchitecture, Custom, Dcm, Fddml, Hddml, Kd, RkdAngle, Vid
from codistill.process.plugins import LoadError
from codistill_server import ensembles, methods
from codistill_server.ensembles import dense
from codistill_server.methods import LOGITS, Aggregator, Output, RoundInputs, Targets

STUDENTS, B, C = ("ant", "bee"), 4, 3
LABELS = torch.tensor([0, 1, 2, 0])


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half_of(settings: Any, teachers: tuple[str, ...] = ("old",)) -> Aggregator:
    half = methods.create(settings, STUDENTS, teachers)
    assert half is not None
    return half


def test_one_teachers_outputs_are_for_all() -> None:
    outputs = {"logits": drawn(1, B, C)}
    made = half_of(Kd()).targets(RoundInputs(STUDENTS, {}, LABELS, teachers={"old": outputs}))
    assert made == Targets(shared=outputs)


def test_without_the_teacher_there_is_nothing() -> None:
    assert half_of(Kd()).targets(RoundInputs(STUDENTS, {}, LABELS)) == methods.NOTHING


def test_what_teachers_publish() -> None:
    assert half_of(Vid(stages=3)).teacher == {f"features/{number}": methods.FEATURES for number in (1, 2, 3)}
    assert half_of(RkdAngle()).teacher == {"embedding": methods.EMBEDDING}
    assert half_of(Kd()).student == {}


def test_a_generation_is_taught_by_its_own() -> None:
    half = half_of(BornAgain(generations=1), ("ant.1", "bee.1"))
    first, second = {"logits": drawn(1, B, C)}, {"logits": drawn(2, B, C)}
    made = half.targets(RoundInputs(STUDENTS, {}, LABELS, teachers={"ant.1": first, "bee.1": second}))
    assert made.each == {"ant": first, "bee": second}
    made = half.targets(RoundInputs(("ant",), {}, LABELS, teachers={"bee.1": second}, include_absent=True))
    assert made.each == {"ant": {}, "bee": second}, "bee asks later, ant learns from the labels alone"


@pytest.mark.parametrize(("settings", "taught"), [(Fddml(), STUDENTS), (Hddml(), ("ant",))])
def test_two_students_and_whom_the_teacher_teaches(settings: Any, taught: tuple[str, ...]) -> None:
    logits, outputs = drawn(3, 2, B, C), {"logits": drawn(4, B, C)}
    made = half_of(settings).targets(RoundInputs(STUDENTS, {"logits": logits}, LABELS, teachers={"old": outputs}))
    assert made.each is not None
    for position, student in enumerate(STUDENTS):
        peer = logits[1 - position].softmax(-1)
        torch.testing.assert_close(made.each[student]["probabilities"], peer)
        assert ("logits" in made.each[student]) is (student in taught)
        assert made.each[student].get("logits", outputs["logits"]) is outputs["logits"]


def test_two_students_without_their_teacher_have_each_other_and_one_alone_has_nothing() -> None:
    logits = drawn(3, 2, B, C)
    made = half_of(Fddml()).targets(RoundInputs(STUDENTS, {"logits": logits}, LABELS))
    assert made.each is not None
    assert [set(each) for each in made.each.values()] == [{"probabilities"}] * 2
    alone = RoundInputs(("bee",), {"logits": logits[:1]}, LABELS, teachers={"old": {"logits": logits[0]}})
    assert half_of(Fddml()).targets(alone) == methods.NOTHING


class TestDcm:
    OUTPUTS = staticmethod(
        lambda count: {name: drawn(seed, count, B, C) for seed, name in enumerate(("logits/stage1", "logits"))}
    )

    def test_each_gets_its_peers_at_its_stage_and_at_the_others(self) -> None:
        half, outputs = half_of(Dcm(stages=1), ()), self.OUTPUTS(2)
        assert set(half.student) == {"logits/stage1", "logits"}
        made = half.targets(RoundInputs(STUDENTS, outputs, LABELS))
        assert made.each is not None
        assert made.shared is None
        for position, student in enumerate(STUDENTS):
            peer = 1 - position
            same = [outputs[name][peer].softmax(-1) for name in ("logits/stage1", "logits")]
            torch.testing.assert_close(made.each[student]["same"], torch.stack(same, 1))
            torch.testing.assert_close(made.each[student]["other"], torch.stack(same[::-1], 1))

    def test_who_asks_later_learns_from_all(self) -> None:
        outputs = self.OUTPUTS(2)
        made = half_of(Dcm(stages=1), ()).targets(RoundInputs(STUDENTS, outputs, LABELS, include_absent=True))
        expected, _ = dense.pooled_dense_probabilities(torch.stack([outputs["logits/stage1"], outputs["logits"]], 1))
        assert made.shared is not None
        assert torch.equal(made.shared["same"], expected.transpose(0, 1))

    def test_one_alone_has_no_peers(self) -> None:
        made = half_of(Dcm(stages=1), ()).targets(RoundInputs(("ant",), self.OUTPUTS(1), LABELS, include_absent=True))
        assert made.each == {"ant": {}}
        assert made.shared is not None
        assert set(made.shared) == {"same", "other"}


def test_cross_architecture_is_the_mean_of_all() -> None:
    logits = drawn(5, 2, B, C)
    made = half_of(CrossArchitecture(temperature=3), ()).targets(RoundInputs(STUDENTS, {"logits": logits}, LABELS))
    assert made.shared is not None
    assert torch.equal(made.shared["probabilities"], ensembles.mean_probabilities(logits, 3))


class TestOutput:
    def test_the_classes_are_exact_and_other_sizes_bounded(self) -> None:
        both = Output((None, 8))
        assert both.takes([3, 8], 3)
        assert both.takes([3, 1], 3)
        for dims in ([3, 9], [2, 8], [3, 0], [3], [3, 8, 1]):
            assert not both.takes(dims, 3)
        assert both.largest(3) == [3, 8]
        assert both.describe(3) == "[3, up to 8]"


class TestCustom:
    MODULE = """
import torch
from codistill_server.methods import LOGITS, Targets

LOGITS_OF_NOBODY = torch.full((2, 3), torch.inf)
ANSWERS = {
    "good": lambda gathered: Targets(shared={"logits": gathered.outputs["logits"].mean(0)}),
    "nothing": lambda gathered: None,
    "list": lambda gathered: Targets(shared={"logits": [1, 2]}),
    "infinite": lambda gathered: Targets(shared={"logits": LOGITS_OF_NOBODY}),
    "state": lambda gathered: Targets(shared={}, state={"mean": LOGITS_OF_NOBODY}),
    "one": lambda gathered: Targets(each={"ant": {}}),
    "error": lambda gathered: gathered.outputs["logit"],
}

class Half:
    heavy, student, teacher = False, {"logits": LOGITS}, {}
    def __init__(self, answer="good", rate=1):
        self.answer, self.rate = ANSWERS[answer], 1 / rate
    def targets(self, gathered):
        return self.answer(gathered)

def nothing():
    return 3
"""

    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "custom_server_half.py").write_text(self.MODULE)
        monkeypatch.syspath_prepend(tmp_path)

    def load(self, name: str, **parameters: Any) -> Any:
        settings = Custom(server=f"custom_server_half:{name}", worker="a:b", parameters=parameters)
        return methods.create(settings)

    def test_it_is_given_its_parameters_and_makes_the_targets(self) -> None:
        half, gathered = self.load("Half", answer="good", rate=4), self.gathered()
        assert (half.heavy, half.student, half.teacher) == (False, {"logits": LOGITS}, {})
        assert torch.equal(half.targets(gathered).shared["logits"], gathered.outputs["logits"].mean(0))

    def gathered(self) -> RoundInputs:
        return RoundInputs(("ant", "bee"), {"logits": torch.ones(2, 2, 3)}, torch.zeros(2, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ("nothing", "targets returned NoneType; expected codistill_server.methods.Targets"),
            ("list", "shared['logits'] is a list; expected a torch.Tensor"),
            ("infinite", "shared['logits'] has values that are not finite; nobody can learn from them"),
            ("state", "state['mean'] has values that are not finite; nobody can learn from them"),
            ("one", "there are targets for ant, and none for 'bee'; give it {} at least"),
        ],
    )
    def test_what_cannot_be_sent_names_the_half(self, answer: str, message: str) -> None:
        with pytest.raises(LoadError) as caught:
            self.load("Half", answer=answer).targets(self.gathered())
        assert str(caught.value) == f"distillation.server: 'custom_server_half:Half': {message}"

    def test_an_error_of_its_own_names_the_half_and_the_line(self) -> None:
        with pytest.raises(
            LoadError, match=r"^distillation\.server: 'custom_server_half:Half': KeyError at .*half\.py:13: 'logit'$"
        ):
            self.load("Half", answer="error").targets(self.gathered())

    @pytest.mark.parametrize(
        ("name", "parameters", "message"),
        [
            ("Hafl", {}, r"distillation\.server: .* has no 'Hafl'; did you mean 'Half'\?"),
            ("Half", {"rat": 1}, r"distillation\.parameters\.rat: .* has no such argument; accepted: answer, rate"),
            ("Half", {"rate": 0}, r"distillation\.server: .*ZeroDivisionError at .*custom_server_half\.py:19"),
            ("nothing", {}, r"returned int, which lacks heavy, student, teacher, targets; a server half has"),
        ],
    )
    def test_what_is_none_is_refused(self, name: str, parameters: dict[str, Any], message: str) -> None:
        with pytest.raises(LoadError, match=message):
            self.load(name, **parameters)
