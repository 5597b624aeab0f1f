"""One student's step: its two parts, what it depends on and what it does not."""

from __future__ import annotations

import math
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from codistill.methods import Loss, Step
from codistill_worker.data import augmentation
from codistill_worker.training import trainer as trainer_module
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore
from codistill_worker.training.trainer import Trainer
from worker.support import STUDENTS, Answer, MakeStudent, Same, State, Tiny, Train, load


class Frozen(nn.Module):
    """A model of a user's that keeps its batch statistics as they are while it trains."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels * size * size, classes)
        self.norm = nn.BatchNorm1d(classes)
        self.modes: list[tuple[bool, bool]] = []

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.modes.append((self.training, self.norm.training))
        return self.norm(self.layer(images.flatten(1)))


class Masks(nn.Module):
    """Answers with what dropout lets through, whatever the images are."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.ones = nn.Parameter(torch.ones(classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.ones.expand(len(images), -1), 0.5, self.training)


class Drawing(nn.Module):
    """Draws from Python's and NumPy's generators, while it trains and while it is evaluated."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels * size * size, classes)
        self.scale = random.random(), np.random.rand()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(images.flatten(1))
        return logits * (random.random() + self.scale[0]) + (np.random.randn() + self.scale[1]) * images.mean()


class Pixels(nn.Module):
    """Answers with the middle rows of the images."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, 24 : 24 + len(self.scale)] * self.scale


