"""The benchmarks run and print tables that can be read; what they measure is not judged here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def table(program: str, *arguments: str | Path) -> list[dict[str, str]]:
    """Run a benchmark and return its table's rows, by column."""
    ended = subprocess.run(
        [sys.executable, BENCHMARKS / program, *arguments], capture_output=True, text=True, timeout=110, check=False
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line.strip().strip("|") for line in ended.stdout.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def exchange(contenders: list[str], file: Path) -> dict[str, str]:
    (row,) = table(
        "exchange.py",
        *("--shapes", "4x3", "--workers", "2", "--contenders", ",".join(contenders)),
        *("--rounds", "3", "--repeats", "1", "--limit", "60", "--json", file),
    )
    assert (row["logits"], row["workers"]) == ("4x3", "2")
    for contender in contenders:
        assert number(row[f"{contender} rounds/s"]) > 0
        assert 0 < number(row[f"{contender} p50 ms"]) <= number(row[f"{contender} p99 ms"])
    measured = json.loads(file.read_text())["measurements"]
    assert [each["contender"] for each in measured] == contenders
    return row


def test_the_exchange_against_gloo(tmp_path: Path) -> None:
    row = exchange(["codistill", "gloo"], tmp_path / "out.json")
    ratio = number(row["gloo p50 ms"]) / number(row["codistill p50 ms"])
    assert number(row["gloo/codistill"]) == pytest.approx(ratio, rel=0.02, abs=0.01)


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed; pip install 'codistill[ray]'"
)
def test_the_exchange_through_ray(tmp_path: Path) -> None:
    exchange(["ray"], tmp_path / "out.json")


def test_the_step(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    rows = table(
        "step.py",
        *("--models", "mlp,cnn", "--batch-size", "2", "--classes", "3", "--steps", "4", "--repeats", "1"),
        *("--limit", "100", "--json", file),
    )
    assert [row["student"] for row in rows] == ["1-mlp", "2-cnn"]
    (repetition,) = json.loads(file.read_text())["repetitions"]
    for row in rows:
        together = number(row["step together ms"])
        assert number(row["step alone ms"]) > 0
        assert 0 < number(row["wait ms"]) < together
        slowest = max(pace["step"] for pace in repetition["alone"]["paces"].values())
        assert number(row["together/slowest alone"]) == pytest.approx(together / 1000 / slowest, rel=0.01)


@pytest.mark.parametrize(
    ("program", "arguments", "problem"),
    [
        ("exchange.py", ["--contenders", "mpi"], "allowed: codistill, gloo, ray"),
        ("step.py", ["--models", "mlp"], "two students at least"),
    ],
)
def test_what_cannot_be_measured_is_refused(program: str, arguments: list[str], problem: str) -> None:
    ended = subprocess.run(
        [sys.executable, BENCHMARKS / program, *arguments], capture_output=True, text=True, timeout=110, check=False
    )
    assert ended.returncode == 2
    assert problem in ended.stderr
