"""Where everything is in the folder of a run, and of a comparison: no other module spells one of these names.

experiment.yaml         the resolved experiment
run.json                when, with which command, versions and machine the run was started
journal.sqlite          the closed rounds (the server's)
metrics.jsonl           what was measured, events.jsonl what happened (the server's; codistill.rundir.records)
supervisor.jsonl        which processes ended, and were started again (the command's)
run.lock                held by the command and every process that it started; server.lock by a server
start.lock              held by a server or a worker while it makes the folder a run's
server.json             the server's address, while it is up
run.token               the token that the command made for the run, while it is going on
driver.json             by which the nodes of a Ray cluster see that they share the folder; host.lock by the actor of a server or a student
server.log
students/NAME/          log.txt, checkpoint.safetensors and the one before it, best.safetensors
teachers/NAME/          log.txt
report.html

A comparison's folder holds comparison.json, gains.svg, report.html, and a run folder METHOD/seed-N for each run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ComparisonLayout", "ParticipantLayout", "RunLayout", "generation_folder"]

_REPORT = "report.html"
_STUDENTS = "students"


@dataclass(frozen=True)
class ParticipantLayout:
    """The folder of one student, or of one teacher."""

    path: Path

    @property
    def log(self) -> Path:
        """The log of its worker."""
        return self.path / "log.txt"

    @property
    def checkpoint(self) -> Path:
        """A student's newest checkpoint."""
        return self.path / "checkpoint.safetensors"

    @property
    def previous_checkpoint(self) -> Path:
        """The checkpoint before it."""
        return self.path / "checkpoint.previous.safetensors"

    @property
    def best_weights(self) -> Path:
        """The weights with the best test accuracy so far."""
        return self.path / "best.safetensors"

    @property
    def weights_files(self) -> tuple[Path, ...]:
        """All files that hold weights of a student's."""
        return self.checkpoint, self.previous_checkpoint, self.best_weights

    @property
    def host_lock(self) -> Path:
        """The lock that its worker's actor holds on a Ray cluster."""
        return self.path / "host.lock"

    @property
    def run(self) -> RunLayout | None:
        """The run whose student this is; None if the folder does not lie where a student's does."""
        return RunLayout(self.path.parent.parent) if self.path.parent.name == _STUDENTS else None


@dataclass(frozen=True)
class RunLayout:
    """The folder of one run."""

    path: Path

    @property
    def experiment_file(self) -> Path:
        """The resolved experiment; the folder is a run's once this is there."""
        return self.path / "experiment.yaml"

    @property
    def info_file(self) -> Path:
        """Facts of the run that its experiment does not hold: :class:`codistill.rundir.info.RunInfo`."""
        return self.path / "run.json"

    @property
    def journal_file(self) -> Path:
        """The closed rounds."""
        return self.path / "journal.sqlite"

    @property
    def journal_files(self) -> tuple[Path, ...]:
        """The journal, and the files that SQLite keeps beside it."""
        return tuple(
            self.journal_file.with_name(f"{self.journal_file.name}{suffix}") for suffix in ("", "-wal", "-shm")
        )

    @property
    def metrics_file(self) -> Path:
        """The measurements; there once the run has begun."""
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        """The events of the run, as the server saw them."""
        return self.path / "events.jsonl"

    @property
    def supervisor_file(self) -> Path:
        """The events of the processes, as the command that started them saw them."""
        return self.path / "supervisor.jsonl"

    @property
    def record_files(self) -> tuple[Path, ...]:
        """All files of records, the measurements first."""
        return self.metrics_file, self.events_file, self.supervisor_file

    @property
    def report_file(self) -> Path:
        """The report."""
        return self.path / _REPORT

    @property
    def address_file(self) -> Path:
        """Where the server is reached, for as long as one is at work there: :mod:`codistill.rundir.address`."""
        return self.path / "server.json"

    @property
    def token_file(self) -> Path:
        """The token that the command made for the run, while it is going on; readable for its user alone."""
        return self.path / "run.token"

    @property
    def driver_file(self) -> Path:
        """The file by which the nodes of a Ray cluster see that they share the folder."""
        return self.path / "driver.json"

    @property
    def server_log(self) -> Path:
        """The log of the server."""
        return self.path / "server.log"

    @property
    def run_lock(self) -> Path:
        """Held by the command and by every process that it started."""
        return self.path / "run.lock"

    @property
    def server_lock(self) -> Path:
        """Held by a server."""
        return self.path / "server.lock"

    @property
    def start_lock(self) -> Path:
        """Held by a server or a worker while it makes the folder a run's."""
        return self.path / "start.lock"

    @property
    def server_host_lock(self) -> Path:
        """Held by the actor of the server on a Ray cluster."""
        return self.path / "host.lock"

    @property
    def students(self) -> Path:
        """The folder that holds the students' folders."""
        return self.path / _STUDENTS

    def student(self, name: str) -> ParticipantLayout:
        """Return the folder of one student."""
        return ParticipantLayout(self.students / name)

    def teacher(self, name: str) -> ParticipantLayout:
        """Return the folder of one teacher."""
        return ParticipantLayout(self.path / "teachers" / name)


@dataclass(frozen=True)
class ComparisonLayout:
    """The folder of a comparison."""

    path: Path

    @property
    def index_file(self) -> Path:
        """Which runs belong to it."""
        return self.path / "comparison.json"

    @property
    def picture_file(self) -> Path:
        """The picture of gains."""
        return self.path / "gains.svg"

    @property
    def report_file(self) -> Path:
        """The report."""
        return self.path / _REPORT

    def run(self, method: str, seed: int) -> Path:
        """Return the folder of the run of a method with a seed, or of those of its generations."""
        return self.path / method.replace("/", "-") / f"seed-{seed}"


def generation_folder(folder: Path, generation: int) -> Path:
    """Return the folder of one generation of a run of several, counted from 1."""
    return folder / f"generation-{generation}"
