"""A user's own objective: its results are checked, and its errors name the experiment's field."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from codistill.config.methods import Custom
from codistill.methods import Objective, Step, StudentContext
from codistill.process.plugins import LoadError
from codistill_worker.errors import ConfigurationError
from codistill_worker.methods import create

MODULE = """
import torch
from codistill.methods import LogitsObjective, Loss
from codistill_worker.methods import losses

ANSWERS = {
    "good": lambda z, loss: Loss(loss, loss.detach()),
    "nothing": lambda z, loss: None,
    "rows": lambda z, loss: Loss(z.sum(-1), loss.detach()),
    "constant": lambda z, loss: Loss(loss.detach(), loss.detach()),
    "error": lambda z, loss: z + torch.ones(7),
    "memory": lambda z, loss: exhausted(),
    "exit": lambda z, loss: exit(0),
}

def exhausted():
    raise MemoryError

class Own(LogitsObjective):
    publishes = ("logits",)
    def __init__(self, context, answer):
        super().__init__(context)
        self.extra, self.answer = torch.nn.Linear(1, 1), ANSWERS[answer]
    def loss(self, step):
        return self.answer(step.outputs["logits"], losses.cross_entropy(step.outputs["logits"], step.labels))
"""
STEP = Step({"logits": torch.zeros(2, 3, requires_grad=True)}, torch.tensor([0, 1]))


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_objective.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def objective(answer: str) -> Objective:
    settings = Custom(server="a:b", worker="custom_objective:Own", parameters={"answer": answer})
    return create(settings, StudentContext("a", nn.Identity(), {"classes": 3, "channels": 1, "size": 8}, dict))


def test_it_is_what_the_user_wrote() -> None:
    made = objective("good")
    assert made.publishes == ("logits",)
    assert not made.measures_held_out
    assert len(list(made.extra.parameters())) == 2
    assert made.loss(STEP).total.item() == pytest.approx(torch.tensor(3.0).log().item())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("nothing", "loss returned NoneType; expected codistill.methods.Loss"),
        ("rows", "the loss's total has shape [2]; expected a scalar that depends on the outputs"),
        ("constant", "the loss's total has no gradient; expected a scalar that depends on the outputs"),
    ],
)
def test_what_cannot_be_minimised_names_the_field(answer: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        objective(answer).loss(STEP)
    assert str(caught.value) == f"distillation.worker: 'custom_objective:Own': {message}"


def test_an_error_of_its_own_names_the_field_and_the_line() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^distillation\.worker: .*Own': RuntimeError at .*custom_objective\.py:11: The size"
    ):
        objective("error").loss(STEP)


def test_an_end_of_the_process_is_an_error_of_its_own() -> None:
    with pytest.raises(
        LoadError, match=r"^distillation\.worker: .*Own': it ended the process \(SystemExit: 0 at .*\.py:13\)"
    ):
        objective("exit").loss(STEP)


def test_out_of_memory_is_no_mistake_of_the_experiment() -> None:
    with pytest.raises(MemoryError):
        objective("memory").loss(STEP)
