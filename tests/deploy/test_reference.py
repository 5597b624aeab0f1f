"""docs/reference.md says what is: every port, file, variable and exit code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from codistill.process.exit_codes import ExitCode
from codistill.rundir import layout
from codistill_deploy.cli.options import DEFAULT_SERVER
from codistill_deploy.supervise.restart_policy import Ending, GiveUp, decide

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
WITH_GPUS = COMPOSE + (ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8")
PACKAGES = ("protos/codistill", "server/codistill_server", "worker/codistill_worker", "deploy/codistill_deploy")


def table(title: str) -> list[list[str]]:
    """Return the rows of the table below a heading, without its own."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def code(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def test_every_variable() -> None:
    source = "".join(
        path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    )
    read = set(re.findall(r'"((?:CODISTILL|RAY|CUDA|NVIDIA|KUBERNETES)_[A-Za-z_]+)"', source)) | set(
        re.findall(r'environ\.\w+\("([A-Z_]+)"', source)
    )
    offered = set(re.findall(r"\$\{([A-Z_]+):-", WITH_GPUS))
    assert set().union(*(code(row[0]) for row in table("Environment variables"))) == read | offered


def test_the_variables_of_docker_compose_are_in_its_page_with_their_defaults() -> None:
    page = (ROOT / "docs" / "docker-compose.md").read_text(encoding="utf-8")
    for name, default in set(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", WITH_GPUS)):
        indexes = {"TORCH_INDEX": "PyTorch's index", "CUDA_TORCH_INDEX": "pip's own index"}
        shown = indexes.get(name, default)
        assert re.search(rf"\| `{name}` \| `?{re.escape(shown)}", page), name


def test_every_exit_code() -> None:
    assert [(int(row[0]), code(row[1])) for row in table("Exit codes")] == [
        (each.value, {each.name}) for each in ExitCode
    ]


@pytest.mark.parametrize("row", table("Exit codes")[1:], ids=lambda row: row[1])
def test_which_process_is_restarted(row: list[str]) -> None:
    given_up = isinstance(decide(Ending(int(row[0])), [], limit=10), GiveUp)
    assert row[2].startswith("stops" if given_up else "starts it again")


def test_every_file_of_a_run_and_of_a_comparison() -> None:
    run, _, comparison = (layout.__doc__ or "").partition("\n\n")[2].rpartition("\n\n")
    shown = {name.rpartition("/")[2] for row in table("Files of a run's folder") for name in code(row[0])}
    assert shown == file_names(run)
    section = PAGE.partition("## Files of a run's folder\n")[2].partition("\n## ")[0]
    assert file_names(comparison) <= code(section)


def file_names(text: str) -> set[str]:
    return set(re.findall(r"\b[\w-]+\.(?:yaml|jsonl|json|sqlite|lock|log|txt|safetensors|html|svg|token)\b", text))


def test_every_port() -> None:
    published = {
        port.rpartition(":")[2]
        for service in yaml.safe_load(COMPOSE)["services"].values()
        for port in service.get("ports", ())
    }
    assert {row[0] for row in table("Ports")} == {DEFAULT_SERVER.rpartition(":")[2], *published}


def test_sizes_of_the_example_follow_from_the_formulas() -> None:
    batch, classes, width, students = 50, 10, 4, 3
    contribution, reply = batch * (classes * width + 16), batch * classes * width
    measured = [int(row[2].split()[0].replace(",", "")) for row in table("Sizes")[:3]]
    assert 0 < measured[0] - contribution < 80
    assert 0 < measured[1] - reply < 50
    assert measured[2] == students * (measured[0] + measured[1])
