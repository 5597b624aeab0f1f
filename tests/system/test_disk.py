"""Full disks under real processes: what was saved stays, what cannot go on says so, and what goes on ends with its bits."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from codistill.config.experiment import load
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder
from codistill_worker.training.checkpoints import read
from system.run_harness import ALL_WELL, CHANGES, ROUNDS, running
from system.support import assert_bit_equal, experiment_file, rounds_trained, weights

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

Mount = Callable[[Path, str], None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mount small disks, and unmount them; mounting one again gives it another size."""
    mounted: list[Path] = []

    def make(path: Path, size: str) -> None:
        again = path in mounted
        path.mkdir(parents=True, exist_ok=True)
        options = f"remount,size={size}" if again else f"size={size}"
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True, check=False
        )
        if made.returncode:
            pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
        if not again:
            mounted.append(path)

    yield make
    for path in mounted:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(folder: Path) -> Path:
    """Leave not a byte free on a folder's disk."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert os.statvfs(folder).f_bavail == 0
    return filler


def test_a_journal_on_a_full_disk_ends_the_server_and_no_round_is_lost(
    tmp_path: Path, reference: Any, mount: Mount
) -> None:
    disk, workers = tmp_path / "disk", tmp_path / "workers"
    mount(disk, "1m")
    with running(tmp_path, disk / "run", ()) as run:
        for name in ("mlp", "cnn"):
            run.work(name, workers)
        run.until(lambda: run.server.poll() is not None, "the disk is full")
        output, _ = run.server.communicate()
        assert run.server.returncode == ExitCode.ERROR, output
        assert f"error: journal {disk / 'run' / 'journal.sqlite'} cannot be written: database or disk is full" in output
        assert "free disk space" in output
        assert "Traceback" not in output
        assert all(worker.poll() is None for worker in run.workers.values()), "they wait for it to come back"
        assert 0 < rounds_trained(run.folder) < ROUNDS

        mount(disk, "50m")
        run.serve()
        assert run.ended() == ALL_WELL
        # Had a round been answered that was not journalled, it would have been decided, and journalled, twice.
        assert rounds_trained(run.folder) == ROUNDS
        assert_bit_equal(weights(workers), reference)


def test_full_disks_under_checkpoints_and_records_leave_the_training_alone(
    tmp_path: Path, reference: Any, mount: Mount
) -> None:
    folder, records = tmp_path / "run", tmp_path / "records"
    checkpoints = folder / "students" / "cnn"
    mount(checkpoints, "3m")
    mount(records, "64k")
    for name in ("metrics.jsonl", "events.jsonl"):
        (records / name).touch()
        (folder / name).symlink_to(records / name)
    with running(tmp_path, training__checkpoint_every=0.2) as run:
        newest = checkpoints / "checkpoint.safetensors"
        run.until(newest.exists, "a first checkpoint")
        fill(records)
        filler = fill(checkpoints)
        kept = read(newest).step
        assert 0 < kept < ROUNDS
        cnn = run.workers.pop("cnn")
        output, _ = cnn.communicate(timeout=90)
        assert cnn.returncode == ExitCode.ERROR, output
        assert f"cannot be written to {checkpoints}: No space left on device; what was saved before stays" in output
        assert "error: student 'cnn' is trained, but cannot be saved" in output
        assert "Traceback" not in output
        assert rounds_trained(folder) == ROUNDS, "the training itself went on to its end"
        assert 0 < read(newest).step < ROUNDS, "the last good one is whole"

        filler.unlink()
        run.work("cnn")
        run.workers["mlp"].communicate(timeout=90)
        assert run.ended() == ALL_WELL
        assert_bit_equal(weights(folder), reference)


class _StopAfter(PlainProgress):
    """Stops a run after so many more rounds."""

    def __init__(self, rounds: int, stop: threading.Event) -> None:
        super().__init__(Console(quiet=True))
        self._left = rounds
        self._stop = stop

    def offer(self, snapshot: Callable[[], pb.Run]) -> None:
        self._left -= 1
        if self._left == 0:
            self._stop.set()


def test_a_journal_that_lost_its_end_refuses_who_is_ahead_and_says_the_way_out(tmp_path: Path, reference: Any) -> None:
    """As after a power cut, with the default durability: followed to the letter, the way out gives the same bits."""
    experiment = load(experiment_file(tmp_path, **CHANGES))
    folder = RunFolder(tmp_path / "run")

    def train(rounds: int) -> None:
        folder.start(experiment, mode="in-process", resume=(folder.path / "students").exists())
        stop = threading.Event()
        run_in_process(experiment, folder, _StopAfter(rounds, stop), stop)

    journal, copy = folder.path / "journal.sqlite", tmp_path / "journal.sqlite"
    train(50)
    shutil.copy(journal, copy)
    train(70)
    assert rounds_trained(folder.path) == 120
    shutil.copy(copy, journal)
    with pytest.raises(PeerError) as refused:
        train(ROUNDS)
    assert refused.value.code is ExitCode.REFUSED
    assert "participant 'mlp' resumes at round 120, but this server's journal ends at round 50" in str(refused.value)
    assert "remove the participant's checkpoint.safetensors" in str(refused.value)
    for student in experiment.names:
        (folder.path / "students" / student / "checkpoint.safetensors").unlink()
    train(ROUNDS + 1)
    assert_bit_equal(weights(folder.path), reference)
