"""The pages' links lead somewhere: to files, to headings, to tests and modules that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FOLDERS = ("protos", "server", "worker", "deploy", "tests", "tools", "benchmarks", "docs", "examples")
TESTS = {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file and the anchor of each link to a file of the project."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"\w+:", link):
            path, _, anchor = link.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
class TestPage:
    def test_links_lead_to_files_and_headings(self, page: Path) -> None:
        for path, anchor in links(page):
            assert path.exists(), path
            assert not anchor or anchor in anchors(path), f"{path.name}#{anchor}"

    def test_the_files_that_it_names_exist(self, page: Path) -> None:
        for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)(?:::[^`]*)?`", prose(page)):
            assert (ROOT / name).exists() or "NAME" in name, name

    def test_the_tests_that_it_names_exist(self, page: Path) -> None:
        text = prose(page)
        assert set(re.findall(r"\b(test_\w+\.py)", text)) <= TESTS
        assert {f"{name}.py" for name in re.findall(r"`(test_\w+)::", text)} <= TESTS
        for path in re.findall(r"\btests/[\w/]+\.py", text):
            assert (ROOT / path).is_file(), path


def test_the_tests_that_sources_name_exist() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__).resolve()]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w/])(?:[\w-]+/)*test_\w+\.py", text)
        assert {name.rpartition("/")[2] for name in named} <= TESTS, path
        for name in named:
            assert not name.startswith("tests/") or (ROOT / name).is_file(), f"{path}: {name}"


def test_the_index_of_decisions_names_each_once() -> None:
    index = ROOT / "docs" / "decisions" / "README.md"
    records = sorted(path for path in index.parent.glob("*.md") if path != index)
    assert sorted(path for path, _ in links(index)) == records
    for path in records:
        number, title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").split(". ", 1)
        assert path.name.startswith(f"{int(number):04d}-")
        assert f"[{number}. {title}]({path.name})" in index.read_text(encoding="utf-8")
