"""The trial step: the errors that only training meets, and that a student which passes it can resume to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codistill.config.experiment import Experiment
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.plugins import LoadError
from codistill_worker.training.trial import try_training
from worker.support import CPU, Tiny, load

MODELS = """
import functools, itertools, os, random, sys, time, types
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self, classes, channels, size):
        super().__init__()
        self.layer = nn.Linear(channels * size * size, classes)
        self.setup()

    def setup(self):
        pass

    def forward(self, images):
        logits = self.layer(images.flatten(1))
        return self.trained(logits) if self.training else logits

    def trained(self, logits):
        return logits


class Tuple(Base):
    def trained(self, logits):
        return logits, logits


class Narrow(Base):
    def trained(self, logits):
        return logits[:, 1:]


class Raises(Base):
    def trained(self, logits):
        raise KeyError("dropped")  # the line


class Exits(Base):
    def trained(self, logits):
        sys.exit(0)  # the line


class Detached(Base):
    def trained(self, logits):
        return logits.detach()


class Frozen(Base):
    def setup(self):
        self.requires_grad_(False)


class Normalised(Base):
    def setup(self):
        self.norm = nn.BatchNorm1d(10)

    def trained(self, logits):
        return self.norm(logits)


class Counted(Base):
    steps = 0

    def trained(self, logits):
        self.steps += 1
        return logits

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


class Unsavable(Counted):
    def get_extra_state(self):
        raise RuntimeError("no state")  # the line


class Unrestorable(Counted):
    def get_extra_state(self):
        return torch.tensor(self.steps)

    def set_extra_state(self, state):
        raise RuntimeError("no way back")  # the line


class CountedAsTensor(Counted):
    def trained(self, logits):
        return super().trained(logits) / self.steps

    def get_extra_state(self):
        return torch.tensor(self.steps)

    def set_extra_state(self, state):
        self.steps = int(state)


class Unsaved(Base):
    def setup(self):
        self.register_buffer("running", torch.zeros(()), persistent=False)

    def trained(self, logits):
        self.running = 0.9 * self.running + 0.1 * logits.detach().mean()
        return logits


class UnsavedAttribute(Base):
    def setup(self):
        self.running = [torch.zeros(())]

    def trained(self, logits):
        self.running[0] = self.running[0] + logits.detach().mean()
        return logits


class UnsavedCounter(Base):
    steps = 0

    def trained(self, logits):
        self.steps += 1
        return logits / self.steps


class OwnGenerator(Base):
    def setup(self):
        self.draws = self.made()

    def made(self):
        return torch.Generator().manual_seed(0)

    def trained(self, logits):
        return logits * torch.rand((), generator=self.draws)


class OwnGeneratorOfNumpy(OwnGenerator):
    def made(self):
        return np.random.default_rng(0)

    def trained(self, logits):
        return logits * float(self.draws.random())


class OwnGeneratorOfPython(OwnGeneratorOfNumpy):
    def made(self):
        return random.Random(0)


class Entropy(Base):
    def trained(self, logits):
        return logits * float(np.random.default_rng().random())


class Global(Base):
    steps = [0]

    def trained(self, logits):
        Global.steps[0] += 1
        return logits / Global.steps[0]


class Constant(Base):
    def setup(self):
        self.register_buffer("positions", torch.arange(10.0), persistent=False)
        self.offsets = torch.ones(10)

    def trained(self, logits):
        return logits + self.positions + self.offsets


class Remembers(Base):
    def trained(self, logits):
        self.last = logits
        self.register_buffer("cached", torch.ones(10), persistent=False)
        return logits * self.cached


class Drawing(Base):
    def trained(self, logits):
        if random.random() < 0.5:
            logits = logits * np.random.rand()
        return nn.functional.dropout(logits, 0.5) + random.gauss(0, 1) + np.random.randn()


@dataclass
class Holder:
    draws: object = field(default_factory=lambda: random.Random(3))


class Slots:
    __slots__ = ("draws",)

    def __init__(self):
        self.draws = np.random.RandomState(3)


SHARED = np.random.default_rng(3)


