"""Going on without those that are away, with real processes."""

from __future__ import annotations

import json
import os
import signal
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from codistill.process.exit_codes import ExitCode
from codistill_worker.training.checkpoints import read
from system.support import experiment_file, processes_of, rounds_trained, run, start, wait_for, weights

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

PROCEED = {"exchange__on_absence": "proceed", "exchange__round_deadline": 0.5, "exchange__evict_after": 3}


def events(folder: Path, what: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["what"] == what]


def test_a_stopped_worker_is_left_behind_evicted_and_catches_up(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = experiment_file(tmp_path, **PROCEED, training__epochs=4000, training__evaluate_every=1000)
    process = start("run", path, "--run-dir", folder, cwd=tmp_path)
    try:
        wait_for(lambda: rounds_trained(folder) >= 5 or process.poll() is not None, "five rounds", 120)
        pids = processes_of(folder)
        os.kill(pids["cnn"], signal.SIGSTOP)
        wait_for(lambda: events(folder, "skipped"), "it is skipped")
        left = rounds_trained(folder)
        wait_for(lambda: rounds_trained(folder) >= left + 100, "the others go on")
        wait_for(lambda: events(folder, "evicted"), "its session is ended")
        code, status = run("status", "--run-dir", folder, "--json", cwd=tmp_path, timeout=60)
        assert code == 0
        assert {each["name"]: (each["state"], each["awaited"]) for each in json.loads(status)["participants"]}[
            "cnn"
        ] == (
            "disconnected",
            False,
        )
        os.kill(pids["cnn"], signal.SIGCONT)
        wait_for(lambda: events(folder, "awaited"), "it is waited for again", 180)
        os.kill(processes_of(folder)["cnn"], signal.SIGKILL)
        killed = time.monotonic()
        left = rounds_trained(folder)
        wait_for(lambda: rounds_trained(folder) >= left + 2, "the others go on")
        assert time.monotonic() - killed < 10, "they lose one deadline, not the time of a restart"
        returns = len(events(folder, "awaited"))
        wait_for(lambda: len(events(folder, "awaited")) > returns, "its next process catches up", 180)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=90)[0]
    finally:
        process.kill()
        for pid in processes_of(folder).values():
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == ExitCode.INTERRUPTED, output
    assert {event["participant"] for event in events(folder, "skipped")} >= {"cnn"}
    (evicted,) = events(folder, "evicted")
    assert evicted["participant"] == "cnn"
    assert "join again" in evicted["message"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(each["missed"].get("cnn", 0) for each in metrics if each["kind"] == "rounds") >= 100
    assert min(int(tensors["step"]) for tensors in weights(folder).values()) > left


def test_a_student_that_diverges_is_left_out_and_the_others_finish_below_the_quorum_without_targets(
    tmp_path: Path,
) -> None:
    module = """
        import torch
        class Broken(torch.nn.Module):
            def __init__(self, classes, channels, size):
                super().__init__()
                self.layer = torch.nn.Linear(channels * size * size, classes)
                self.steps = 0
            def forward(self, images):
                self.steps += self.training
                return self.layer(images.flatten(1)) * (1e38 if self.steps > 3 else 1)
    """
    (tmp_path / "broken.py").write_text(textwrap.dedent(module))
    folder = tmp_path / "run"
    students = [
        {"name": "bad", "model": "broken:Broken"},
        {"name": "mlp", "model": "mlp"},
        {"name": "cnn", "model": "cnn"},
    ]
    path = experiment_file(tmp_path, **PROCEED, exchange__quorum=3, students=students)
    code, output = run("run", path, "--run-dir", folder, cwd=tmp_path)
    assert code == ExitCode.DIVERGED, output
    assert "the others go on without it" in output
    assert "error: student 'bad' ended with exit code 7" in output
    assert "report: " in output
    trained = {name: read(folder / "students" / name / "checkpoint.safetensors").step for name in ("mlp", "cnn")}
    assert trained == {"mlp": 10, "cnn": 10}
    # It is there for rounds 0 to 2; two are fewer than the quorum.
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    closed = [each for each in metrics if each["kind"] == "rounds"]
    assert sum(each.get("without_targets", 0) for each in closed) == 7
    assert events(folder, "below_quorum")


def test_a_student_added_later_learns_the_whole_run_from_the_journal(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = {"exchange__journal": {"keep": "all"}, "distillation": {"method": "dml"}}
    two = [{"name": "mlp", "model": "mlp"}, {"name": "cnn", "model": "cnn"}]
    path = experiment_file(tmp_path, **changes, students=two)
    code, output = run("run", path, "--run-dir", folder, "--in-process", cwd=tmp_path)
    assert code == 0, output
    before = weights(folder)
    path = experiment_file(tmp_path, **changes, students=[*two, {"name": "late", "model": "mlp"}])
    code, output = run("run", path, "--run-dir", folder, "--resume", cwd=tmp_path)
    assert code == 0, output
    after = weights(folder)
    assert int(after["late"]["step"]) == 10
    for student, tensors in before.items():
        assert all((value == after[student][name]).all() for name, value in tensors.items()), (
            "the others are as they were"
        )
