"""Bad input ends within seconds, with lines that say what, where and what instead, and with a documented code."""

from __future__ import annotations

import json
import re
import socket
import textwrap
from pathlib import Path
from typing import Any

import pytest

from codistill.config.experiment import load
from codistill.process.exit_codes import ExitCode
from codistill_deploy.run_folder import RunFolder
from system.support import EXPERIMENT, experiment_file, run, start, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


def refused(output: str, *fragments: str) -> None:
    """Check that the output ends in one line of error that holds all fragments, and that no traceback is shown."""
    assert "Traceback" not in output, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    for fragment in fragments:
        assert fragment in errors[0], f"{fragment!r} not in {errors[0]!r}"


STUDENTS: list[dict[str, Any]] = EXPERIMENT["students"]

IN_THE_FILE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"training__epoch": 3}, ["training.epoch: unknown key", "did you mean 'epochs'?", "Allowed: "]),
    "wrong type": ({"training__epochs": "many"}, ["training.epochs", "'many'", "integer"]),
    "out of range": ({"training__optimizer__lr": -1}, ["training.optimizer.lr", "-1", "greater than 0"]),
    "unknown method": (
        {"distillation": {"method": "kdlc"}},
        ["distillation.method", "'kdlc'", "allowed: independent, kd, logit_regression, born_again"],
    ),
    "unknown data set": ({"data": {"dataset": "digit"}}, ["data.dataset", "'digit'", "did you mean 'digits'?"]),
    "a student name twice": (
        {"students": [STUDENTS[0], STUDENTS[0]]},
        ["students.1.name", "'mlp'", "students.0", "give each its own"],
    ),
    "one student only": ({"students": STUDENTS[:1]}, ["distillation.method", "'kdcl'", "at least 2 students"]),
    "a batch larger than the data": (
        {"training__batch_size": 101},
        ["training.batch_size", "101", "100 training samples"],
    ),
    "general without held-out samples": (
        {"distillation": {"method": "kdcl", "ensemble": "general"}},
        ["data.held_out", "0", "general"],
    ),
    "unknown model": (
        {"students": [{"name": "a", "model": "resnet19"}, STUDENTS[1]]},
        ["experiment.yaml: students.0.model", "resnet19", "resnet20"],
    ),
}


@pytest.mark.parametrize("case", IN_THE_FILE)
def test_an_experiment_that_cannot_be(case: str, tmp_path: Path) -> None:
    changes, fragments = IN_THE_FILE[case]
    path = experiment_file(tmp_path, **changes)
    code, output = run("run", path, "--run-dir", tmp_path / "run", cwd=tmp_path, timeout=60)
    assert code == ExitCode.CONFIGURATION, output
    refused(output, *fragments)
    assert not (tmp_path / "run").exists(), "nothing is started for a wrong experiment"


def test_an_address_that_is_none(tmp_path: Path) -> None:
    path = experiment_file(tmp_path)
    code, output = run("run", path, "--run-dir", tmp_path / "run", "--listen", "here", cwd=tmp_path, timeout=60)
    assert code == ExitCode.CONFIGURATION, output
    refused(output, "--listen: 'here' is not an address", "HOST:PORT")
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    path = experiment_file(tmp_path, training__epochs="many")
    code, output = run("run", path, "--debug", cwd=tmp_path)
    assert code == ExitCode.CONFIGURATION
    assert "Traceback" in output


def test_a_missing_experiment(tmp_path: Path) -> None:
    code, output = run("run", tmp_path / "nothing.yaml", cwd=tmp_path)
    assert code == ExitCode.CONFIGURATION
    refused(output, "nothing.yaml", "No such file")


