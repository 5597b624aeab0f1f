"""The files for Prometheus and Grafana, without either: structure, and what promtool says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support_dashboard import DASHBOARD, GRAFANA, PROMETHEUS, ROOT, VARIABLES, panel_queries, rules, substituted

RULE_TESTS = Path(__file__).resolve().parent / "prometheus" / "alerts.yml"
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
BUILT_IN = {"__rate_interval", "__range"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


SOURCE: dict[str, Any] = read(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"][0]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's prometheus) is not installed")
class TestPromtool:
    def test_the_configuration_and_its_rules_are_sound(self) -> None:
        checked = promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
        assert f"{len(rules('record')) + len(rules('alert'))} rules found" in checked

    def test_the_rules_do_what_their_tests_say(self) -> None:
        assert "SUCCESS" in promtool("test", "rules", str(RULE_TESTS))


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_alert_has_a_test_and_says_what_to_do() -> None:
    tested = {
        test["alertname"]
        for group in read(RULE_TESTS)["tests"]
        for test in group.get("alert_rule_test", ())
        if test.get("exp_alerts")
    }
    assert tested == set(rules("alert"))
    alerts = [
        rule
        for group in read(PROMETHEUS / "rules" / "codistill.yml")["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    for alert in alerts:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert set(alert["annotations"]) == {"summary", "description"}


def test_panels_have_ids_titles_and_places_of_their_own() -> None:
    for key in ("id", "title"):
        assert len({panel[key] for panel in PANELS}) == len(PANELS)
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken.get((x, y))}"
                taken[x, y] = panel["title"]
        assert panel["description"].endswith(".")
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_the_dashboard_asks_the_provisioned_source() -> None:
    wanted = {"type": SOURCE["type"], "uid": SOURCE["uid"]}
    used = [each["datasource"] for panel in PANELS for each in (panel, *panel["targets"])]
    used += [variable["datasource"] for variable in DASHBOARD["templating"]["list"]]
    assert all(each == wanted for each in used)


def test_the_source_knows_how_often_is_scraped() -> None:
    assert SOURCE["jsonData"]["timeInterval"] == read(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]


def test_no_query_names_an_unknown_variable() -> None:
    known = dict.fromkeys({*VARIABLES, *BUILT_IN}, "1m")
    for query in panel_queries():
        assert "$" not in substituted(query.expr, **known)


def test_a_query_of_a_run_is_of_that_run_only() -> None:
    for query in panel_queries():
        if "ALERTS" not in query.expr:
            assert 'run="$run"' in query.expr, query


def test_addresses_are_those_of_the_compose_network() -> None:
    services = read(ROOT / "docker-compose.yml")["services"]
    (scrape,) = read(PROMETHEUS / "prometheus.yml")["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert f"--metrics=0.0.0.0:{port}" in services[name]["command"]
    name, port = SOURCE["url"].removeprefix("http://").split(":")
    assert services[name]["ports"][0].endswith(f":{port}")


def test_grafana_finds_what_it_is_provisioned_with() -> None:
    volumes = dict(each.split(":")[:2] for each in read(ROOT / "docker-compose.yml")["services"]["grafana"]["volumes"])
    mounted = {target: ROOT / source for source, target in volumes.items() if source.startswith("./")}
    (provider,) = read(GRAFANA / "provisioning" / "dashboards" / "codistill.yml")["providers"]
    assert list(mounted[provider["options"]["path"]].glob("*.json"))
    assert (mounted["/etc/grafana/provisioning"] / "datasources").is_dir()
