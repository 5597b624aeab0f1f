"""The journal's cost for a round: rounds closed by the server's core, with and without one.

Contributions of two students with random logits go to coordinators that differ in their journal alone. There is none at
all, one in memory, one on disk (`durability: process`, the default), or one that is synced each round (`power`). They
take turns round by round, so that other load on the machine slows all alike. No socket and no training: a round
here is the decoding, the ensemble (KDCL's min_logit), the journal and the answers, as the server does them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity, identity_sha256
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import encode
from codistill_server.coordinator import Coordinator
from codistill_server.observability.state import RunState
from codistill_server.rounds.actions import Status
from codistill_server.storage.journal import ClosedRound, Journal

_STUDENTS = ("first", "second")
_STEPS = 10**6


class _Nothing(Journal):
    """A journal that keeps nothing of a round."""

    def append(self, closed: ClosedRound) -> None:
        """Drop it."""


class _Drain:
    """An outbox that nobody reads."""

    def reply(self, reply: bytes) -> None:
        """Drop a reply."""

    def end(self, status: Status, message: str) -> None:
        """Fail: no session ends here."""
        raise RuntimeError(f"{status.value}: {message}")


class _Contender:
    """A coordinator whose two students contribute in turn."""

    def __init__(self, experiment: Experiment, journal: Journal) -> None:
        samples = experiment.training.batch_size * _STEPS
        self._coordinator = Coordinator(experiment, journal, RunState(experiment, lambda _: None))
        self._session_ids: list[int] = []
        for name in experiment.names:
            request = pb.JoinRequest(
                protocol_version=PROTOCOL_VERSION,
                participant=name,
                experiment_sha256=identity_sha256(experiment),
                data=pb.DataFingerprint(train_samples=samples, classes=experiment.data.class_count),
                outputs={"logits": pb.Shape(dims=[experiment.data.class_count])},
                total_rounds=_STEPS,
                total_steps=_STEPS,
            )
            session_id = self._coordinator.join(request).session_id
            self._coordinator.open_stream(session_id, _Drain())
            self._session_ids.append(session_id)

    def close_round(self, messages: list[pb.ExchangeRequest]) -> float:
        """Close a round, and return the seconds that it took."""
        started = time.perf_counter()
        for session_id, message in zip(self._session_ids, messages, strict=True):
            self._coordinator.contribute(session_id, message, 0)
        return time.perf_counter() - started

    def close(self) -> None:
        """Close the journal."""
        self._coordinator.close()


def _experiment(batch: int, classes: int) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "journal",
            "data": {"dataset": "somewhere:make", "classes": classes},
            "training": {"epochs": 1, "batch_size": batch},
            "distillation": {"method": "kdcl", "ensemble": "min_logit"},
            "students": [{"name": name, "model": "mlp"} for name in _STUDENTS],
        }
    )


def _messages(round_number: int, batch: int, classes: int) -> list[pb.ExchangeRequest]:
    ids, labels = torch.arange(batch), torch.randint(0, classes, (batch,))
    return [
        pb.ExchangeRequest(
            round=round_number,
            batch=pb.SampleOutputs(
                ids=encode(ids, "int64"),
                labels=encode(labels, "int64"),
                outputs={"logits": encode(torch.randn(batch, classes), "float32")},
            ),
        )
        for _ in _STUDENTS
    ]


def _measure(batch: int, classes: int, rounds: int, folder: Path) -> dict[str, float]:
    experiment = _experiment(batch, classes)
    run = identity(experiment)
    makers: dict[str, Callable[[], Journal]] = {
        "none": lambda: _Nothing(None, run),
        "memory": lambda: Journal(None, run),
        "process": lambda: Journal(folder / "process.sqlite", run),
        "power": lambda: Journal(folder / "power.sqlite", run, "power"),
    }
    contenders = {name: _Contender(experiment, make()) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds):
        messages = _messages(round_number, batch, classes)
        for name, contender in contenders.items():
            times[name].append(contender.close_round(messages))
    for contender in contenders.values():
        contender.close()
    return {name: statistics.median(seconds[rounds // 10 :]) for name, seconds in times.items()}


def main(
    rounds: Annotated[int, typer.Option(min=20, help="Rounds for each journal and shape.")] = 500,
    shapes: Annotated[str, typer.Option(help="BATCHxCLASSES of the logits, separated by commas.")] = (
        "64x10,128x100,256x1000"
    ),
) -> None:
    """Print a table: microseconds that each journal adds to a round."""
    torch.set_num_threads(1)
    table = Table(box=box.MARKDOWN)
    for heading in ("logits", "no journal µs", "memory adds µs", "process adds µs", "power adds µs"):
        table.add_column(heading, justify="right")
    for shape in shapes.split(","):
        batch, classes = (int(part) for part in shape.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            medians = _measure(batch, classes, rounds, Path(folder))
        added = [f"{1e6 * (medians[name] - medians['none']):.0f}" for name in ("memory", "process", "power")]
        table.add_row(shape, f"{1e6 * medians['none']:.0f}", *added)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