def test_a_batch_larger_than_a_data_set_of_unknown_size(tmp_path: Path) -> None:
    module = """
        import numpy as np
        def make():
            images = np.zeros((30, 8, 8), np.uint8)
            return images, np.arange(30) % 3, images[:6], np.arange(6) % 3
    """
    (tmp_path / "few.py").write_text(textwrap.dedent(module))
    path = experiment_file(
        tmp_path, data={"dataset": "few:make", "classes": 3}, training__batch_size=31, students=STUDENTS[:2]
    )
    code, output = run("run", path, "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert code == ExitCode.CONFIGURATION, output
    refused(output, "training.batch_size", "31", "30")


def test_a_busy_port(tmp_path: Path) -> None:
    path = experiment_file(tmp_path, students=STUDENTS[:2])
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        code, output = run("run", path, "--run-dir", tmp_path / "run", "--listen", f"127.0.0.1:{port}", cwd=tmp_path)
    assert code == ExitCode.CONFIGURATION, output
    refused(output, f"127.0.0.1:{port}", "in use", "--listen")


def test_a_busy_port_of_the_live_page(tmp_path: Path) -> None:
    path = experiment_file(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, output = run("run", path, "--metrics", address, "--run-dir", "run", cwd=tmp_path)
    assert code == ExitCode.CONFIGURATION, output
    refused(
        output,
        f"metrics: {address} cannot be listened on: ",
        "choose another address for the live page",
        "with --metrics",
    )


def test_an_unreachable_server(tmp_path: Path) -> None:
    path = experiment_file(tmp_path, exchange__connect_timeout=1)
    with socket.socket() as nobody:  # bound, not listening: a port that refuses, and that nobody else takes
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        code, output = run("work", path, "--student", "mlp", "--server", f"127.0.0.1:{port}", cwd=tmp_path)
    assert code == ExitCode.UNREACHABLE, output
    refused(output, f"127.0.0.1:{port}", "within 1 s", "codistill serve")


def test_status_of_an_unreachable_server(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        code, output = run("status", "--server", f"127.0.0.1:{port}", cwd=tmp_path)
    assert code == ExitCode.UNREACHABLE, output
    refused(output, f"127.0.0.1:{port}", "--server")


def test_a_server_of_another_experiment_and_another_data_order(tmp_path: Path) -> None:
    module = """
        import os
        import numpy as np
        def make():
            order = np.arange(120)[:: int(os.environ.get("ORDER", "1"))]
            images = np.zeros((120, 8, 8), np.uint8)
            return images, order % 3, images[:6], np.arange(6) % 3
    """
    (tmp_path / "ordered.py").write_text(textwrap.dedent(module))
    data = {"dataset": "ordered:make", "classes": 3}
    path = experiment_file(tmp_path, data=data)
    server = start("serve", path, "--listen", "127.0.0.1:0", "--run-dir", tmp_path / "run", cwd=tmp_path)
    try:
        wait_for(lambda: (tmp_path / "run" / "server.json").exists() or server.poll() is not None, "the server is up")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "ordered.py").write_text(textwrap.dedent(module))
        other = experiment_file(tmp_path / "other", data=data, training__optimizer__lr=0.25)
        work = ["--student", "mlp", "--run-dir", tmp_path / "run"]
        code, output = run("work", other, *work, cwd=tmp_path)
        assert code == ExitCode.CONFIGURATION, output
        refused(output, "training.optimizer.lr", "the run has 0.05", "--run-dir")
        address = json.loads((tmp_path / "run" / "server.json").read_text())["address"]
        elsewhere = ["--student", "mlp", "--run-dir", tmp_path / "elsewhere", "--server", address]
        code, output = run("work", other, *elsewhere, cwd=tmp_path)
        assert code == ExitCode.REFUSED, output
        refused(output, "training.optimizer.lr", "the run has 0.05", "this worker has 0.25")

        # The first worker to join settles the data; it is stopped again right after.
        first = start("work", path, *work, cwd=tmp_path)
        wait_for(lambda: '"joined"' in (tmp_path / "run" / "events.jsonl").read_text(), "the first worker joins")
        first.terminate()
        assert first.wait(60) == ExitCode.INTERRUPTED
        assert first.stdout is not None
        first.stdout.close()
        from system.support import environment

        cnn = ["--student", "cnn", "--run-dir", tmp_path / "run"]
        code, output = run("work", path, *cnn, cwd=tmp_path, env=environment(ORDER="-1"))
        assert code == ExitCode.REFUSED, output
        refused(output, "data.data_sha256", "the run has", "this worker", "'ordered:make' must return the same")
        digests = re.findall(r"[0-9a-f]{64}", output.splitlines()[-1])
        assert len(set(digests)) == 2, "both values are named"
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0


def test_logits_that_are_not_numbers(tmp_path: Path) -> None:
    module = """
        import torch
        class Broken(torch.nn.Module):
            def __init__(self, classes, channels, size):
                super().__init__()
                self.layer = torch.nn.Linear(channels * size * size, classes)
                self.steps = 0
            def forward(self, images):
                self.steps += self.training
                logits = self.layer(images.flatten(1))
                return logits * float("nan") if self.steps > 3 else logits
    """
    (tmp_path / "broken.py").write_text(textwrap.dedent(module))
    path = experiment_file(tmp_path, students=[{"name": "bad", "model": "broken:Broken"}, STUDENTS[1]])
    code, output = run("run", path, "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert code == ExitCode.DIVERGED, output
    refused(output, "student 'bad'", "step 3", "not finite", "lr")


def test_auxiliary_logits_end_the_run_before_it_begins(tmp_path: Path) -> None:
    module = """
        import torch
        class Auxiliary(torch.nn.Linear):
            def __init__(self, classes, channels, size):
                super().__init__(channels * size * size, classes)
            def forward(self, images):
                logits = super().forward(images.flatten(1))
                return (logits, logits) if self.training else logits
    """
    (tmp_path / "auxiliary.py").write_text(textwrap.dedent(module))
    path = experiment_file(tmp_path, students=[{"name": "bad", "model": "auxiliary:Auxiliary"}, STUDENTS[1]])
    code, output = run("run", path, "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert code == ExitCode.CONFIGURATION, output
    refused(output, "student 'bad'", "cannot train a step", "a tuple", "auxiliary.py:6", "not started again")
    assert not (tmp_path / "run" / "students" / "bad" / "checkpoint.safetensors").exists()


def test_an_unreadable_checkpoint(tmp_path: Path) -> None:
    path = experiment_file(tmp_path)
    broken = tmp_path / "run" / "students" / "cnn" / "checkpoint.safetensors"
    RunFolder(tmp_path / "run").join(load(path), ["cnn"])
    broken.write_bytes(b"this is no checkpoint")
    work = ["work", path, "--student", "cnn", "--run-dir", tmp_path / "run", "--server", "127.0.0.1:1"]
    code, output = run(*work, cwd=tmp_path)
    assert code == ExitCode.CONFIGURATION, output
    refused(output, str(broken), "remove")
