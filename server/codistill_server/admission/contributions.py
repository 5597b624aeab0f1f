"""Contributions: the size limit, decoding and validation, and a round's inputs for its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.methods.aggregator import Output, RoundInputs
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import TensorError, check, decode, encoded_size
from codistill_server import methods
from codistill_server.errors import RequestRejected
from codistill_server.rounds.actions import Decide, Status
from codistill_server.rounds.events import Contribution, Samples

__all__ = ["Contributions", "receive_limit"]

_LARGEST_LOGIT = 1e30  # sums and differences that the ensembles compute stay finite in float32


def receive_limit(experiment: Experiment) -> int:
    """Return the size in bytes of the largest message that an experiment can need.

    That is a contribution with its held-out samples and the largest outputs that the method takes, or a join with the
    experiment's identity. 64 KiB are added for names and lengths.
    """
    aggregator = methods.create(experiment.distillation)
    classes, dtype = experiment.data.class_count, experiment.exchange.dtype
    samples = [experiment.training.batch_size]
    if experiment.data.held_out:
        samples.append(experiment.data.held_out)

    def contribution(outputs: Mapping[str, Output]) -> int:
        shapes = [output.largest(classes) for output in outputs.values()]
        return sum(
            2 * encoded_size([size], "int64") + sum(encoded_size([size, *shape], dtype) for shape in shapes)
            for size in samples
        )

    published: list[Mapping[str, Output]] = []
    if aggregator is not None:
        published = [aggregator.student, aggregator.teacher if experiment.teachers else {}]
    return max(*map(contribution, published), len(identity(experiment)), 0) + 65536


@dataclass(frozen=True)
class _Payload:
    """A contribution's decoded outputs by name, [B, ...] each, and labels [B] int64; the same of its held-out samples."""

    outputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    held_out: Mapping[str, torch.Tensor]
    held_out_labels: torch.Tensor | None


class Contributions:
    """Decodes one run's contributions, and makes a round's inputs of them."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._classes = experiment.data.class_count
        self._dtype = experiment.exchange.dtype
        self._teachers = frozenset(experiment.teacher_names)

    def decode(
        self,
        participant: str,
        message: pb.ExchangeRequest,
        shapes: Mapping[str, list[int]],
    ) -> Contribution:
        """Decode and validate a contribution.

        Args:
            participant: its sender.
            message: the contribution as it arrived.
            shapes: the shapes of the participant's outputs by name, without the samples.

        Raises:
            RequestRejected: a value contradicts the experiment; the text names the field.
        """
        try:
            samples, outputs, labels = self._decode_samples(
                participant, message.batch, "batch", message.round, self._experiment.training.batch_size, shapes
            )
            held_out: Samples | None = None
            held_out_outputs: Mapping[str, torch.Tensor] = {}
            held_out_labels: torch.Tensor | None = None
            if message.HasField("held_out"):
                if not self._experiment.data.held_out:
                    raise TensorError("held_out: some samples are not allowed; this run's experiment holds out none")
                held_out, held_out_outputs, held_out_labels = self._decode_samples(
                    participant, message.held_out, "held_out", message.round, self._experiment.data.held_out, shapes
                )
        except TensorError as error:
            raise RequestRejected(
                Status.INVALID_ARGUMENT, f"participant {participant!r}, round {message.round}: {error}"
            ) from error
        payload = _Payload(outputs, labels, held_out_outputs, held_out_labels)
        return Contribution(message.round, samples, held_out, payload)

    def _decode_samples(
        self,
        participant: str,
        message: pb.SampleOutputs,
        field: str,
        round_number: int,
        size: int,
        shapes: Mapping[str, list[int]],
    ) -> tuple[Samples, Mapping[str, torch.Tensor], torch.Tensor]:
        check(message.ids, f"{field}.ids", dtype="int64", shape=[size])
        check(message.labels, f"{field}.labels", dtype="int64", shape=[size])
        if message.sparse_outputs:
            raise TensorError(f"{field}.sparse_outputs: some are not allowed; this session's arrays are dense")
        if set(message.outputs) != set(shapes):
            raise TensorError(f"{field}.outputs: {sorted(message.outputs)} are not allowed; expected {sorted(shapes)}")
        for name, dims in shapes.items():
            check(message.outputs[name], f"{field}.outputs.{name}", dtype=self._dtype, shape=[size, *dims])
        labels = decode(message.labels)
        if not (int(labels.min()) >= 0 and int(labels.max()) < self._classes):
            bad = int(labels[(labels < 0) | (labels >= self._classes)][0])
            raise TensorError(f"{field}.labels: {bad} is not a class; allowed: 0 to {self._classes - 1}")
        outputs = {name: decode(message.outputs[name]) for name in shapes}
        for name, values in outputs.items():
            low, high = torch.aminmax(values)  # both NaN where any value is
            if not (float(low) >= -_LARGEST_LOGIT and float(high) <= _LARGEST_LOGIT):
                place = torch.nonzero(~(values.double().abs() <= _LARGEST_LOGIT))[0].tolist()
                why = (
                    "the teacher's weights are damaged"
                    if participant in self._teachers
                    else "the student has diverged, lower its learning rate"
                )
                raise RequestRejected(
                    Status.INVALID_ARGUMENT,
                    f"participant {participant!r}, round {round_number}: {field}.outputs.{name}{place} is "
                    f"{values[tuple(place)].item()}; allowed are finite values of magnitude up to {_LARGEST_LOGIT:g}: {why}",
                )
        return Samples(message.ids.data, message.labels.data), outputs, labels

    def round_inputs(self, decide: Decide, state: Mapping[str, torch.Tensor], *, include_missing: bool) -> RoundInputs:
        """Return a round's contributions as its method's inputs, float32.

        Args:
            decide: the round.
            state: the method's state after the round before.
            include_missing: whether students that did not contribute will ask for the targets.
        """
        payloads = {name: cast("_Payload", sent.payload) for name, sent in decide.contributions.items()}
        students = [payload for name, payload in payloads.items() if name not in self._teachers]
        first = next(iter(payloads.values()))
        of_students = students[0] if students else _Payload({}, first.labels, {}, None)
        return RoundInputs(
            students=tuple(name for name in payloads if name not in self._teachers),
            outputs={
                name: torch.stack([student.outputs[name] for student in students]).float()
                for name in of_students.outputs
            },
            labels=first.labels,
            teachers={
                name: {key: value.float() for key, value in payload.outputs.items()}
                for name, payload in payloads.items()
                if name in self._teachers
            },
            held_out={
                name: torch.stack([student.held_out[name] for student in students]).float()
                for name in of_students.held_out
            },
            held_out_labels=of_students.held_out_labels,
            state=state,
            include_missing=include_missing,
        )
