"""What the processes do: codistill's server and workers without a model, and the members of a gloo group."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import parse
from codistill.config.fingerprint import identity
from codistill.peer.grpc import GrpcTransport
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill_deploy.supervise.discovery import find_server
from codistill_server.app import ServeOptions, serve
from codistill_server.ensembles import min_logit
from round_trips.course import Configuration, Course

__all__ = ["Gather", "Serve", "Task", "Work", "experiment_of"]


class Task(Protocol):
    """What one process does in a measurement."""

    def run(self) -> list[float]:
        """Does it, and returns the seconds of each timed round trip."""
        ...


@dataclass(frozen=True)
class Serve:
    """The aggregation server, until its workers have finished."""

    experiment: str
    folder: Path
    limit: float

    def run(self) -> list[float]:
        """Serves; nothing is timed here."""
        stop = threading.Event()
        timer = threading.Timer(self.limit, stop.set)
        timer.start()
        try:
            serve(parse(self.experiment), ServeOptions("127.0.0.1:0", self.folder), stop)
        finally:
            timer.cancel()
            stop.set()
        return []


@dataclass(frozen=True)
class Work:
    """A worker of codistill without a model."""

    experiment: str
    folder: Path
    course: Course

    def run(self) -> list[float]:
        """See :class:`Task`."""
        course, stop = self.course, threading.Event()
        batch, classes = course.configuration.batch, course.configuration.classes
        logits, labels = torch.from_numpy(course.logits()), torch.from_numpy(course.labels())
        ids = torch.arange(batch)
        exchange = GrpcTransport(
            find_server(self.folder, course.limit, stop),
            connect_timeout=course.limit,
            give_up_after=course.limit,
            stop=stop,
        )

        def round_trip(number: int) -> torch.Tensor:
            outputs = {"logits": encode(logits, "float32")}
            samples = pb.Samples(ids=encode(ids, "int64"), labels=encode(labels, "int64"), outputs=outputs)
            exchange.send(pb.Contribution(round=number, batch=samples))
            return decode(exchange.receive(number).targets["logits"])

        try:
            exchange.join(
                pb.JoinRequest(
                    protocol_version=PROTOCOL_VERSION,
                    student=_student(course.position),
                    experiment=identity(parse(self.experiment)),
                    data=pb.DataFingerprint(
                        digest=64 * "0", train_samples=batch * course.total_rounds, classes=classes
                    ),
                    outputs={"logits": pb.Shape(dims=[classes])},
                    total_rounds=course.total_rounds,
                )
            )
            seconds = course.time(round_trip)
            exchange.leave(pb.LEAVE_REASON_FINISHED, "measured")
        finally:
            exchange.close()
        return seconds


@dataclass(frozen=True)
class Gather:
    """A process of a gloo group."""

    folder: Path
    course: Course

    def run(self) -> list[float]:
        """See :class:`Task`."""
        course = self.course
        logits, labels = torch.from_numpy(course.logits()), torch.from_numpy(course.labels())
        workers = course.configuration.workers
        everyone = torch.empty(workers, *logits.shape)
        parts = list(everyone.unbind())

        def round_trip(number: int) -> torch.Tensor:
            del number
            dist.all_gather(parts, logits)
            return min_logit(everyone, labels)

        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.folder / 'store'}",
            rank=course.position,
            world_size=workers,
            timeout=timedelta(seconds=course.limit),
        )
        try:
            seconds = course.time(round_trip)
            dist.barrier()
        finally:
            dist.destroy_process_group()
        return seconds


def _student(position: int) -> str:
    return f"student{position}"


def experiment_of(configuration: Configuration) -> str:
    """Returns an experiment file; its data set and models are never loaded."""
    document = {
        "name": "benchmark",
        "data": {"dataset": "image_folder", "classes": configuration.classes, "image_size": 32},
        "training": {"epochs": 1, "batch_size": configuration.batch},
        "distillation": {"method": "kdcl", "ensemble": "min_logit"},
        "students": [{"name": _student(position), "model": "mlp"} for position in range(configuration.workers)],
    }
    return json.dumps(document)  # which is YAML
