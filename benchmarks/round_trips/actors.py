"""A Ray with one actor for each worker, and one that aggregates."""

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
from round_trips.course import Array, BenchmarkError, Course

__all__ = ["Actors"]


class _Aggregator:
    """An actor that gathers a round's logits and returns the target to every worker of it."""

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
            everyone = np.stack([self._gathered[each] for each in range(self._workers)])
            self._gathered, self._target = {}, None
            target.set_result(min_logit(torch.from_numpy(everyone), torch.tensor(labels)).numpy())
        return await target


class _Worker:
    def __init__(self) -> None:
        torch.set_num_threads(1)

    def run(self, aggregator: Any, course: Course) -> list[float]:
        ray: Any = importlib.import_module("ray")
        logits, labels = course.logits(), course.labels()

        def round_trip(number: int) -> torch.Tensor:
            del number
            asked = aggregator.contribute.remote(course.position, logits, labels)
            return torch.tensor(ray.get(asked, timeout=course.limit))

        return course.time(round_trip)


class Actors:
    """A Ray of our own with its actors."""

    def __init__(self, workers: int, folder: Path) -> None:
        # Ray reads these when it is imported. A token of our own keeps others out and writes no file.
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),
            RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_worker_niceness="0",  # else its workers run at 15, and lose to everybody
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

    def run(self, courses: Sequence[Course], limit: float) -> list[list[float]]:
        """Runs the workers' courses at the same time and returns what each measured.

        Raises:
            BenchmarkError: it failed, or took longer than `limit` seconds.
        """
        try:
            self._ray.get(self._aggregator.begin.remote(len(courses)), timeout=limit)
            running = [
                worker.run.remote(self._aggregator, course)
                for worker, course in zip(self._workers, courses, strict=False)
            ]
            return self._ray.get(running, timeout=limit)
        except self._ray.exceptions.RayError as error:
            raise BenchmarkError(f"Ray: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Ends it, and no other Ray on this machine."""
        self._ray.shutdown()
