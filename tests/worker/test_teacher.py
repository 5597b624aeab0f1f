"""A teacher publishes what its model says of each round's view, in whatever order and from wherever it begins."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from codistill.config.data import Data
from codistill.config.experiment import Experiment
from codistill.peer.errors import PeerError
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode
from codistill_worker import data, models
from codistill_worker.errors import ConfigurationError
from codistill_worker.teacher import TeacherLoop
from codistill_worker.training.trainer import Trainer

Tiny = Callable[..., Experiment]
CPU = torch.device("cpu")


class ClosingTransport:
    """Closes every round at once, and records every message."""

    def __init__(self, frontier: int = 0) -> None:
        self.frontier = frontier
        self.joined: list[pb.JoinRequest] = []
        self.sent: list[pb.ExchangeRequest] = []
        self.reports: list[pb.ReportRequest] = []
        self.left: list[tuple[int, str]] = []

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        self.joined.append(request)
        return pb.JoinResponse(session_id=1, frontier=self.frontier, run="tiny")

    def send(self, contribution: pb.ExchangeRequest) -> None:
        self.sent.append(contribution)

    def receive(self, number: int) -> pb.Targets:
        assert self.sent[-1].round == number
        return pb.Targets(round=number)

    def report(self, report: pb.ReportRequest) -> None:
        self.reports.append(report)

    def undelivered(self) -> Sequence[pb.Measurement]:
        return ()

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self.left.append((reason, message))

    def close(self) -> None:
        pass


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = models.build("cnn", classes=10, channels=1, size=8, args={"width": 4}, seed=5)
    save_file(model.state_dict(), tmp_path / "old.safetensors")
    return tmp_path / "old.safetensors"


@pytest.fixture
def teacher(
    tiny: Tiny, load_data: Callable[[Data], data.Dataset], weights: Path
) -> Callable[..., tuple[TeacherLoop, ClosingTransport]]:
    def make(frontier: int = 0, **changes: Any) -> tuple[TeacherLoop, ClosingTransport]:
        named = {"name": "old", "model": "cnn", "model_args": {"width": 4}, "weights": str(weights)}
        settings = {"distillation": {"method": "kd"}, "teachers": [named], "training__evaluation_batch_size": 40}
        experiment = tiny(**settings | changes)
        plan, transport = experiment.teacher_plan("old"), ClosingTransport(frontier)
        return TeacherLoop(experiment, plan, load_data(plan.data), CPU, transport), transport

    return make


def teach(loop: TeacherLoop) -> None:
    loop.join()
    while not loop.done:
        loop.begin_step()
        loop.end_step()
    loop.finish()


def logits(transport: ClosingTransport) -> dict[int, torch.Tensor]:
    return {each.round: decode(each.batch.outputs["logits"]) for each in transport.sent}


def test_a_run_from_its_first_round(teacher: Callable[..., tuple[TeacherLoop, ClosingTransport]]) -> None:
    loop, transport = teacher()
    teach(loop)
    (request,) = transport.joined
    assert (request.participant, request.first_round, request.total_rounds) == ("old", 0, 9)
    assert (request.steps_trained, request.total_steps) == (0, 9)
    assert {name: list(shape.dims) for name, shape in request.outputs.items()} == {"logits": [10]}
    assert len(request.weights_sha256) == 32
    assert [each.round for each in transport.sent] == list(range(9))
    measured = [each for report in transport.reports for each in report.measurements]
    assert [(each.split, each.steps_trained) for each in measured] == [(pb.SPLIT_TEST, 0)], "evaluated once"
    assert [(each.round, each.durable_round) for each in transport.reports][-1] == (9, 9), "it needs no round again"
    assert transport.left == [(pb.LEAVE_REASON_FINISHED, "taught 9 steps")]


@pytest.mark.parametrize("frontier", [1, 2, 5, 8, 9])
def test_begun_in_the_midst_it_gives_the_same_bits(
    frontier: int, teacher: Callable[..., tuple[TeacherLoop, ClosingTransport]]
) -> None:
    """Two rounds of 16 fit into a forward pass of 40; which two does not follow from where it begins."""
    whole, part = teacher(), teacher(frontier)
    teach(whole[0])
    teach(part[0])
    expected = {number: value for number, value in logits(whole[1]).items() if number >= frontier}
    found = logits(part[1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[number], expected[number]) for number in found)


def test_it_sees_what_a_student_sees(
    teacher: Callable[..., tuple[TeacherLoop, ClosingTransport]],
    tiny: Tiny,
    load_data: Callable[[Data], data.Dataset],
    weights: Path,
) -> None:
    named = {"name": "old", "model": "cnn", "model_args": {"width": 4}, "weights": str(weights)}
    for view, alike in (("auto", True), ("own", False)):
        changes = {"data__augment__view": view}
        loop, transport = teacher(**changes)
        teach(loop)
        experiment = tiny(distillation={"method": "kd"}, teachers=[named], **changes)
        plan = experiment.plan("mlp")
        student = Trainer(experiment, plan, load_data(plan.data), CPU)
        with torch.inference_mode():
            by_hand = loop._network(student._prepare(0).images)["logits"]
        assert torch.allclose(by_hand, logits(transport)[0], atol=1e-5) is alike


def test_it_publishes_in_rounds_that_exchange_alone(
    teacher: Callable[..., tuple[TeacherLoop, ClosingTransport]],
) -> None:
    custom = {"method": "custom", "server": "a:b", "worker": "a:c", "every": 2, "start_epoch": 1}
    loop, transport = teacher(distillation=custom)
    teach(loop)
    (request,) = transport.joined
    assert (request.total_rounds, request.total_steps) == (3, 9)
    assert [each.round for each in transport.sent] == [0, 1, 2]
    ids = [decode(each.batch.ids).tolist() for each in transport.sent]
    assert ids == [loop._order.samples(step).tolist() for step in (3, 5, 7)]


@pytest.mark.parametrize("frontier", [0, 1, 2, 3])
def test_at_a_later_frontier_it_begins_at_that_rounds_step(
    frontier: int, teacher: Callable[..., tuple[TeacherLoop, ClosingTransport]]
) -> None:
    custom = {"method": "custom", "server": "a:b", "worker": "a:c", "every": 2, "start_epoch": 1}
    loop, transport = teacher(frontier, distillation=custom)
    loop.join()
    assert loop.step == [3, 5, 7, 9][frontier]
    assert [each.first_round for each in transport.joined] == [0], "a teacher needs no round"
    assert transport.reports[-1].round == frontier
    loop, transport = teacher(frontier, distillation=custom)
    teach(loop)
    assert [each.round for each in transport.sent] == list(range(frontier, 3))
    assert (transport.reports[-1].round, transport.reports[-1].durable_round) == (3, 3)
    assert transport.reports[-1].steps_trained == 9


def test_stopped_and_failed(teacher: Callable[..., tuple[TeacherLoop, ClosingTransport]]) -> None:
    loop, transport = teacher()
    loop.join()
    loop.stop()
    loop.fail("why")
    assert transport.left == [(pb.LEAVE_REASON_STOPPED, "stopped at step 0"), (pb.LEAVE_REASON_FAILED, "why")]


def test_weights_that_give_no_number_end_it(
    teacher: Callable[..., tuple[TeacherLoop, ClosingTransport]], weights: Path
) -> None:
    model = models.build("cnn", classes=10, channels=1, size=8, args={"width": 4}, seed=5)
    save_file(
        {
            name: torch.full_like(value, torch.finfo(value.dtype).max) if value.is_floating_point() else value
            for name, value in model.state_dict().items()
        },
        weights,
    )
    loop, _ = teacher()
    with pytest.raises(PeerError, match=r"teacher 'old': its logits are not finite in steps 0 to 1; its weights are"):
        loop._prepare(0)


class Noisy(nn.Module):
    """Draws from Python's global generator, or from one of its own."""

    def __init__(self, classes: int, channels: int, size: int, *, own: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(channels * size * size, classes)
        self.draw = random.Random(0).random if own else random.random

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) == 3:
            raise RuntimeError("three")
        logits: torch.Tensor = self.layer(images.flatten(1)) * self.draw()
        return logits


