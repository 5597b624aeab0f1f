"""Where everything is in a run's folder, and that no other module spells it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import codistill
import codistill_deploy
import codistill_server
import codistill_worker
from codistill.rundir import files, layout
from codistill.rundir.layout import ComparisonLayout, ParticipantLayout, RunLayout, generation_folder

FOLDER = Path("runs/mine")
RUNDIR = Path(layout.__file__).parent
PACKAGES = [
    Path(str(package.__file__)).parent for package in (codistill, codistill_server, codistill_worker, codistill_deploy)
]
# Addresses of the dashboard; the document that it serves is not the file of that name.
ROUTES = {("http.py", "run.json")}
PATH_METHODS = {"joinpath", "with_name", "with_suffix", "glob", "rglob"}


class TestPlaces:
    def test_every_property_is_in_the_folder_and_named_once(self) -> None:
        run = RunLayout(FOLDER)
        single = [value for name in vars(RunLayout) if isinstance(value := getattr(run, name, None), Path)]
        assert len(single) > 10
        assert len(set(single)) == len(single)
        assert all(path == FOLDER or path.parent == FOLDER for path in single)

    def test_names_that_runs_on_disk_have(self) -> None:
        run = RunLayout(FOLDER)
        assert [path.name for path in run.record_files] == ["metrics.jsonl", "events.jsonl", "supervisor.jsonl"]
        assert [path.name for path in run.journal_files] == [
            "journal.sqlite",
            "journal.sqlite-wal",
            "journal.sqlite-shm",
        ]
        assert run.experiment_file == FOLDER / "experiment.yaml"
        assert run.info_file == FOLDER / "run.json"
        assert run.address_file == FOLDER / "server.json"
        assert run.report_file == FOLDER / "report.html"
        assert (run.run_lock.name, run.server_lock.name, run.start_lock.name) == (
            "run.lock",
            "server.lock",
            "start.lock",
        )

    def test_a_student_and_a_teacher(self) -> None:
        run = RunLayout(FOLDER)
        student = run.student("cnn")
        assert student.path == FOLDER / "students/cnn"
        assert student.log == FOLDER / "students/cnn/log.txt"
        assert student.checkpoint.name == "checkpoint.safetensors"
        assert student.previous_checkpoint.name == "checkpoint.previous.safetensors"
        assert student.best_weights.name == "best.safetensors"
        assert run.teacher("cnn").log == FOLDER / "teachers/cnn/log.txt"

    def test_the_run_of_a_student(self) -> None:
        assert RunLayout(FOLDER).student("cnn").run == RunLayout(FOLDER)
        assert ParticipantLayout(Path("elsewhere/cnn")).run is None
        assert RunLayout(FOLDER).teacher("cnn").run is None

    def test_a_comparison_and_generations(self) -> None:
        comparison = ComparisonLayout(FOLDER)
        assert comparison.run("kdcl/min_logit", 3) == FOLDER / "kdcl-min_logit/seed-3"
        assert comparison.index_file == FOLDER / "comparison.json"
        assert comparison.report_file == RunLayout(FOLDER).report_file
        assert generation_folder(FOLDER, 2) == FOLDER / "generation-2"


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Return every source file but those of `rundir`, parsed."""
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            if RUNDIR not in path.parents and "v1" not in path.parts:
                yield path, ast.parse(path.read_text(encoding="utf-8"))


def strings(tree: ast.Module) -> Iterator[str]:
    """Return every string but docstrings, and the fixed pieces of formatted strings."""
    prose = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def file_names() -> set[str]:
    """Return the file names that the layout spells: strings of one word with a suffix."""
    found = strings(ast.parse(Path(layout.__file__).read_text(encoding="utf-8")))
    return {text for text in found if "." in text.strip(".") and " " not in text}


def paths_of(tree: ast.Module) -> Iterator[str]:
    """Return the strings joined to a path with / or joinpath, at whatever depth of an expression."""
    for node in ast.walk(tree):
        joined: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            joined = [node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATH_METHODS:
            joined = node.args
        for part in joined:
            yield from (
                text.value for text in ast.walk(part) if isinstance(text, ast.Constant) and isinstance(text.value, str)
            )


def spelled(tree: ast.Module, names: set[str]) -> set[str]:
    """Return the names that a source spells, as a string or as a piece of a path; prose may mention them."""
    stems = {name.split(".")[0] for name in names if "." in name} | {"students", "teachers"}
    whole = {piece.strip() for text in strings(tree) if " " not in text.strip() for piece in text.split("/")} & names
    return whole | {
        piece for text in paths_of(tree) for piece in text.replace("/", " ").replace(".", " ").split() if piece in stems
    }


def test_the_names_are_found() -> None:
    assert {"experiment.yaml", "metrics.jsonl", "run.lock", "log.txt", "report.html", "gains.svg"} <= file_names()
    planted = ast.parse("path = folder / 'run.json'\nlink = f'{path}/report.html'\nraise E('no experiment.yaml in it')")
    assert spelled(planted, file_names()) == {"run", "run.json", "report.html"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ('folder / "students" / name / ("checkpoint" + ".safetensors")', "checkpoint"),
        ("folder / 'students' / name", "students"),
        ("folder / f\"journal.{'sqlite'}\"", "journal"),
        ("folder.joinpath('teachers')", "teachers"),
        ("folder.glob('students/*/x')", "students"),
        ("open(f'{folder}/log.txt ')", "log.txt"),
    ],
)
def test_a_name_put_together_is_found(source: str, name: str) -> None:
    assert name in spelled(ast.parse(source), file_names())


def test_no_other_module_spells_a_file_of_a_runs_folder() -> None:
    names = file_names()
    found = {(path.name, name) for path, tree in sources() for name in spelled(tree, names)}
    assert found <= ROUTES, f"spelled outside {layout.__name__}: {sorted(found - ROUTES)}"


@pytest.mark.parametrize("forbidden", ["fcntl", "flock", "lockf", "fsync"])
def test_no_other_module_locks_or_syncs(forbidden: str) -> None:
    def uses(tree: ast.Module) -> bool:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and forbidden in {alias.name for alias in node.names}:
                return True
            if isinstance(node, ast.ImportFrom) and forbidden in {node.module, *(alias.name for alias in node.names)}:
                return True
            if isinstance(node, ast.Attribute) and node.attr == forbidden:
                return True
        return False

    found = [str(path) for path, tree in sources() if uses(tree)]
    assert not found, f"{forbidden} outside {files.__name__}"


def renames(tree: ast.Module) -> list[str]:
    """Return the calls that rename a file: those of os and shutil, and a path's, whose one argument is the target."""
    found: list[str] = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of_module = isinstance(node.func.value, ast.Name) and node.func.value.id in {"os", "shutil"}
        if (
            (of_module and node.func.attr in {"replace", "rename", "renames", "move"})
            or node.func.attr == "rename"
            or (node.func.attr == "replace" and len(node.args) == 1 and not node.keywords)
        ):
            found.append(ast.unparse(node))
    return found


def test_no_other_module_renames() -> None:
    assert renames(ast.parse("os.rename(a, b)\nos.replace(a, b)\na.replace(b)\nshutil.move(a, b)\na.rename(b)"))
    assert not renames(ast.parse("text.replace('a', 'b')\nreplace(settings, seed=1)\nsettings.replace(seed=1)"))
    found = [(path.name, call) for path, tree in sources() for call in renames(tree)]
    assert not found, f"renamed outside {files.__name__}: {found}"
