"""The live page: what it asks for and how often that is made, and what a browser shows of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from codistill.config.experiment import load
from codistill.rundir import history
from codistill.rundir.records import Happened
from codistill.v1 import distillation_pb2 as pb
from codistill_server.observability.dashboard.document import run_document
from codistill_server.observability.dashboard.html import encoded_json
from codistill_server.observability.dashboard.live import LivePage
from codistill_server.observability.http import HttpServer
from server.observability.dashboard.support import NASTY, Tab, browser, number, opened_browser, write_run

NAMES = ("mlp", "cnn", "vit")


class Shown:
    """A run's folder, where the run stands, and the page of both."""

    def __init__(self, folder: Path, names: tuple[str, ...] = NAMES, **run: Any) -> None:
        self.folder = write_run(folder / "run", students=dict.fromkeys(names, 0.9), **run)
        self.state = pb.Run(
            name="digits", frontier=100, total_rounds=360, steps_trained=200, total_steps=720, rounds_per_second=25
        )
        for name in names:
            self.state.participants.add(
                name=name,
                role=pb.ROLE_STUDENT,
                state=pb.PARTICIPANT_STATE_CONNECTED,
                awaited=True,
                steps_trained=200,
                round=100,
                joins=1,
                measurements=[pb.Measurement(split=pb.SPLIT_TEST, steps_trained=200, accuracy=0.5)],
            )
        self.now = 1000.0
        self.snapshots = 0
        self.page = LivePage(load(self.folder / "experiment.yaml"), self.folder, self._snapshot, lambda: self.now)

    def _snapshot(self) -> pb.Run:
        self.snapshots += 1
        return self.state

    def happens(self, message: str) -> None:
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(Happened(time=1_741_064_999.0, what="told", message=message).model_dump_json() + "\n")

    def document(self) -> dict[str, Any]:
        return json.loads(self.page.document()[1])


@pytest.fixture
def shown(tmp_path: Path) -> Shown:
    return Shown(tmp_path, epochs=6, every=1)


def test_the_document_is_the_reports(shown: Shown) -> None:
    version, text = shown.page.document()
    document = json.loads(text)
    assert document.pop("version") == version == json.loads(shown.page.now())["version"]
    assert document == run_document(history.read(shown.folder))


def test_the_state_now_has_the_protos_words(shown: Shown) -> None:
    teacher = shown.state.participants[2]
    teacher.role, teacher.awaited = pb.ROLE_TEACHER, False
    teacher.step_time.nanos = 250_000_000
    shown.state.waiting_for.append("cnn")
    shown.state.waiting_time.FromMilliseconds(1500)
    event = shown.state.events.add(kind=pb.EVENT_KIND_BELOW_QUORUM, message="round 5 closed")
    event.time.FromMilliseconds(2500)
    now = json.loads(shown.page.now())
    assert [now[key] for key in ("steps_trained", "total_steps", "frontier", "total_rounds")] == [200, 720, 100, 360]
    assert now["waiting"] == {"participants": ["cnn"], "seconds": 1.5}
    assert now["events"] == [{"time": 2.5, "what": "below_quorum", "participant": "", "message": "round 5 closed"}]
    first, _, last = now["participants"]
    assert [first[key] for key in ("role", "state", "awaited", "test_accuracy")] == ["student", "connected", True, 0.5]
    assert (first["step_seconds"], first["train_accuracy"]) == (None, None)
    assert [last[key] for key in ("role", "awaited", "step_seconds", "wait_seconds")] == ["teacher", False, 0.25, None]


