"""A run's page: its document, the page around it, the colours, and what a browser makes of them."""

from __future__ import annotations

import itertools
import json
import math
import re
from html import escape
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.config.experiment import parse
from codistill.rundir import history
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Happened, Joined, Measured, RoundsClosed
from codistill_server.observability.dashboard import downsample, html, palette
from codistill_server.observability.dashboard.document import run_document
from server.observability.dashboard.support import (
    NASTY,
    Page,
    browser,
    is_number,
    loaded,
    number,
    root,
    write_page,
    write_run,
)

# ---- the document


@given(st.integers(0, 5000), st.integers(2, 600))
def test_a_thinned_series_keeps_its_ends_its_order_and_its_limit(count: int, limit: int) -> None:
    kept = downsample.evenly_spaced(count, limit)
    assert len(kept) == min(count, limit)
    assert kept == sorted(set(kept))
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)


@given(st.integers(0, 5000), st.integers(1, 600))
def test_groups_cover_every_span_once(count: int, limit: int) -> None:
    groups = downsample.neighbour_groups(count, limit)
    assert len(groups) == min(count, limit)
    assert [index for group in groups for index in group] == list(range(count))
    assert all(groups)


def test_a_long_run_of_many_students_is_cut_down_and_loses_neither_its_end_nor_its_longest_wait(tmp_path: Path) -> None:
    names = {f"mlp-{number}": 0.7 + 0.01 * number for number in range(20)}
    run = history.read(write_run(tmp_path, students=names, epochs=1000, every=1))
    shown = run_document(run)
    for student, data in zip(run.students, shown["participants"], strict=True):
        assert len(data["test"]["epochs_trained"]) == len(data["test"]["accuracy"]) == downsample.LIMIT
        assert data["test"]["count"] == 1000
        assert data["test"]["epochs_trained"][-1] == 1000
        assert data["test"]["accuracy"][-1] == pytest.approx(student.test[-1].accuracy, rel=1e-4)
        assert data["final"]["accuracy"] == student.test[-1].accuracy
    assert len(shown["rounds"]["longest"]) == downsample.LIMIT
    assert max(shown["rounds"]["longest"]) == 4.2
    assert (shown["rounds"]["x"], shown["rounds"]["position"][-1], run.closed_rounds) == ("epoch", 1000, 6000)
    assert len(shown["disagreement"]["pairs"]) == 190
    assert [line["students"] for line in shown["disagreement"]["lines"]] == [[name] for name in names]
    assert len(html.render(shown)) < 1_500_000


def test_a_mean_disagreement_is_that_over_a_students_pairs() -> None:
    names = [f"s{number}" for number in range(6)]
    listed = ", ".join(f"{{name: {name}, model: mlp}}" for name in names)
    experiment = parse(f"name: x\ndata: {{dataset: digits}}\ntraining: {{epochs: 1}}\nstudents: [{listed}]\n")
    ratios = {f"{a}|{b}": 0.01 * number for number, (a, b) in enumerate(itertools.combinations(names, 2))}
    span = RoundsClosed(
        time=0, first=0, last=9, steps_trained=30, seconds=1, wait_p50=0, wait_max=0, waits={}, disagreement=ratios
    )
    shown = run_document(history.collect(experiment, [span]))["disagreement"]
    assert shown["x"] == "step"
    assert shown["lines"][1]["position"] == [30]
    expected = sum(value for pair, value in ratios.items() if "s1" in pair.split("|")) / 5
    assert shown["lines"][1]["ratio"] == [pytest.approx(expected, rel=1e-4)]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    run = history.read(write_run(tmp_path))
    broken = Measured(
        time=0, participant="mlp", split="test", steps_trained=360, epochs_trained=60, accuracy=0.1, loss=math.nan
    )
    worse = Measured(
        time=0, participant="mlp", split="train", steps_trained=360, epochs_trained=60, accuracy=0.1, loss=math.inf
    )
    shown = run_document(history.collect(run.experiment, [broken, worse]))
    assert shown["participants"][0]["final"] == {"epochs_trained": 60, "accuracy": 0.1, "loss": None}
    assert shown["participants"][0]["train"]["loss"] == [None]
    assert Page(html.render(shown)).document == shown


def test_charts_count_epochs_by_the_steps_of_a_span_and_not_by_its_rounds() -> None:
    text = "name: x\ndata: {dataset: digits}\ntraining: {epochs: 4}\nstudents: [{name: a, model: mlp}, {name: b, model: mlp}]\n"
    joined = Joined(time=0, participant="a", model="m", parameters=1, device="cpu", total_rounds=20, total_steps=40)
    span = RoundsClosed(
        time=0,
        first=0,
        last=9,
        steps_trained=20,
        seconds=1,
        wait_p50=0,
        wait_max=0,
        waits={},
        ensemble_accuracy=0.5,
        disagreement={"a|b": 0.1},
    )
    shown = run_document(history.collect(parse(text), [joined, span]))
    assert (shown["run"]["total_rounds"], shown["run"]["total_steps"], shown["run"]["closed_rounds"]) == (20, 40, 10)
    assert shown["rounds"]["x"] == shown["disagreement"]["x"] == "epoch"
    drawn = (shown["rounds"], shown["rounds"]["ensemble"], shown["disagreement"]["lines"][0])
    assert [each["position"] for each in drawn] == [[2], [2], [2]]


