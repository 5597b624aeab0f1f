"""Shared by the tests of transports: its messages, rounds of all participants, and waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity, identity_sha256
from codistill.peer.grpc import GrpcTransport
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import encode

BOUND = 10.0
"""Seconds far above what anything here takes, far below what it would take unbounded."""

Connect = Callable[..., GrpcTransport]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def request(experiment: Experiment, participant: str = "cnn", first: int = 0, **changes: Any) -> pb.JoinRequest:
    steps = experiment.training.epochs * (48 // experiment.training.batch_size)
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "participant": participant,
        "experiment_sha256": identity_sha256(experiment),
        "experiment_json": identity(experiment),
        "data": pb.DataFingerprint(data_sha256=bytes(32), train_samples=48, classes=10),
        "outputs": {"logits": pb.Shape(dims=[10])},
        "first_round": first,
        "total_rounds": steps if experiment.distillation.exchanges else 0,
        "steps_trained": first,
        "total_steps": steps,
    }
    return pb.JoinRequest(**{**fields, **changes})


def contribution(number: int, seed: int) -> pb.ExchangeRequest:
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(100 * seed + number))
    labels = torch.arange(16) % 10
    samples = pb.SampleOutputs(
        ids=encode(torch.arange(16) + number, "int64"),
        labels=encode(labels, "int64"),
        outputs={"logits": encode(logits, "float32")},
    )
    return pb.ExchangeRequest(round=number, batch=samples)


def report(number: int, *steps: int, durable: int = 0) -> pb.ReportRequest:
    measurements = [
        pb.Measurement(split=pb.SPLIT_TEST, steps_trained=measured, accuracy=0.5, loss=measured) for measured in steps
    ]
    return pb.ReportRequest(
        steps_trained=number,
        epochs_trained=number / 3,
        round=number,
        durable_round=durable,
        measurements=measurements,
    )


def exchange_round(number: int, transports: list[GrpcTransport]) -> list[pb.Targets]:
    """Exchange one round, every participant on a thread of its own, as it would be in a process of its own."""

    def take_part(seed: int) -> pb.Targets:
        transports[seed].send(contribution(number, seed))
        return transports[seed].receive(number)

    with ThreadPoolExecutor(len(transports)) as pool:
        return list(pool.map(take_part, range(len(transports))))


def both(experiment: Experiment, address: str, connect: Connect, **settings: Any) -> list[GrpcTransport]:
    transports = [connect(address, **settings) for _ in experiment.names]
    for name, transport in zip(experiment.names, transports, strict=True):
        transport.join(request(experiment, name))
    return transports


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException | object]]:
    """Run work beside; the list gets its result, or what it raised."""
    outcome: list[BaseException | object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the test
            outcome.append(error)

    thread = threading.Thread(target=run, name="background")
    thread.start()
    return thread, outcome
