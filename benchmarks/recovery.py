"""How long a run stands still when one of its processes dies.

Faults strike a `codistill run`, one after the other. Recovery is the time from a signal to the closing of the
second round after it. The round under way may close without the victim; the one after it cannot. It is given in seconds
and as a multiple of the median round before the fault. Most of it is the start of a Python process that imports torch.

Linux only: the processes are found in /proc.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from codistill.rundir.layout import RunLayout

_POLL_SECONDS = 0.002
_LIMIT_SECONDS = 120.0
_STEADY_SECONDS = 1.5
_STUDENTS = ("mlp", "cnn", "vit")
_STOPPED_SECONDS = 1.0


@dataclass(frozen=True)
class Recovery:
    """One fault and what it cost.

    Attributes:
        fault: its kind.
        round_seconds: the mean time of a round just before it.
        seconds: from the signal to the closing of the second round after it.
    """

    fault: str
    round_seconds: float
    seconds: float

    @property
    def rounds(self) -> float:
        """The recovery as a multiple of the round."""
        return self.seconds / self.round_seconds


class BenchmarkError(RuntimeError):
    """The run ended, or does not go on; the text says how."""


class _Run:
    """A run under way, seen from outside."""

    def __init__(self, folder: Path, checkpoint_every: float) -> None:
        path = folder / "recovery.yaml"
        students = "".join(f"\n  - {{name: {name}, model: {name}}}" for name in _STUDENTS)
        path.write_text(
            "name: recovery\ndata: {dataset: digits}\n"
            f"training: {{epochs: 1000000, checkpoint_every: {checkpoint_every}, optimizer: {{lr: 0.01}}}}\n"
            f"distillation: {{method: kdcl}}\nstudents:{students}\n",
            encoding="utf-8",
        )
        self._folder = folder / "run"
        self._output = (folder / "output.txt").open("w+")
        command = ["run", str(path), "--run-dir", str(self._folder), "--restarts", "1000"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "codistill_deploy", *command], stdout=self._output, stderr=subprocess.STDOUT
        )

    def closed(self) -> int:
        """Return how many rounds are closed."""
        path = RunLayout(self._folder).journal_file
        if not path.exists():
            return 0
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            ((newest,),) = database.execute("SELECT max(round) FROM rounds").fetchall()
        except sqlite3.OperationalError:  # it is being created
            return 0
        finally:
            database.close()
        return 0 if newest is None else newest + 1

    def await_closed(self, rounds: int) -> None:
        """Wait until so many rounds are closed."""
        deadline = time.monotonic() + _LIMIT_SECONDS
        while self.closed() < rounds:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._output.seek(0)
                raise BenchmarkError(f"round {rounds} was not closed:\n{self._output.read()}")
            time.sleep(_POLL_SECONDS)

    def round_seconds(self) -> float:
        """Return the mean time of a round over a short while."""
        first, started = self.closed(), time.monotonic()
        time.sleep(_STEADY_SECONDS)
        self.await_closed(first + 5)
        return (time.monotonic() - started) / (self.closed() - first)

    def strike(self, signal_number: signal.Signals, *names: str) -> None:
        """Send a signal to the server ("server") or to workers, by student."""
        pids = self._pids()
        for name in names:
            os.kill(pids[name], signal_number)

    def end(self) -> None:
        """Stop the run."""
        self._process.terminate()
        try:
            self._process.wait(_LIMIT_SECONDS)
        finally:
            self._process.kill()
            self._output.close()

    def _pids(self) -> dict[str, int]:
        found: dict[str, int] = {}
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text(encoding="ascii")
        for child in children.split():
            arguments = Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8").split("\0")
            name = arguments[arguments.index("--student") + 1] if "--student" in arguments else "server"
            found[name] = int(child)
        return found


def _stop_for_a_while(run: _Run, name: str) -> None:
    run.strike(signal.SIGSTOP, name)
    time.sleep(_STOPPED_SECONDS)
    run.strike(signal.SIGCONT, name)


_FAULTS: Mapping[str, Callable[[_Run], None]] = {
    "SIGKILL of a worker": lambda run: run.strike(signal.SIGKILL, "cnn"),
    "SIGKILL of the server": lambda run: run.strike(signal.SIGKILL, "server"),
    "SIGKILL of both": lambda run: run.strike(signal.SIGKILL, "mlp", "server"),
    "SIGKILL of every worker": lambda run: run.strike(signal.SIGKILL, *_STUDENTS),
    "SIGTERM of the server": lambda run: run.strike(signal.SIGTERM, "server"),
    f"worker stopped for {_STOPPED_SECONDS:g} s": lambda run: _stop_for_a_while(run, "cnn"),
    f"server stopped for {_STOPPED_SECONDS:g} s": lambda run: _stop_for_a_while(run, "server"),
}


def measure(repeats: int, checkpoint_every: float, seed: int) -> list[Recovery]:
    """Inject every fault `repeats` times.

    Raises:
        BenchmarkError: the run did not survive.
    """
    draw = random.Random(seed)
    found: list[Recovery] = []
    for _ in range(repeats):
        # Pauses before restarts grow with their number, so each repetition has a run of its own.
        with tempfile.TemporaryDirectory(prefix="codistill-recovery-") as folder:
            run = _Run(Path(folder), checkpoint_every)
            try:
                run.await_closed(50)
                for fault, inject in _FAULTS.items():
                    round_seconds = run.round_seconds()
                    time.sleep(draw.uniform(0, checkpoint_every))  # anywhere between two checkpoints
                    closed, struck = run.closed(), time.monotonic()
                    inject(run)
                    run.await_closed(closed + 2)
                    found.append(Recovery(fault, round_seconds, time.monotonic() - struck))
            finally:
                run.end()
    return found


def table(found: Sequence[Recovery]) -> Table:
    """Return the medians as a Markdown table."""
    made = Table(box=box.MARKDOWN)
    made.add_column("fault")
    for heading in ("times", "round ms", "recovery s", "least to most s", "recovery/round"):
        made.add_column(heading, justify="right")
    for fault in dict.fromkeys(recovery.fault for recovery in found):
        of_fault = [recovery for recovery in found if recovery.fault == fault]
        seconds = [recovery.seconds for recovery in of_fault]
        made.add_row(
            fault,
            str(len(of_fault)),
            f"{1000 * statistics.median(recovery.round_seconds for recovery in of_fault):.1f}",
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f} to {max(seconds):.2f}",
            f"{statistics.median(recovery.rounds for recovery in of_fault):.0f}",
        )
    return made


def main(
    repeats: Annotated[int, typer.Option(min=1, help="How often each fault strikes.")] = 3,
    checkpoint_every: Annotated[float, typer.Option(min=0.0, help="Seconds between two checkpoints.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of the moments at which the faults strike.")] = 0,
    to: Annotated[Path | None, typer.Option("--json", help="Write every recovery to this file.")] = None,
) -> None:
    """Measure how long a run stands still when one of its processes dies."""
    try:
        found = measure(repeats, checkpoint_every, seed)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    if to is not None:
        to.write_text(json.dumps([asdict(recovery) for recovery in found], indent=2) + "\n", encoding="utf-8")
    Console(width=120).print(table(found))


if __name__ == "__main__":
    typer.run(main)
