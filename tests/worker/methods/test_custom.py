"""A user's own worker half: what it returns is looked at, and what it raises is told by the experiment's field."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from codistill.config.methods import Custom
from codistill_worker.errors import ConfigurationError
from codistill_worker.methods import Objective, Step, StudentContext, create

MODULE = """
import torch
from codistill_worker.methods import losses
from codistill_worker.methods import LogitsObjective, Loss

ANSWERS = {
    "good": lambda z, loss: Loss(loss, loss.detach()),
    "nothing": lambda z, loss: None,
    "rows": lambda z, loss: Loss(z.sum(-1), loss.detach()),
    "constant": lambda z, loss: Loss(loss.detach(), loss.detach()),
    "error": lambda z, loss: z + torch.ones(7),
    "memory": lambda z, loss: exhausted(),
}

def exhausted():
    raise MemoryError

class Half(LogitsObjective):
    publishes = ("logits",)
    def __init__(self, subject, answer):
        super().__init__(subject)
        self.extra, self.answer = torch.nn.Linear(1, 1), ANSWERS[answer]
    def loss(self, step):
        return self.answer(step.outputs["logits"], losses.cross_entropy(step.outputs["logits"], step.labels))
"""
STEP = Step({"logits": torch.zeros(2, 3, requires_grad=True)}, torch.tensor([0, 1]))


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_worker_half.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def half(answer: str) -> Objective:
    settings = Custom(server="a:b", worker="custom_worker_half:Half", parameters={"answer": answer})
    return create(settings, StudentContext("a", nn.Identity(), {"classes": 3, "channels": 1, "size": 8}, dict))


def test_it_is_what_the_user_wrote() -> None:
    made = half("good")
    assert made.publishes == ("logits",)
    assert not made.measures_held_out
    assert len(list(made.extra.parameters())) == 2
    assert made.loss(STEP).total.item() == pytest.approx(torch.tensor(3.0).log().item())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("nothing", "loss returned NoneType; expected codistill_worker.methods.Loss"),
        ("rows", "the loss's total has shape [2]; expected a scalar that depends on the outputs"),
        ("constant", "the loss's total has no gradient; expected a scalar that depends on the outputs"),
    ],
)
def test_what_cannot_be_minimised_names_the_half(answer: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        half(answer).loss(STEP)
    assert str(caught.value) == f"distillation.worker: 'custom_worker_half:Half': {message}"


def test_an_error_of_its_own_names_the_half_and_the_line() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^distillation\.worker: .*Half': RuntimeError at .*half\.py:11: The size"
    ):
        half("error").loss(STEP)


def test_out_of_memory_is_no_mistake_of_the_experiment() -> None:
    with pytest.raises(MemoryError):
        half("memory").loss(STEP)
