"""`package.module:callable`: found or explained."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from codistill.process import plugins
from codistill.process.exit_codes import ExitCode
from codistill.process.interrupts import SignalInterrupt, mark_interrupts
from codistill.process.plugins import (
    LoadError,
    accepted_arguments,
    call,
    explain_error,
    is_reference,
    load,
    raised_by_user,
    shorten,
    users_code,
)

MODULE = """
import os

def widget(classes, *, size=3):
    return classes, size

class Gadget:
    pass

def calling():
    import json
    return json.loads("")

limit = 5
"""

PARSING = """import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.1)
"""
ENDING = {
    "parsing": PARSING + "args = parser.parse_args()\n",
    "lenient": PARSING + "args, _ = parser.parse_known_args()\ndef lr(): return args.lr\n",
    "leaving": "import sys\nsys.exit()\n",
    "saying": "import sys\nsys.exit('prepared; run me again')\n",
    "inside": PARSING + "def lr(): return parser.parse_args().lr\n",
    "stopped": "raise KeyboardInterrupt\n",
    "odd": "class Odd(BaseException): pass\nraise Odd('no')\n",
}


@pytest.fixture
def our_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    mark_interrupts()
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "references_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(MODULE)
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    (package / "torn.py").write_text("f = (\n")
    (package / "failing.py").write_text("raise OSError('no licence')\n")
    for name, text in ENDING.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


def test_functions_and_classes_are_found() -> None:
    assert load("references_package.parts:widget", "model")(4) == (4, 3)
    assert load("references_package.parts:Gadget", "model").__name__ == "Gadget"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("widget", "model: 'widget' is not of the form package.module:callable"),
        ("a.b:c.d", "model: 'a.b:c.d' is not of the form package.module:callable"),
        ("nowhere_at_all:f", "there is no module 'nowhere_at_all'; install it, put it beside the experiment file, or"),
        ("references_package.other:f", "there is no module 'references_package.other'"),
        ("references_package.parts.deeper:f", "there is no module 'references_package.parts.deeper'"),
        (
            "references_package.parts:wigdet",
            r"has no 'wigdet'; did you mean 'widget'\? It has: Gadget, calling, widget",
        ),
        ("references_package:f", "has no 'f'; It has: nothing to call"),
        ("references_package.parts:limit", "is of type int; expected a callable"),
    ],
)
def test_what_cannot_be_found_is_explained(reference: str, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        load(reference, "model")
    assert caught.value.code is ExitCode.CONFIGURATION


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("broken", r"ModuleNotFoundError at .*broken\.py:1: No module named 'a_module_that_is_not_there'"),
        ("failing", r"OSError at .*failing\.py:1: no licence"),
        ("torn", r"SyntaxError: .*torn\.py, line 1"),
    ],
)
def test_errors_inside_a_module_are_one_line_with_the_users_own(module: str, what: str) -> None:
    with pytest.raises(LoadError, match=f"^model: 'references_package.{module}:f': {what}") as caught:
        load(f"references_package.{module}:f", "model")
    assert "\n" not in str(caught.value)


def test_an_error_deep_in_a_library_is_laid_to_the_line_that_called_it() -> None:
    calling = load("references_package.parts:calling", "model")
    with pytest.raises(ValueError) as caught:
        calling()
    assert re.fullmatch(r"JSONDecodeError at .*parts\.py:\d+: Expecting value: .*", explain_error(caught.value))


def test_long_lists_are_cut() -> None:
    assert shorten(["a", "b"]) == "a, b"
    assert shorten([str(each) for each in range(100)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 92 more"


@pytest.mark.parametrize(
    ("text", "yes"),
    [("a:b", True), ("a.b_1:C", True), ("a", False), ("a:", False), ("a.:b", False), ("1a:b", False), ("a:b:c", False)],
)
def test_the_form(text: str, yes: bool) -> None:
    assert is_reference(text) is yes


def test_accepted_arguments() -> None:
    def anything(classes: int, **others: int) -> None: ...

    def positional(classes: int, /, size: int, *rest: int, width: int = 3) -> None: ...

    assert accepted_arguments(anything) is None
    assert accepted_arguments(positional) == {"size", "width"}
    assert accepted_arguments(max) is None  # no signature to read


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (
            "parsing",
            r"it ended the process while it was imported \(SystemExit: 2 at .*parsing\.py:4\); put what .* under `if",
        ),
        ("leaving", r"it ended the process while it was imported \(SystemExit at .*leaving\.py:2\); put what"),
        (
            "saying",
            r"it ended the process while it was imported \(SystemExit: prepared; run me again at .*saying\.py:2\)",
        ),
        ("odd", r"Odd at .*odd\.py:2: no"),
    ],
)
def test_a_module_that_ends_the_process_is_an_error_of_its_reference(
    module: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["codistill", "run", "--lr", "3"])
    with pytest.raises(LoadError, match=f"^model: 'references_package.{module}:f': {what}") as caught:
        load(f"references_package.{module}:f", "model")
    assert caught.value.code is ExitCode.CONFIGURATION
    assert sys.argv == ["codistill", "run", "--lr", "3"]


def test_a_parser_takes_none_of_our_arguments_and_its_usage_names_the_users_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["codistill", "--lr", "3"])
    assert load("references_package.lenient:lr", "model")() == 0.1
    with pytest.raises(
        LoadError, match=r"^f: '.*inside:lr': it ended the process \(SystemExit: 2 at .*inside\.py:4\); let"
    ):
        call("references_package.inside:lr", "f", {})
    assert capsys.readouterr().err.startswith("usage: inside.py [-h]")


def test_an_interrupt_keeps_its_meaning_where_pythons_own_handler_may_have_raised_it() -> None:
    with pytest.raises(KeyboardInterrupt):
        load("references_package.stopped:f", "model")


def test_without_a_signal_an_interrupt_is_the_users_error(our_handler: None) -> None:
    with pytest.raises(LoadError, match=r"^model: '.*': KeyboardInterrupt at .*stopped\.py:1$"):
        load("references_package.stopped:f", "model")


def test_a_signals_interrupt_stays(our_handler: None) -> None:
    with pytest.raises(SignalInterrupt), users_code("here"):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("kind", [GeneratorExit, KeyboardInterrupt, type("Odd", (BaseException,), {}), StopIteration])
def test_whatever_a_users_code_raises_is_an_error_of_one_line(kind: type[BaseException], our_handler: None) -> None:
    expected = rf"^here: {kind.__name__} at .*test_plugins\.py:\d+: mine$"
    with pytest.raises(LoadError, match=expected) as caught, users_code("here"):
        raise kind("mine")
    assert caught.value.code is ExitCode.CONFIGURATION


def test_errors_of_a_library_are_the_users_where_an_experiment_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_packages", set[str]())
    with pytest.raises(ValueError, match="Expecting") as raised:
        json.loads("")
    error = raised.value.with_traceback(raised.tb.tb_next)  # without this test's frame
    assert not raised_by_user(error)
    load("json:loads", "model")
    assert raised_by_user(error)


def test_an_end_of_the_process_is_never_the_callers_kind_of_error_and_others_are() -> None:
    with pytest.raises(RuntimeError, match=r"^here: KeyError at .*: 'a'$"), users_code("here", RuntimeError):
        raise KeyError("a")
    with (
        pytest.raises(LoadError, match=r"^here: it ended the process \(SystemExit: 0 at "),
        users_code("here", RuntimeError),
    ):
        sys.exit(0)
    with pytest.raises(MemoryError), users_code("here", spare=lambda error: isinstance(error, MemoryError)):
        raise MemoryError


def test_threads_leave_the_arguments_alone() -> None:
    seen: list[list[str]] = []

    def work() -> None:
        with users_code("here"):
            seen.append(sys.argv)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [sys.argv]
