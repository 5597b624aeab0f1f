"""Checks what a program can of the prose in docstrings, comments, messages and documentation.

Docstrings: no sentence has more than 25 words. That they begin in the imperative is ruff's rule D401.
Everywhere: no phrase of tools/phrases.txt, which a reader has to read twice.
"""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("protos", "server", "worker", "deploy", "tools", "benchmarks")
MOST_WORDS = 25

_PHRASES = ROOT / "tools" / "phrases.txt"
_CODE = re.compile(r"``[^`]*``|`[^`]*`|:\w+:`[^`]*`|\S*[=_(){}\[\]∑Σ‖²·→<>/|^]\S*")
_END = re.compile(r"(?<=[.!?])(?:\s+|$)")
_SKIPPED = ("Example:", ">>>", "Examples:")


def python_files() -> Iterator[Path]:
    """Yield the project's own source files, generated code left out."""
    for source in SOURCES:
        yield from (path for path in sorted((ROOT / source).rglob("*.py")) if path.parent.name != "v1")


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str):
                    yield statement.lineno, text


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield the sentences of a docstring with their line in it; examples, tables and formulas are left out."""
    line = 0
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        if not any(mark in paragraph for mark in _SKIPPED) and "    " not in lines[0].strip():
            for item, start in _items(lines):
                for sentence in _END.split(item):
                    yield line + start, sentence
        line += len(lines) + 1


def _items(lines: list[str]) -> Iterator[tuple[str, int]]:
    """Yield what stands together: a paragraph, or one entry of a list or of the arguments."""
    item, start = "", 0
    indent = len(lines[0]) - len(lines[0].lstrip())
    for index, line in enumerate(lines):
        text = line.strip()
        own = len(line) - len(line.lstrip())
        if re.match(r"(?:[*-]|\d+\.) |\w+(?:, \w+)*: ", text) or own < indent:
            if item:
                yield item, start
            item, start, indent = text, index, own
        else:
            item = f"{item} {text}".strip()
    if item:
        yield item, start


def words(sentence: str) -> int:
    """Return how many words a sentence has; names, numbers and formulas count as one, whatever they hold."""
    return len(re.findall(r"\S*\w\S*", _CODE.sub(" x ", sentence)))


def phrases() -> list[re.Pattern[str]]:
    """Return the phrases that are not to be used, one regular expression a line."""
    lines = _PHRASES.read_text(encoding="utf-8").splitlines()
    return [re.compile(line, re.IGNORECASE) for line in lines if line and not line.startswith("#")]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that hold prose: strings and comments of a module, all lines of a page."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        return
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.STRING, tokenize.COMMENT):
                for offset, line in enumerate(token.string.splitlines()):
                    yield token.start[0] + offset, line


def problems() -> Iterator[str]:
    """Yield a line for each sentence that is too long, and for each phrase."""
    for path in python_files():
        for start, text in docstrings(path):
            for offset, sentence in sentences(text):
                count = words(sentence)
                if count > MOST_WORDS:
                    where = f"{path.relative_to(ROOT)}:{start + offset}"
                    yield f"{where}: a sentence of {count} words; allowed are {MOST_WORDS}: {sentence[:60]}…"
    wanted = phrases()
    for path in (*python_files(), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        if path == Path(__file__).resolve():
            continue
        for line_number, line in prose(path):
            for phrase in wanted:
                found = phrase.search(line)
                if found is not None:
                    yield f"{path.relative_to(ROOT)}:{line_number}: {found.group()!r} is to be said in other words"


def main() -> None:
    """Print all problems; end with 1 if there is one."""
    found = list(problems())
    for line in found:
        print(line)
    print(f"{len(found)} sentences to mend" if found else "the sentences that a program can check are in order")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
