"""Variables of the environment that are meant for others break nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from system.support import EXPERIMENT, environment, experiment_file, run

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

DEAD = "http://127.0.0.1:9"
OF_OTHERS = {
    **dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"), DEAD),
    "PROMETHEUS_MULTIPROC_DIR": "/nonexistent/x",
    "PYTHONIOENCODING": "ascii",
    "PYTHONWARNINGS": "error",
    "PYTHONOPTIMIZE": "2",
    "PYTHONDONTWRITEBYTECODE": "1",
    "COLUMNS": "0",
    "TERM": "dumb",
    "NO_COLOR": "1",
    "TMPDIR": "/nonexistent",
    "HOME": "/nonexistent",
    "OMP_NUM_THREADS": "nonsense",
    "CUDA_VISIBLE_DEVICES": "nonsense",
    "GRPC_VERBOSITY": "nonsense",
    "GRPC_ENABLE_FORK_SUPPORT": "1",
}


def test_a_comparison_in_an_environment_that_is_meant_for_others(tmp_path: Path) -> None:
    students = [{"name": name, "model": "mlp"} for name in ("a", "b")]
    path = experiment_file(tmp_path, students=students, data={**EXPERIMENT["data"], "test_size": 50})
    arguments = ["compare", path, "--methods", "independent,dml", "--seeds", "1", "--run-dir", tmp_path / "c"]
    code, output = run(*arguments, cwd=tmp_path, timeout=200, env=environment(**OF_OTHERS))
    assert code == ExitCode.OK, output
    assert output.isascii()
    assert "[2/2" in output
    assert "step 10/10; test accuracy: a " in output
    assert "points" in output, "the table is shown"
    assert "Traceback" not in output
    assert (tmp_path / "c" / "report.html").exists()
    assert "started again" not in output
