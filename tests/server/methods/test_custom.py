from __future__ import annotations

from typing import Any

import pytest
import torch

from codistill.config.methods import Custom
from codistill.methods.aggregator import LOGITS, RoundInputs
from codistill.process.plugins import LoadError
from codistill_server import methods


class TestCustom:
    MODULE = """
import torch
from codistill.methods.aggregator import LOGITS, Targets

LOGITS_OF_NOBODY = torch.full((2, 3), torch.inf)
ANSWERS = {
    "good": lambda inputs: Targets(shared={"logits": inputs.outputs["logits"].mean(0)}),
    "nothing": lambda inputs: None,
    "list": lambda inputs: Targets(shared={"logits": [1, 2]}),
    "infinite": lambda inputs: Targets(shared={"logits": LOGITS_OF_NOBODY}),
    "state": lambda inputs: Targets(shared={}, state={"mean": LOGITS_OF_NOBODY}),
    "one": lambda inputs: Targets(each={"ant": {}}),
    "error": lambda inputs: inputs.outputs["logit"],
    "exit": lambda inputs: exit(0),
}

class Mean:
    heavy, student, teacher = False, {"logits": LOGITS}, {}
    def __init__(self, answer="good", rate=1):
        self.answer, self.rate = ANSWERS[answer], 1 / rate
    def targets(self, inputs):
        return self.answer(inputs)

def nothing():
    return 3
"""

    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "custom_aggregator.py").write_text(self.MODULE)
        monkeypatch.syspath_prepend(tmp_path)

    def load(self, name: str, **parameters: Any) -> Any:
        settings = Custom(server=f"custom_aggregator:{name}", worker="a:b", parameters=parameters)
        return methods.create(settings)

    def test_it_is_given_its_parameters_and_makes_the_targets(self) -> None:
        aggregator, inputs = self.load("Mean", answer="good", rate=4), self.round_inputs()
        assert (aggregator.heavy, aggregator.student, aggregator.teacher) == (False, {"logits": LOGITS}, {})
        assert torch.equal(aggregator.targets(inputs).shared["logits"], inputs.outputs["logits"].mean(0))

    def round_inputs(self) -> RoundInputs:
        return RoundInputs(("ant", "bee"), {"logits": torch.ones(2, 2, 3)}, torch.zeros(2, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ("nothing", "targets returned NoneType; expected codistill.methods.Targets"),
            ("list", "shared['logits'] is a list; expected a torch.Tensor"),
            ("infinite", "shared['logits'] has values that are not finite; nobody can learn from them"),
            ("state", "state['mean'] has values that are not finite; nobody can learn from them"),
            ("one", "there are targets for ant, and none for 'bee'; give it {} at least"),
        ],
    )
    def test_what_cannot_be_sent_names_the_aggregator(self, answer: str, message: str) -> None:
        with pytest.raises(LoadError) as caught:
            self.load("Mean", answer=answer).targets(self.round_inputs())
        assert str(caught.value) == f"distillation.server: 'custom_aggregator:Mean': {message}"

    def test_an_error_of_its_own_names_the_aggregator_and_the_line(self) -> None:
        with pytest.raises(
            LoadError,
            match=r"^distillation\.server: 'custom_aggregator:Mean': KeyError at .*aggregator\.py:13: 'logit'$",
        ):
            self.load("Mean", answer="error").targets(self.round_inputs())

    def test_an_end_of_the_process_is_an_error_of_its_own(self) -> None:
        with pytest.raises(
            LoadError, match=r"^distillation\.server: .*: it ended the process \(SystemExit: 0 at .*\.py:14\)"
        ):
            self.load("Mean", answer="exit").targets(self.round_inputs())

    @pytest.mark.parametrize(
        ("name", "parameters", "message"),
        [
            ("Maen", {}, r"distillation\.server: .* has no 'Maen'; did you mean 'Mean'\?"),
            ("Mean", {"rat": 1}, r"distillation\.parameters\.rat: .* has no such argument; accepted: answer, rate"),
            ("Mean", {"rate": 0}, r"distillation\.server: .*ZeroDivisionError at .*custom_aggregator\.py:20"),
            ("nothing", {}, r"returned int, which lacks heavy, student, teacher, targets; an aggregator has"),
        ],
    )
    def test_what_is_none_is_refused(self, name: str, parameters: dict[str, Any], message: str) -> None:
        with pytest.raises(LoadError, match=message):
            self.load(name, **parameters)