def test_a_teacher_is_a_participant_and_no_student() -> None:
    text = (
        "name: x\ndata: {dataset: digits}\ntraining: {epochs: 1}\ndistillation: {method: kd}\n"
        "students: [{name: a, model: mlp}]\nteachers: [{name: old, model: cnn, weights: old.safetensors}]\n"
    )
    tested = Measured(time=0, participant="a", split="test", steps_trained=9, epochs_trained=1, accuracy=0.5, loss=1)
    shown = run_document(history.collect(parse(text), [tested]))
    assert [(each["name"], each["role"], each["model"]) for each in shown["participants"]] == [
        ("a", "student", "mlp"),
        ("old", "teacher", "cnn"),
    ]
    assert shown["complete"], "a teacher is not trained"


def test_a_run_without_a_record_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(
        "name: x\ndata: {dataset: digits}\ntraining: {epochs: 1}\nstudents: [{name: a, model: mlp}, {name: b, model: mlp}]\n"
    )
    shown = Page(write_page(tmp_path).read_text(encoding="utf-8")).document
    assert shown["events"] == []
    assert shown["complete"] is False


def test_the_last_of_a_series_is_the_tables_number_unrounded(tmp_path: Path) -> None:
    run = history.read(write_run(tmp_path, epochs=2, every=1))
    test = [
        Measured(
            time=0,
            participant="mlp",
            split="test",
            steps_trained=steps,
            epochs_trained=epochs,
            accuracy=accuracy,
            loss=loss,
        )
        for steps, epochs, accuracy, loss in ((6, 1, 1 / 3, 2 / 3), (12, 2, 0.889949999, 0.3333335))
    ]
    shown = run_document(history.collect(run.experiment, test))["participants"][0]
    assert shown["test"]["accuracy"] == [0.33333, 0.889949999], "0.88995 would be shown as 89.00 %"
    assert shown["test"]["loss"] == [0.66667, 0.3333335] == [0.66667, shown["final"]["loss"]]
    whole = run_document(run)
    assert whole["rounds"]["ensemble"]["accuracy"][-1] == whole["run"]["ensemble_accuracy"]
    pairs = {(pair["first"], pair["second"]): pair["latest"] for pair in whole["disagreement"]["pairs"]}
    assert {tuple(line["students"]): line["ratio"][-1] for line in whole["disagreement"]["lines"]} == pairs


# ---- the page


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_what_is_embedded_reads_back_and_can_end_no_script(value: object) -> None:
    text = html.embedded_json({"value": value})
    assert json.loads(text) == {"value": value}
    assert not set(text) & set("<>&\u2028\u2029")


def test_nothing_that_a_run_says_becomes_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path, events=[(1.0, NASTY, "mlp", NASTY)])
    (folder / "run.json").write_text(
        json.dumps({"versions": {NASTY: NASTY}, "command": [NASTY], "machine": {NASTY: NASTY}})
    )
    text = write_page(folder).read_text(encoding="utf-8")
    read = Page(text)
    assert len(read.scripts) == 3
    assert "img" not in [tag for tag, _ in read.tags]
    assert read.document == run_document(history.read(folder))
    shown = {**run_document(history.read(folder)), "title": NASTY}
    assert f"<title>{escape(NASTY)}: codistill run</title>" in html.render(shown)


def test_the_page_loads_nothing_and_lets_only_its_own_scripts_run(tmp_path: Path) -> None:
    text = write_page(write_run(tmp_path)).read_text(encoding="utf-8")
    read = Page(text)
    assert not any("src" in attributes for _, attributes in read.tags)
    assert [attributes.get("href") for tag, attributes in read.tags if tag == "link"] == ["data:,"]
    assert not re.search(r"@import|url\((?!data:)", html.style())
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|importScripts|sendBeacon)\b", html.script())
    [policy] = [
        attributes["content"] or ""
        for _, attributes in read.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split(";")[1]


def test_the_chart_librarys_licence_is_shipped_beside_it() -> None:
    vendor = Path(html.__file__).parent / "vendor"
    assert (vendor / "LICENSE").read_text().startswith("The MIT License")
    assert (vendor / "uPlot.iife.min.js").read_text().startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32) */")


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