@pytest.fixture
def noisy(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    module = types.ModuleType("noisy_teacher")
    module.Noisy = Noisy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "noisy_teacher", module)
    save_file(Noisy(10, 1, 8).state_dict(), weights)

    def changes(**args: Any) -> dict[str, Any]:
        return {
            "teachers": [
                {"name": "old", "model": "noisy_teacher:Noisy", "model_args": args, "weights": str(weights)},
            ]
        }

    return changes


def test_what_a_teacher_draws_follows_from_the_rounds(noisy: Any, teacher: Any) -> None:
    whole, part = teacher(**noisy()), teacher(5, **noisy())
    teach(whole[0])
    random.random()
    teach(part[0])
    expected, found = logits(whole[1]), logits(part[1])
    assert all(torch.equal(found[number], expected[number]) for number in range(5, 9))


def test_a_teacher_that_gives_other_outputs_each_time_is_refused_before_it_joins(noisy: Any, teacher: Any) -> None:
    loop, transport = teacher(**noisy(own=True))
    with pytest.raises(
        ConfigurationError, match=r"^teachers\.0\.model: .* of teacher 'old' gives other logits for the same"
    ):
        loop.join()
    assert transport.joined == []


def test_an_error_that_only_its_batches_meet_ends_a_teacher_before_it_joins(noisy: Any, teacher: Any) -> None:
    loop, transport = teacher(**noisy(), training__batch_size=3, training__evaluation_batch_size=3)
    with pytest.raises(
        ConfigurationError, match=r"teacher 'old' cannot compute its outputs: RuntimeError at .*: three"
    ):
        loop.join()
    assert transport.joined == []


@pytest.mark.parametrize("part", ["launch_step", "begin_step", "end_step"])
def test_an_error_in_any_part_of_a_step_names_the_field_and_the_step(part: str, noisy: Any, teacher: Any) -> None:
    loop, _ = teacher(**noisy(), training__batch_size=3, training__evaluation_batch_size=3)
    with pytest.raises(
        ConfigurationError,
        match=r"^teachers\.0\.model: .* of teacher 'old' failed in the forward pass, step \d: RuntimeError at .*: three$",
    ):
        getattr(loop, part)()


def test_another_models_weights_are_refused(
    teacher: Callable[..., tuple[TeacherLoop, ClosingTransport]], weights: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"^weights: .* does not fit model 'mlp' with 10 classes"):
        teacher(teachers=[{"name": "old", "model": "mlp", "weights": str(weights)}])
