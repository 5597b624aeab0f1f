"""Validation of a worker that asks to join, and the facts to which the first workers settle the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import difference, identity, identity_sha256
from codistill.config.schedule import ExchangeSchedule
from codistill.methods.aggregator import Aggregator, Output
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.words import word
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Status
from codistill_server.storage.journal import Journal

__all__ = ["JoinAdmission"]

_DIGEST_BYTES = 64  # of a digest from outside, which may have any length
_LARGEST_COUNT = 2**53  # what JSON, the journal's 64-bit integers and float metrics all hold exactly

_WHICH_DATA = (
    "; labels, images or the samples held out differ: compare the lines `data digests` of the workers' logs, then give all "
    "workers the same files"
)


class JoinAdmission:
    """Admits workers that compute the same run, and settles facts that the experiment leaves open.

    Such facts are the data set's size and digest, output shapes and teachers' weights. The run's length follows from the size.

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
        self._sha256 = identity_sha256(experiment)
        self._classes = experiment.data.class_count
        self._participants = frozenset(experiment.participants)
        self._teachers = frozenset(experiment.teacher_names)
        self._settled: Mapping[str, int | str] = json.loads(journal.settled("data") or "{}")
        self._shapes: dict[str, Mapping[str, list[int]]] = {}

    @property
    def train_samples(self) -> int:
        """The number of samples to train on; 0 until the first worker has joined."""
        return int(self._settled.get("data.train_samples", 0))

    @property
    def total_rounds(self) -> int:
        """The number of rounds of the run; 0 until the first worker has joined, and where nothing is exchanged."""
        return self._rounds_of(self.train_samples)

    @property
    def total_steps(self) -> int:
        """The number of steps of each student; 0 until the first worker has joined."""
        return self._steps_of(self.train_samples)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch; 0 until the first worker has joined."""
        return self.train_samples // self._experiment.training.batch_size

    @property
    def schedule(self) -> ExchangeSchedule:
        """Which steps exchange; it holds once the first worker has joined."""
        return self._schedule_of(self.train_samples)

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
        if request.participant not in self._participants:
            return  # the state machine names the participants there are
        self._check_experiment(request)
        if request.data.classes != self._classes:
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"data.classes: the run has {self._classes}, this worker {request.data.classes}",
            )
        self._check_length(request)
        facts = _facts(request)
        dataset = self._experiment.data.dataset
        seeding = (
            f"; {dataset!r} must return the same in every process: seed whatever it draws" if ":" in dataset else ""
        )
        for field, value in self._settled.items():
            if facts[field] != value:
                which = _WHICH_DATA if field == "data.data_sha256" else ""
                raise RequestRejected(
                    Status.FAILED_PRECONDITION,
                    f"{field}: the run has {value}, this worker {facts[field]}; all participants need the same data set, "
                    f"in the same order{which}{seeding}",
                )
        self._check_outputs(request)
        self._check_weights(request)
        _check_offer("lanes", pb.Lane, request.lanes, pb.LANE_GRPC)
        _check_offer("encodings", pb.Encoding, request.encodings, pb.ENCODING_DENSE)

    def _check_experiment(self, request: pb.JoinRequest) -> None:
        """Reject a worker of another experiment; its JSON, where it sent any, says what differs."""
        if request.experiment_sha256 == self._sha256:
            return
        differs = difference(self._identity, request.experiment_json) if request.experiment_json else None
        theirs = request.experiment_sha256[:_DIGEST_BYTES].hex() or "none"
        digests = f"experiment_sha256: the run has {self._sha256.hex()}, this worker {theirs}"
        raise RequestRejected(
            Status.FAILED_PRECONDITION, f"{differs or digests}; start both from the same experiment file"
        )

    def _check_length(self, request: pb.JoinRequest) -> None:
        """Reject a worker whose numbers of samples, steps and rounds do not follow from the experiment."""
        training, samples = self._experiment.training, request.data.train_samples
        largest = _LARGEST_COUNT // training.epochs  # so that the steps are no more than that either
        if not training.batch_size <= samples <= largest:
            raise RequestRejected(
                Status.INVALID_ARGUMENT,
                f"data.train_samples: {samples} is not allowed; allowed: {training.batch_size}, one batch, to "
                f"{largest}",
            )
        steps, rounds = self._steps_of(samples), self._rounds_of(samples)
        epoch = samples // training.batch_size
        for field, value, expected, why in (
            ("total_steps", request.total_steps, steps, f"{training.epochs} epochs of {epoch} steps"),
            ("total_rounds", request.total_rounds, rounds, f"as many of the {steps} steps exchange"),
        ):
            if value != expected:
                raise RequestRejected(
                    Status.INVALID_ARGUMENT, f"{field}: {value} is not allowed; allowed: {expected}, {why}"
                )
        for field, value, largest in (
            ("steps_trained", request.steps_trained, steps),
            ("first_round", request.first_round, rounds),
        ):
            if value > largest:
                raise RequestRejected(
                    Status.INVALID_ARGUMENT, f"{field}: {value} is not allowed; allowed: 0 to {largest}"
                )

    def _steps_of(self, train_samples: int) -> int:
        """Return the number of steps of a run with so many samples to train on."""
        training = self._experiment.training
        return training.epochs * (train_samples // training.batch_size)

    def _rounds_of(self, train_samples: int) -> int:
        """Return the number of its rounds."""
        if self._aggregator is None:
            return 0
        return self._schedule_of(train_samples).rounds_before(self._steps_of(train_samples))

    def _schedule_of(self, train_samples: int) -> ExchangeSchedule:
        """Return which of its steps exchange."""
        steps_per_epoch = train_samples // self._experiment.training.batch_size
        return self._experiment.distillation.exchange_schedule(steps_per_epoch)

    def _check_outputs(self, request: pb.JoinRequest) -> None:
        """Reject a worker whose outputs are not those that the method takes, or not in the settled shapes."""
        participant, outputs = request.participant, _shapes(request)
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
        settled = self._journal.settled(f"weights/{request.participant}")
        theirs = request.weights_sha256[:_DIGEST_BYTES].hex()
        if request.participant in self._teachers and settled not in (None, theirs):
            raise RequestRejected(
                Status.FAILED_PRECONDITION,
                f"weights_sha256: the run has a teacher {request.participant!r} with weights of SHA-256 {settled}, this worker's are "
                f"{theirs}; give its teachers.weights the file that the run began with",
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
        participant = request.participant
        self._shapes[participant] = _shapes(request)
        if any(any(output.limits) for output in self._expected_outputs(participant).values()):
            self._settle_once(self._outputs_key(participant), json.dumps(self._shapes[participant]))
        if participant in self._teachers:
            self._settle_once(f"weights/{participant}", request.weights_sha256[:_DIGEST_BYTES].hex())

    def _settle_once(self, key: str, value: str) -> None:
        if self._journal.settled(key) is None:
            self._journal.settle(key, value)


def _check_offer(field: str, enum: Any, offered: Sequence[int], taken: int) -> None:
    """Reject a worker that offers other ways of exchange than the one that this server takes."""
    if offered and taken not in offered:
        names = ", ".join(f"{number} ({word(enum, number)})" for number in offered)
        raise RequestRejected(
            Status.FAILED_PRECONDITION, f"{field}: {names}; allowed: {taken} ({word(enum, taken)}), or none given"
        )


def _shapes(request: pb.JoinRequest) -> dict[str, list[int]]:
    """Return the shapes of a worker's outputs, by name."""
    return {name: list(shape.dims) for name, shape in sorted(request.outputs.items())}


def _facts(request: pb.JoinRequest) -> dict[str, int | str]:
    """Return the facts on the data that every worker must agree on, by the fields' names."""
    return {
        "data.train_samples": request.data.train_samples,
        "data.data_sha256": request.data.data_sha256[:_DIGEST_BYTES].hex() or "none",
    }
