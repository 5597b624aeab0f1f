"""A real Prometheus reads real runs: every query of the dashboard and of the rules gives what it is there for."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml

from support_dashboard import PROMETHEUS, VARIABLES, Query, label_values, panel_queries, rules, substituted
from system.support import EXPERIMENT, experiment_file, start, wait_for

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian's package) is not installed"),
]

STUDENTS = ("mlp", "cnn")
CHANGES: dict[str, Any] = {
    "training__epochs": 60,
    "training__evaluate_every": 20,
    "students": [each for each in EXPERIMENT["students"] if each["name"] in STUDENTS],
}
RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "together": ({"distillation": {"method": "kdcl"}}, STUDENTS),
    "alone": ({"distillation": {"method": "independent"}}, STUDENTS),
    "still": ({"distillation": {"method": "dml"}}, ("mlp",)),  # it waits for cnn, which never comes
}
SELECTED = {"run": "together", "alone": "alone", "__rate_interval": "1m", "__range": "10m"}


class Prometheus:
    """A server of the project's own configuration, with other targets and a quicker pulse."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(PROMETHEUS / each) for each in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"] = [{"targets": targets}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        self.folder = folder
        self._url = f"http://127.0.0.1:{free_port()}"
        self._log = (folder / "prometheus.log").open("w")
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address={self._url.removeprefix('http://')}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def ready(self) -> bool:
        assert self.process.poll() is None, "Prometheus has ended"
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{self._url}/-/ready", timeout=20) as answer,  # noqa: S310 - as below
        ):
            return answer.status == HTTPStatus.OK
        return False

    def get(self, path: str, **parameters: str) -> Any:
        """Return what an endpoint of the API answers; fail with Prometheus' own words."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 - http, of our own making
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {json.load(error)['error']}") from error

    def instant(self, expr: str) -> list[dict[str, Any]]:
        return self.get("query", query=expr)["result"]

    def values(self, query: Query) -> list[float]:
        """Return every value that Grafana would draw of a query."""
        expr = substituted(query.expr, **SELECTED)
        if query.instant:
            return [float(series["value"][1]) for series in self.instant(expr)]
        now = float(self.get("query", query="time()")["result"][1])
        drawn = self.get("query_range", query=expr, start=str(now - 60), end=str(now), step="0.5")["result"]
        return [float(value) for series in drawn for _, value in series["values"]]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()
        print(f"--- prometheus\n{(self.folder / 'prometheus.log').read_text()}")  # for a test that fails


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has read two runs to their end, one that stands still, and a server that is not there."""
    folder = tmp_path_factory.mktemp("dashboards")
    with contextlib.ExitStack() as stack:

        def launch(*arguments: str | Path) -> subprocess.Popen[str]:
            process = start(*arguments, cwd=folder)
            stack.callback(end, process)
            return process

        files: dict[str, Path] = {}
        for name, (changes, _) in RUNS.items():
            (folder / name).mkdir()
            files[name] = experiment_file(folder / name, **CHANGES, name=name, **changes)
            addresses = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
            launch("serve", files[name], "--run-dir", folder / name / "run", *addresses, "--stay", "--report")
        servers: dict[str, dict[str, Any]] = {}
        for name in RUNS:
            path = folder / name / "run" / "server.json"
            servers[name] = json.loads(
                wait_for(lambda path=path: path.exists() and path.read_text(), f"{name} is up", 120)
            )
        made = Prometheus(folder, [*(each["metrics"] for each in servers.values()), f"127.0.0.1:{free_port()}"])
        stack.callback(made.close)
        wait_for(made.ready, "Prometheus is up")
        for name, (_, students) in RUNS.items():
            for student in students:
                where = ["--server", servers[name]["address"], "--run-dir", folder / name / student]
                launch("work", files[name], "--student", student, *where)

        def all_ended() -> bool:
            finished = made.instant('min by (run) (codistill_participant_state{state="finished"}) == 1')
            waiting = made.instant('codistill_open_round_wait_seconds{run="still"} > 1')
            return len(finished) == 2 and len(waiting) == 1

        wait_for(all_ended, "two runs are complete and the third stands still", 120)
        yield made


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    output, _ = process.communicate()
    print(f"--- {' '.join(map(str, process.args))}\n{output}")  # for a test that fails


@pytest.mark.parametrize("query", panel_queries(), ids=str)
def test_a_panel_has_something_to_draw(prometheus: Prometheus, query: Query) -> None:
    values = prometheus.values(query)
    assert any(math.isfinite(value) for value in values), f"{query.expr}: {values[-5:] or 'no series'}"


@pytest.mark.parametrize("query", rules("record").values(), ids=str)
def test_a_recording_rule_records(prometheus: Prometheus, query: Query) -> None:
    now = {series["metric"]["run"] for series in prometheus.instant(query.title)}
    assert "together" in now
    assert prometheus.instant(query.expr)


def test_an_alert_is_for_those_that_it_is_meant_for(prometheus: Prometheus) -> None:
    meant = {"CodistillRunStandsStill": ["still"], "CodistillServerDown": [None]}
    for name, query in rules("alert").items():
        found = [series["metric"].get("run") for series in prometheus.instant(query.expr)]
        assert found == meant.get(name, []), name


def test_no_alert_and_no_rule_is_left_out(prometheus: Prometheus) -> None:
    loaded = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in loaded} == {*rules("record"), *rules("alert")}
    assert [(rule["name"], rule.get("lastError")) for rule in loaded if rule["health"] != "ok"] == []
    assert {rule["name"] for rule in loaded if rule.get("state") in ("pending", "firing")} == {
        "CodistillServerDown",
        "CodistillRunStandsStill",
    }


def test_every_metric_named_is_in_a_live_scrape(prometheus: Prometheus) -> None:
    scraped = set(prometheus.get("label/__name__/values"))
    queries = [*panel_queries(), *rules("record").values(), *rules("alert").values()]
    queries += [Query(name, query) for name, query in VARIABLES.items()]
    assert set().union(*(query.metrics for query in queries)) <= scraped


def test_the_variables_offer_the_runs(prometheus: Prometheus) -> None:
    offered = {}
    for name, query in VARIABLES.items():
        series, label = label_values(query)
        offered[name] = prometheus.get(f"label/{label}/values", **{"match[]": series})
    assert offered == {"run": sorted(RUNS), "alone": ["alone"]}


def test_a_server_that_stays_has_written_the_report_of_a_complete_run(prometheus: Prometheus) -> None:
    written = {name for name in RUNS if (prometheus.folder / name / "run" / "report.html").exists()}
    assert written == {"together", "alone"}
