"""The tasks of the processes: codistill's server and workers without a model, and the ranks of a gloo group."""

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
from codistill.config.fingerprint import identity_sha256
from codistill.peer.grpc import GrpcTransport
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill_deploy.supervise.discovery import find_server
from codistill_server.app import ServeOptions, serve
from codistill_server.ensembles import min_logit
from round_trips.workload import Configuration, Workload

__all__ = ["GlooTask", "ServerTask", "Task", "WorkerTask", "experiment_file"]


class Task(Protocol):
    """The work of one process in a measurement."""

    def run(self) -> list[float]:
        """Do it, and return the seconds of each timed round trip."""
        ...


@dataclass(frozen=True)
class ServerTask:
    """The aggregation server, until its workers have finished."""

    experiment: str
    folder: Path
    limit: float

    def run(self) -> list[float]:
        """Serve; nothing is timed here."""
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
class WorkerTask:
    """A worker of codistill without a model."""

    experiment: str
    folder: Path
    workload: Workload

    def run(self) -> list[float]:
        """See :class:`Task`."""
        workload, stop = self.workload, threading.Event()
        batch, classes = workload.configuration.batch, workload.configuration.classes
        logits, labels = torch.from_numpy(workload.logits()), torch.from_numpy(workload.labels())
        ids = torch.arange(batch)
        transport = GrpcTransport(
            find_server(self.folder, workload.limit, stop),
            connect_timeout=workload.limit,
            give_up_after=workload.limit,
            stop=stop,
        )

        def round_trip(round_number: int) -> torch.Tensor:
            outputs = {"logits": encode(logits, "float32")}
            samples = pb.SampleOutputs(ids=encode(ids, "int64"), labels=encode(labels, "int64"), outputs=outputs)
            transport.send(pb.ExchangeRequest(round=round_number, batch=samples))
            return decode(transport.receive(round_number).targets["logits"])

        try:
            transport.join(
                pb.JoinRequest(
                    protocol_version=PROTOCOL_VERSION,
                    participant=_student(workload.position),
                    experiment_sha256=identity_sha256(parse(self.experiment)),
                    data=pb.DataFingerprint(train_samples=batch * workload.total_rounds, classes=classes),
                    outputs={"logits": pb.Shape(dims=[classes])},
                    total_rounds=workload.total_rounds,
                    total_steps=workload.total_rounds,
                )
            )
            seconds = workload.time(round_trip)
            transport.leave(pb.LEAVE_REASON_FINISHED, "measured")
        finally:
            transport.close()
        return seconds


@dataclass(frozen=True)
class GlooTask:
    """One rank of a gloo group."""

    folder: Path
    workload: Workload

    def run(self) -> list[float]:
        """See :class:`Task`."""
        workload = self.workload
        logits, labels = torch.from_numpy(workload.logits()), torch.from_numpy(workload.labels())
        workers = workload.configuration.workers
        all_logits = torch.empty(workers, *logits.shape)
        rows = list(all_logits.unbind())

        def round_trip(round_number: int) -> torch.Tensor:
            del round_number
            dist.all_gather(rows, logits)
            return min_logit(all_logits, labels)

        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.folder / 'store'}",
            rank=workload.position,
            world_size=workers,
            timeout=timedelta(seconds=workload.limit),
        )
        try:
            seconds = workload.time(round_trip)
            dist.barrier()
        finally:
            dist.destroy_process_group()
        return seconds


def _student(position: int) -> str:
    return f"student{position}"


def experiment_file(configuration: Configuration) -> str:
    """Return the text of an experiment file; its data set and models are never loaded."""
    document = {
        "name": "benchmark",
        "data": {"dataset": "image_folder", "classes": configuration.classes, "image_size": 32},
        "training": {"epochs": 1, "batch_size": configuration.batch},
        "distillation": {"method": "kdcl", "ensemble": "min_logit"},
        "students": [{"name": _student(position), "model": "mlp"} for position in range(configuration.workers)],
    }
    return json.dumps(document)  # which is YAML
