from __future__ import annotations

from typing import Any

import pytest
import yaml

from codistill.config.experiment import Experiment, ExperimentError, parse
from codistill.config.fingerprint import identity
from protos.config.support import document, experiment


class TestAbsence:
    def exchange(self, **changes: Any) -> Experiment:
        return experiment(exchange={"on_absence": "proceed", **changes})

    def problem(self, **changes: Any) -> str:
        with pytest.raises(ExperimentError) as refused:
            parse(yaml.safe_dump({**document(), "exchange": {"on_absence": "proceed", **changes}}))
        return str(refused.value)

    def test_defaults(self) -> None:
        exchange = experiment().exchange
        assert (exchange.on_absence, exchange.quorum, exchange.round_deadline) == ("wait", 2, "auto")

    def test_shorter_waits_end_before_longer_ones(self) -> None:
        self.exchange(round_deadline=5, evict_after=20, keepalive=15, give_up_after=30)
        for changes, parts in (
            ({"round_deadline": 30}, ["round_deadline: 30.0 s", "shorter than evict_after: 30.0 s"]),
            ({"evict_after": 40}, ["evict_after: 40.0 s", "keepalive + 10: 40.0 s"]),
            ({"keepalive": 100, "give_up_after": 110}, ["keepalive + 10: 110.0 s", "give_up_after: 110.0 s"]),
        ):
            for part in parts:
                assert part in self.problem(**changes)

    def test_where_every_student_is_waited_for_only_the_notice_counts(self) -> None:
        experiment(exchange={"give_up_after": 6, "evict_after": 100})

    @pytest.mark.parametrize("quorum", [1, 3])
    def test_a_quorum_is_two_or_more_and_no_more_than_there_are(self, quorum: int) -> None:
        assert f"exchange.quorum: {quorum} is not allowed" in self.problem(quorum=quorum)

    @pytest.mark.parametrize("deadline", [0, -1, "soon"])
    def test_a_deadline_is_seconds_or_auto(self, deadline: object) -> None:
        assert "exchange.round_deadline" in self.problem(round_deadline=deadline)

    def test_how_a_run_goes_on_is_not_part_of_what_it_is(self) -> None:
        assert identity(self.exchange(quorum=2, round_deadline=3)) == identity(experiment())
