"""The records of a run: JSON lines that reports are made from.

The server appends to two files of a run's folder. ``metrics.jsonl`` holds :class:`Joined`, :class:`Measured`,
:class:`Paced` and :class:`RoundsClosed`; ``events.jsonl`` holds :class:`Happened`. ``supervisor.jsonl`` holds
:class:`Happened` lines of the process that starts and restarts the others, so it also has events of times without a server.

A student that resumes repeats the steps after its checkpoint. So of several lines about the same participant, split and
number of steps, the last one counts. A last line without its end, as a killed process leaves it, is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

__all__ = ["Happened", "Joined", "Measured", "Paced", "ParticipantWait", "Record", "RoundsClosed", "parse", "read"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)

    time: float = Field(description="Seconds since 1970-01-01 UTC.")


class Joined(_Record):
    """A participant joined the run."""

    kind: Literal["joined"] = "joined"
    participant: str
    model: str
    parameters: int
    device: str
    total_rounds: int
    """Rounds of the whole run; 0 where nothing is exchanged."""
    total_steps: int
    """Steps of each student."""


class Measured(_Record):
    """A participant's accuracy and loss on one split."""

    kind: Literal["measured"] = "measured"
    participant: str
    split: Literal["train", "test"]
    steps_trained: int
    """Steps that the student had trained when it was measured; 0 for a teacher."""
    epochs_trained: float
    """The same in epochs, fractions included."""
    accuracy: float
    """Share of samples classified correctly, 0 to 1."""
    loss: float
    """Mean cross-entropy in nats."""
    distillation_loss: float | None = None


class Paced(_Record):
    """A participant's speed: medians since its last report, in seconds."""

    kind: Literal["paced"] = "paced"
    participant: str
    steps_trained: int
    """Steps that the student has trained; for a teacher, those it has taught."""
    step_seconds: float
    """The time of a step, waiting included."""
    wait_seconds: float
    """The time that a step waited for its targets."""


class ParticipantWait(BaseModel):
    """How long the other participants waited for one, over a span of rounds."""

    model_config = ConfigDict(frozen=True)

    rounds: int
    """The number of rounds in which it was the last to contribute."""
    seconds: float
    """The total time for which it was the only one missing."""


class RoundsClosed(_Record):
    """A span of closed rounds, `first` to `last` inclusive."""

    kind: Literal["rounds"] = "rounds"
    first: int
    last: int
    steps_trained: int
    """Steps of each student up to and with that of `last`."""
    seconds: float
    """From the closing of the round before `first` to the closing of `last`."""
    wait_p50: float
    """Median over the rounds of the time from the first contribution to the last, in seconds."""
    wait_max: float
    waits: dict[str, ParticipantWait]
    ensemble_accuracy: float | None = None
    """Share of training samples that the mean of the students' probabilities classifies correctly, over the rounds of one
    epoch up to `last`."""
    disagreement: dict[str, float] = Field(default_factory=dict)
    """Share of the same samples on which two students differ, by ``first|second``."""
    missed: dict[str, int] = Field(default_factory=dict)
    """How many of the rounds closed without a participant, by its name."""
    without_targets: int = 0
    """How many of the rounds closed below the quorum, without targets."""


class Happened(_Record):
    """An event: a short stable word, the participant if any, and a line for people."""

    kind: Literal["event"] = "event"
    what: str
    participant: str = ""
    message: str = ""


Record = Annotated[Joined | Measured | Paced | RoundsClosed | Happened, Field(discriminator="kind")]

_RECORD: TypeAdapter[Record] = TypeAdapter(Record)


def read(path: Path) -> Iterator[Record]:
    """Yield a file's records in order; none if there is no such file.

    Raises:
        ValueError: a line other than an unfinished last one is not a record.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield parse(line, path, line_number)


def parse(line: bytes, path: Path, line_number: int) -> Record:
    """Return the record of one line of a file.

    Raises:
        ValueError: the line is not a record.
    """
    try:
        return _RECORD.validate_json(line)
    except ValidationError as error:
        raise ValueError(f"{path}: line {line_number} is not a record of a run: {error.errors()[0]['msg']}") from error
