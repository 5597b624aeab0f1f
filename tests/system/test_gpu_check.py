"""The program that checks a GPU: its small form on the CPU, that it finds what is wrong, and that it needs no GPU to end."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.config.experiment import parse

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def gpu_check() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # its data classes look up their annotations there
    spec.loader.exec_module(module)
    return module


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, check=False)


PASSED = {
    "numbers": [
        "12 steps on the CPU and on the GPU: codes [0, 0, 0, 0]",
        "the GPU twice, bit for bit: cnn 0.0e+00, mlp 0.0e+00",
        "CPU and GPU without TF32, within 1e-3: cnn 0.0e+00, mlp 0.0e+00",
        "CPU and GPU, within 2e-2: cnn 0.0e+00, mlp 0.0e+00",
    ],
    "equality and faults": [
        "a worker was killed while it trained",
        "every process of a run was killed while it trained",
        "gRPC and in-process, bit for bit: cnn 0.0e+00, mlp 0.0e+00",
        "in-process and gRPC with a killed worker, bit for bit: cnn 0.0e+00, mlp 0.0e+00",
        "in-process and killed, resumed, bit for bit: cnn 0.0e+00, mlp 0.0e+00",
    ],
    "methods": ["method dcm: code 0"],
    "exit codes": ["a GPU that is not there: code 3", "auto without a GPU: code 0"],
    "throughput": [
        "throughput, one: code 0",
        "throughput, two over gRPC: code 0",
        "throughput, two in-process: code 0",
    ],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", PASSED)
def test_the_small_form_passes_on_the_cpu(part: str, gpu_check: types.ModuleType, tmp_path: Path) -> None:
    check = gpu_check.Check(gpu_check.CPU, tmp_path, 580)
    ((_, _, function),) = (each for each in gpu_check._PARTS if each[0] == part)
    function(check)
    lines = (tmp_path / "results.txt").read_text().splitlines()
    assert all(re.match(r"(PASS|INFO) +\d+ s  \S", line) for line in lines), lines
    for text in PASSED[part]:
        assert any(line.startswith("PASS") and text in line for line in lines), text
    if part == "throughput":
        assert re.search(
            r"cnn, alone: images/s of a student: codistill [\d,]+, plain loop [\d,]+, ratio", "\n".join(lines)
        )


def test_the_small_form_has_every_part(gpu_check: types.ModuleType) -> None:
    assert list(PASSED) == [name for name, _, _ in gpu_check._PARTS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which would be checked")
def test_without_a_gpu_nothing_is_checked() -> None:
    ended = run()
    assert ended.returncode == 0
    assert ended.stdout.startswith("INFO PyTorch finds no GPU here, so nothing was checked")


def test_what_does_not_fit_the_time_is_named() -> None:
    ended = run("--cpu", "--limit", "1")
    assert ended.returncode == 0
    for part in ("numbers", "equality and faults", "methods", "exit codes", "throughput"):
        assert f"left out, as the time is over: {part}" in ended.stdout


def test_every_experiment_is_valid(
    gpu_check: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the long form runs, also what the small form leaves out."""
    seen: list[str] = []

    class Done:
        log = tmp_path / "log"

        def wait(self) -> int:
            return 0

        def problem(self) -> str:
            return ""

    def run(check: Any, name: str, *_: str, **__: Any) -> Done:
        experiment = parse((tmp_path / f"{name}.yaml").read_text())
        assert all(
            experiment.plan(student).training.device in ("cpu", "cuda", "cuda:99", "auto")
            for student in experiment.names
        )
        seen.append(name)
        return Done()

    monkeypatch.setattr(gpu_check.Check, "run", run)
    check = gpu_check.Check(gpu_check.GPU, tmp_path, 60)
    gpu_check.check_methods(check)
    gpu_check.check_numbers(check)
    with pytest.raises(AttributeError):  # there is no process to kill
        gpu_check.check_equality(check)
    gpu_check.check_exit_codes(check)
    assert seen.count("memory") == 2
    assert {"teacher", *gpu_check.GPU.methods, "short_gpu", "short_cpu", "long"} <= set(seen)
    assert len(gpu_check.GPU.methods) == 10


def checkpoint(run_folder: Path, **tensors: torch.Tensor) -> Path:
    from safetensors.torch import save_file

    folder = run_folder / "students" / "a"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "checkpoint.safetensors")
    return run_folder


def test_other_bits_and_missing_weights_fail(gpu_check: types.ModuleType, tmp_path: Path) -> None:
    weights = {"model.w": torch.tensor([3.0, 4.0]), "model.n": torch.tensor(5)}
    for name, change in (
        ("one", {}),
        ("same", {}),
        ("near", {"model.w": torch.tensor([3.0, 4.0005])}),
        ("count", {"model.n": torch.tensor(6)}),
        ("nan", {"model.w": torch.tensor([3.0, float("nan")])}),
    ):
        checkpoint(tmp_path / name, **{**weights, **change})
    checkpoint(tmp_path / "more", **weights, **{"model.v": torch.zeros(1)})
    check = gpu_check.Check(gpu_check.CPU, tmp_path, 60)
    for other, tolerance, passes in (
        ("same", 0.0, True),
        ("near", 0.0, False),
        ("near", 1e-3, True),
        ("near", 1e-5, False),
        ("count", 0.0, False),
        ("nan", 1e-3, False),
        ("more", 1e-3, False),
        ("absent", 1e-3, False),
    ):
        before = check.failed
        gpu_check.compare(check, "one", other, tolerance, f"one and {other}")
        assert (check.failed == before) == passes, other
