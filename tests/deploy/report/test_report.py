"""The report of a folder: the comparison's document, the picture of gains, and what a browser makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from codistill.config.experiment import parse
from codistill.rundir import history
from codistill.rundir.records import Measured
from codistill_deploy import report
from codistill_deploy.compare import statistics
from codistill_deploy.compare.index import ComparisonIndex, IndexedRun
from codistill_server.observability.dashboard import html
from server.observability.dashboard.support import NASTY, Page, browser, loaded, number, root, write_run


def write_comparison(
    folder: Path,
    methods: tuple[str, ...] = ("independent", "kdcl"),
    seeds: tuple[int, ...] = (0, 1, 2),
    *,
    epochs: int = 60,
    every: int = 5,
    stop: dict[str, int] | None = None,
) -> Path:
    """Write a comparison folder and its runs."""
    title = {"kdcl": "kdcl/min_logit"}
    runs: list[IndexedRun] = []
    for method in methods:
        for seed in seeds:
            path = f"{method}/seed-{seed}"
            write_run(folder / path, method, seed=seed, epochs=epochs, every=every, stop=stop)
            runs.append(IndexedRun(method=title.get(method, method), seed=seed, path=path))
    ComparisonIndex(
        experiment="digits",
        methods=tuple(title.get(m, m) for m in methods),
        seeds=seeds,
        runs=tuple(runs),
        left_out={"fddml": NASTY},
    ).write(folder)
    return folder


MANY = ("independent", "dml", "dcm", "kdcl", "cross_architecture")


# ---- the document


def test_a_comparisons_document_holds_the_tables_numbers_unrounded(tmp_path: Path) -> None:
    index = ComparisonIndex.read(write_comparison(tmp_path))
    table = statistics.summarise(statistics.read_runs(tmp_path, index))
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
    assert shown["runs"][3]["events"] == {"disconnected": 1, "finished": 1, "joined": 2}
    assert shown["runs"][3]["longest_wait"] == 4.2
    assert json.loads(html.embedded_json(shown)) == shown


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
    assert shown["left_out"] == {"fddml": NASTY}
    assert ET.parse(tmp_path / "gains.svg").getroot().get("width") == "1072"  # noqa: S314 - our own text


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
    (tmp_path / "statistics.json").write_text("[]")
    with pytest.raises(report.ReportError, match=r"comparison\.json"):
        report.write(tmp_path)


# ---- the picture of gains


def drawn(folder: Path, width: int = 860) -> tuple[statistics.Comparison, ET.Element]:
    table = statistics.summarise(statistics.read_runs(folder, ComparisonIndex.read(folder)))
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


def test_of_many_methods_each_student_has_a_panel_all_on_one_scale(tmp_path: Path) -> None:
    table, svg = drawn(write_comparison(tmp_path, MANY, epochs=10), 1072)
    gains = [student.results[method].gain for student in table.students for method in table.others]
    gains += [table.means[method].gain for method in table.others]
    assert table.many
    means = [100 * (gain.mean or 0.0) for gain in gains if gain is not None]
    places = [float(mark.get("cx") or "nan") for mark in marks(svg, "mean")]
    zeros = [float(each.get("x1") or "nan") for each in svg.iter() if each.get("class") == "zero"]
    assert len(zeros) == len(table.students) + 1
    assert zeros == sorted(zeros)
    count = len(table.others)
    offsets = [place - zeros[number // count] for number, place in enumerate(places)]
    scale = offsets[0] / means[0]
    assert np.allclose(offsets, scale * np.array(means), atol=0.2)
    heights = [float(mark.get("cy") or "nan") for mark in marks(svg, "mean")]
    assert heights == heights[:count] * (len(table.students) + 1), "a method's row is the same in all panels"


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
    test = Measured(time=0, participant=NASTY, split="test", steps_trained=1, epochs_trained=1, accuracy=0.5, loss=1)
    runs = [statistics.MethodRun(method, 0, history.collect(experiment, [test])) for method in ("independent", NASTY)]
    for width in (370, 860):
        svg = ET.fromstring(report.gain_svg(statistics.summarise(runs), width))  # noqa: S314
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


# ---- the browser


class TestBrowser:
    pytestmark = browser

    def test_a_comparisons_page_draws_its_charts_and_its_numbers_are_the_datas(self, tmp_path: Path) -> None:
        folder = write_comparison(tmp_path / "cmp", ("independent", "dml", "kdcl"), epochs=20)
        table = statistics.summarise(statistics.read_runs(folder, ComparisonIndex.read(folder)))
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

    def test_of_many_methods_the_table_has_a_row_each_and_the_page_a_chart_each(self, tmp_path: Path) -> None:
        folder = write_comparison(tmp_path / "cmp", MANY, epochs=20)
        table = statistics.summarise(statistics.read_runs(folder, ComparisonIndex.read(folder)))
        read = Page(loaded(report.write(folder), tmp_path / "profile"))
        assert "data-error" not in root(read)
        assert root(read)["data-charts"] == "4"
        rows = read.tables["gains"][2:]
        assert [row[0] for row in rows] == list(table.methods)
        for row in rows:
            results = [each.results[row[0]] for each in table.students] + [table.means[row[0]]]
            for text, result in zip(row[1::2], results, strict=True):
                assert number(text) == pytest.approx(100 * (result.accuracy.mean or 0), abs=0.005001)
            for text, result in zip(row[2::2], results, strict=True):
                if result.gain is not None:
                    assert number(text.partition("±")[0]) == pytest.approx(100 * (result.gain.mean or 0), abs=0.005001)
        assert f"fddml was not compared: {NASTY}." in read.text
