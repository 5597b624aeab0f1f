"""Processes that do tasks."""

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

from round_trips.course import BenchmarkError
from round_trips.tasks import Task

__all__ = ["Members"]


class Members:
    """Processes that stay up and do tasks, so that a repetition does not pay for starting Python."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection[Any, Any]] = []
        self._processes: list[BaseProcess] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_member, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, tasks: Sequence[Task], limit: float) -> list[list[float]]:
        """Does tasks at the same time, one in each process, and returns their results.

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
            for pipe in [each for each in at_work if each in ready]:
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
        """Ends the processes, whatever they are at."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def _member(pipe: Connection[Any, Any]) -> None:
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
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent says it and ends
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)


def _follow_parent() -> None:
    """Ends this process when its parent has ended, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - runs in a child only
    parent.join()
    os._exit(1)