def test_a_value_in_pieces_is_the_value() -> None:
    value = {"a": [1, {"b": [None, {"c": [[1.5, "<é\u2028"]]}]}], "d": {}, "e": []}
    assert json.loads(encoded_json(value)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        encoded_json({"a": [[[[[float("nan")]]]]]})


def test_however_many_ask_the_state_is_asked_for_twice_a_second(shown: Shown) -> None:
    asking = [threading.Thread(target=shown.page.now) for _ in range(40)]
    for each in asking:
        each.start()
    for each in asking:
        each.join()
    assert shown.snapshots == 1
    shown.now += 0.6
    shown.page.now()
    assert shown.snapshots == 2


def test_a_newer_document_comes_after_a_while_and_at_once_when_all_have_finished(shown: Shown) -> None:
    first = shown.page.document()[0]
    shown.happens("one")
    assert json.loads(shown.page.now())["version"] != first, "a page learns that there is something to ask for"
    assert shown.page.document()[0] == first, "but what was made has to last for a second at least"
    shown.now += 1000
    assert shown.document()["events"][-1]["message"] == "one"
    shown.happens("two")
    shown.state.complete = True
    shown.now += 0.6
    shown.page.now()
    assert shown.document()["events"][-1]["message"] == "two"


def test_an_unfinished_line_is_read_when_it_is_whole(shown: Shown) -> None:
    shown.page.document()
    with (shown.folder / "events.jsonl").open("a") as file:
        file.write('{"kind": "event", "time": 1, "wh')
        file.flush()
        shown.now += 1000
        assert len(shown.document()["events"]) == 4
        file.write('at": "told"}\n')
    shown.now += 1000
    assert len(shown.document()["events"]) == 5


def test_a_line_that_is_no_record_is_named(shown: Shown) -> None:
    with (shown.folder / "events.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"events\.jsonl: line 5 is not a record"):
        shown.page.document()


def test_pages_that_ask_together_wait_once_for_rounds_that_do_not_answer(shown: Shown) -> None:
    answering = threading.Event()
    asked = 0

    def snapshot() -> pb.Run:
        nonlocal asked
        asked += 1
        assert answering.wait(60)
        raise TimeoutError("the rounds have not answered")

    page = LivePage(load(shown.folder / "experiment.yaml"), shown.folder, snapshot, lambda: shown.now)
    with ThreadPoolExecutor(4) as pages:
        told = [pages.submit(page.now) for _ in range(4)]
        answering.set()
        assert [str(each.exception(60)) for each in told] == ["the rounds have not answered"] * 4
    assert asked == 1
    shown.now += 1
    with pytest.raises(TimeoutError):
        page.now()
    assert asked == 2, "it is not taken for an answer for long"


def test_the_page_knows_whether_it_is_watched(shown: Shown) -> None:
    assert not shown.page.watched
    shown.page.now()
    assert shown.page.watched
    shown.page.end()
    assert json.loads(shown.page.now())["ending"]
    shown.now += 5
    assert not shown.page.watched


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with opened_browser() as opened:
        yield opened


class TestBrowser:
    pytestmark = browser

    def test_it_goes_on_without_a_reload_when_its_server_is_back(self, tab: Tab, tmp_path: Path) -> None:
        run = Shown(tmp_path, epochs=12, every=1, events=[(1.0, "told", NAMES[0], NASTY)])
        run.state.participants[2].state = pb.PARTICIPANT_STATE_DISCONNECTED
        run.state.participants[2].awaited = False
        run.state.events.add(kind=pb.EVENT_KIND_BELOW_QUORUM, participant=NASTY, message=NASTY)
        http_server = HttpServer("127.0.0.1", 0, run.page, CollectorRegistry())
        try:
            tab.open(f"http://127.0.0.1:{http_server.port}/")
            tab.until("document.documentElement.dataset.version")
            tab.ask("window.kept = document.querySelector('canvas'); window.loads = 'no reload'")
            assert tab.ask("document.getElementById('state').textContent").startswith(
                "Running. Step 200 of 720, about 10\u202fs left at 25 rounds/s"
            )
            assert [row[1] for row in tab.rows("states")[1:]] == ["connected", "connected", "disconnected, skipped"]
            assert f"below quorum {NASTY} {NASTY}" in tab.ask("document.getElementById('latest').textContent")
            assert tab.ask("document.querySelectorAll('img').length") == 0
            tab.ask("[...document.querySelectorAll('.legend button')][0].click()")

            run.state.waiting_for.append("cnn")
            run.state.waiting_time.seconds = 12
            run.now += 1
            tab.until("document.getElementById('state').textContent.includes('for cnn in round 100, for 12')")
            assert tab.rows("states")[2][1] == "connected, waited for"
        finally:
            http_server.close()
        tab.until("document.documentElement.dataset.state === 'lost'")
        assert "Connection lost. The server does not answer. What is shown is of " in tab.ask(
            "document.body.textContent"
        )
        assert len(tab.rows("participants")) == 4, "what was known stays"

        run.state.ClearField("waiting_for")
        run.happens("after the break")
        run.now += 1000
        http_server = HttpServer("127.0.0.1", http_server.port, run.page, CollectorRegistry())
        try:
            tab.until("document.getElementById('state').textContent.startsWith('Running.')")
            tab.until("document.getElementById('events').textContent.includes('after the break')")
            assert tab.ask("window.loads === 'no reload' && window.kept.isConnected"), "charts are kept"
            assert tab.ask("document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
            assert "error" not in tab.ask("({...document.documentElement.dataset})")

            run.state.complete = True
            run.now += 1
            tab.until("document.documentElement.dataset.state === 'finished'")
            assert "Finished. Every student has trained" in tab.ask("document.getElementById('state').textContent")
            assert not tab.rows("states"), "what remains is the report"
        finally:
            http_server.close()

    def test_a_run_that_nobody_joined_and_one_that_is_stopped(self, tab: Tab, tmp_path: Path) -> None:
        run = Shown(tmp_path, epochs=2, every=1)
        run.state.total_rounds = run.state.total_steps = 0
        http_server = HttpServer("127.0.0.1", 0, run.page, CollectorRegistry())
        try:
            tab.open(f"http://127.0.0.1:{http_server.port}/")
            tab.until("document.getElementById('state')?.textContent === 'Ready. Nobody has joined yet.'")
            run.state.total_rounds, run.state.total_steps = 360, 720
            run.state.participants[1].state = pb.PARTICIPANT_STATE_FAILED
            run.page.end()
            tab.until("document.getElementById('state').textContent === 'Stopping. The server goes down.'")
        finally:
            http_server.close()
        tab.until("document.getElementById('state').textContent.startsWith('Stopped. The server went down at ')")
        assert [row[1] for row in tab.rows("states")[1:]] == ["connected", "failed", "connected"], (
            "what was known stays"
        )
        http_server = HttpServer(
            "127.0.0.1", http_server.port, Shown(tmp_path / "next", epochs=2, every=1).page, CollectorRegistry()
        )
        try:
            tab.until("document.getElementById('state').textContent.startsWith('Running. Step 200 of 720')")
        finally:
            http_server.close()

    def test_what_the_server_cannot_read_is_said(self, tab: Tab, tmp_path: Path) -> None:
        run = Shown(tmp_path, epochs=2, every=1)
        (run.folder / "run.json").write_text("{")
        http_server = HttpServer("127.0.0.1", 0, run.page, CollectorRegistry())
        try:
            tab.open(f"http://127.0.0.1:{http_server.port}/")
            tab.until("document.getElementById('state')?.textContent.includes('run.json cannot be shown now: ')")
        finally:
            http_server.close()

    def test_a_thousand_epochs_of_twenty_students_are_small_and_quick(self, tab: Tab, tmp_path: Path) -> None:
        names = tuple(f"student-{position}" for position in range(20))
        run = Shown(tmp_path, names, epochs=1000, every=1)
        http_server = HttpServer("127.0.0.1", 0, run.page, CollectorRegistry())
        try:
            tab.open(f"http://127.0.0.1:{http_server.port}/")
            tab.until("document.documentElement.dataset.version")
            sent = tab.ask("performance.getEntriesByName(new URL('run.json', location).href)[0].encodedBodySize")
            assert sent < 400_000
            assert tab.ask("fetch('now.json').then((answer) => answer.text()).then((text) => text.length)") < 20_000
            render = "const begun = performance.now(); codistill.render(data); return performance.now() - begun"
            took = tab.ask(f"fetch('run.json').then((answer) => answer.json()).then((data) => {{{render}}})")
            assert took < 1500, "well below the two seconds after which the next one may come"
            rows = tab.rows("participants")[1:]
            assert [row[0] for row in rows] == list(names)
            for row, student in zip(rows, history.read(run.folder).students, strict=True):
                assert student.final is not None
                assert number(row[4]) == pytest.approx(100 * student.final.accuracy, abs=0.005001)
            looks = "[...document.querySelectorAll('#participants .swatch path')].map((path) => path.outerHTML)"
            assert len(set(tab.ask(looks))) == 20, "any two students look different"
        finally:
            http_server.close()


def test_many_requests_disturb_an_event_loops_thread_little(tmp_path: Path) -> None:
    """Beside a document that is made, a thread that wakes up every millisecond is not held up for long at a time."""
    run = Shown(tmp_path, tuple(f"student-{position}" for position in range(20)), epochs=300, every=1)
    late: list[float] = []
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            before = time.monotonic()
            over.wait(0.001)
            late.append(time.monotonic() - before - 0.001)

    beating = threading.Thread(target=beat)
    beating.start()
    run.page.document()
    over.set()
    beating.join()
    assert len(late) > 10, "the other thread got its turns"
    assert sorted(late)[len(late) // 2] < 0.02
