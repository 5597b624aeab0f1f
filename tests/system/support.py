"""Shared by the system tests: small experiments, the command as a process, and a look at what a run leaves behind."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from codistill_worker.training.checkpoints import read

COMMAND = [sys.executable, "-m", "codistill_deploy"]

EXPERIMENT: dict[str, Any] = {
    "name": "small",
    "seed": 7,
    "data": {"dataset": "digits", "train_size": 100, "test_size": 200, "augment": {"crop_padding": 1}},
    "training": {
        "epochs": 2,
        "batch_size": 20,
        "optimizer": {"name": "sgd", "lr": 0.05},
        "schedule": {"name": "constant"},
    },
    "exchange": {"waiting_notice": 0.5, "connect_timeout": 60, "give_up_after": 120},
    "students": [
        {"name": "mlp", "model": "mlp", "model_args": {"dropout": 0.2}},
        {"name": "cnn", "model": "cnn"},
        {"name": "vit", "model": "vit", "training": {"optimizer": {"name": "adamw", "lr": 0.002}}},
    ],
}


def experiment_file(folder: Path, **changes: Any) -> Path:
    """Write the small experiment with changes; `section__key` names a key inside a section."""
    document = yaml.safe_load(yaml.safe_dump(EXPERIMENT))
    for key, value in changes.items():
        *path, last = key.split("__")
        section = document
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", **extra}


def start(*arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start the command; its output is one pipe."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=dict(env or environment()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(
    *arguments: str | Path, cwd: Path, timeout: float = 100, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run the command to its end; return its exit code and what it printed."""
    process = start(*arguments, cwd=cwd, env=env)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Wait until a condition gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds} s")


def processes_of(folder: Path) -> dict[str, int]:
    """Return the pids of the server ("server") and the workers (by student) that run in a folder."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "codistill_deploy" not in arguments or str(folder) not in arguments:
            continue
        if "serve" in arguments:
            found["server"] = int(entry.name)
        elif "work" in arguments:
            found[arguments[arguments.index("--student") + 1]] = int(entry.name)
    return found


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return every student's last weights, and the step they were saved after."""
    return {
        student.name: {
            **read(student / "checkpoint.safetensors").model,
            "step": torch.tensor(read(student / "checkpoint.safetensors").step),
        }
        for student in sorted((folder / "students").iterdir())
    }


def assert_bit_equal(left: dict[str, dict[str, torch.Tensor]], right: dict[str, dict[str, torch.Tensor]]) -> None:
    assert left.keys() == right.keys()
    for student, tensors in left.items():
        assert tensors.keys() == right[student].keys()
        for name, value in tensors.items():
            assert torch.equal(value, right[student][name]), f"{student}: {name} differs"


def rounds_trained(folder: Path) -> int:
    """Return how many rounds the journal of a run knows to be closed."""
    if not (folder / "journal.sqlite").exists():
        return 0
    database = sqlite3.connect(f"file:{folder / 'journal.sqlite'}?mode=ro", uri=True)
    try:
        ((newest,),) = database.execute("SELECT max(round) FROM rounds").fetchall()
    except sqlite3.OperationalError:  # the server is just making it
        return 0
    finally:
        database.close()
    return 0 if newest is None else newest + 1
