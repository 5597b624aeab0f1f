"""docs/methods.md is true: its parameters and defaults are the schema's, its bytes are sent, its own pair runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from codistill.config.experiment import parse
from codistill.config.methods import Distillation, Method
from codistill.methods.aggregator import RoundInputs
from codistill_server import methods
from system.support import assert_bit_equal, run, weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
METHODS: dict[str, type[Method]] = {
    each.model_fields["method"].default: each for each in get_args(get_args(Distillation)[0])
}
B, C, K = 128, 100, 2


def section(method: str) -> str:
    """Returns the section that has a method in its heading."""
    parts = re.split(r"^##+ ", PAGE, flags=re.MULTILINE)
    heading = "Your own" if method == "custom" else f"`{method}`"
    (found,) = [part for part in parts if heading in part.splitlines()[0]]
    return found


def rows(text: str, first: str) -> list[list[str]]:
    """Returns the rows of the tables whose head begins so."""
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
    told: dict[str, str] = {}
    for row in rows(section(method), "parameter"):
        name = re.match(r"`(\w+)`", row[0])
        assert name is not None
        of = re.search(r"\(of (.*)\)", row[0])  # a section of several methods says whose a parameter is
        if of is None or f"`{method}`" in of.group(1):
            told[name.group(1)] = row[1].strip("`")
    expected: dict[str, str] = {}
    for name, each in fields.items():
        if name != "method":
            default = each.get_default(call_default_factory=True)
            expected[name] = "needed" if each.is_required() else str(default)
    assert told == expected


SIZES = {"features/1": (64, 8, 8), "features/2": (128, 8, 8), "embedding": (512,)}
EXCHANGING = [each for each in METHODS if each not in ("independent", "custom")]


def crossing(method: str) -> set[tuple[int, int]]:
    """Returns the bytes that cross for each participant in a round, up and down, by the aggregator itself."""
    settings = METHODS[method]()
    names, teachers = ["a", "b"], ["t", "u"][: max(settings.teachers[0], 2 * (method == "born_again"))]
    aggregator = methods.create(settings, names, teachers)
    assert aggregator is not None
    generator = torch.Generator().manual_seed(0)

    def drawn(outputs: Any, *before: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(*before, B, *SIZES.get(name, (C,)), generator=generator) for name in outputs}

    gathered = RoundInputs(
        students=tuple(names),
        outputs=drawn(aggregator.student, K),
        labels=torch.zeros(B, dtype=torch.int64),
        teachers={name: drawn(aggregator.teacher) for name in teachers},
    )
    targets = aggregator.targets(gathered)
    found = {
        (16 * B + bytes_of(drawn(aggregator.student)), bytes_of((targets.each or {}).get(name, targets.shared)))
        for name in names
    }
    return found | ({(16 * B + bytes_of(drawn(aggregator.teacher)), 0)} if teachers else set())


@pytest.mark.parametrize("heading", sorted({section(method).splitlines()[0] for method in EXCHANGING}))
def test_the_bytes_are_those_that_cross(heading: str) -> None:
    of_heading = [method for method in EXCHANGING if f"`{method}`" in heading]
    told = {
        tuple(int(cell.rpartition("= ")[2].replace(",", "")) for cell in (row[2], row[4]))
        for row in rows(section(of_heading[0]), "who")
    }
    assert told == set().union(*(crossing(method) for method in of_heading))


def test_every_example_is_there_and_is_of_its_method() -> None:
    for method in METHODS:
        if method == "custom":
            continue
        links = re.findall(r"\]\(\.\./(examples/methods/[\w.]+)\)", section(method))
        titles = [parse((ROOT / link).read_text()).distillation.method for link in links]
        assert method in titles, f"{method}: {titles}"


def test_links_lead_to_headings() -> None:
    def anchor(heading: str) -> str:
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    anchors = {anchor(each) for each in re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= anchors


def test_the_pair_of_ones_own_runs(tmp_path: Path) -> None:
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
