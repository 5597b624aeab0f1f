"""The report: the document, the page around it, the picture of gains, and what a browser makes of them."""

from __future__ import annotations

import html
import itertools
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.experiment import parse
from codistill.records import Happened, Joined, Measured, Paced, RoundsClosed, StudentWait
from codistill_deploy import comparison, history, report
from codistill_deploy.comparison import ComparisonIndex, IndexedRun
from codistill_deploy.report import document, page, palette

NASTY = "</script><script>document.title='broken'</script><!--<img src=x onerror=alert(1)> & \"quotes\" 'too' \u2028 é"
SKILL = {"mlp": 0.90, "cnn": 0.965, "vit": 0.885}


def write_run(
    folder: Path,
    method: str = "kdcl",
    *,
    seed: int = 0,
    students: dict[str, float] | None = None,
    epochs: int = 60,
    every: int = 5,
    per_epoch: int = 6,
    stop: dict[str, int] | None = None,
    events: list[tuple[float, str, str, str]] | None = None,
) -> Path:
    """Writes a run folder as a run of `epochs` would leave it; a student named in `stop` ends at that epoch."""
    skill = students or SKILL
    stop = stop or {}
    draw = random.Random(f"{method} {seed}")
    names = list(skill)
    total, exchanges = epochs * per_epoch, method != "independent"
    folder.mkdir(parents=True, exist_ok=True)
    listed = "".join(f"\n  - {{name: {name}, model: {name.split('-')[0]}}}" for name in names)
    text = (
        f"name: digits\nseed: {seed}\ndata: {{dataset: digits, train_size: 300}}\n"
        f"training: {{epochs: {epochs}, batch_size: 50, evaluate_every: {every}, optimizer: {{name: adamw, lr: 2e-3}}}}\n"
        f"distillation: {{method: {method}}}\nstudents:{listed}\n"
    )
    (folder / "experiment.yaml").write_text(parse(text).to_yaml(), encoding="utf-8")
    (folder / "run.json").write_text(
        json.dumps(
            {
                "created": "2025-03-04T05:06:07+00:00",
                "versions": {"python": "3.12.3", "torch": "2.13.0", "codistill": "0.1.0"},
                "command": ["codistill", "run", "examples/digits.yaml"],
                "mode": "grpc" if exchanges else "in-process",
                "machine": {"processor": "x86_64", "cores": 16, "gpu": "none"},
            }
        ),
        encoding="utf-8",
    )
    start = 1_741_064_767.0
    lines: list[Joined | Measured | Paced | RoundsClosed] = [
        Joined(
            time=start,
            student=name,
            model=name.split("-")[0],
            parameters=24_000 + 61_000 * number,
            device="cpu",
            total_rounds=total,
        )
        for number, name in enumerate(names)
    ]
    luck = {name: draw.gauss(0, 0.004) for name in names}
    for epoch in range(1, epochs + 1):
        now = start + 1.9 * epoch
        for number, name in enumerate(names):
            if epoch > stop.get(name, epochs):
                continue
            top = skill[name] + luck[name] + (0.006 + 0.25 * (0.97 - skill[name]) if exchanges else 0.0)
            reached = 0.1 + (top - 0.1) * (1 - math.exp(-epoch / (0.05 * epochs + 2 + number % 3)))
            train = Measured(
                time=now,
                student=name,
                split="train",
                round=epoch * per_epoch,
                epoch=epoch,
                accuracy=min(1.0, max(0.0, reached + 0.02 + draw.gauss(0, 0.008))),
                loss=-math.log(max(0.02, min(0.998, reached + 0.01))) * 1.6 + abs(draw.gauss(0, 0.01)),
                distillation_loss=0.95 * math.exp(-epoch / (0.2 * epochs)) + abs(draw.gauss(0, 0.01))
                if exchanges
                else None,
            )
            lines.append(train)
            if epoch % every == 0 or epoch == epochs:
                accuracy = round(min(1.0, reached + draw.gauss(0, 0.004)) * 1497) / 1497
                loss = -math.log(max(0.02, accuracy - 0.01)) * 1.9
                lines.append(
                    train.model_copy(
                        update={"split": "test", "accuracy": accuracy, "loss": loss, "distillation_loss": None}
                    )
                )
            wait = 0.0 if not exchanges else 0.0012 + 0.002 * ((number + 1) % len(names) / len(names))
            lines.append(
                Paced(
                    time=now,
                    student=name,
                    round=epoch * per_epoch,
                    step_seconds=0.0094 + draw.random() * 0.0004,
                    wait_seconds=wait,
                )
            )
        if exchanges:
            lines.append(
                RoundsClosed(
                    time=now,
                    first=(epoch - 1) * per_epoch,
                    last=epoch * per_epoch - 1,
                    seconds=1.9,
                    wait_p50=0.0016 * math.exp(draw.gauss(0, 0.15)),
                    wait_max=4.2 if epoch == epochs // 2 else 0.004 * math.exp(abs(draw.gauss(0, 0.5))),
                    waits={
                        name: StudentWait(
                            rounds=per_epoch // 2 if number == 0 else 1,
                            seconds=(0.004 if number else 0.0015) * math.exp(draw.gauss(0, 0.3)),
                        )
                        for number, name in enumerate(names)
                    },
                    ensemble_accuracy=min(0.999, 0.35 + 0.64 * (1 - math.exp(-epoch / (0.06 * epochs + 1)))),
                    disagreement={
                        f"{a}|{b}": 0.05
                        + 0.5 * math.exp(-epoch / (0.12 * epochs))
                        + 0.02 * abs(draw.gauss(0, 1))
                        + 0.01 * (number % 4)
                        for number, (a, b) in enumerate(itertools.combinations(names, 2))
                    },
                )
            )
    (folder / "metrics.jsonl").write_text("".join(f"{line.model_dump_json()}\n" for line in lines), encoding="utf-8")
    told = (
        events
        if events is not None
        else [
            (0.4, "joined", names[0], "joined at round 0"),
            (57.0, "absent", names[-1], f"{names[-1]} closed its stream; round {total // 2} waits for it"),
            (61.2, "joined", names[-1], f"joined at round {total // 2 - 9}, 9 rounds behind"),
            (1.9 * epochs, "finished", "", "every student has finished"),
        ]
    )
    (folder / "events.jsonl").write_text(
        "".join(
            f"{Happened(time=start + at, what=what, student=who, message=message).model_dump_json()}\n"
            for at, what, who, message in told
        ),
        encoding="utf-8",
    )
    return folder


