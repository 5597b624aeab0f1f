"""What is checked of a worker that wants to join, and what the run is held to from then on."""

from __future__ import annotations

import json
from collections.abc import Mapping

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import difference, identity
from codistill.methods.aggregator import Aggregator, Output
from codistill.v1 import distillation_pb2 as pb
from codistill_server.errors import RequestRejected, printable
from codistill_server.rounds.events import Status
from codistill_server.storage.journal import Journal

__all__ = ["JoinAdmission"]

_LARGEST_ROUND = 2**53  # what JSON, the journal's 64-bit integers and float metrics all hold exactly


class JoinAdmission:
    """Lets in who computes the same run, and settles what the experiment does not say.

    Args:
        experiment: the run's experiment.
        journal: keeps what is settled.
        half: the method's server half; None where nothing is exchanged.
    """

    def __init__(self, experiment: Experiment, journal: Journal, half: Aggregator | None) -> None:
        self._experiment = experiment
        self._journal = journal
        self._half = half
        self._identity = identity(experiment)
        self._classes = experiment.data.class_count
        self._participants = frozenset(experiment.participants)
        self._teachers = frozenset(experiment.teacher_names)
        self._settled: Mapping[str, int | str] = json.loads(journal.settled("data") or "{}")
        self._shapes: dict[str, Mapping[str, list[int]]] = {}

    @property
    def train_samples(self) -> int:
        """How many samples there are to train on; 0 until the first worker has said it."""
        return int(self._settled.get("data.train_samples", 0))

    def shapes_of(self, participant: str) -> Mapping[str, list[int]]:
        """Returns the shapes of what a student or a teacher publishes, by name; none before it was let in."""
        return self._shapes.get(participant, {})

    def check(self, request: pb.JoinRequest) -> None:
        """Sees that a worker computes what the others do.

        Raises:
            RequestRejected: something differs from the run; the text names the field and both values.
        """
        if request.protocol_version != PROTOCOL_VERSION:
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"protocol_version: the server speaks {PROTOCOL_VERSION}, this worker {request.protocol_version}; "
                "install the same codistill on both sides",
            )
        if request.student not in self._participants:
            return  # the state machine names the students there are
        if request.total_rounds > _LARGEST_ROUND:
            raise RequestRejected(
                Status.INVALID_ARGUMENT,
                f"total_rounds: {request.total_rounds} is not allowed; allowed are at most {_LARGEST_ROUND}",
            )
        if request.first_round > request.total_rounds:
            raise RequestRejected(
                Status.INVALID_ARGUMENT,
                f"first_round: {request.first_round} is not allowed; allowed: 0 to total_rounds, {request.total_rounds}",
            )
        differs = difference(self._identity, request.experiment)
        if differs is not None:
            raise RequestRejected(Status.FAILED_PRECONDITION, f"{differs}; start both from the same experiment file")
        if request.data.classes != self._classes:
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"data.classes: the run has {self._classes}, this worker {request.data.classes}",
            )
        theirs = _course(request)
        dataset = self._experiment.data.dataset
        drawn = f"; {dataset!r} must return the same in every process: seed whatever it draws" if ":" in dataset else ""
        for field, value in self._settled.items():
            if theirs[field] != value:
                raise RequestRejected(
                    Status.FAILED_PRECONDITION,
                    f"{field}: the run has {value}, this worker {theirs[field]}; all students need the same data set, "
                    f"in the same order{drawn}",
                )
        self._check_outputs(request)
        self._check_weights(request)

    def _check_outputs(self, request: pb.JoinRequest) -> None:
        """Sees that a worker publishes what the method takes, in the shapes that were settled."""
        who, outputs = request.student, _shapes(request)
        expected, classes = self._expected(who), self._classes
        if self._half is None:
            return
        if outputs.keys() != expected.keys() or not all(
            each.accepts(outputs[name], classes) for name, each in expected.items()
        ):
            allowed = ", ".join(f"'{name}': {each.describe(classes)}" for name, each in sorted(expected.items()))
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"outputs: this worker publishes {outputs}, method {self._experiment.distillation.title} "
                f"with {classes} classes takes {{{allowed}}}",
            )
        settled = self._journal.settled(self._outputs_key(who))
        if settled is not None and json.loads(settled) != outputs:
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"outputs: {who!r} publishes {outputs}, the run was settled to {json.loads(settled)}; its model must give "
                "the same shapes as before, and all students the same",
            )

    def _check_weights(self, request: pb.JoinRequest) -> None:
        """Sees that a teacher is the one that it was."""
        settled = self._journal.settled(f"weights/{request.student}")
        if request.student in self._teachers and settled not in (None, request.weights):
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"weights: the run has a teacher {request.student!r} with weights of digest {settled}, this worker's are "
                f"{printable(request.weights[:128])}; give its teachers.weights the file that the run began with",
            )

    def _expected(self, participant: str) -> Mapping[str, Output]:
        """Returns the outputs that a student or a teacher publishes."""
        if self._half is None:
            return {}
        return self._half.teacher if participant in self._teachers else self._half.student

    def _outputs_key(self, participant: str) -> str:
        """Returns under which key shapes are settled: each teacher has its own, the students' are stacked."""
        return f"outputs/{participant}" if participant in self._teachers else "outputs"

    def settle(self, request: pb.JoinRequest) -> None:
        """Holds the run to the data of the first worker that is let in, and to what nobody else says of its models."""
        if not self._settled:
            self._settled = _course(request)
            self._journal.settle("data", json.dumps(self._settled))
        who = request.student
        self._shapes[who] = _shapes(request)
        if any(any(each.limits) for each in self._expected(who).values()):
            self._settle_once(self._outputs_key(who), json.dumps(self._shapes[who]))
        if who in self._teachers:
            self._settle_once(f"weights/{who}", printable(request.weights[:128]))

    def _settle_once(self, key: str, value: str) -> None:
        if self._journal.settled(key) is None:
            self._journal.settle(key, value)


def _shapes(request: pb.JoinRequest) -> dict[str, list[int]]:
    """Returns the shapes of what a worker publishes, by name."""
    return {name: list(shape.dims) for name, shape in sorted(request.outputs.items())}


def _course(request: pb.JoinRequest) -> dict[str, int | str]:
    """Returns what every worker must say alike of the run's data and length, by the fields' names."""
    return {
        "data.train_samples": request.data.train_samples,
        "data.digest": printable(request.data.digest[:128]),
        "total_rounds": request.total_rounds,
    }