class HeldDeep(Base):
    # It draws too late for a trial to see.
    def setup(self):
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.held = self.made()

    def made(self):
        return Holder()

    def trained(self, logits):
        self.steps += 1
        return logits * self.held.draws.random() if self.steps > 5 else logits


class HeldInSlots(HeldDeep):
    def made(self):
        return [{"it": Slots()}]


class HeldInNamespace(HeldDeep):
    def made(self):
        return types.SimpleNamespace(draws=torch.Generator())


class HeldByMethod(HeldDeep):
    def made(self):
        return functools.partial(random.Random(3).gauss, 0)


class HeldByClosure(HeldDeep):
    def made(self):
        draws = random.Random(3)
        return lambda: draws.random()


class HeldByHook(HeldDeep):
    def made(self):
        draws = random.Random(3)
        self.layer.register_forward_hook(lambda *_: draws.random() and None)


class HeldByModule(HeldDeep):
    def trained(self, logits):
        return logits * SHARED.random() if self.steps > 5 else logits


class Counts(Base):
    def setup(self):
        self.counts = itertools.count()

    def trained(self, logits):
        return logits * 1.5 if next(self.counts) > 6 else logits


class Yields(Counts):
    def setup(self):
        self.counts = (number for number in range(10**6))


class HiddenModule(Base):
    def setup(self):
        self.hidden = [nn.BatchNorm1d(10)]

    def trained(self, logits):
        return logits + 0 * self.hidden[0](logits)


class BuiltOfEntropy(Base):
    def setup(self):
        self.register_buffer("offset", torch.tensor(np.random.default_rng().random(10)).float())


class BuiltOfEntropyUnsaved(Base):
    def setup(self):
        self.offset = torch.tensor(np.random.default_rng().random(10)).float()


class MadeInForward(Base):
    def trained(self, logits):
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(10))
        return logits * self.scale


class RemadeInForward(Base):
    def setup(self):
        self.scale = nn.Parameter(torch.ones(10))

    def trained(self, logits):
        self.scale = nn.Parameter(torch.ones(10))
        return logits * self.scale


class ReshapedInForward(Base):
    def forward(self, images):
        self.register_buffer("mask", torch.ones(len(images), 1), persistent=self.persistent)
        return self.layer(images.flatten(1)) * self.mask

    persistent = True


class ReshapedUnsaved(ReshapedInForward):
    persistent = False


class Masked(Base):
    def forward(self, images):
        self.register_buffer("mask", (torch.rand(images.shape[1:]) > 0.2).float(), persistent=False)
        return self.layer((images * self.mask).flatten(1))


class Timed(Base):
    def setup(self):
        self.times, self.log = [], types.SimpleNamespace(calls=0)

    def trained(self, logits):
        self.last = time.time()
        self.times.append(time.perf_counter())
        self.log.calls += 1
        return logits


class Dummy(Base):
    def setup(self):
        self.scale = None
        self(torch.zeros(2, 64))

    def forward(self, images):
        if self.scale is None:
            self.scale = nn.Parameter(torch.ones(10))
        return super().forward(images) * self.scale


def sequential(classes, channels, size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes), nn.BatchNorm1d(classes))


class Spectral(Base):
    def setup(self):
        self.layer = nn.utils.parametrizations.spectral_norm(self.layer)
