"""The live page of a real run in a real browser: its numbers are the metrics', whatever happens to the server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.observability.dashboard.support import Page, Tab, browser, loaded, number, opened_browser
from system.run_harness import CHANGES, STUDENTS
from system.support import experiment_file, run, start, wait_for

pytestmark = [pytest.mark.system, *browser]


class Parts:
    """A server with a page, and workers, as processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self._cwd = folder
        self._path = experiment_file(folder, **{**CHANGES, "training__epochs": 60, "training__evaluate_every": 10})
        self._listen = self._web = "127.0.0.1:0"
        self.started: list[subprocess.Popen[str]] = []
        self.server = self.serve()
        self.workers = {name: self._start("work", self._path, "--student", name) for name in STUDENTS}

    def serve(self) -> subprocess.Popen[str]:
        """Start the server, a second time where it was the first time."""
        addresses = ["--listen", self._listen, "--metrics", self._web]
        self.server = self._start("serve", self._path, *addresses, "--stay")
        file = self.folder / "server.json"
        wait_for(lambda: file.exists() and str(self.server.pid) in file.read_text(), "the server is up")
        announced = json.loads(file.read_text())
        self._listen, self._web = announced["address"], announced["metrics"]
        return self.server

    @property
    def url(self) -> str:
        return f"http://{self._web}/"

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Return what the metrics say now, by a series' name, its participant and its split."""
        with urllib.request.urlopen(f"{self.url}metrics", timeout=20) as answer:  # noqa: S310 - our own server
            text = answer.read().decode()
        return {
            (
                each.name.removeprefix("codistill_"),
                *(each.labels[key] for key in ("participant", "split") if key in each.labels),
            ): (each.value)
            for family in text_string_to_metric_families(text)
            for each in family.samples
        }

    def _start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        process = start(*arguments, "--run-dir", self.folder, cwd=self._cwd)
        self.started.append(process)
        return process


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        output, _ = process.communicate()
        print(f"--- {' '.join(map(str, process.args))}\n{output}")  # for a test that fails


@pytest.fixture
def tab() -> Iterator[Tab]:
    with opened_browser() as opened:
        yield opened


def test_the_pages_numbers_are_the_metrics_while_the_run_goes_and_after(parts: Parts, tab: Tab, tmp_path: Path) -> None:
    tab.open(parts.url)
    tab.ask("window.loads = 'no reload'")
    wanted = {("participant_accuracy_ratio", name, split) for name in STUDENTS for split in ("train", "test")}
    wait_for(lambda: wanted <= parts.metrics().keys(), "every student was tested")
    parts.workers["cnn"].send_signal(signal.SIGSTOP)  # so that the numbers stand still
    told = tab.until(
        "(document.getElementById('state').textContent.match(/^Waiting for cnn in round [0-9]+, for/) || [''])[0]"
    )
    metrics = parts.metrics()
    assert number(told.removeprefix("Waiting for cnn in round ")) == metrics["frontier_round",]
    assert metrics["waiting_for", "cnn"] == 1
    tab.until("document.querySelectorAll('#participants tr').length === 3")
    assert_agree(tab.rows("states"), metrics)
    assert [row[1] for row in tab.rows("states")[1:]] == ["connected", "connected, waited for"]

    parts.server.kill()
    tab.until("document.documentElement.dataset.state === 'lost'")
    assert "Connection lost. The server does not answer." in tab.ask("document.body.textContent")
    parts.serve()
    tab.until("document.documentElement.dataset.state === 'running'")
    parts.workers["cnn"].send_signal(signal.SIGCONT)

    tab.until("document.documentElement.dataset.state === 'finished'", 80)
    assert tab.ask("window.loads") == "no reload"
    assert tab.ask("document.getElementById('state').textContent").startswith("Finished.")
    metrics = parts.metrics()
    rows = tab.rows("participants")[1:]
    assert [row[0] for row in rows] == list(STUDENTS)
    for row in rows:
        assert number(row[4]) == pytest.approx(
            100 * metrics["participant_accuracy_ratio", row[0], "test"], abs=0.005001
        )
        assert number(row[5]) == pytest.approx(metrics["participant_loss", row[0], "test"], abs=0.0005001)
        assert number(row[2]) == metrics["participant_parameters", row[0]]
    tiles = tab.ask("[...document.querySelectorAll('.tile')].map((tile) => tile.textContent)")
    [ensemble] = [tile for tile in tiles if "accuracy of the ensemble" in tile]
    assert number(ensemble) == pytest.approx(100 * metrics["ensemble_accuracy_ratio", "train"], abs=0.005001)

    # The file that stays shows the same.
    code, printed = run("report", parts.folder, cwd=tmp_path)
    assert code == 0, printed
    shown = Page(loaded(parts.folder / "report.html", tmp_path / "profile"))
    for table in ("participants", "waits", "disagreement", "events"):
        assert shown.tables[table] == tab.rows(table), table

    parts.server.send_signal(signal.SIGTERM)
    output, _ = parts.server.communicate(timeout=30)
    assert parts.server.returncode == 0, output
    assert re.search(r"live page on (\S+), metrics on \1metrics", output)


def assert_agree(rows: list[list[str]], metrics: dict[tuple[str, ...], float]) -> None:
    """Compare the table of where every participant is with the metrics of the same moment."""
    columns = rows[0]
    for row in rows[1:]:
        name, cells = row[0], dict(zip(columns, row, strict=True))
        assert number(cells["Steps"]) == metrics["participant_steps_trained", name]
        for column, split in (("Training accuracy", "train"), ("Test accuracy", "test")):
            assert number(cells[column]) == pytest.approx(
                100 * metrics["participant_accuracy_ratio", name, split], abs=0.005001
            )
        assert number(cells["Step time"]) == pytest.approx(1000 * metrics["participant_step_seconds", name], rel=0.005)
