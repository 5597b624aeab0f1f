from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill_server.rounds.stragglers import (
    ArrivalLags,
    CloseDecision,
    StragglerPolicy,
    close_decision,
    straggler_policy,
)
from server.support import make_experiment

FIXED = StragglerPolicy(quorum=2, round_deadline=3.0, evict_after=30.0)
AUTO = StragglerPolicy(quorum=2, round_deadline=None, evict_after=30.0)
NAMES = ("ant", "bee", "cat")


def decision(waited: float, contributed: tuple[str, ...], **changes: Any) -> CloseDecision:
    arguments: dict[str, Any] = {
        "waited": waited, "deadline": 3.0, "awaited": NAMES, "expected": (), "contributed": contributed
    }  # fmt: skip
    return close_decision(FIXED, **{**arguments, **changes})


class TestCloseDecision:
    def test_it_closes_when_every_awaited_participant_is_in(self) -> None:
        assert decision(0.1, NAMES) == CloseDecision(
            True, True, (), "every awaited participant is in; 3 contributions, quorum 2"
        )
        assert decision(0.1, ("ant", "bee"), awaited=("ant", "bee")).close

    def test_before_the_deadline_it_waits(self) -> None:
        made = decision(2.999, ("ant", "bee"))
        assert not made.close
        assert made.skipped == ()
        assert made.reason == "waits for cat since 3.0 s; 2 contributions, quorum 2"

    def test_at_the_deadline_it_goes_on_with_a_quorum(self) -> None:
        made = decision(3.0, ("ant", "bee"))
        assert (made.close, made.targets, made.skipped) == (True, True, ("cat",))
        assert made.reason == "cat had not contributed after 3.0 s; 2 contributions, quorum 2"

    def test_below_the_quorum_it_has_no_targets(self) -> None:
        made = decision(3.0, ("bee",))
        assert (made.close, made.targets, made.skipped) == (True, False, ("ant", "cat"))
        assert made.reason.endswith("1 contributions, quorum 2: no targets")

    def test_the_contribution_of_a_skipped_participant_counts(self) -> None:
        assert decision(0.0, ("ant", "cat"), awaited=("ant",)).targets

    def test_one_that_never_joined_is_given_longer(self) -> None:
        early = decision(29.9, ("ant",), expected=("cat",))
        assert (early.close, early.skipped) == (False, ("bee",))
        late = decision(30.0, ("ant",), expected=("cat",))
        assert (late.close, late.skipped) == (True, ("bee", "cat"))

    @given(
        waited=st.floats(0, 100),
        contributed=st.sets(st.sampled_from(NAMES), min_size=1),
        awaited=st.sets(st.sampled_from(NAMES)),
        expected=st.sets(st.sampled_from(NAMES)),
    )
    def test_nothing_waits_past_the_longest_bound(
        self, waited: float, contributed: set[str], awaited: set[str], expected: set[str]
    ) -> None:
        made = decision(waited, tuple(contributed), awaited=tuple(sorted(awaited)), expected=expected)
        assert made.close or waited < FIXED.evict_after
        assert made.close == (awaited - contributed <= set(made.skipped))
        assert made.targets == (made.close and len(contributed) >= 2)
        assert not set(made.skipped) & contributed


class TestArrivalLags:
    def of(self, *lags: float) -> ArrivalLags:
        known = ArrivalLags()
        for lag in lags:
            known.add(lag)
        return known

    def test_a_fixed_deadline_is_what_it_is(self) -> None:
        assert self.of(*[20.0] * 10).deadline(FIXED) == 3.0

    def test_few_rounds_say_nothing(self) -> None:
        assert self.of(*[0.1] * 7).deadline(AUTO) == 30.0
        assert self.of(*[0.1] * 8).deadline(AUTO) == 2.0

    def test_it_is_the_median_and_ten_spreads(self) -> None:
        # Median 4; distances 3 2 1 0 1 2 3 4 from it, of which the median is 2.
        assert self.of(1, 2, 3, 4, 4, 5, 6, 7).deadline(AUTO) == pytest.approx(4 + 10 * 1.5)

    def test_one_pause_moves_it_little(self) -> None:
        assert self.of(*[0.5] * 40, 25.0).deadline(AUTO) == 2.0

    def test_it_is_bounded_by_the_eviction(self) -> None:
        assert self.of(1, 9, 1, 9, 1, 9, 1, 9).deadline(AUTO) == 30.0

    def test_it_forgets(self) -> None:
        assert self.of(*[25.0] * 64, *[0.1] * 64).deadline(AUTO) == 2.0


class TestPolicyOfAnExperiment:
    def test_one_that_waits_for_every_participant_has_none(self) -> None:
        assert straggler_policy(make_experiment()) is None

    @pytest.mark.parametrize(("setting", "deadline"), [("auto", None), (3, 3.0)])
    def test_one_that_proceeds(self, setting: str | int, deadline: float | None) -> None:
        exchange = {"on_absence": "proceed", "quorum": 2, "round_deadline": setting, "evict_after": 30}
        assert straggler_policy(make_experiment(exchange=exchange)) == StragglerPolicy(2, deadline, 30.0)