"""


@pytest.fixture(autouse=True)
def trial_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "trial_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "trial_models", raising=False)
    return tmp_path / "trial_models.py"


@pytest.fixture
def tried(tiny: Tiny) -> Callable[..., None]:
    def run(model: str, **changes: Any) -> None:
        students = [{"name": "b", "model": "mlp"}, {"name": "a", "model": model}]
        experiment: Experiment = tiny(**{"students": students, "distillation": {"method": "dml"}} | changes)
        plan = experiment.plan("a")
        try_training(experiment, plan, load(plan.data), CPU)

    return run


def line_of(path: Path, model: str) -> str:
    """Return FILE:LINE of the marked line of a model."""
    lines = path.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"class {model}("))
    marked = next(number for number, line in enumerate(lines[start:], start + 1) if "# the line" in line)
    return f"{path}:{marked}"


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("Tuple", "cannot train a step on a batch of 16: it gives a tuple as logits for 16 images"),
        ("Narrow", "cannot train a step on a batch of 16: it gives torch.float32 [16, 9] as logits for 16 images"),
        ("Detached", "cannot train a step on a batch of 16: it gives logits without a gradient while it trains"),
        ("Frozen", "has nothing to train"),
        ("Counted", "cannot be saved: '_extra_state' in its state_dict is a dict"),
        ("Unsaved", "buffer 'running' changes while it trains"),
        ("UnsavedAttribute", "attribute 'running' changes while it trains"),
        ("UnsavedCounter", "attribute 'steps' changes while it trains"),
        ("OwnGenerator", "attribute 'draws' (torch._C.Generator)"),
        ("OwnGeneratorOfNumpy", "attribute 'draws' (numpy.random._generator.Generator)"),
        ("OwnGeneratorOfPython", "attribute 'draws' (random.Random)"),
        ("HeldDeep", "attribute 'held.draws' (random.Random)"),
        ("HeldInSlots", "held[0]['it'].draws\" (numpy.random.mtrand.RandomState)"),
        ("HeldInNamespace", "attribute 'held.draws' (torch._C.Generator)"),
        ("HeldByMethod", "attribute 'held' (random.Random)"),
        ("HeldByClosure", "attribute 'held.draws' (random.Random)"),
        ("HeldByHook", "hook of 'layer"),
        ("HeldByModule", "global 'trial_models.SHARED' (numpy.random._generator.Generator)"),
        ("Counts", "attribute 'counts' changes while it trains"),
        ("Yields", "attribute 'counts' changes while it trains"),
        ("HiddenModule", "attribute 'hidden' changes while it trains"),
        ("BuiltOfEntropy", "begins with other numbers each time it is built: 'offset'; draw"),
        ("BuiltOfEntropyUnsaved", "begins with other numbers each time it is built: attribute 'offset'; draw"),
        ("MadeInForward", "makes, replaces or reshapes 'scale' in its forward pass"),
        ("RemadeInForward", "makes, replaces or reshapes 'scale' in its forward pass"),
        ("ReshapedInForward", "makes, replaces or reshapes 'mask' in its forward pass"),
        ("Entropy", "the same step from the same checkpoint gave other weights"),
        ("Global", "class attribute 'Global.steps' changes while it trains"),
    ],
)
def test_a_student_that_cannot_be_trained_or_resumed_is_refused(model: str, text: str, tried: Any) -> None:
    with pytest.raises(PeerError) as caught:
        tried(f"trial_models:{model}")
    assert caught.value.code is ExitCode.CONFIGURATION
    assert str(caught.value).startswith(f"students.1.model: 'trial_models:{model}' of student 'a' ")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("model", "kind", "text"),
    [
        ("Raises", "cannot train a step on a batch of 16: KeyError", "'dropped'"),
        ("Unsavable", "cannot train a step on a batch of 16: RuntimeError", "no state"),
        ("Unrestorable", "cannot be restored from its checkpoint: RuntimeError", "no way back"),
    ],
)
def test_an_error_of_a_users_code_names_its_line(
    model: str, kind: str, text: str, tried: Any, trial_models: Path
) -> None:
    with pytest.raises(PeerError) as caught:
        tried(f"trial_models:{model}")
    assert caught.value.code is ExitCode.CONFIGURATION
    place = line_of(trial_models, model)
    assert str(caught.value) == f"students.1.model: 'trial_models:{model}' of student 'a' {kind} at {place}: {text}"


def test_a_users_code_that_ends_the_process_is_named_too(tried: Any, trial_models: Path) -> None:
    with pytest.raises(LoadError) as caught:
        tried("trial_models:Exits")
    assert caught.value.code is ExitCode.CONFIGURATION
    where = "students.1.model: 'trial_models:Exits' of student 'a' cannot train a step on a batch of 16"
    place = line_of(trial_models, "Exits")
    assert str(caught.value).startswith(f"{where}: it ended the process (SystemExit: 0 at {place}); let it return")


def test_a_batch_of_one_with_batch_normalisation_is_refused(tried: Any) -> None:
    with pytest.raises(
        PeerError, match=r"'a' cannot train a step on a batch of 1: ValueError at .*models\.py:"
    ) as caught:
        tried("trial_models:Normalised", training__batch_size=1)
    assert caught.value.code is ExitCode.CONFIGURATION


def test_a_batch_of_one_names_the_field_and_the_users_file(tried: Any, trial_models: Path) -> None:
    with pytest.raises(PeerError, match=r"raise training\.batch_size$") as caught:
        tried("trial_models:sequential", training__batch_size=1)
    assert f"ValueError at {trial_models}:" in str(caught.value)


def test_counters_and_times_that_no_weight_depends_on_are_a_warning(tried: Any, caplog: Any) -> None:
    tried("trial_models:Timed")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(" changes while")[0] for line in warnings] == [
        "students.1.model: 'trial_models:Timed' of student 'a': attribute 'times', attribute 'log', attribute 'last'"
    ]


def test_outputs_in_evaluation_name_the_field_and_the_student(tried: Any, trial_models: Path) -> None:
    with trial_models.open("a") as file:
        file.write("\n\nclass Pairs(Base):\n    def forward(self, images):\n        return images, images\n")
    with pytest.raises(
        PeerError, match=r"^students\.1\.model: 'trial_models:Pairs' of student 'a' gives a tuple for 2"
    ):
        tried("trial_models:Pairs")


PASSING = ("Constant", "Remembers", "CountedAsTensor", "Drawing", "Spectral", "ReshapedUnsaved", "Masked", "Dummy")


@pytest.mark.parametrize(
    "model",
    [
        *(f"trial_models:{name}" for name in PASSING),
        *("cnn", "mlp", "vit", "resnet8", "torchvision:resnet18"),
    ],
)
def test_a_student_that_can_resume_passes(model: str, tried: Any) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    tried(model)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_student_that_diverges_is_left_to_the_run(tried: Any) -> None:
    tried("mlp", training__optimizer={"name": "sgd", "lr": 1e30})


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("of the GPU"), MemoryError(), RuntimeError("CUDA error: ECC")], ids=repr
)
def test_errors_of_the_device_are_not_the_students(
    error: BaseException, tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("codistill_worker.training.trainer.Trainer.begin", fail)
    with pytest.raises(type(error)) as caught:
        tried("mlp")
    assert caught.value is error


OBJECTIVE = """
from codistill.methods import LOGITS, LogitsObjective, Loss, Targets
from codistill_worker.methods import losses


