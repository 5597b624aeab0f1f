"""The trial of a user's aggregator: its targets are those of one that was created anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from codistill.config.experiment import Experiment, parse
from codistill.process.plugins import LoadError
from codistill_server.methods.custom_trial import try_aggregator

MODULE = """
import random
import numpy as np, torch
from codistill.methods import LOGITS, Targets


class Mean:
    heavy, student, teacher = False, {"logits": LOGITS}, {}
    def __init__(self):
        self.count = 0
    def targets(self, inputs):
        self.count += 1
        return Targets(shared={"mine": self.of(inputs.outputs["logits"].mean(0), inputs)})
    def of(self, mean, inputs):
        return mean


class Counted(Mean):
    def of(self, mean, inputs):
        return mean * (1 + self.count % 3)


class CountedLater(Mean):
    def of(self, mean, inputs):
        return mean * (2 if self.count > 2 else 1)


class Entropy(Mean):
    def of(self, mean, inputs):
        return mean * float(np.random.default_rng().random())


SHARED = np.random.default_rng(0)


class Shared(Mean):
    def of(self, mean, inputs):
        return mean * float(SHARED.random())


class Own(Mean):
    def __init__(self):
        super().__init__()
        self.draws = random.Random(0)
    def of(self, mean, inputs):
        return mean * self.draws.random()


class Later(Own):
    def of(self, mean, inputs):
        return super().of(mean, inputs) if self.count > 9 else mean


class Seeded(Mean):
    def of(self, mean, inputs):
        return mean * random.random() * np.random.rand() * torch.rand(1)


class Kept(Mean):
    def targets(self, inputs):
        mean = inputs.outputs["logits"].mean(0)
        kept = mean + inputs.state.get("kept", 0)
        return Targets(each={name: {"mine": kept} for name in inputs.students}, state={"kept": kept})


class Fails(Mean):
    def of(self, mean, inputs):
        return mean.reshape(3, 3)
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "aggregators_to_try.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "aggregators_to_try", raising=False)

    def make(name: str) -> Experiment:
        distillation = {"method": "custom", "server": f"aggregators_to_try:{name}", "worker": "aggregators_to_try:Mean"}
        document: dict[str, Any] = {
            "name": "tiny",
            "data": {"dataset": "digits"},
            "training": {"epochs": 1, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.1}},
            "distillation": distillation,
            "students": [{"name": "a", "model": "mlp"}, {"name": "b", "model": "mlp"}],
        }
        return parse(yaml.safe_dump(document))

    return make


@pytest.mark.parametrize(
    ("name", "round_number"),
    [("Counted", 1), ("CountedLater", 2), ("Entropy", 0), ("Shared", 0), ("Own", 1)],
)
def test_targets_of_more_than_the_inputs_are_refused(name: str, round_number: int, experiment: Any) -> None:
    with pytest.raises(
        LoadError,
        match=rf"^distillation\.server: 'aggregators_to_try:{name}' made other targets 'mine' .* in round {round_number} ",
    ):
        try_aggregator(experiment(name))


def test_a_generator_for_later_rounds_is_refused(experiment: Any) -> None:
    with pytest.raises(
        LoadError, match=r"holds a generator .*: attribute 'aggregator\.draws' \(random\.Random\); draw"
    ):
        try_aggregator(experiment("Later"))


@pytest.mark.parametrize("name", ["Mean", "Seeded", "Kept", "Fails"])
def test_others_pass_and_draw_nothing_from_the_runs_generators(name: str, experiment: Any) -> None:
    before = torch.get_rng_state()
    try_aggregator(experiment(name))
    assert torch.equal(torch.get_rng_state(), before)