def write_comparison(
    folder: Path,
    methods: tuple[str, ...] = ("independent", "kdcl"),
    seeds: tuple[int, ...] = (0, 1, 2),
    *,
    epochs: int = 60,
    every: int = 5,
    stop: dict[str, int] | None = None,
) -> Path:
    """Writes a comparison folder and its runs."""
    title = {"kdcl": "kdcl/min_logit"}
    runs: list[IndexedRun] = []
    for method in methods:
        for seed in seeds:
            path = f"{method}/seed-{seed}"
            write_run(folder / path, method, seed=seed, epochs=epochs, every=every, stop=stop)
            runs.append(IndexedRun(method=title.get(method, method), seed=seed, path=path))
    ComparisonIndex(
        experiment="digits", methods=tuple(title.get(m, m) for m in methods), seeds=seeds, runs=tuple(runs)
    ).write(folder)
    return folder


class Page(HTMLParser):
    """The text of a page's tables by their id, its scripts by type, and its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[tuple[str | None, str]] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._table: list[list[str]] | None = None
        self._cell = self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given_ = dict(attrs)
        self.tags.append((tag, given_))
        if tag == "table":
            self._table = self.tables.setdefault(given_.get("id") or "", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
            self._cell = True
        elif tag == "script":
            self.scripts.append((given_.get("type"), ""))
            self._script = True
        elif tag == "a":
            self.links.append(given_.get("href") or "")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")
        self._script = self._script and tag != "script"
        self._table = None if tag == "table" else self._table

    def handle_data(self, data: str) -> None:
        if self._script:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self._cell and self._table is not None:
            self._table[-1][-1] += data

    @property
    def document(self) -> dict[str, Any]:
        """The document embedded in the page."""
        [text] = [text for kind, text in self.scripts if kind == "application/json"]
        return json.loads(text)


# ---- the document


@given(st.integers(0, 5000), st.integers(2, 600))
def test_a_thinned_series_keeps_its_ends_its_order_and_its_limit(count: int, limit: int) -> None:
    kept = document.thinned(count, limit)
    assert len(kept) == min(count, limit)
    assert kept == sorted(set(kept))
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)


@given(st.integers(0, 5000), st.integers(1, 600))
def test_groups_cover_every_span_once(count: int, limit: int) -> None:
    groups = document.grouped(count, limit)
    assert len(groups) == min(count, limit)
    assert [index for group in groups for index in group] == list(range(count))
    assert all(groups)


def test_a_long_run_of_many_students_is_cut_down_and_loses_neither_its_end_nor_its_longest_wait(tmp_path: Path) -> None:
    names = {f"mlp-{number}": 0.7 + 0.01 * number for number in range(20)}
    run = history.read(write_run(tmp_path, students=names, epochs=1000, every=1))
    shown = report.run_document(run)
    for student, data in zip(run.students, shown["students"], strict=True):
        assert len(data["test"]["epoch"]) == len(data["test"]["accuracy"]) == document.LIMIT
        assert data["test"]["count"] == 1000
        assert data["test"]["epoch"][-1] == 1000
        assert data["test"]["accuracy"][-1] == pytest.approx(student.test[-1].accuracy, rel=1e-4)
        assert data["final"]["accuracy"] == student.test[-1].accuracy
    assert len(shown["rounds"]["longest"]) == document.LIMIT
    assert max(shown["rounds"]["longest"]) == 4.2
    assert shown["rounds"]["round"][-1] == run.closed_rounds == 6000
    assert len(shown["disagreement"]["pairs"]) == 190
    assert [line["students"] for line in shown["disagreement"]["lines"]] == [[name] for name in names]
    assert len(page.render(shown)) < 1_500_000


def test_a_mean_disagreement_is_that_over_a_students_pairs() -> None:
    names = [f"s{number}" for number in range(6)]
    listed = ", ".join(f"{{name: {name}, model: mlp}}" for name in names)
    experiment = parse(f"name: x\ndata: {{dataset: digits}}\ntraining: {{epochs: 1}}\nstudents: [{listed}]\n")
    ratios = {f"{a}|{b}": 0.01 * number for number, (a, b) in enumerate(itertools.combinations(names, 2))}
    span = RoundsClosed(time=0, first=0, last=9, seconds=1, wait_p50=0, wait_max=0, waits={}, disagreement=ratios)
    shown = report.run_document(history.collect(experiment, [span]))["disagreement"]
    assert shown["x"] == "round"
    assert shown["lines"][1]["position"] == [10]
    expected = sum(value for pair, value in ratios.items() if "s1" in pair.split("|")) / 5
    assert shown["lines"][1]["ratio"] == [pytest.approx(expected, rel=1e-4)]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    run = history.read(write_run(tmp_path))
    broken = Measured(time=0, student="mlp", split="test", round=360, epoch=60, accuracy=0.1, loss=math.nan)
    worse = Measured(time=0, student="mlp", split="train", round=360, epoch=60, accuracy=0.1, loss=math.inf)
    shown = report.run_document(history.collect(run.experiment, [broken, worse]))
    assert shown["students"][0]["final"] == {"epoch": 60, "accuracy": 0.1, "loss": None}
    assert shown["students"][0]["train"]["loss"] == [None]
    assert Page(page.render(shown)).document == shown


def test_a_run_without_a_record_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(
        "name: x\ndata: {dataset: digits}\ntraining: {epochs: 1}\nstudents: [{name: a, model: mlp}, {name: b, model: mlp}]\n"
    )
    shown = Page(report.write(tmp_path).read_text(encoding="utf-8")).document
    assert shown["events"] == []
    assert shown["complete"] is False


def test_the_last_of_a_series_is_the_tables_number_unrounded(tmp_path: Path) -> None:
    run = history.read(write_run(tmp_path, epochs=2, every=1))
    test = [
        Measured(time=0, student="mlp", split="test", round=round_, epoch=epoch, accuracy=accuracy, loss=loss)
        for round_, epoch, accuracy, loss in ((6, 1, 1 / 3, 2 / 3), (12, 2, 0.889949999, 0.3333335))
    ]
    shown = report.run_document(history.collect(run.experiment, test))["students"][0]
    assert shown["test"]["accuracy"] == [0.33333, 0.889949999], "0.88995 would be shown as 89.00 %"
    assert shown["test"]["loss"] == [0.66667, 0.3333335] == [0.66667, shown["final"]["loss"]]
    whole = report.run_document(run)
    assert whole["rounds"]["ensemble"]["accuracy"][-1] == whole["run"]["ensemble_accuracy"]
    pairs = {(pair["first"], pair["second"]): pair["latest"] for pair in whole["disagreement"]["pairs"]}
    assert {tuple(line["students"]): line["ratio"][-1] for line in whole["disagreement"]["lines"]} == pairs


def test_a_comparisons_document_holds_the_tables_numbers_unrounded(tmp_path: Path) -> None:
    index = ComparisonIndex.read(write_comparison(tmp_path))
    table = comparison.summarise(comparison.read_runs(tmp_path, index))
    shown = report.comparison_document(table, "digits")
    for student, data in zip(table.students, shown["students"], strict=True):
        gain = student.results["kdcl/min_logit"].gain
        assert gain is not None
        assert data["results"]["kdcl/min_logit"]["gain"] == {
            "mean": gain.mean,
            "deviation": gain.deviation,
            "values": {str(seed): value for seed, value in gain.values.items()},
        }
        assert data["results"]["independent"]["gain"] is None
    assert shown["runs"][3]["report"] == "kdcl/seed-0/report.html"
    assert shown["runs"][3]["events"] == {"absent": 1, "finished": 1, "joined": 2}
    assert shown["runs"][3]["longest_wait"] == 4.2
    assert json.loads(page.embedded(shown)) == shown


# ---- the page


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_what_is_embedded_reads_back_and_can_end_no_script(value: object) -> None:
    text = page.embedded({"value": value})
    assert json.loads(text) == {"value": value}
    assert not set(text) & set("<>&\u2028\u2029")


def test_nothing_that_a_run_says_becomes_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path, events=[(1.0, NASTY, "mlp", NASTY)])
    (folder / "run.json").write_text(
        json.dumps({"versions": {NASTY: NASTY}, "command": [NASTY], "machine": {NASTY: NASTY}})
    )
    text = report.write(folder).read_text(encoding="utf-8")
    read = Page(text)
    assert len(read.scripts) == 3
    assert "img" not in [tag for tag, _ in read.tags]
    assert read.document == report.run_document(history.read(folder))
    shown = {**report.run_document(history.read(folder)), "title": NASTY}
    assert f"<title>{html.escape(NASTY)}: codistill run</title>" in page.render(shown)


def test_the_page_loads_nothing_and_lets_only_its_own_scripts_run(tmp_path: Path) -> None:
    text = report.write(write_run(tmp_path)).read_text(encoding="utf-8")
    read = Page(text)
    assert not any("src" in attributes for _, attributes in read.tags)
    assert [attributes.get("href") for tag, attributes in read.tags if tag == "link"] == ["data:,"]
    assert not re.search(r"@import|url\((?!data:)", page.style())
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|importScripts|sendBeacon)\b", page.script())
    [policy] = [
        attributes["content"] or ""
        for _, attributes in read.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split(";")[1]


def test_the_chart_librarys_licence_is_shipped_beside_it() -> None:
    vendor = Path(report.__file__).parent / "vendor"
    assert (vendor / "LICENSE").read_text().startswith("The MIT License")
    assert (vendor / "uPlot.iife.min.js").read_text().startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32) */")


# ---- the folder


def test_a_comparisons_report_is_written_with_those_it_links_to(tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=(0, 1), epochs=4, every=1)
    shutil.rmtree(tmp_path / "kdcl" / "seed-1")
    assert report.write(tmp_path) == tmp_path / "report.html"
    shown = Page((tmp_path / "report.html").read_text(encoding="utf-8")).document
    linked = [run["report"] for run in shown["runs"] if run["report"]]
    assert linked == ["independent/seed-0/report.html", "independent/seed-1/report.html", "kdcl/seed-0/report.html"]
    assert all((tmp_path / link).is_file() for link in linked)
    assert [each["seed"] for each in shown["incomplete"]] == [1]


def test_a_folder_of_neither_kind_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        report.ReportError, match=r"neither a run folder \(no experiment\.yaml in it\) nor a comparison folder"
    ):
        report.write(tmp_path)
    with pytest.raises(report.ReportError, match="neither"):
        report.write(tmp_path / "nowhere")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", epochs=2)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(report.ReportError, match=r"metrics\.jsonl: line 1"):
        report.write(tmp_path / "run")
    (tmp_path / "run" / "experiment.yaml").write_text("name: x\n")
    with pytest.raises(report.ReportError, match=r"experiment\.yaml: data: is needed"):
        report.write(tmp_path / "run")
    (tmp_path / "comparison.json").write_text("[]")
    with pytest.raises(report.ReportError, match=r"comparison\.json"):
        report.write(tmp_path)


# ---- the picture of gains


def drawn(folder: Path, width: int = 860) -> tuple[comparison.Comparison, ET.Element]:
    table = comparison.summarise(comparison.read_runs(folder, ComparisonIndex.read(folder)))
    return table, ET.fromstring(report.gain_svg(table, width))  # noqa: S314 - our own text


def marks(svg: ET.Element, kind: str) -> list[ET.Element]:
    return [each for each in svg.iter("{http://www.w3.org/2000/svg}circle") if each.get("class") == kind]


@pytest.mark.parametrize("width", [370, 860])
def test_the_picture_shows_every_seed_and_mean_to_scale(tmp_path: Path, width: int) -> None:
    table, svg = drawn(write_comparison(tmp_path, ("independent", "dml", "kdcl"), epochs=10), width)
    gains = [student.results[method].gain for student in table.students for method in table.others]
    gains += [table.means[method].gain for method in table.others]
    means = [100 * (gain.mean or 0.0) for gain in gains if gain is not None]
    seeds = [100 * value for gain in gains if gain is not None for value in gain.values.values()]
    assert len(means) == 8
    places = [float(mark.get("cx") or "nan") for mark in (*marks(svg, "mean"), *marks(svg, "seed"))]
    [zero] = [each for each in svg.iter("{http://www.w3.org/2000/svg}line") if each.get("class") == "zero"]
    scale, offset = np.polyfit([*means, *seeds], places, 1)
    assert np.allclose(scale * np.array([*means, *seeds]) + offset, places, atol=0.1)
    assert float(zero.get("x1") or "nan") == pytest.approx(offset, abs=0.2)
    assert scale > 0
    assert all(0 <= place <= width for place in places)


def test_the_picture_tells_its_numbers_to_those_who_cannot_see_it(tmp_path: Path) -> None:
    table, svg = drawn(write_comparison(tmp_path, epochs=10))
    gain = table.students[1].results["kdcl/min_logit"].gain
    assert gain is not None
    assert gain.mean is not None
    assert gain.deviation is not None
    sign = "+" if gain.mean > 0 else "−"
    assert f"cnn, kdcl/min_logit: {sign}{abs(100 * gain.mean):.2f} ± {100 * gain.deviation:.2f}" in (
        svg.get("aria-label") or ""
    )


def test_with_one_seed_the_picture_has_no_whisker_and_without_a_gain_it_says_so(tmp_path: Path) -> None:
    _, svg = drawn(write_comparison(tmp_path, seeds=(0,), epochs=10, stop={"vit": 5}))
    assert len(marks(svg, "mean")) == 2
    assert not marks(svg, "seed")
    assert not [each for each in svg.iter() if each.get("class") == "whisker"]
    assert [each.text for each in svg.iter()].count("no pair of runs") == 2


def test_the_pictures_text_is_escaped() -> None:
    experiment = parse(
        "name: x\ndata: {dataset: digits}\ntraining: {epochs: 1}\nstudents: [{name: a, model: mlp}]\ndistillation: {method: independent}\n"
    )
    test = Measured(time=0, student=NASTY, split="test", round=1, epoch=1, accuracy=0.5, loss=1)
    runs = [comparison.MethodRun(method, 0, history.collect(experiment, [test])) for method in ("independent", NASTY)]
    for width in (370, 860):
        svg = ET.fromstring(report.gain_svg(comparison.summarise(runs), width))  # noqa: S314
        assert {each.tag.partition("}")[2] for each in svg.iter()} <= {
            "svg",
            "style",
            "line",
            "text",
            "g",
            "title",
            "path",
            "circle",
        }


# ---- the colours

# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as seen with each deficiency.
SEEN = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(colour: str, eyes: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB colour as these eyes see it."""
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.clip(eyes @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ linear
        / [0.9505, 1, 1.089]
    )
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN)
@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_any_two_colours_differ_to_all_eyes(colours: tuple[str, ...], eyes: str) -> None:
    seen = {colour: lab(colour, SEEN[eyes]) for colour in colours}
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 14, (one, other)


