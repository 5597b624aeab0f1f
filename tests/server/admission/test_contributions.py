from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill.config.fingerprint import identity
from codistill.methods.aggregator import RoundInputs
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill_server import methods
from codistill_server.admission.contributions import receive_limit
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Status
from codistill_server.rounds.machine import ParticipantState
from server.support import (
    BATCH,
    CLASSES,
    HELD_OUT,
    Run,
    contribution,
    general_experiment,
    independent_experiment,
    join_request,
    logits_of,
    make_experiment,
    refused,
    samples,
)

WRONG: list[tuple[Callable[[pb.ExchangeRequest], object], list[str]]] = [
    (
        lambda m: m.batch.outputs["logits"].CopyFrom(encode(torch.zeros(BATCH, CLASSES), "float16")),
        ["batch.outputs.logits.dtype", "float16", "float32"],
    ),
    (
        lambda m: m.batch.outputs["logits"].CopyFrom(encode(torch.zeros(BATCH, CLASSES + 1), "float32")),
        ["batch.outputs.logits.shape", "[4, 4]", "[4, 3]"],
    ),
    (lambda m: m.batch.ids.CopyFrom(encode(torch.arange(BATCH + 1), "int64")), ["batch.ids.shape", "[5]", "[4]"]),
    (
        lambda m: m.batch.labels.CopyFrom(encode(torch.zeros(BATCH), "float32")),
        ["batch.labels.dtype", "float32", "int64"],
    ),
    (lambda m: setattr(m.batch.labels, "data", m.batch.labels.data[:-1]), ["batch.labels.data", "31 bytes", "32"]),
    (lambda m: setattr(m.batch.ids, "dtype", 0), ["batch.ids.dtype"]),
    (
        lambda m: m.batch.labels.CopyFrom(encode(torch.tensor([0, 3, 0, 0]), "int64")),
        ["batch.labels", "3 is not a class", "0 to 2"],
    ),
    (
        lambda m: m.batch.labels.CopyFrom(encode(torch.tensor([0, 0, -1, 0]), "int64")),
        ["batch.labels", "-1 is not a class", "0 to 2"],
    ),
    (
        lambda m: m.batch.outputs["more"].CopyFrom(encode(torch.zeros(BATCH), "float32")),
        ["batch.outputs", "['logits', 'more']", "['logits']"],
    ),
    (
        lambda m: m.batch.sparse_outputs["logits"].CopyFrom(pb.SparseTensor(size=CLASSES)),
        ["batch.sparse_outputs", "not allowed", "this session's arrays are dense"],
    ),
    (lambda m: m.ClearField("batch"), ["batch.ids"]),
    (lambda m: m.held_out.CopyFrom(samples(torch.zeros(0, CLASSES))), ["held_out", "holds out none"]),
]


