"""The second promise, for good: whatever dies, and however often, the run ends with the bits of one that nothing disturbed."""

from __future__ import annotations

import os
import random
import re
import signal
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from codistill.config.experiment import load
from codistill.process.exit_codes import ExitCode
from codistill.rundir.records import Happened, read
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder
from system.support import (
    EXPERIMENT,
    assert_bit_equal,
    experiment_file,
    processes_of,
    rounds_trained,
    start,
    wait_for,
    weights,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

ROUNDS = 250
STUDENTS = ("cnn", "vit")
# A checkpoint every few rounds: some faults strike while one is written, and some rounds are repeated after each.
CHANGES = {
    "training__epochs": ROUNDS // 5,
    "training__checkpoint_every": 0.2,
    "students": [each for each in EXPERIMENT["students"] if each["name"] in STUDENTS],
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the same experiment in one process."""
    path = tmp_path_factory.mktemp("undisturbed")
    experiment = load(experiment_file(path, **CHANGES))
    folder = RunFolder(path / "run")
    folder.start(experiment, mode="in-process", resume=False)
    assert run_in_process(experiment, folder, PlainProgress(Console(quiet=True)), threading.Event()) == 0
    return weights(folder.path)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    yield path
    for pid in processes_of(path).values():  # only what a failed test leaves
        os.kill(pid, signal.SIGKILL)


class Disturbed:
    """A run that faults are injected into."""

    def __init__(self, folder: Path, *options: str, **changes: object) -> None:
        self.folder = folder
        path = experiment_file(folder.parent, **{**CHANGES, **changes})
        self.command = ("run", path, "--run-dir", folder, *options)
        self.process = start(*self.command, cwd=folder.parent)

    def reach(self, rounds: int) -> None:
        """Wait until so many rounds are closed."""
        wait_for(lambda: self.process.poll() is not None or rounds_trained(self.folder) >= rounds, f"round {rounds}")
        assert self.process.poll() is None, self.process.communicate()[0]

    def pid(self, name: str) -> int:
        return int(wait_for(lambda: processes_of(self.folder).get(name), f"{name} runs"))

    def strike(self, number: signal.Signals, *names: str) -> None:
        for name in names:
            os.kill(self.pid(name), number)

    def restarted(self) -> list[str]:
        """Return who was started again, in order; "" is the server."""
        events = read(self.folder / "supervisor.jsonl")
        return [each.participant for each in events if isinstance(each, Happened) and each.what == "restarted"]

    def await_restarts(self, count: int) -> None:
        wait_for(lambda: len(self.restarted()) >= count, f"{count} restarts")

    def end(self) -> str:
        try:
            return self.process.communicate(timeout=120)[0]
        finally:
            self.process.kill()

    def kill_everything(self) -> None:
        pids = processes_of(self.folder).values()
        for pid in (self.process.pid, *pids):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=30)

    def resume(self) -> None:
        self.process = start(*self.command, "--resume", cwd=self.folder.parent)


def assert_as_undisturbed(run: Disturbed, undisturbed: dict[str, dict[str, torch.Tensor]]) -> str:
    output = run.end()
    assert run.process.returncode == 0, output
    assert processes_of(run.folder) == {}
    assert_bit_equal(weights(run.folder), undisturbed)
    return output


def test_killed_workers_and_servers_are_started_again_and_the_bits_are_the_same(
    folder: Path, undisturbed: dict[str, dict[str, torch.Tensor]]
) -> None:
    draw = random.Random(1)
    run = Disturbed(folder)
    faults = [[draw.choice(STUDENTS)], ["server"], [draw.choice(STUDENTS), "server"], [*STUDENTS]]
    draw.shuffle(faults)
    expected: list[str] = []
    for number, victims in enumerate(faults):
        run.reach(20 + 55 * number + draw.randrange(30))
        time.sleep(draw.uniform(0, 0.03))  # anywhere within a round; the fault, not a wait for anything
        run.strike(signal.SIGKILL, *victims)
        expected += ["" if name == "server" else name for name in victims]
        run.await_restarts(len(expected))
    output = assert_as_undisturbed(run, undisturbed)
    assert sorted(run.restarted()) == sorted(expected)
    assert output.count("was killed by SIGKILL; started again in ") == len(expected)
    report = (folder / "report.html").read_text()
    assert "the server was killed by SIGKILL; started again in 0.1 s, restart 1 of 10" in report
    addresses = re.findall(r"on (127\.0\.0\.1:\d+)\b.*metrics on (\S+)", (folder / "server.log").read_text())
    assert len(addresses) == 3, "it lived three times"
    assert len(set(addresses)) == 1, "and came back to its addresses"


def test_a_run_whose_every_process_is_gone_is_resumed(
    folder: Path, undisturbed: dict[str, dict[str, torch.Tensor]]
) -> None:
    draw = random.Random(3)
    run = Disturbed(folder)
    wait_for(lambda: "cnn" in processes_of(folder), "the processes are started")
    run.kill_everything()  # before the first round

    run.resume()
    run.reach(30)
    time.sleep(draw.uniform(0, 0.03))
    run.kill_everything()
    # What a power cut can leave on top of that.
    for name in ("metrics.jsonl", "events.jsonl", "supervisor.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b'{"kind": "event", "time": 17\0\0')
    (folder / "server.json").write_text('{"address": "127.0.0.1:1", "metrics": "127.0')
    (folder / "experiment.yaml.part").write_text("name: sm")

    run.resume()
    run.reach(80)
    orphans = set(processes_of(folder).values())
    assert len(orphans) == 3
    run.process.kill()  # only the command; the next one waits for its processes to end
    run.process.communicate()

    run.resume()
    run.reach(130)
    assert not orphans & set(processes_of(folder).values()), "nothing outlives the command"
    run.strike(signal.SIGKILL, "server")
    run.await_restarts(1)
    run.process.send_signal(signal.SIGINT)  # while the server is away
    output = run.end()
    assert run.process.returncode == ExitCode.INTERRUPTED, output
    assert processes_of(folder) == {}

    run.resume()
    assert_as_undisturbed(run, undisturbed)


def test_stopped_processes_go_on_and_a_server_told_to_end_has_a_successor(
    folder: Path, undisturbed: dict[str, dict[str, torch.Tensor]]
) -> None:
    run = Disturbed(folder)
    for number, name in enumerate(("cnn", "server")):
        run.reach(30 + 60 * number)
        pid = run.pid(name)
        os.kill(pid, signal.SIGSTOP)
        until = time.monotonic() + 2
        wait_for(lambda: time.monotonic() > until, "it has been away for a while", 30)  # noqa: B023 - used at once
        assert run.process.poll() is None
        os.kill(pid, signal.SIGCONT)
    run.reach(150)
    assert run.restarted() == [], "nothing had died"
    server = run.pid("server")
    run.strike(signal.SIGTERM, "server")
    run.reach(180)
    assert run.pid("server") != server
    run.strike(signal.SIGTERM, "vit")
    output = assert_as_undisturbed(run, undisturbed)
    assert run.restarted() == ["", "vit"]
    assert "the server ended before the run did; started again in 0.1 s, restart 1 of 10" in output
    assert "going down" in (folder / "server.log").read_text(), "it drained"


def test_restarts_that_are_used_up_end_the_run(folder: Path) -> None:
    run = Disturbed(folder, "--restarts", "1", training__epochs=100_000)
    run.reach(10)
    run.strike(signal.SIGKILL, "cnn")
    run.await_restarts(1)
    run.strike(signal.SIGKILL, "cnn")
    output = run.end()
    assert run.process.returncode == ExitCode.WORKER_FAILED, output
    assert "error: student 'cnn' was killed by SIGKILL; not started again: 1 restart is used up; its log: " in output
    assert "--resume" in output
    assert processes_of(folder) == {}


def own_model(folder: Path, body: str) -> list[object]:
    """Write a model that does something at step 3; return the students of an experiment with it."""
    module = f"""
        import pathlib
        import time
        import torch
        class Model(torch.nn.Module):
            def __init__(self, classes, channels, size):
                super().__init__()
                self.layer = torch.nn.Linear(channels * size * size, classes)
                self.register_buffer("steps", torch.zeros(()))
            def forward(self, images):
                if self.training:
                    if self.steps == 3:
                        {body}
                    self.steps += 1
                return self.layer(images.flatten(1))
    """
    (folder / "own.py").write_text(textwrap.dedent(module))
    return [{"name": "own", "model": "own:Model"}, EXPERIMENT["students"][1]]


def test_an_error_of_a_students_own_code_ends_the_run_at_once(tmp_path: Path, folder: Path) -> None:
    """A restarted worker would repeat the step, and the error with it."""
    run = Disturbed(folder, students=own_model(tmp_path, 'raise ValueError(f"no such thing in {object()}")'))
    output = run.end()
    assert run.process.returncode == ExitCode.CONFIGURATION, output
    assert run.restarted() == []
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    assert (
        "student 'own' ended with exit code 3: students.0.model: 'own:Model' of student 'own' failed in the forward"
        in error
    )
    assert ": no such thing in <object object at 0x" in error
    assert "not started again" in error
    assert processes_of(folder) == {}


def test_a_worker_that_runs_out_of_memory_is_started_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch is refused what no machine has; the next time there is enough."""
    body = 'torch.empty(1 << 60) if not (been := pathlib.Path("been")).exists() and not been.touch() else None'
    run = Disturbed(folder, students=own_model(tmp_path, body), training__epochs=4)
    output = run.end()
    assert run.process.returncode == 0, output
    assert run.restarted() == ["own"]
    assert "ended with exit code 10: student 'own' ran out of memory on cpu: " in output

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    undisturbed = RunFolder(tmp_path / "undisturbed")
    experiment = load(tmp_path / "experiment.yaml")
    undisturbed.start(experiment, mode="in-process", resume=False)
    assert run_in_process(experiment, undisturbed, PlainProgress(Console(quiet=True)), threading.Event()) == 0
    assert_bit_equal(weights(folder), weights(undisturbed.path))


def test_a_model_that_hangs_is_ended_by_its_watchdog(tmp_path: Path, folder: Path) -> None:
    run = Disturbed(folder, students=own_model(tmp_path, "time.sleep(100_000)"), training__hang_after=8)
    output = run.end()
    assert run.process.returncode == ExitCode.HUNG, output
    assert run.restarted() == ["own"]
    assert "hung for 8 s: student 'own' at the forward pass, step 3" in output
    assert 'own.py", line' in (folder / "students" / "own" / "log.txt").read_text(), "the log shows where"
    assert processes_of(folder) == {}


def test_a_worker_that_is_stopped_for_good_and_that_nobody_waits_for_is_killed_and_started_again(
    folder: Path, tmp_path: Path
) -> None:
    changes = {"distillation": {"method": "independent"}, "students": EXPERIMENT["students"][:2]}
    run = Disturbed(folder, "--restarts", "2", **changes, training__hang_after=8, training__evaluate_every=10)
    wait_for((folder / "students" / "cnn" / "checkpoint.safetensors").exists, "it has begun")
    run.strike(signal.SIGSTOP, "cnn")
    struck = time.monotonic()
    output = run.end()
    assert run.process.returncode == 0, output
    assert run.restarted() == ["cnn"], output
    assert "student 'cnn' ended with exit code 11: killed after 8 s without a sign of life, " in output
    assert time.monotonic() - struck < 60

    experiment = load(tmp_path / "experiment.yaml")
    undisturbed = RunFolder(tmp_path / "undisturbed")
    undisturbed.start(experiment, mode="in-process", resume=False)
    assert run_in_process(experiment, undisturbed, PlainProgress(Console(quiet=True)), threading.Event()) == 0
    assert_bit_equal(weights(folder), weights(undisturbed.path))


def test_a_worker_that_is_stopped_for_good_ends_the_run_of_those_who_wait(folder: Path) -> None:
    run = Disturbed(folder, training__epochs=100_000, exchange__give_up_after=3)
    run.reach(10)
    run.strike(signal.SIGSTOP, "cnn")
    output = run.end()
    assert run.process.returncode == ExitCode.GAVE_UP, output
    assert "still waits for cnn" in output
    assert processes_of(folder) == {}, "a stopped process can be killed"