# ---- the browser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

browser = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")]


def loaded(path: Path, profile: Path, width: int = 1200) -> str:
    """Returns the page's DOM after its scripts have run."""
    assert CHROMIUM is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
        f"--window-size={width},900",
    ]
    result = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    return result.stdout


def root(read: Page) -> dict[str, str | None]:
    return next(attributes for tag, attributes in read.tags if tag == "html")


def number(text: str) -> float:
    found = re.search(r"[-+−]?[\d.,]+", text)
    assert found, text
    return float(found[0].replace("−", "-").replace(",", ""))


def is_number(text: str) -> bool:
    return re.fullmatch(r"[\d.]+", text) is not None


class TestBrowser:
    pytestmark = browser

    def test_a_runs_page_draws_its_charts_and_its_numbers_are_the_datas(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", events=[(1.0, "absent", "vit", NASTY)])
        run = history.read(folder)
        read = Page(loaded(report.write(folder), tmp_path / "profile"))
        assert "data-error" not in root(read)
        charts = [attributes for _, attributes in read.tags if attributes.get("class") == "plot"]
        assert root(read)["data-charts"] == str(len(charts)) == "9"
        assert [tag for tag, _ in read.tags].count("canvas") == 9
        assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)
        rows = read.tables["students"][1:]
        assert [row[0] for row in rows] == ["mlp", "cnn", "vit"]
        for row, student in zip(rows, run.students, strict=True):
            assert student.final is not None
            assert number(row[2]) == student.parameters
            assert number(row[4]) == pytest.approx(100 * student.final.accuracy, abs=0.005001)
            assert number(row[5]) == pytest.approx(student.final.loss, abs=0.0005001)
        for row, student in zip(read.tables["waits"][1:], run.students, strict=True):
            assert number(row[1]) == pytest.approx(1000 * (student.step_seconds or 0), rel=0.005)
            assert number(row[4]) == run.waits[student.name].rounds
        assert [row[3] for row in read.tables["events"][1:]] == [NASTY]

    def test_ticks_are_as_far_apart_as_they_say(self, tmp_path: Path) -> None:
        """Every step that the axes of shares can take, read off what is drawn."""
        program = [
            "const drawn = [];",
            "const paint = CanvasRenderingContext2D.prototype.fillText;",
            "CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {",
            "  drawn.push(text); document.documentElement.dataset.drawn = JSON.stringify(drawn);",
            "  return paint.call(this, text, ...rest);",
            "};",
        ]
        folder = write_run(tmp_path / "run", epochs=2, every=1)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps: set[float] = set()
        for number, spread in enumerate((0.03, 0.12, 0.3)):
            changed: list[str] = []
            for line in lines:
                record = json.loads(line)
                if record["kind"] == "measured":
                    record["accuracy"] = 0.5 + spread * (record["epoch"] - 1)
                changed.append(json.dumps(record))
            (folder / "metrics.jsonl").write_text("\n".join(changed) + "\n", encoding="utf-8")
            text = report.write(folder).read_text(encoding="utf-8")
            text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
            hooked = tmp_path / "hooked.html"
            hooked.write_text(
                text.replace("<script", f"<script>{''.join(program)}</script><script", 1), encoding="utf-8"
            )
            texts = json.loads(root(Page(loaded(hooked, tmp_path / f"profile-{number}")))["data-drawn"] or "[]")
            first = texts.index("test accuracy, %") + 1  # an axis's name is drawn before its ticks
            ticks = [float(each) for each in itertools.takewhile(is_number, texts[first:])]
            apart = {round(other - one, 6) for one, other in itertools.pairwise(ticks)}
            assert len(apart) == 1, ticks
            steps |= apart
        assert any(step % 1 for step in steps), f"a step that is no whole number is among {steps}"

    def test_a_narrow_screen_has_the_accuracies_whole_and_cuts_nothing_else(self, tmp_path: Path) -> None:
        """Tables may scroll, and show that they do; the page itself may not."""
        folder = write_run(tmp_path / "run", epochs=5)
        text = report.write(folder).read_text(encoding="utf-8")
        text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
        outer = tmp_path / "outer.html"
        measure = (
            "const page = document.querySelector('iframe').contentDocument;"
            "const right = (each) => each.getBoundingClientRect().right;"
            "const free = [...page.querySelectorAll('main *')].filter((each) => !each.closest('.scroll'));"
            "const shown = [...page.querySelectorAll('#students tr > :nth-child(5), #students .meter')];"
            "document.documentElement.dataset.free = Math.max(...free.map(right));"
            "document.documentElement.dataset.shown = Math.max(...shown.map(right));"
        )
        source = html.escape(text, quote=True)
        outer.write_text(
            f'<body><iframe style="width:420px;height:900px;border:0" srcdoc="{source}"></iframe>'
            f"<script>addEventListener('load', () => {{{measure}}})</script>",
            encoding="utf-8",
        )
        measured = root(Page(loaded(outer, tmp_path / "profile")))
        assert 300 < float(measured["data-shown"] or "nan") <= 420
        assert 300 < float(measured["data-free"] or "nan") <= 420

    def test_a_page_says_who_was_started_again(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", epochs=5)
        assert "<dt>Started again</dt>" not in loaded(report.write(folder), tmp_path / "profile")
        killed = "was killed by SIGKILL; started again in 0.1 s, restart 1 of 10"
        (folder / history.SUPERVISOR_FILE).write_text(
            "".join(
                Happened(time=1e9, what=history.RESTARTED, student=who, message=killed).model_dump_json() + "\n"
                for who in ("cnn", "", "cnn")
            )
        )
        dom = loaded(report.write(folder), tmp_path / "profile")
        assert "<dt>Started again</dt><dd>the server once and cnn 2 times</dd>" in dom
        assert dom.count(killed) >= 3

    def test_a_page_says_what_was_missed_only_where_something_was(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", epochs=5)
        dom = loaded(report.write(folder), tmp_path / "profile")
        assert all(len(row) == 6 for row in Page(dom).tables["waits"])
        drawn = dom.partition("<script")[0]
        assert 'id="waits"' in drawn
        assert "Missed" not in drawn
        assert "below the quorum" not in drawn
        assert "<dt>Joined again</dt>" not in dom
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        spans = [record for record in records if record["kind"] == "rounds"]
        spans[1] |= {"missed": {"vit": 3, "cnn": 1}, "without_targets": 1}
        spans[3] |= {"missed": {"vit": 3}}
        records += [record for record in records if record["kind"] == "joined" and record["student"] == "vit"]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
        dom = loaded(report.write(folder), tmp_path / "profile")
        waits = Page(dom).tables["waits"]
        assert [row[-1] for row in waits] == ["Missed, rounds", "0 (0.0\u202f%)", "1 (3.3\u202f%)", "6 (20.0\u202f%)"]
        assert "1 round closed below the quorum and had no targets" in dom
        assert "<dt>Joined again</dt><dd>vit once</dd>" in dom

    def test_a_comparisons_page_draws_its_charts_and_its_numbers_are_the_datas(self, tmp_path: Path) -> None:
        folder = write_comparison(tmp_path / "cmp", ("independent", "dml", "kdcl"), epochs=20)
        table = comparison.summarise(comparison.read_runs(folder, ComparisonIndex.read(folder)))
        read = Page(loaded(report.write(folder), tmp_path / "profile"))
        assert "data-error" not in root(read)
        assert root(read)["data-charts"] == "4"
        assert [tag for tag, _ in read.tags].count("canvas") == 4
        rows = read.tables["gains"][2:]
        results = [student.results for student in table.students] + [table.means]
        for row, result in zip(rows, results, strict=True):
            alone, dml, dml_gain, kdcl, kdcl_gain = row[3:]
            for text, spread in (
                (alone, result["independent"].accuracy),
                (dml, result["dml"].accuracy),
                (dml_gain, result["dml"].gain),
                (kdcl, result["kdcl/min_logit"].accuracy),
                (kdcl_gain, result["kdcl/min_logit"].gain),
            ):
                assert spread is not None
                mean, deviation = text.split("±")
                assert number(mean) == pytest.approx(100 * (spread.mean or 0), abs=0.005001)
                assert number(deviation) == pytest.approx(100 * (spread.deviation or 0), abs=0.005001)
        seeds = [number(text) for row in read.tables["seeds"][1:] for text in row[-3:]]
        assert seeds == pytest.approx(
            [
                100 * result.accuracy.values[seed]
                for student in table.students
                for result in student.results.values()
                for seed in (0, 1, 2)
            ],
            abs=0.005001,
        )
        assert len(read.links) == 9

    def test_an_empty_run_shows_sentences_and_no_chart(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "experiment.yaml").write_text(
            "name: x\ndata: {dataset: digits}\ntraining: {epochs: 1}\nstudents: [{name: a, model: mlp}, {name: b, model: mlp}]\n"
        )
        dom = loaded(report.write(folder), tmp_path / "profile")
        read = Page(dom)
        assert "data-error" not in root(read)
        assert root(read)["data-charts"] == "0"
        assert "Not complete: a has not been tested and b has not been tested; the last epoch is 1." in dom
        for sentence in (
            "Nothing has been measured yet.",
            "No student has been tested yet.",
            "No closed round and no step time",
            "No disagreement",
            "No event",
        ):
            assert sentence in dom
