"""The first promise: a run over gRPC with real processes ends with the bits of the in-process run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from rich.console import Console

from codistill.config.experiment import load
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder
from system.support import assert_bit_equal, experiment_file, run, weights

pytestmark = pytest.mark.system


@pytest.mark.timeout(240)
def test_processes_and_one_process_end_with_the_same_bits(tmp_path: Path) -> None:
    """The method that has most to carry: held-out samples and a state. The others' bits are in test_methods.py."""
    path = experiment_file(
        tmp_path,
        distillation={"method": "kdcl", "ensemble": "general", "weight": 0.7, "temperature": 3},
        data__held_out=40,
        data__train_size=140,
        exchange__dtype="float16",  # what the wire rounds, the in-process run rounds too
    )

    code, output = run("run", path, "--run-dir", tmp_path / "grpc", cwd=tmp_path, timeout=200)
    assert code == 0, output
    assert "live page: http://127.0.0.1:" in output

    experiment = load(path)
    folder = RunFolder(tmp_path / "in-process")
    folder.start(experiment, mode="in-process", resume=False)
    assert run_in_process(experiment, folder, PlainProgress(Console(quiet=True)), threading.Event()) == 0

    ours, theirs = weights(tmp_path / "grpc"), weights(tmp_path / "in-process")
    assert {name: int(tensors["step"]) for name, tensors in ours.items()} == {"mlp": 10, "cnn": 10, "vit": 10}
    assert_bit_equal(ours, theirs)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Another seed gives other bits: the assertion above is no tautology."""
    runs = []
    for seed in (1, 2):
        path = experiment_file(tmp_path, seed=seed, training__epochs=1)
        experiment = load(path)
        folder = RunFolder(tmp_path / f"seed-{seed}")
        folder.start(experiment, mode="in-process", resume=False)
        run_in_process(experiment, folder, PlainProgress(Console(quiet=True)), threading.Event())
        runs.append(weights(folder.path))
    with pytest.raises(AssertionError, match="differs"):
        assert_bit_equal(*runs)