class TestBrowser:
    pytestmark = browser

    def test_a_runs_page_draws_its_charts_and_its_numbers_are_the_datas(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", events=[(1.0, "disconnected", "vit", NASTY)])
        run = history.read(folder)
        read = Page(loaded(write_page(folder), tmp_path / "profile"))
        assert "data-error" not in root(read)
        charts = [attributes for _, attributes in read.tags if attributes.get("class") == "plot"]
        assert root(read)["data-charts"] == str(len(charts)) == "9"
        assert [tag for tag, _ in read.tags].count("canvas") == 9
        assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)
        rows = read.tables["participants"][1:]
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
        for turn, spread in enumerate((0.03, 0.12, 0.3)):
            changed: list[str] = []
            for line in lines:
                record = json.loads(line)
                if record["kind"] == "measured":
                    record["accuracy"] = 0.5 + spread * (record["epochs_trained"] - 1)
                changed.append(json.dumps(record))
            (folder / "metrics.jsonl").write_text("\n".join(changed) + "\n", encoding="utf-8")
            text = write_page(folder).read_text(encoding="utf-8")
            text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
            hooked = tmp_path / "hooked.html"
            hooked.write_text(
                text.replace("<script", f"<script>{''.join(program)}</script><script", 1), encoding="utf-8"
            )
            texts = json.loads(root(Page(loaded(hooked, tmp_path / f"profile-{turn}")))["data-drawn"] or "[]")
            first = texts.index("test accuracy, %") + 1  # an axis's name is drawn before its ticks
            ticks = [float(each) for each in itertools.takewhile(is_number, texts[first:])]
            apart = {round(other - one, 6) for one, other in itertools.pairwise(ticks)}
            assert len(apart) == 1, ticks
            steps |= apart
        assert any(step % 1 for step in steps), f"a step that is no whole number is among {steps}"

    def test_a_narrow_screen_has_the_accuracies_whole_and_cuts_nothing_else(self, tmp_path: Path) -> None:
        """Tables may scroll, and show that they do; the page itself may not."""
        folder = write_run(tmp_path / "run", epochs=5)
        text = write_page(folder).read_text(encoding="utf-8")
        text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
        outer = tmp_path / "outer.html"
        measure = (
            "const page = document.querySelector('iframe').contentDocument;"
            "const right = (each) => each.getBoundingClientRect().right;"
            "const free = [...page.querySelectorAll('main *')].filter((each) => !each.closest('.scroll'));"
            "const shown = [...page.querySelectorAll('#participants tr > :nth-child(5), #participants .meter')];"
            "document.documentElement.dataset.free = Math.max(...free.map(right));"
            "document.documentElement.dataset.shown = Math.max(...shown.map(right));"
        )
        source = escape(text, quote=True)
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
        assert "<dt>Started again</dt>" not in loaded(write_page(folder), tmp_path / "profile")
        killed = "was killed by SIGKILL; started again in 0.1 s, restart 1 of 10"
        (RunLayout(folder).supervisor_file).write_text(
            "".join(
                Happened(time=1e9, what=history.RESTARTED, participant=who, message=killed).model_dump_json() + "\n"
                for who in ("cnn", "", "cnn")
            )
        )
        dom = loaded(write_page(folder), tmp_path / "profile")
        assert "<dt>Started again</dt><dd>the server once and cnn 2 times</dd>" in dom
        assert dom.count(killed) >= 3

    def test_a_page_says_what_was_missed_only_where_something_was(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", epochs=5)
        dom = loaded(write_page(folder), tmp_path / "profile")
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
        records += [record for record in records if record["kind"] == "joined" and record["participant"] == "vit"]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
        dom = loaded(write_page(folder), tmp_path / "profile")
        waits = Page(dom).tables["waits"]
        assert [row[-1] for row in waits] == ["Missed, rounds", "0 (0.0\u202f%)", "1 (3.3\u202f%)", "6 (20.0\u202f%)"]
        assert "1 round closed below the quorum and had no targets" in dom
        assert "<dt>Joined again</dt><dd>vit once</dd>" in dom

    def test_a_teachers_accuracy_is_not_in_the_mean_of_the_students(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "experiment.yaml").write_text(
            "name: x\ndata: {dataset: digits}\ntraining: {epochs: 1}\ndistillation: {method: kd}\n"
            "students: [{name: a, model: mlp}]\nteachers: [{name: old, model: cnn, weights: old.safetensors}]\n"
        )
        tested = [
            Measured(time=0, participant=name, split="test", steps_trained=9, epochs_trained=1, accuracy=value, loss=1)
            for name, value in (("a", 0.5), ("old", 0.9))
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{each.model_dump_json()}\n" for each in tested))
        read = Page(loaded(write_page(folder), tmp_path / "profile"))
        assert "1 student learns digits" in read.text
        assert "50.00\u202f%test accuracy after the last epoch" in read.text
        assert [row[:2] for row in read.tables["participants"][1:]] == [["a", "mlp"], ["old", "cnn (teacher)"]]

    def test_an_empty_run_shows_sentences_and_no_chart(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "experiment.yaml").write_text(
            "name: x\ndata: {dataset: digits}\ntraining: {epochs: 1}\nstudents: [{name: a, model: mlp}, {name: b, model: mlp}]\n"
        )
        dom = loaded(write_page(folder), tmp_path / "profile")
        read = Page(dom)
        assert "data-error" not in root(read)
        assert root(read)["data-charts"] == "0"
        assert "Not complete: a has not been tested and b has not been tested; the last epoch is 1." in dom
        for sentence in (
            "Nothing has been measured yet.",
            "No participant has been tested yet.",
            "No closed round and no step time",
            "No disagreement",
            "No event",
        ):
            assert sentence in dom
