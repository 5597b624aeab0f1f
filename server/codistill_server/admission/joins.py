"""Validation of a worker that asks to join, and the facts to which the first workers settle the run."""

from __future__ import annotations

import json
from collections.abc import Mapping

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import difference, identity
from codistill.methods.aggregator import Aggregator, Output
from codistill.process.printable import printable
from codistill.v1 import distillation_pb2 as pb
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Status
from codistill_server.storage.journal import Journal

__all__ = ["JoinAdmission"]

_LARGEST_ROUND = 2**53  # what JSON, the journal's 64-bit integers and float metrics all hold exactly

_WHICH_DATA = (
    "; labels, images or the samples held out differ: compare the lines `data digests` of the workers' logs, then give all "
    "workers the same files"
)


class JoinAdmission:
    """Admits workers that compute the same run, and settles facts that the experiment leaves open.

    Such facts are the data set's size and digest, the run's length, output shapes and teachers' weights.

    Args:
        experiment: the run's experiment.
        journal: keeps the settled facts.
        aggregator: the method's aggregator; None where nothing is exchanged.
    """

    def __init__(self, experiment: Experiment, journal: Journal, aggregator: Aggregator | None) -> None:
        self._experiment = experiment
        self._journal = journal
        self._aggregator = aggregator
        self._identity = identity(experiment)
        self._classes = experiment.data.class_count
        self._participants = frozenset(experiment.participants)
        self._teachers = frozenset(experiment.teacher_names)
        self._settled: Mapping[str, int | str] = json.loads(journal.settled("data") or "{}")
        self._shapes: dict[str, Mapping[str, list[int]]] = {}

    @property
    def train_samples(self) -> int:
        """The number of samples to train on; 0 until the first worker has joined."""
        return int(self._settled.get("data.train_samples", 0))

    def shapes_of(self, participant: str) -> Mapping[str, list[int]]:
        """Return the shapes of a participant's outputs by name, without the samples; empty before it has joined."""
        return self._shapes.get(participant, {})

    def check(self, request: pb.JoinRequest) -> None:
        """Reject a worker that would not compute the same run as the others.

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
        facts = _facts(request)
        dataset = self._experiment.data.dataset
        seeding = (
            f"; {dataset!r} must return the same in every process: seed whatever it draws" if ":" in dataset else ""
        )
        for field, value in self._settled.items():
            if facts[field] != value:
                which = _WHICH_DATA if field == "data.digest" else ""
                raise RequestRejected(
                    Status.FAILED_PRECONDITION,
                    f"{field}: the run has {value}, this worker {facts[field]}; all students need the same data set, "
                    f"in the same order{which}{seeding}",
                )
        self._check_outputs(request)
        self._check_weights(request)

    def _check_outputs(self, request: pb.JoinRequest) -> None:
        """Reject a worker whose outputs are not those that the method takes, or not in the settled shapes."""
        participant, outputs = request.student, _shapes(request)
        expected, classes = self._expected_outputs(participant), self._classes
        if self._aggregator is None:
            return
        if outputs.keys() != expected.keys() or not all(
            output.accepts(outputs[name], classes) for name, output in expected.items()
        ):
            allowed = ", ".join(f"'{name}': {output.describe(classes)}" for name, output in sorted(expected.items()))
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"outputs: this worker publishes {outputs}, method {self._experiment.distillation.title} "
                f"with {classes} classes takes {{{allowed}}}",
            )
        settled = self._journal.settled(self._outputs_key(participant))
        if settled is not None and json.loads(settled) != outputs:
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"outputs: {participant!r} publishes {outputs}, the run was settled to {json.loads(settled)}; its model must give "
                "the same shapes as before, and all students the same",
            )

    def _check_weights(self, request: pb.JoinRequest) -> None:
        """Reject a teacher whose weights changed since the run began."""
        settled = self._journal.settled(f"weights/{request.student}")
        if request.student in self._teachers and settled not in (None, request.weights):
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"weights: the run has a teacher {request.student!r} with weights of digest {settled}, this worker's are "
                f"{printable(request.weights[:128])}; give its teachers.weights the file that the run began with",
            )

    def _expected_outputs(self, participant: str) -> Mapping[str, Output]:
        """Return the outputs that the method takes from a participant, by name."""
        if self._aggregator is None:
            return {}
        return self._aggregator.teacher if participant in self._teachers else self._aggregator.student

    def _outputs_key(self, participant: str) -> str:
        """Return the key under which shapes are settled; students share one, as their outputs are stacked."""
        return f"outputs/{participant}" if participant in self._teachers else "outputs"

    def settle(self, request: pb.JoinRequest) -> None:
        """Settle facts that are still open to those of an admitted worker.

        Raises:
            JournalError: they cannot be journalled.
        """
        if not self._settled:
            self._settled = _facts(request)
            self._journal.settle("data", json.dumps(self._settled))
        participant = request.student
        self._shapes[participant] = _shapes(request)
        if any(any(output.limits) for output in self._expected_outputs(participant).values()):
            self._settle_once(self._outputs_key(participant), json.dumps(self._shapes[participant]))
        if participant in self._teachers:
            self._settle_once(f"weights/{participant}", printable(request.weights[:128]))

    def _settle_once(self, key: str, value: str) -> None:
        if self._journal.settled(key) is None:
            self._journal.settle(key, value)


def _shapes(request: pb.JoinRequest) -> dict[str, list[int]]:
    """Return the shapes of a worker's outputs, by name."""
    return {name: list(shape.dims) for name, shape in sorted(request.outputs.items())}


def _facts(request: pb.JoinRequest) -> dict[str, int | str]:
    """Return the facts on data and length that every worker must agree on, by the fields' names."""
    return {
        "data.train_samples": request.data.train_samples,
        "data.digest": printable(request.data.digest[:128]),
        "total_rounds": request.total_rounds,
    }