class TestContribute:
    def test_targets_are_the_ensembles(self, run: Run) -> None:
        answers = run.close_round(0)
        assert answers[0] == answers[1]
        targets = pb.ExchangeResponse.FromString(answers[0]).targets
        assert targets.round == 0
        aggregator = methods.create(run.experiment.distillation)
        assert aggregator is not None
        logits = torch.stack([logits_of(run.experiment, name, 0) for name in run.experiment.names])
        expected = aggregator.targets(RoundInputs(run.experiment.names, {"logits": logits}, torch.tensor([0, 1, 2, 0])))
        assert expected.shared is not None
        assert torch.equal(decode(targets.targets["logits"]), expected.shared["logits"])

    def test_dml_answers_each_with_its_own(self) -> None:
        run = Run(make_experiment().replace(distillation={"method": "dml"}))
        run.join_all()
        ant, bee = run.close_round(0)
        assert ant != bee
        probabilities = decode(pb.ExchangeResponse.FromString(ant).targets.targets["probabilities"])
        torch.testing.assert_close(probabilities, logits_of(run.experiment, "bee", 0).softmax(-1))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_targets_travel_in_the_experiments_dtype(self, dtype: str) -> None:
        run = Run(make_experiment(exchange={"dtype": dtype}))
        run.join_all()
        reply = pb.ExchangeResponse.FromString(run.close_round(0)[0])
        assert str(decode(reply.targets.targets["logits"]).dtype) == f"torch.{dtype}"

    def test_whoever_comes_first_the_bits_are_the_same(self) -> None:
        experiment = make_experiment(("ant", "bee", "cat", "dog"))
        answers: set[bytes] = set()
        for seed in range(5):
            run = Run(experiment)
            order = list(experiment.names)
            random.Random(seed).shuffle(order)
            for participant in order:
                run.join(participant)
            for participant in reversed(order):
                run.contribute(participant, 0)
            answers |= {raw for inbox in run.inboxes.values() for raw in inbox.raw}
        assert len(answers) == 1

    @pytest.mark.parametrize(("change", "parts"), WRONG, ids=[", ".join(parts) for _, parts in WRONG])
    def test_a_wrong_message_is_refused_by_field_and_value(
        self, run: Run, change: Callable[[pb.ExchangeRequest], object], parts: list[str]
    ) -> None:
        message = contribution(run.experiment, "ant", 0)
        change(message)
        error = refused(lambda: run.send("ant", message))
        assert error.status is Status.INVALID_ARGUMENT
        for part in ["participant 'ant', round 0", *parts]:
            assert part in str(error)
        assert run.coordinator.states == {"ant": ParticipantState.DISCONNECTED, "bee": ParticipantState.CONNECTED}
        assert run.run_state.rejected[Status.INVALID_ARGUMENT] == 1
        assert [(event.participant, event.message) for event in run.events("rejected")] == [("ant", str(error))]
        run.join("ant")  # and it did no harm to the round
        assert len(set(run.close_round(0))) == 1

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e31, -3e38])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_values_that_are_no_logits_are_refused_by_position(self, value: float, dtype: str) -> None:
        run = Run(make_experiment(exchange={"dtype": dtype}))
        run.join_all()
        logits = logits_of(run.experiment, "ant", 0)
        logits[2, 1] = value
        error = refused(lambda: run.send("ant", pb.ExchangeRequest(batch=samples(logits, dtype))))
        assert error.status is Status.INVALID_ARGUMENT
        assert "participant 'ant', round 0: batch.outputs.logits[2, 1] is " in str(error)
        assert "the student has diverged, lower its learning rate" in str(error)
        shown = str(error).split("[2, 1] is ")[1].split(";")[0]
        assert shown == str(value) or float(shown) == pytest.approx(value, rel=1e-2)
        run.join("ant")
        run.close_round(0)

    @pytest.mark.parametrize("ensemble", ["naive", "linear", "min_logit", "general"])
    def test_the_largest_values_let_in_have_finite_targets(self, ensemble: str) -> None:
        experiment = make_experiment(data={"held_out": HELD_OUT}, distillation={"ensemble": ensemble})
        run = Run(experiment)
        run.join_all()
        for participant in experiment.names:
            signs = logits_of(experiment, participant, 0).sign()
            logits = signs * torch.nextafter(torch.tensor(1e30), torch.tensor(0.0))
            run.send(
                participant,
                pb.ExchangeRequest(batch=samples(logits), held_out=samples(logits[:1].expand(HELD_OUT, -1))),
            )
        for inbox in run.inboxes.values():
            (reply,) = inbox.replies
            assert bool(torch.isfinite(decode(reply.targets.targets["logits"])).all())

    def test_other_samples_are_refused_with_both_values(self, run: Run) -> None:
        run.contribute("ant", 0)
        error = refused(lambda: run.contribute("bee", 0, first=20))
        assert error.status is Status.FAILED_PRECONDITION
        assert "participant 'bee' has at position 0 sample 20 with label 0" in str(error)
        assert "sample 0 with label 0, from participant 'ant'" in str(error)
        assert run.run_state.rejected[Status.FAILED_PRECONDITION] == 1
        assert run.inboxes["ant"].ended is None
        run.join("bee")
        run.contribute("bee", 0)
        assert run.inboxes["ant"].rounds == [0]

    def test_a_future_round_is_told_the_expected_one(self, run: Run) -> None:
        run.close_round(0)
        error = refused(lambda: run.contribute("ant", 7))
        assert error.status is Status.ABORTED
        assert "round 7 is not open; expected round 1" in str(error)
        assert run.coordinator.frontier == 1

    def test_a_session_that_is_over_contributes_nothing(self, run: Run) -> None:
        run.leave("ant", pb.LEAVE_REASON_STOPPED)
        error = refused(lambda: run.contribute("ant", 0))
        assert error.status is Status.ABORTED
        assert "join again" in str(error)

    def test_a_method_without_an_exchange_takes_none(self) -> None:
        run = Run(independent_experiment())
        run.join("ant")
        error = refused(lambda: run.contribute("ant", 0))
        assert error.status is Status.FAILED_PRECONDITION

    @given(st.data())
    @settings(max_examples=60)
    def test_a_garbled_message_does_no_harm(self, data: st.DataObject) -> None:
        run = Run(general_experiment())
        run.join_all()
        raw = bytearray(contribution(run.experiment, "ant", 0, held_out=True).SerializeToString())
        for _ in range(data.draw(st.integers(1, 6))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(DecodeError, RequestRejected):
            run.send("ant", pb.ExchangeRequest.FromString(bytes(raw)))
        run.join("ant")
        answers = run.close_round(0, held_out=True)
        clean = Run(run.experiment)
        clean.join_all()
        assert answers == clean.close_round(0, held_out=True)


class TestHeldOut:
    def test_its_size_is_the_experiments(self) -> None:
        run = Run(general_experiment())
        run.join_all()
        message = contribution(run.experiment, "ant", 0)
        message.held_out.CopyFrom(samples(torch.zeros(HELD_OUT + 1, CLASSES)))
        error = refused(lambda: run.send("ant", message))
        assert error.status is Status.INVALID_ARGUMENT
        assert f"held_out.ids.shape: [{HELD_OUT + 1}] is not allowed; expected [{HELD_OUT}]" in str(error)

    def test_sparse_arrays_are_refused_there_too(self) -> None:
        run = Run(general_experiment())
        run.join_all()
        message = contribution(run.experiment, "ant", 0, held_out=True)
        message.held_out.sparse_outputs["logits"].size = CLASSES
        error = refused(lambda: run.send("ant", message))
        assert error.status is Status.INVALID_ARGUMENT
        assert "held_out.sparse_outputs: some are not allowed; this session's arrays are dense" in str(error)

    def test_values_are_checked_there_too(self) -> None:
        run = Run(general_experiment())
        run.join_all()
        message = contribution(run.experiment, "ant", 0)
        message.held_out.CopyFrom(samples(torch.full((HELD_OUT, CLASSES), torch.nan)))
        error = refused(lambda: run.send("ant", message))
        assert "held_out.outputs.logits[0, 0] is nan" in str(error)

    def test_all_send_them_or_none(self) -> None:
        run = Run(general_experiment())
        run.join_all()
        run.contribute("ant", 0)
        error = refused(lambda: run.contribute("bee", 0, held_out=True))
        assert error.status is Status.FAILED_PRECONDITION
        assert "held_out" in str(error)


class TestReceiveLimit:
    @given(
        batch=st.integers(1, 600),
        classes=st.integers(2, 1500),
        held_out=st.integers(0, 900),
        dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    )
    @settings(max_examples=25)
    def test_it_is_enough_and_not_much_more(self, batch: int, classes: int, held_out: int, dtype: str) -> None:
        experiment = make_experiment(
            ("a" * 64, "b" * 64),
            data={"classes": classes, "held_out": held_out},
            training={"batch_size": batch},
            exchange={"dtype": dtype},
        )
        message = pb.ExchangeRequest(round=2**63, batch=samples(torch.zeros(batch, classes), dtype, 10**9, [0] * batch))
        if held_out:
            held = samples(torch.zeros(held_out, classes), dtype, 10**9, [0] * held_out)
            message.held_out.CopyFrom(held)
        limit = receive_limit(experiment)
        assert message.ByteSize() <= limit
        assert join_request(experiment, "a" * 64).ByteSize() <= limit
        if message.ByteSize() > 100_000:
            assert limit <= 2 * message.ByteSize()

    def test_a_large_experiment_can_still_join(self) -> None:
        experiment = make_experiment([f"participant-{number:03}" for number in range(256)])
        assert json.loads(identity(experiment))
        assert join_request(experiment, "participant-000").ByteSize() <= receive_limit(experiment)