@pytest.fixture(autouse=True)
def odd_models(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("odd_models")
    for model in (Masks, Pixels, Drawing):
        setattr(module, model.__name__, model)
    monkeypatch.setitem(sys.modules, "odd_models", module)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the two parts


def test_what_is_published(tiny: Tiny, student: MakeStudent, load_data: Any) -> None:
    experiment = tiny()
    trainer = student(experiment)
    published = trainer.begin()
    assert published is not None
    assert (published.step, published.held_out) == (0, None)
    batch = published.batch
    assert (batch.ids.dtype, batch.labels.dtype, batch.arrays["logits"].dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )
    assert batch.arrays["logits"].shape == (16, 10)
    assert not batch.arrays["logits"].requires_grad
    assert torch.equal(batch.labels, load_data(experiment.data).train.labels[batch.ids])


def test_an_epoch_visits_every_sample_once_and_all_students_alike(
    tiny: Tiny, student: MakeStudent, targets_for: Answer
) -> None:
    experiment = tiny()
    visited: dict[str, list[int]] = {}
    for name in STUDENTS:
        trainer = student(experiment, name)
        visited[name] = []
        for _ in range(trainer.steps_per_epoch):
            published = trainer.begin()
            assert published is not None
            visited[name] += published.batch.ids.tolist()
            trainer.finish(targets_for(published))
    assert visited["cnn"] == visited["mlp"]
    assert sorted(visited["cnn"]) == list(range(48))


def test_the_step_by_hand(tiny: Tiny, student: MakeStudent) -> None:
    """Plain SGD on a linear layer: w − lr·∂loss/∂w, with the loss written out."""
    experiment = tiny(
        training__optimizer={"name": "sgd", "lr": 0.1, "momentum": 0, "weight_decay": 0.01},
        training__schedule={"name": "constant"},
        distillation={"method": "kdcl", "temperature": 2, "weight": 0.5},
        data__augment={},
        students=[
            {"name": "a", "model": "mlp", "model_args": {"depth": 1, "hidden": 8}},
            {"name": "b", "model": "mlp"},
        ],
    )
    trainer = student(experiment, "a")
    published = trainer.begin()
    assert published is not None
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    target = torch.linspace(-1, 1, 160).view(16, 10)
    dataset = trainer._dataset
    images = augmentation.normalise(dataset.train.images(published.batch.ids), dataset.mean, dataset.std)
    weights = {name: value.clone().double().requires_grad_() for name, value in before.items()}
    hidden = (images.flatten(1).double() @ weights["1.weight"].T + weights["1.bias"]).relu()
    logits = hidden @ weights["4.weight"].T + weights["4.bias"]
    log_p, teacher = logits.log_softmax(-1), (target.double() / 2).softmax(-1)
    cross_entropy = -log_p.gather(1, published.batch.labels[:, None]).mean()
    kl = (teacher * (teacher.log() - (logits / 2).log_softmax(-1))).sum() / 16
    (cross_entropy + 0.5 * 4 * kl).backward()

    step = trainer.finish({"logits": target})
    for name, value in trainer.model.named_parameters():
        gradient = weights[name].grad
        assert gradient is not None
        expected = before[name].double() - 0.1 * (gradient + 0.01 * before[name].double())
        assert torch.allclose(value.detach().double(), expected, atol=1e-6), name
    assert step.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert step.distillation is not None
    assert step.distillation.item() == pytest.approx(0.5 * 4 * kl.item(), rel=1e-4)
    assert int(step.correct) == int((published.batch.arrays["logits"].argmax(-1) == published.batch.labels).sum())
    assert step.samples == 16
    assert trainer.step == 1


def test_a_step_without_targets_is_learnt_from_the_labels_alone(
    tiny: Tiny, student: MakeStudent, state: State, same: Same
) -> None:
    together = student(tiny(distillation={"method": "kdcl"}), "cnn")
    alone = student(tiny(distillation={"method": "independent"}), "cnn")
    for trainer in (together, alone):
        for _ in range(3):
            trainer.begin()
            step = trainer.finish({})
            assert step.distillation is None
    assert same(state(together), state(alone))


def test_one_forward_pass_a_step(tiny: Tiny, student: MakeStudent, train: Train) -> None:
    """Whatever the number of students: KD_Lib's DML ran 2K² a step."""
    trainer = student(tiny())
    calls: list[int] = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    train(trainer, 4)
    assert len(calls) == 4


def test_begin_and_finish_come_in_turn(tiny: Tiny, student: MakeStudent) -> None:
    trainer = student(tiny())
    with pytest.raises(RuntimeError, match="no step is begun"):
        trainer.finish({})
    trainer.abandon()  # nothing to undo
    trainer.begin()
    with pytest.raises(RuntimeError, match="step 0 is begun already; finish or abandon it"):
        trainer.begin()


def test_a_method_without_an_exchange_publishes_nothing(tiny: Tiny, student: MakeStudent) -> None:
    trainer = student(tiny(distillation={"method": "independent", "label_smoothing": 0.1}))
    assert not trainer.exchanges
    assert trainer.begin() is None
    step = trainer.finish({})
    assert step.distillation is None
    assert trainer.step == 1


def test_a_model_that_keeps_a_part_in_evaluation_mode_trains_so_from_the_first_step_on(
    tiny: Tiny, student: MakeStudent, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "frozen_model", types.ModuleType("frozen_model"))
    sys.modules["frozen_model"].net = Frozen  # pyright: ignore[reportAttributeAccessIssue]
    trainer = student(
        tiny(students=[{"name": "a", "model": "frozen_model:net"}, {"name": "b", "model": "mlp"}]), name="a"
    )
    assert isinstance(trainer.model, Frozen)
    trainer.model.modes.clear()
    train(trainer, 2)
    assert trainer.model.modes == [(True, False)] * 2


def test_the_mode_is_set_only_after_something_changed_it(
    tiny: Tiny, student: MakeStudent, train: Train, load_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny()
    trainer = student(experiment)
    train(trainer, 1)
    calls: list[bool] = []
    own = type(trainer.model).train

    def counted(model: nn.Module, mode: bool = True) -> nn.Module:
        calls.append(mode)
        return own(model, mode)

    monkeypatch.setattr(type(trainer.model), "train", counted)
    train(trainer, 2)
    assert not calls
    trainer.evaluate(load_data(experiment.data).test)
    calls.clear()
    train(trainer, 1)
    assert True in calls
    assert all(module.training for module in trainer.model.modules())


# --- abandoning


@pytest.mark.parametrize("name", STUDENTS)
def test_an_abandoned_step_leaves_no_trace(
    name: str, tiny: Tiny, student: MakeStudent, train: Train, state: State, same: Same, targets_for: Answer
) -> None:
    experiment = tiny()
    disturbed, undisturbed = student(experiment, name), student(experiment, name)
    train(disturbed, 2)
    train(undisturbed, 2)
    before = state(disturbed)
    first = disturbed.begin()
    assert first is not None
    if name == "cnn":
        assert not same(state(disturbed), before), "batch statistics moved"
    disturbed.prepare()
    disturbed.abandon()
    assert same(state(disturbed), before)
    again = disturbed.begin()
    assert again is not None
    assert torch.equal(first.batch.arrays["logits"], again.batch.arrays["logits"])
    assert torch.equal(first.batch.ids, again.batch.ids)
    disturbed.finish(targets_for(again))
    train(disturbed, 3)
    train(undisturbed, 4)
    assert same(state(disturbed), state(undisturbed))


# --- randomness


@pytest.mark.parametrize("name", STUDENTS)
def test_preparing_ahead_changes_no_bit(
    name: str, tiny: Tiny, student: MakeStudent, state: State, same: Same, targets_for: Answer
) -> None:
    experiment = tiny()
    plain, ahead = student(experiment, name), student(experiment, name)
    for each in range(plain.total_steps):
        expected = plain.begin()
        plain.finish(targets_for(expected))
        if each % 2:
            ahead.prepare()
        published = ahead.begin()
        ahead.prepare()
        ahead.prepare()
        assert published is not None
        assert expected is not None
        assert torch.equal(published.batch.arrays["logits"], expected.batch.arrays["logits"])
        ahead.finish(targets_for(published))
        ahead.prepare()  # also after the last step, where there is nothing to prepare
    assert same(state(plain), state(ahead))


def test_dropout_and_augmentation_follow_from_seed_student_and_step(
    tiny: Tiny, student: MakeStudent, train: Train, state: State
) -> None:
    def logits(seed: int = 3, name: str = "a", noise: int = 0, at: int = 0) -> torch.Tensor:
        students = [{"name": each, "model": "mlp", "model_args": {"dropout": 0.5}} for each in ("a", "b")]
        trainer = student(tiny(seed=seed, students=students), name)
        # The same weights whatever seed and student are.
        weights = state(student(tiny(students=students), "a"))
        trainer.restore(at, weights["model"], trainer.optimizer_state())
        torch.manual_seed(noise)
        torch.rand(noise)
        published = trainer.begin()
        assert published is not None
        order = published.batch.ids.argsort()
        return published.batch.arrays["logits"][order] if at == 0 else published.batch.arrays["logits"]

    assert torch.equal(logits(), logits(noise=5)), "the global generator has no part in it"
    assert not torch.equal(logits(), logits(name="b"))
    assert not torch.equal(logits(), logits(seed=4))
    assert torch.equal(logits(at=4), logits(at=4, noise=9))


@pytest.mark.parametrize("what", ["dropout", "crops and flips"])
def test_every_student_and_step_draws_its_own(what: str, tiny: Tiny, student: MakeStudent) -> None:
    """Seen by models that show nothing else: the mask that dropout draws, or the pixels of all samples."""
    model = {"dropout": "odd_models:Masks", "crops and flips": "odd_models:Pixels"}[what]

    def drawn(name: str, number: int, seed: int = 3) -> torch.Tensor:
        students = [{"name": each, "model": model} for each in ("a", "b")]
        trainer = student(tiny(seed=seed, students=students, training__batch_size=48), name)
        trainer.restore(number, trainer.model.state_dict(), trainer.optimizer_state())
        published = trainer.begin()
        assert published is not None
        logits, ids = published.batch.arrays["logits"], published.batch.ids
        return logits if what == "dropout" else logits[ids.argsort()]

    first = drawn("a", 0)
    assert torch.equal(first, drawn("a", 0))
    for other in (drawn("a", 1), drawn("b", 0), drawn("a", 0, seed=4)):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("drawing", [False, True])
def test_two_students_in_one_process_are_each_as_alone(
    drawing: bool, tiny: Tiny, student: MakeStudent, train: Train, state: State, same: Same, targets_for: Answer
) -> None:
    own = [{"name": name, "model": "odd_models:Drawing"} for name in STUDENTS]
    experiment = tiny(students=own) if drawing else tiny()
    alone, scores = {}, {}
    for name in STUDENTS:
        trainer = student(experiment, name)
        train(trainer, 6)
        alone[name] = state(trainer)
        scores[name] = trainer.evaluate(load(experiment.data).test)
    together = {name: student(experiment, name) for name in STUDENTS}
    for each in range(6):
        published = {name: together[name].begin() for name in STUDENTS[:: 1 if each % 2 else -1]}
        for name in STUDENTS:
            together[name].prepare()
            together[name].finish(targets_for(published[name]))
    assert same({name: state(each) for name, each in together.items()}, alone)
    assert {name: together[name].evaluate(load(experiment.data).test) for name in reversed(STUDENTS)} == scores


def test_what_a_method_draws_for_its_loss_is_its_own(
    tiny: Tiny, student: MakeStudent, state: State, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another student's forward pass, or nothing, comes between the forward pass and the loss."""
    label_loss = trainer_module.label_loss

    def drawing(step: Step) -> Loss:
        loss = label_loss(step)
        factor = torch.rand(()) + random.random() + np.random.rand()
        return Loss(loss.total * factor, loss.cross_entropy)

    monkeypatch.setattr(trainer_module, "label_loss", drawing)
    one, other = student(tiny()), student(tiny())
    for disturbance in range(3):
        one.begin()
        one.finish({})
        other.begin()
        torch.rand(disturbance)
        random.random()
        np.random.rand(disturbance)
        other.finish({})
    assert same(state(one), state(other))


def test_each_student_has_its_own_number_of_threads(tiny: Tiny, student: MakeStudent, train: Train) -> None:
    students = [
        {"name": "a", "model": "mlp", "training": {"threads": 2}},
        {"name": "b", "model": "mlp"},
    ]
    experiment = tiny(students=students)
    first, second = student(experiment, "a"), student(experiment, "b")
    for trainer, threads in ((first, 2), (second, 1), (first, 2)):
        trainer.begin()
        assert torch.get_num_threads() == threads
        trainer.abandon()


# --- restoring


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", STUDENTS)
def test_restored_it_goes_on_as_if_nothing_had_been(
    name: str, layout: str, tiny: Tiny, student: MakeStudent, train: Train, state: State, same: Same
) -> None:
    experiment = tiny(training__channels_last=layout == "channels_last")
    undisturbed = student(experiment, name)
    train(undisturbed, 4)
    saved = state(undisturbed)
    expected = train(undisturbed, 5)

    resumed = student(experiment, name)
    train(resumed, 6)  # has been further already, as one whose process lives on
    resumed.begin()
    resumed.prepare()
    resumed.restore(4, saved["model"], saved["optimizer"])
    assert resumed.step == 4
    assert same(train(resumed, 5), expected)
    assert same(state(resumed), state(undisturbed))

    fresh = student(experiment, name)
    fresh.restore(4, saved["model"], saved["optimizer"])
    assert strides(fresh) == strides(undisturbed) == strides(resumed)
    train(fresh, 5)
    assert same(state(fresh), state(undisturbed))
    assert strides(fresh) == strides(undisturbed)


def strides(trainer: Trainer) -> list[Any]:
    """Return the layouts of the weights, and of the optimiser's tensors beside them.

    The stride of a dimension of one element is left out, as it means nothing.
    """

    def layout(value: torch.Tensor) -> list[int]:
        return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]

    kept = trainer._optimizer.state
    return [
        (layout(parameter), {name: layout(value) for name, value in kept[parameter].items() if torch.is_tensor(value)})
        for parameter in trainer._trained.parameters()
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimisers_state_from_a_file_lies_as_its_parameters(
    optimizer: str, tiny: Tiny, student: MakeStudent, train: Train, tmp_path: Path
) -> None:
    experiment = tiny(training__channels_last=True, training__optimizer={"name": optimizer, "lr": 0.01})
    undisturbed = student(experiment)
    train(undisturbed, 2)
    store = CheckpointStore(tmp_path)
    store.save(Checkpoint("cnn", "", 2, undisturbed.model.state_dict(), undisturbed.optimizer_state(), {}))
    loaded = store.load("cnn", "")
    assert loaded is not None
    restored = student(experiment)
    restored.restore(2, loaded.model, loaded.optimizer)
    assert strides(restored) == strides(undisturbed)
    parameter = next(each for each in restored._trained.parameters() if each.ndim == 4 and each.shape[1] > 1)
    of_parameter = {
        value.stride() for value in restored._optimizer.state[parameter].values() if value.shape == parameter.shape
    }
    assert of_parameter == {parameter.stride()}
    assert not parameter.is_contiguous()


def test_a_model_whose_code_has_versions_is_restored_from_tensors_alone(tiny: Tiny, student: MakeStudent) -> None:
    """A checkpoint has no place for the versions that a state dict carries, and MNASNet takes none without."""
    trainer = student(
        tiny(students=[{"name": "cnn", "model": "torchvision:mnasnet0_5"}], distillation={"method": "independent"})
    )
    trained = {name: value + 1 for name, value in trainer.model.state_dict().items()}
    trainer.restore(1, trained, trainer.optimizer_state())
    assert all(torch.equal(value, trained[name]) for name, value in trainer.model.state_dict().items())


def test_initial_weights_follow_from_seed_and_name(tiny: Tiny, student: MakeStudent, state: State, same: Same) -> None:
    def weights(seed: int, name: str) -> Any:
        students = [{"name": each, "model": "mlp"} for each in ("a", "b")]
        return state(student(tiny(seed=seed, students=students), name))["model"]

    assert same(weights(1, "a"), weights(1, "a"))
    assert not same(weights(1, "a"), weights(1, "b"))
    assert not same(weights(1, "a"), weights(2, "a"))


# --- settings


def test_gradients_are_clipped(tiny: Tiny, student: MakeStudent) -> None:
    optimizer = {"name": "sgd", "lr": 1.0, "momentum": 0, "weight_decay": 0}
    settings = {"training__optimizer": optimizer, "training__schedule": {"name": "constant"}}

    def moved(clip: float | None) -> float:
        trainer = student(tiny(**settings, training__clip_norm=clip))
        before = [value.detach().clone() for value in trainer.model.parameters()]
        published = trainer.begin()
        assert published is not None
        trainer.finish({"logits": torch.zeros(16, 10)})
        after = trainer.model.parameters()
        return math.sqrt(sum(float((b - a.detach()).square().sum()) for b, a in zip(before, after, strict=True)))

    free = moved(None)
    assert free > 0.02
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved(10 * free) == pytest.approx(free, rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_precisions_and_layouts(
    precision: str, channels_last: bool, tiny: Tiny, student: MakeStudent, train: Train, state: State, same: Same
) -> None:
    experiment = tiny(training__precision=precision, training__channels_last=channels_last)
    trainer, reference = student(experiment), student(tiny())
    logits, expected = train(trainer, 3), train(reference, 3)
    assert all(each.dtype is torch.float32 for each in logits)
    assert torch.allclose(logits[0], expected[0], atol=0.05 if precision == "bfloat16" else 1e-4)
    if precision == "bfloat16":
        assert not torch.equal(logits[0], expected[0])
        assert all(value.dtype is torch.float32 for value in trainer.model.parameters())
    convolution = next(value for value in trainer.model.parameters() if value.ndim == 4 and value.shape[1] > 1)
    assert convolution.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert 0 <= trainer.evaluate(trainer._dataset.test).accuracy <= 1
    again = student(experiment)
    train(again, 3)
    assert same(state(trainer), state(again)), "the same experiment gives the same bits"
