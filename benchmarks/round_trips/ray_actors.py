"""A Ray cluster with one actor for each worker, and one that aggregates."""

from __future__ import annotations

import asyncio
import importlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codistill_server.ensembles import min_logit
from round_trips.workload import Array, BenchmarkError, Workload

__all__ = ["RayActors"]


class _Aggregator:
    """An actor that gathers a round's logits and returns the target to each of its workers."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._workers = 0
        self._gathered: dict[int, Array] = {}
        self._target: asyncio.Future[Array] | None = None

    async def begin(self, workers: int) -> None:
        self._workers = workers
        self._gathered, self._target = {}, None

    async def contribute(self, position: int, logits: Array, labels: Array) -> Array:
        target = self._target
        if target is None:
            target = self._target = asyncio.get_running_loop().create_future()
        self._gathered[position] = logits
        if len(self._gathered) == self._workers:
            all_logits = np.stack([self._gathered[worker] for worker in range(self._workers)])
            self._gathered, self._target = {}, None
            target.set_result(min_logit(torch.from_numpy(all_logits), torch.tensor(labels)).numpy())
        return await target


class _Worker:
    def __init__(self) -> None:
        torch.set_num_threads(1)

    def run(self, aggregator: Any, workload: Workload) -> list[float]:
        ray: Any = importlib.import_module("ray")
        logits, labels = workload.logits(), workload.labels()

        def round_trip(round_number: int) -> torch.Tensor:
            del round_number
            target = aggregator.contribute.remote(workload.position, logits, labels)
            return torch.tensor(ray.get(target, timeout=workload.limit))

        return workload.time(round_trip)


class RayActors:
    """A Ray cluster on this machine with its actors."""

    def __init__(self, workers: int, folder: Path) -> None:
        # Ray reads these when it is imported. A token made here keeps others out and writes no file.
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_worker_niceness="0",  # else its workers run at niceness 15, behind all others
        )
        self._ray: Any = importlib.import_module("ray")
        self._ray.init(
            address="local",
            num_cpus=workers + 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=str(folder),
        )
        actor = self._ray.remote(num_cpus=1)
        self._aggregator = actor(_Aggregator).remote()
        self._workers = [actor(_Worker).remote() for _ in range(workers)]

    def run(self, workloads: Sequence[Workload], limit: float) -> list[list[float]]:
        """Run the workers' workloads at the same time, and return what each measured.

        Raises:
            BenchmarkError: it failed, or took longer than `limit` seconds.
        """
        try:
            self._ray.get(self._aggregator.begin.remote(len(workloads)), timeout=limit)
            running = [
                worker.run.remote(self._aggregator, workload)
                for worker, workload in zip(self._workers, workloads, strict=False)
            ]
            return self._ray.get(running, timeout=limit)
        except self._ray.exceptions.RayError as error:
            raise BenchmarkError(f"Ray: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """End it, and no other cluster on this machine."""
        self._ray.shutdown()
