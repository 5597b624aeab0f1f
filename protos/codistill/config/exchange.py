"""The experiment file's `exchange` section."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from codistill.config.base import OPERATIONAL, Section

__all__ = ["KEEPALIVE_ANSWER", "Exchange", "Journal"]

KEEPALIVE_ANSWER = 10.0
"""Seconds that a peer has to answer a keepalive ping before its link is cut."""


class Journal(Section):
    """The closed rounds on the server's disk."""

    durability: Literal["process", "power"] = Field(
        default="process",
        description="`process`: a closed round survives the death of every process. `power`: it also survives the death of the machine, at the cost of a sync per round.",
    )
    keep: Literal["needed", "all"] = Field(
        default="needed",
        description="`needed`: rounds back to the oldest that a student's checkpoint still needs. `all`: every round. Students that are added later, at the end of `students`, then learn the whole run from the journal.",
    )


class Exchange(Section):
    """How workers and server communicate."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32",
        description="Element type of logits and targets on the wire. `float16` halves the traffic. While logits are within ±8, T is 1 or more and classes are at most 1,000, it moves a teacher's probabilities by less than 1e-3. The mean of students' probabilities moves by less than 1.25e-3. docs/methods.md has the other targets.",
    )
    connect_timeout: float = Field(
        default=30.0,
        gt=0,
        description="Seconds that a worker tries to reach a server for the first time.",
        json_schema_extra=OPERATIONAL,
    )
    give_up_after: float = Field(
        default=600.0,
        gt=0,
        description="Seconds that a worker waits for one round's targets, or for a server that went away. Then it ends.",
        json_schema_extra=OPERATIONAL,
    )
    on_absence: Literal["wait", "proceed"] = Field(
        default="wait",
        description="`wait`: a round waits for every student, and a run in which processes died ends with the same bits. `proceed`: a round closes at its deadline without the students that are late or away, which catch up from the journal.",
        json_schema_extra=OPERATIONAL,
    )
    quorum: int = Field(
        default=2,
        ge=2,
        description="With `proceed`: contributions that a round needs to get targets. Below that number the students learn from the labels alone for that round.",
        json_schema_extra=OPERATIONAL,
    )
    round_deadline: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        default="auto",
        description="With `proceed`: seconds from a round's first contribution until it closes without the others. `auto` is median + 10·MAD of the recent rounds' lags, from 2 s up to `evict_after`.",
        json_schema_extra=OPERATIONAL,
    )
    evict_after: float = Field(
        default=30.0,
        gt=0,
        description="With `proceed`: seconds of silence after which the session of a skipped student is ended. Also the seconds to wait for a student that has not joined yet.",
        json_schema_extra=OPERATIONAL,
    )
    keepalive: float = Field(
        default=30.0,
        ge=5,
        le=240,
        description="Seconds between the pings that detect a vanished peer. The peer has 10 s to answer.",
        json_schema_extra=OPERATIONAL,
    )
    waiting_notice: float = Field(
        default=5.0,
        gt=0,
        description="Seconds between the server's notices to waiting workers.",
        json_schema_extra=OPERATIONAL,
    )
    journal: Journal = Field(
        default_factory=Journal, description="The closed rounds on the server's disk.", json_schema_extra=OPERATIONAL
    )

    @model_validator(mode="after")
    def _waits_in_order(self) -> Exchange:
        """Check that each wait ends before a longer one that it is part of."""
        waits = [("waiting_notice", self.waiting_notice), ("give_up_after", self.give_up_after)]
        if self.on_absence == "proceed":
            waits = [
                *([("round_deadline", self.round_deadline)] if self.round_deadline != "auto" else []),
                ("evict_after", self.evict_after),
                (f"keepalive + {KEEPALIVE_ANSWER:g}", self.keepalive + KEEPALIVE_ANSWER),
                ("give_up_after", self.give_up_after),
            ]
        for (name, shorter), (longer_name, longer) in pairwise(waits):
            if shorter >= longer:
                raise ValueError(f"{name}: {shorter} s must be shorter than {longer_name}: {longer} s")
        return self
