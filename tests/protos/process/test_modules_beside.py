"""Modules beside an experiment: last on the path, and never in place of another of their name."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from codistill.process import modules_beside
from codistill.process.plugins import LoadError, load

NET = "def net():\n    return 3\n"
TRAP = "raise RuntimeError('a module beside the experiment was loaded in place of another')\n"


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The experiment's folder, which holds nothing yet."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    monkeypatch.setattr(modules_beside, "_folders", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    modules_beside.add_folder(folder)
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(path: Path, text: str = NET) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_folder_comes_last_and_only_where_a_reference_needs_it(beside: Path) -> None:
    write(beside / "mine_beside.py")
    assert str(beside) not in sys.path
    assert load("mine_beside:net", "model")() == 3
    assert sys.path[-1] == str(beside)
    assert sys.path.count(str(beside)) == 1


def test_a_module_s_own_neighbours_are_found(beside: Path) -> None:
    write(beside / "mine_parts" / "models.py", "from mine_helper import net\n")
    write(beside / "mine_helper.py")
    assert load("mine_parts.models:net", "model")() == 3


@pytest.mark.parametrize(
    ("file", "reference", "other"),
    [
        ("queue.py", "queue:net", r"/queue\.py"),
        ("types.py", "types:net", r"/types\.py"),
        ("time.py", "time:net", r"Python's own \(built-in\)"),
        ("sklearn.py", "sklearn:net", r"/site-packages/sklearn"),
        ("sklearn.py", "sklearn.models:net", r"/site-packages/sklearn"),
        ("sklearn/models.py", "sklearn.models:net", r"/site-packages/sklearn"),
        ("sklearn/__init__.py", "sklearn:net", r"/site-packages/sklearn"),
        ("json/nets/small.py", "json.nets.small:net", r"/json"),
    ],
)
def test_a_reference_that_leads_elsewhere_is_refused_with_both_places(
    beside: Path, file: str, reference: str, other: str
) -> None:
    written = write(beside / file, TRAP)
    own = beside / written.relative_to(beside).parts[0]
    with pytest.raises(
        LoadError, match=f"^model: '{reference}': for Python the module .* is .*{other}, and not {own} "
    ):
        load(reference, "model")


def test_another_module_of_the_name_on_the_path_is_refused(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = write(tmp_path / "elsewhere" / "mine_twice.py", TRAP)
    write(beside / "mine_twice.py", TRAP)
    monkeypatch.syspath_prepend(elsewhere.parent)
    with pytest.raises(LoadError, match=f"is {elsewhere}, and not {beside / 'mine_twice.py'} beside the experiment"):
        load("mine_twice:net", "model")


def test_a_link_to_the_same_file_and_a_folder_of_data_hide_nothing(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write(tmp_path / "elsewhere" / "mine_linked.py")
    (beside / "mine_linked.py").symlink_to(target)
    (beside / "mine_linked").mkdir()
    monkeypatch.syspath_prepend(target.parent)
    assert load("mine_linked:net", "model")() == 3


def test_a_module_in_the_working_folder_is_named_and_not_loaded(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "work" / "mine_here.py", TRAP)
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    with pytest.raises(LoadError, match=f"there is no module 'mine_here'; .*; {file} is not looked at"):
        load("mine_here:net", "model")


def test_nothing_beside_is_loaded_in_place_of_what_user_code_imports(tmp_path: Path) -> None:
    for name in ("queue", "types", "sqlite3", "sklearn", "sitecustomize", "yaml"):
        write(tmp_path / f"{name}.py", TRAP)
    write(tmp_path / "mine.py", "import queue, sqlite3, types, yaml\n" + NET)
    program = f"""
        from pathlib import Path
        from codistill.process import modules_beside, plugins
        modules_beside.add_folder(Path({str(tmp_path)!r}))
        print(plugins.load("mine:net", "model")())
        import sklearn, wave
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr
