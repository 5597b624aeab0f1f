"""The environment of a run's processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from codistill_deploy.supervise.isolation import FOLDERS_VARIABLE, isolated


def test_the_users_folders_are_no_part_of_pythons_path(tmp_path: Path) -> None:
    made = isolated({"A": "b"}, [tmp_path])
    assert made.pop("PYTHONHASHSEED") == "0"
    assert made == {"A": "b", "PYTHONSAFEPATH": "1", FOLDERS_VARIABLE: str(tmp_path)}


@pytest.mark.parametrize(("given", "seed"), [({}, "0"), ({"PYTHONHASHSEED": ""}, "0"), ({"PYTHONHASHSEED": "7"}, "7")])
def test_texts_hash_alike_in_every_process(given: dict[str, str], seed: str) -> None:
    assert isolated(given, [])["PYTHONHASHSEED"] == seed


def test_the_users_own_path_stays_without_its_empty_parts(tmp_path: Path) -> None:
    path = os.pathsep.join(["", "/one", "", "two", ""])
    assert isolated({"PYTHONPATH": path}, [tmp_path])["PYTHONPATH"] == os.pathsep.join(["/one", "two"])


def test_folders_that_others_put_first_are_moved_behind(tmp_path: Path) -> None:
    job, experiment = tmp_path, tmp_path / "experiments"
    path = os.pathsep.join([f"{job}/", "/one"])
    made = isolated({"PYTHONPATH": path}, [experiment], last=[experiment, job])
    assert made["PYTHONPATH"] == "/one"
    assert made[FOLDERS_VARIABLE] == os.pathsep.join([str(experiment), str(job)])


LOADER = """
import multiprocessing, sys
loader = multiprocessing.get_context("spawn").Process(target=print)
loader.start()
loader.join()
sys.exit(loader.exitcode)
"""


@pytest.mark.parametrize("program", ["import queue", LOADER])
def test_no_process_loads_a_module_of_the_working_folder(tmp_path: Path, program: str) -> None:
    for name in ("queue", "sitecustomize", "usercustomize", "types"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(7)\n")
    environment = isolated({**os.environ, "PYTHONPATH": os.pathsep + os.environ.get("PYTHONPATH", "")}, [tmp_path])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
