"""Processes that run tasks."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from round_trips.tasks import Task
from round_trips.workload import BenchmarkError

__all__ = ["TaskProcesses"]


class TaskProcesses:
    """Processes that stay up and run tasks, so that a repetition does not pay for starting Python."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection[Any, Any]] = []
        self._processes: list[BaseProcess] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run_tasks, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, tasks: Sequence[Task], limit: float) -> list[list[float]]:
        """Run tasks at the same time, one in each process, and return their results.

        Raises:
            BenchmarkError: a task failed, or took longer than `limit` seconds.
        """
        results: list[list[float]] = [[]] * len(tasks)
        at_work = {pipe: position for position, pipe in enumerate(self._pipes[: len(tasks)])}
        for pipe, position in at_work.items():
            pipe.send(tasks[position])
        deadline = time.monotonic() + limit
        while at_work:
            ready = multiprocessing.connection.wait(at_work, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(sorted(type(tasks[position]).__name__ for position in at_work.values()))
                raise BenchmarkError(f"not done after {limit:g} s: {late}; raise --limit or lower --rounds")
            for pipe in [busy for busy in at_work if busy in ready]:
                position = at_work.pop(pipe)
                task = type(tasks[position]).__name__
                try:
                    answer = pipe.recv()
                except EOFError:
                    raise BenchmarkError(f"the process of {task} died") from None
                if isinstance(answer, str):
                    raise BenchmarkError(f"{task} failed: {answer}")
                results[position] = answer
        return results

    def close(self) -> None:
        """Kill the processes."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def _run_tasks(pipe: Connection[Any, Any]) -> None:
    os.setsid()  # the terminal's Ctrl-C is for the parent, which ends this process
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer: list[float] | str = task.run()
        except Exception as error:  # noqa: BLE001 - the parent shows any error and ends
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)


def _follow_parent() -> None:
    """End this process when its parent has ended, for whatever reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - runs in a child only
    parent.join()
    os._exit(1)
