"""Runs the coordinator's heavy work beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["EventLoopSubmit"]

_T = TypeVar("_T")


class EventLoopSubmit:
    """Runs heavy work on one thread beside the event loop, and light work at once.

    Args:
        on_failure: called with the error of heavy work that fails.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure
        self._pool = ThreadPoolExecutor(1, "codistill-targets", initializer=torch.set_num_threads, initargs=(1,))
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, work: Callable[[], _T], done: Callable[[_T], None], *, heavy: bool) -> None:
        """Run work and hand its result to `done`; see :class:`codistill_server.coordinator.Submit`."""
        if not heavy:
            done(work())
            return
        task = asyncio.get_running_loop().create_task(self._run_on_thread(work, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """End the thread once the work under way is done."""
        self._pool.shutdown(cancel_futures=True)

    async def _run_on_thread(self, work: Callable[[], _T], done: Callable[[_T], None]) -> None:
        try:
            done(await asyncio.get_running_loop().run_in_executor(self._pool, work))
        except Exception as error:  # noqa: BLE001 - nobody awaits this task; any error ends the run
            self._on_failure(error)
