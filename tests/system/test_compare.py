"""`codistill compare` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from codistill_deploy.compare.plan import VARIANTS
from system.support import EXPERIMENT, assert_bit_equal, experiment_file, run, weights

pytestmark = pytest.mark.system


def test_all_methods_end_in_one_table_and_one_picture(tmp_path: Path) -> None:
    file = experiment_file(tmp_path, training__epochs=1, data__held_out=20, exchange__journal={"keep": "all"})
    arguments = ("compare", file, "--methods", "all", "--seeds", "1", "--in-process", "--run-dir", "all")
    code, output = run(*arguments, cwd=tmp_path)
    assert code == 0, output
    lines = output.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("method "))
    compared = [method for method in VARIANTS if method not in ("fddml", "hddml")]
    assert [line.split()[0] for line in lines[head + 1 : head + 1 + len(compared)]] == compared
    assert any(line.startswith("not compared: fddml: 'fddml' is for 2 students, there are 3") for line in lines)
    assert "<svg" in (tmp_path / "all" / "gains.svg").read_text()

    code, again = run(*arguments, "--resume", cwd=tmp_path)
    assert code == 0, again
    assert again.splitlines()[1:] == lines[head:], "the table again, and nothing was run"


def test_over_processes_the_best_alone_teaches_to_the_same_bits(tmp_path: Path) -> None:
    file = experiment_file(tmp_path, training__epochs=1, students=EXPERIMENT["students"][:2])
    for name, way in (("one", ["--in-process"]), ("many", [])):
        arguments = ("compare", file, "--methods", "kd,independent", "--seeds", "1", "--run-dir", name)
        code, output = run(*arguments, *way, cwd=tmp_path)
        assert code == 0, output
    for path in ("independent/seed-7", "kd/seed-7"):
        assert_bit_equal(weights(tmp_path / "many" / path), weights(tmp_path / "one" / path))


def test_a_method_that_cannot_be_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    file = experiment_file(tmp_path)
    for methods, line in (
        (
            "kd,dml",
            "--methods: 'kd' needs a teacher, there is none; add `teachers` to the experiment, or independent to",
        ),
        ("independent,fddml", "distillation.method: 'fddml' is for 2 students, there are 3; remove some"),
        ("independent,kdcl/general", "data.held_out: 0, but the `general` ensemble measures its weights on held-out"),
    ):
        code, output = run("compare", file, "--methods", methods, "--run-dir", "none", cwd=tmp_path)
        assert code == 3, output
        assert line in output
        assert len(output.splitlines()) == 1
    assert not (tmp_path / "none").exists()