class Server:
    heavy, student, teacher = False, {"logits": LOGITS}, {}

    def targets(self, inputs):
        return Targets(shared={"mine": inputs.outputs["logits"].mean(0)})


class Own(LogitsObjective):
    publishes = ("logits",)

    def __init__(self, context):
        super().__init__(context)
        self.center = 0

    def loss(self, step):
        self.center = self.center + step.targets["mine"].mean()
        total = losses.cross_entropy(step.outputs["logits"], step.labels) + self.center
        return Loss(total, total.detach())


class Stateless(Own):
    def loss(self, step):
        total = losses.cross_entropy(step.outputs["logits"], step.labels) + step.targets["mine"].mean()
        return Loss(total, total.detach())
"""


def test_the_state_of_a_users_method_is_tried_with_the_users_targets(tried: Any, tmp_path: Path) -> None:
    (tmp_path / "trial_objective.py").write_text(OBJECTIVE)
    custom = {"method": "custom", "server": "trial_objective:Server", "worker": "trial_objective:Stateless"}
    tried("mlp", distillation=custom)
    with pytest.raises(PeerError, match=r"attribute 'objective\.center' changes while it trains"):
        tried("mlp", distillation=custom | {"worker": "trial_objective:Own"})


@pytest.mark.parametrize(
    "method",
    [
        {"method": "independent"},
        {"method": "kdcl"},
        {"method": "dcm", "stages": 1},
        {"method": "cross_architecture", "every": 3, "start_epoch": 1},
    ],
    ids=str,
)
def test_every_kind_of_method_has_targets_to_try(method: Any, tried: Any) -> None:
    tried("cnn", distillation=method)
