"""docs/methods.md is true and complete: sections, parameters, defaults, bytes, examples, and the pair that it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.config.experiment import parse
from codistill.config.methods import KDCL_ENSEMBLES, METHODS
from codistill.methods.aggregator import RoundInputs
from codistill_server import methods
from system.support import assert_bit_equal, run, weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BUILT_IN = {name: settings for name, settings in METHODS.items() if settings.variants()}
TITLES = [title for settings in BUILT_IN.values() for title in settings.variants()]
B, C, K = 128, 100, 2


def sections(method: str) -> list[str]:
    """Return the sections that have a method in their heading."""
    parts = re.split(r"^##+ ", PAGE, flags=re.MULTILINE)
    heading = "Your own" if method == "custom" else f"`{method}`"
    return [part for part in parts if heading in part.splitlines()[0]]


def section(method: str) -> str:
    """Return the one section that has a method in its heading."""
    found = sections(method)
    assert len(found) == 1, f"docs/methods.md needs one section with `{method}` in its heading"
    return found[0]


def rows(text: str, first: str) -> list[list[str]]:
    """Return the rows of the tables whose head begins so."""
    found: list[list[str]] = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
        if lines[0][0] == first:
            found += lines[2:]
    return found


def bytes_of(arrays: Any) -> int:
    return sum(value.numel() * 4 for value in arrays.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_there_with_its_default(method: str) -> None:
    fields = METHODS[method].model_fields
    documented: dict[str, str] = {}
    for row in rows(section(method), "parameter"):
        name = re.match(r"`(\w+)`", row[0])
        assert name is not None
        of = re.search(r"\(of (.*)\)", row[0])  # a section of several methods says whose a parameter is
        if of is None or f"`{method}`" in of.group(1):
            documented[name.group(1)] = row[1].strip("`")
    expected: dict[str, str] = {}
    for name, field in fields.items():
        if name != "method":
            default = field.get_default(call_default_factory=True)
            expected[name] = "needed" if field.is_required() else str(default)
    assert documented == expected


SIZES = {"features/1": (64, 8, 8), "features/2": (128, 8, 8), "embedding": (512,)}
EXCHANGING = [name for name, settings in BUILT_IN.items() if settings().exchanges]


def crossing(method: str) -> set[tuple[int, int]]:
    """Return the bytes that cross for each participant in a round, up and down, by the aggregator itself."""
    settings = BUILT_IN[method]()
    names, teachers = ["a", "b"], ["t", "u"][: max(settings.teacher_limits[0], 2 * (method == "born_again"))]
    aggregator = methods.create(settings, names, teachers)
    assert aggregator is not None
    generator = torch.Generator().manual_seed(0)

    def drawn(outputs: Any, *before: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(*before, B, *SIZES.get(name, (C,)), generator=generator) for name in outputs}

    inputs = RoundInputs(
        students=tuple(names),
        outputs=drawn(aggregator.student, K),
        labels=torch.zeros(B, dtype=torch.int64),
        teachers={name: drawn(aggregator.teacher) for name in teachers},
    )
    targets = aggregator.targets(inputs)
    found = {
        (16 * B + bytes_of(drawn(aggregator.student)), bytes_of((targets.each or {}).get(name, targets.shared)))
        for name in names
    }
    return found | ({(16 * B + bytes_of(drawn(aggregator.teacher)), 0)} if teachers else set())


@pytest.mark.parametrize(
    "heading", sorted({part.splitlines()[0] for method in EXCHANGING for part in sections(method)})
)
def test_the_bytes_are_those_that_cross(heading: str) -> None:
    of_heading = [method for method in EXCHANGING if f"`{method}`" in heading]
    documented = {
        tuple(int(cell.rpartition("= ")[2].replace(",", "")) for cell in (row[2], row[4]))
        for row in rows(section(of_heading[0]), "who")
    }
    assert documented == set().union(*(crossing(method) for method in of_heading))


@pytest.mark.parametrize("title", TITLES)
def test_every_method_and_ensemble_has_an_example_that_its_section_links_to(title: str) -> None:
    example = f"examples/methods/{title.replace('/', '_')}.yaml"
    assert (ROOT / example).is_file(), f"write {example}"
    assert parse((ROOT / example).read_text(encoding="utf-8")).distillation.title == title
    links = re.findall(r"\]\(\.\./(examples/methods/[\w.]+)\)", section(title.partition("/")[0]))
    assert example in links


@pytest.mark.parametrize("method", BUILT_IN)
def test_every_method_is_in_the_table_that_helps_to_choose(method: str) -> None:
    """A section that several methods share may stand there under one of their names."""
    chosen = " ".join(row[1] for row in rows(PAGE, "you have"))
    sharing = [name for name in BUILT_IN if sections(name) == sections(method)]
    assert any(f"`{name}`" in chosen for name in sharing), (
        f"add a row for `{method}` below 'Which one' in docs/methods.md"
    )


def test_every_ensemble_is_in_its_table() -> None:
    assert [row[0].strip("`") for row in rows(section("kdcl"), "`ensemble`")] == list(KDCL_ENSEMBLES)


def test_the_readme_lists_every_method_and_ensemble() -> None:
    listed = " ".join(" ".join(row) for row in rows(README, "learn from"))
    assert set(re.findall(r"`(\w+)`", listed)) == {*METHODS, *KDCL_ENSEMBLES}


def test_links_lead_to_headings() -> None:
    def anchor(heading: str) -> str:
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    anchors = {anchor(found) for found in re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= anchors


def test_the_custom_pair_runs(tmp_path: Path) -> None:
    """The very text of the page, with real processes and in one; both end with the same bits."""
    files = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", section("custom"), re.DOTALL)
    experiment = re.search(r"```yaml\n(.*?)```", section("custom"), re.DOTALL)
    assert [name for _, name in files] == ["median.py", "median_loss.py"]
    assert experiment is not None
    assert len(("".join(text for text, _ in files) + experiment.group(1)).splitlines()) < 40
    assert set(re.findall(r"^(?:from|import) (\w+)", files[0][0], re.MULTILINE)) == {"codistill"}
    for text, name in files:
        (tmp_path / name).write_text(text)
    (tmp_path / "median.yaml").write_text(experiment.group(1))
    for folder, options in (("processes", []), ("one", ["--in-process"])):
        ended, output = run("run", "median.yaml", "--run-dir", folder, *options, cwd=tmp_path)
        assert ended == 0, output
    found = weights(tmp_path / "processes")
    assert list(found) == ["cnn", "mlp", "small"]
    assert_bit_equal(found, weights(tmp_path / "one"))
