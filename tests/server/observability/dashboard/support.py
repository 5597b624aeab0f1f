"""Shared by the tests of the page: run folders as a run leaves them, a reader of pages, and a browser."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from codistill.config.experiment import parse
from codistill.rundir import history
from codistill.rundir.records import Happened, Joined, Measured, Paced, ParticipantWait, RoundsClosed
from codistill_server.observability.dashboard.document import run_document
from codistill_server.observability.dashboard.html import render

NASTY = "</script><script>document.title='broken'</script><!--<img src=x onerror=alert(1)> & \"quotes\" 'too' \u2028 é"
SKILL = {"mlp": 0.90, "cnn": 0.965, "vit": 0.885}
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

browser = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")]


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
    """Write a run folder as a run of `epochs` would leave it; a student named in `stop` ends at that epoch."""
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
            participant=name,
            model=name.split("-")[0],
            parameters=24_000 + 61_000 * number,
            device="cpu",
            total_rounds=total if exchanges else 0,
            total_steps=total,
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
                participant=name,
                split="train",
                steps_trained=epoch * per_epoch,
                epochs_trained=epoch,
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
                    participant=name,
                    steps_trained=epoch * per_epoch,
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
                    steps_trained=epoch * per_epoch,
                    seconds=1.9,
                    wait_p50=0.0016 * math.exp(draw.gauss(0, 0.15)),
                    wait_max=4.2 if epoch == epochs // 2 else 0.004 * math.exp(abs(draw.gauss(0, 0.5))),
                    waits={
                        name: ParticipantWait(
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
            (57.0, "disconnected", names[-1], f"{names[-1]} closed its stream; round {total // 2} waits for it"),
            (61.2, "joined", names[-1], f"joined at round {total // 2 - 9}, 9 rounds behind"),
            (1.9 * epochs, "finished", "", "every student has finished"),
        ]
    )
    (folder / "events.jsonl").write_text(
        "".join(
            f"{Happened(time=start + at, what=what, participant=who, message=message).model_dump_json()}\n"
            for at, what, who, message in told
        ),
        encoding="utf-8",
    )
    return folder


def write_page(folder: Path) -> Path:
    """Write the page of a run's folder into it."""
    path = folder / "report.html"
    path.write_text(render(run_document(history.read(folder))), encoding="utf-8")
    return path


class Page(HTMLParser):
    """A page's text, that of its tables by their id, its scripts by type, and its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
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
            return
        self.text += data
        if self._cell and self._table is not None:
            self._table[-1][-1] += data

    @property
    def document(self) -> dict[str, Any]:
        """The document embedded in the page."""
        [text] = [text for kind, text in self.scripts if kind == "application/json"]
        return json.loads(text)


FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def loaded(path: Path, profile: Path, width: int = 1200) -> str:
    """Return the page's DOM after its scripts have run."""
    assert CHROMIUM is not None
    own = [f"--user-data-dir={profile}", f"--window-size={width},900"]
    result = subprocess.run(
        [CHROMIUM, *FLAGS, *own, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    return result.stdout


class Tab:
    """A page in a browser, spoken to over two pipes (the DevTools protocol, a null byte after each message)."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._buffer = b""
        self._number = 0
        self._session = ""

    def open(self, url: str) -> None:
        """Load a page."""
        target = self._call("Target.createTarget", url=url)["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.until(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def ask(self, expression: str) -> Any:
        """Return the value of an expression of the page's."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 40) -> Any:
        """Wait until an expression of the page's is true, and return its value."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = self.ask(expression)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(
            f"{expression}: not within {seconds} s; the page: {self.ask('document.body.innerText')[:3000]}"
        )

    def rows(self, table: str) -> list[list[str]]:
        """Return the texts of a table's cells, the head's first."""
        cells = "[...row.cells].map((cell) => cell.textContent)"
        return self.ask(f"[...document.querySelectorAll('#{table} tr')].map((row) => {cells})")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            text, found, rest = self._buffer.partition(b"\0")
            if not found:
                more = os.read(self._reading, 2**16)
                assert more, "the browser has ended"
                self._buffer += more
                continue
            self._buffer = rest
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]


_WITH_PIPES = (
    "import fcntl, os, sys\n"
    "ends = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]\n"
    "os.dup2(ends[0], 3), os.dup2(ends[1], 4)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)


@contextlib.contextmanager
def opened_browser() -> Iterator[Tab]:
    """Start a browser, and end it."""
    assert CHROMIUM is not None
    to_browser, writing = os.pipe()
    reading, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        own = ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--window-size=1200,900"]
        start = [sys.executable, "-I", "-S", "-c", _WITH_PIPES, str(to_browser), str(from_browser)]
        process = subprocess.Popen(
            [*start, CHROMIUM, *FLAGS, *own], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        made = Tab(reading, writing)
        try:
            yield made
        finally:
            with contextlib.suppress(OSError):
                made._call("Browser.close")
            os.close(writing)
            os.close(reading)
            process.wait(20)


def root(read: Page) -> dict[str, str | None]:
    return next(attributes for tag, attributes in read.tags if tag == "html")


def number(text: str) -> float:
    found = re.search(r"[-+−]?[\d.,]+", text)
    assert found, text
    return float(found[0].replace("−", "-").replace(",", ""))


def is_number(text: str) -> bool:
    return re.fullmatch(r"[\d.]+", text) is not None
