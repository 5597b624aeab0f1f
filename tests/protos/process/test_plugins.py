"""`package.module:callable`: found or explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from codistill.process.plugins import LoadError, accepted_arguments, explain_error, is_reference, load, shorten

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


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "references_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(MODULE)
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    (package / "torn.py").write_text("f = (\n")
    (package / "failing.py").write_text("raise OSError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_functions_and_classes_are_found() -> None:
    assert load("references_package.parts:widget", "model")(4) == (4, 3)
    assert load("references_package.parts:Gadget", "model").__name__ == "Gadget"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("widget", "model: 'widget' is not of the form package.module:callable"),
        ("a.b:c.d", "model: 'a.b:c.d' is not of the form package.module:callable"),
        ("nowhere_at_all:f", "there is no module 'nowhere_at_all'; install it, or add its folder to PYTHONPATH"),
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
