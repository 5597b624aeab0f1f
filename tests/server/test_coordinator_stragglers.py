from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.config.fingerprint import identity
from codistill.methods.aggregator import RoundInputs
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill_server import methods
from codistill_server.rounds.actions import Status
from codistill_server.storage.journal import ClosedRound, Journal
from server.support import (
    BATCH,
    CLASSES,
    HELD_OUT,
    ROUNDS_PER_EPOCH,
    TOTAL_ROUNDS,
    Run,
    contribution,
    logits_of,
    make_experiment,
    refused,
)


class TestSkipped:
    """A run whose rounds close without skipped participants; the state machine's own cases are in rounds/test_machine_stragglers.py."""

    def run(self, **sections: Any) -> Run:
        exchange = {"on_absence": "proceed", "round_deadline": 3, "evict_after": 10, **sections.pop("exchange", {})}
        made = Run(make_experiment(("ant", "bee", "cat"), exchange=exchange, **sections))
        made.join_all()
        return made

    def late(self, run: Run) -> None:
        run.clock.now += 3
        run.coordinator.tick()

    @pytest.mark.parametrize("method", [{"method": "dml"}, {"method": "kdcl", "ensemble": "min_logit"}])
    def test_targets_are_made_of_those_that_are_there(self, method: dict[str, Any]) -> None:
        run = self.run(distillation=method)
        for participant in ("ant", "cat"):
            run.contribute(participant, 0)
        assert run.inboxes["ant"].rounds == []
        self.late(run)
        experiment = run.experiment
        logits = torch.stack([logits_of(experiment, participant, 0) for participant in ("ant", "cat")])
        aggregator = methods.create(experiment.distillation)
        assert aggregator is not None
        labels = decode(contribution(experiment, "ant", 0).batch.labels)
        made = aggregator.targets(RoundInputs(("ant", "cat"), {"logits": logits}, labels, include_missing=True))
        run.contribute("bee", 0)
        for participant in run.experiment.names:
            (reply,) = [reply for reply in run.inboxes[participant].replies if reply.HasField("targets")]
            expected = (made.each or {}).get(participant, made.shared)
            assert expected is not None
            assert {name: decode(value).tolist() for name, value in reply.targets.targets.items()} == {
                name: value.tolist() for name, value in expected.items()
            }
        closed = run.journal.read(0)
        assert closed is not None
        assert closed.contributors == ("ant", "cat")

    def test_the_skipped_are_named_in_events_and_records(self) -> None:
        run = self.run()
        for number in range(3):
            run.contribute("ant", number)
            run.contribute("bee", number)
            self.late(run)
        (skipped,) = run.events("skipped")
        assert (skipped.participant, skipped.message) == (
            "cat",
            "skipped from round 0 on: cat had not contributed after 3.0 s; 2 contributions, quorum 2",
        )
        for number in range(3):
            run.contribute("cat", number)
        (awaited,) = run.events("awaited")
        assert (awaited.participant, awaited.message) == (
            "cat", "awaited from round 3 on; it missed rounds from 0 on, 3 rounds missed in all"
        )  # fmt: skip
        run.run_state.flush()
        spans = [record for record in run.records if record.kind == "rounds"]
        assert sum(span.missed.get("cat", 0) for span in spans) == 3
        assert sum(span.without_targets for span in spans) == 0

    def test_one_that_was_skipped_finishes_like_the_others(self) -> None:
        """Rounds that closed without it count; those that are open are open for everybody."""
        run = self.run()
        for number in range(TOTAL_ROUNDS):
            for participant in run.experiment.names:
                error = refused(partial(run.leave, participant, pb.LEAVE_REASON_FINISHED))
                assert f"while {number} of {TOTAL_ROUNDS} rounds are closed" in str(error)
            run.contribute("ant", number)
            run.contribute("bee", number)
            self.late(run)
            if number % 2:
                run.contribute("cat", number)
        for participant in ("ant", "bee"):
            run.leave(participant, pb.LEAVE_REASON_FINISHED)
        run.contribute("cat", TOTAL_ROUNDS - 1)
        run.leave("cat", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 1

    def test_who_is_awaited_is_shown(self) -> None:
        run = self.run()

        def awaited() -> dict[str, bool]:
            return {each.name: each.awaited for each in run.coordinator.snapshot().participants}

        assert awaited() == {"ant": True, "bee": True, "cat": True}
        for number in range(3):
            run.contribute("ant", number)
            run.contribute("bee", number)
            self.late(run)
            assert awaited() == {"ant": True, "bee": True, "cat": False}
        (*_, cat) = run.coordinator.snapshot().participants
        assert (cat.state, cat.missed_rounds) == (pb.PARTICIPANT_STATE_CONNECTED, 3), "another fact than its state"
        for number in range(3):
            run.contribute("cat", number)
        assert awaited() == {"ant": True, "bee": True, "cat": True}

    def test_below_the_quorum_there_are_no_targets_and_it_is_counted(self) -> None:
        run = self.run()
        run.contribute("bee", 0)
        self.late(run)
        run.contribute("bee", 1)
        replies = [reply.targets for reply in run.inboxes["bee"].replies]
        assert [(each.round, len(each.targets)) for each in replies] == [(0, 0), (1, 0)]
        assert run.run_state.rounds_without_targets == 2
        (event,) = run.events("below_quorum")
        assert event.message == "round 0 closed with 1 contributions, below the quorum: no targets"
        run.contribute("ant", 0)
        assert [len(reply.targets.targets) for reply in run.inboxes["ant"].replies] == [0], "the same for everybody"

    def test_what_is_not_a_number_is_left_out_and_the_others_go_on(self) -> None:
        run = self.run()
        for participant in ("ant", "cat"):
            run.contribute(participant, 0)
        broken = contribution(run.experiment, "bee", 0)
        broken.batch.outputs["logits"].CopyFrom(encode(torch.full((BATCH, CLASSES), torch.nan), "float32"))
        error = refused(lambda: run.send("bee", broken))
        assert "diverged" in str(error)
        assert run.inboxes["ant"].rounds == run.inboxes["cat"].rounds == [0], "at once"
        (reply,) = run.inboxes["ant"].replies
        assert bool(torch.isfinite(decode(reply.targets.targets["logits"])).all())
        assert [event.participant for event in run.events("rejected")] == ["bee"]
        assert [event.participant for event in run.events("skipped")] == ["bee"]

    def test_samples_that_are_not_the_rounds_are_left_out_and_the_others_go_on(self) -> None:
        run = self.run()
        for participant in ("ant", "cat"):
            run.contribute(participant, 0)
        error = refused(lambda: run.contribute("bee", 0, first=8))
        assert error.status is Status.FAILED_PRECONDITION
        assert run.inboxes["ant"].rounds == run.inboxes["cat"].rounds == [0], "at once"
        assert [event.participant for event in run.events("rejected")] == ["bee"]
        assert [event.participant for event in run.events("skipped")] == ["bee"]

    def test_one_that_cannot_be_answered_costs_nobody_else_the_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reply_to = ClosedRound.reply_to
        monkeypatch.setattr(
            ClosedRound, "reply_to", lambda closed, name: None if name == "bee" else reply_to(closed, name)
        )
        run = self.run()
        for participant in ("bee", "ant", "cat"):  # the last one's call is that which closes the round
            run.contribute(participant, 0)
        assert run.inboxes["ant"].rounds == run.inboxes["cat"].rounds == [0]
        ended = run.inboxes["bee"].ended
        assert ended is not None
        assert ended[0] is Status.FAILED_PRECONDITION
        assert "targets for nobody else" in ended[1]
        assert [event.participant for event in run.events("rejected")] == ["bee"]
        assert run.coordinator.participant_of(run.session_ids["bee"]) is None
        assert run.coordinator.participant_of(run.session_ids["cat"]) is not None
        run.contribute("ant", 1)
        run.contribute("cat", 1)
        assert run.inboxes["cat"].rounds == [0, 1], "it is not waited for"

    def test_a_silent_skipped_participant_is_told_to_join_again(self) -> None:
        run = self.run()
        run.contribute("ant", 0)
        run.contribute("bee", 0)
        self.late(run)
        run.clock.now += 10
        run.coordinator.tick()
        ended = run.inboxes["cat"].ended
        assert ended is not None
        assert ended[0] is Status.ABORTED
        assert [event.participant for event in run.events("evicted")] == ["cat"]
        assert run.coordinator.participant_of(run.session_ids["cat"]) is None

    def test_general_goes_on_with_the_errors_it_has(self, tmp_path: Path) -> None:
        run = self.run(data={"held_out": HELD_OUT}, distillation={"method": "kdcl", "ensemble": "general"})
        for number in range(ROUNDS_PER_EPOCH):
            run.close_round(number)
        run.close_round(ROUNDS_PER_EPOCH, held_out=True)
        for participant in ("ant", "cat"):
            run.contribute(participant, ROUNDS_PER_EPOCH + 1)
        self.late(run)
        assert run.inboxes["cat"].rounds[-1] == ROUNDS_PER_EPOCH + 1


class TestLateStudents:
    """With every round kept, students may be added to the experiment later."""

    @pytest.mark.parametrize("method", [{"method": "dml"}, {"method": "kdcl", "ensemble": "naive"}])
    def test_one_learns_the_whole_run_from_the_journal(self, method: dict[str, Any], tmp_path: Path) -> None:
        sections: dict[str, Any] = {"distillation": method, "exchange": {"journal": {"keep": "all"}}}
        before = Run(make_experiment(("ant", "bee"), **sections), path=tmp_path / "journal.sqlite")
        before.join_all()
        for number in range(TOTAL_ROUNDS):
            before.close_round(number)
        for participant in before.experiment.names:
            before.leave(participant, pb.LEAVE_REASON_FINISHED)
        assert before.completed == 1
        before.coordinator.close()

        experiment = make_experiment(("ant", "bee", "cat"), **sections)
        journal = Journal(tmp_path / "journal.sqlite", identity(experiment), may_grow=True)
        run = Run(experiment, journal=journal)
        assert not run.coordinator.complete
        run.join("cat")
        for number in range(TOTAL_ROUNDS):
            run.contribute("cat", number)
        assert run.inboxes["cat"].rounds == list(range(TOTAL_ROUNDS))
        assert all(reply.targets.targets for reply in run.inboxes["cat"].replies)
        run.leave("cat", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 1

    def test_without_a_target_for_it_it_is_told_why(self, tmp_path: Path) -> None:
        kept = {"distillation": {"method": "dml"}}
        before = Run(make_experiment(("ant", "bee"), **kept), path=tmp_path / "journal.sqlite")
        before.join_all()
        before.close_round(0)
        before.coordinator.close()
        experiment = make_experiment(("ant", "bee", "cat"), **kept, exchange={"journal": {"keep": "all"}})
        run = Run(experiment, journal=Journal(tmp_path / "journal.sqlite", identity(experiment), may_grow=True))
        run.join("cat")
        error = refused(lambda: run.contribute("cat", 0))
        assert error.status is Status.FAILED_PRECONDITION
        assert "round 0 was closed by ant, bee" in str(error)
        assert "exchange.journal.keep: all" in str(error)
