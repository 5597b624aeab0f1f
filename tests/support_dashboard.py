"""The dashboard and the rules as data: what both the cheap checks and the real Prometheus go through."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "codistill.json").read_text(encoding="utf-8"))
VARIABLES: dict[str, str] = {each["name"]: each["query"]["query"] for each in DASHBOARD["templating"]["list"]}

_METRIC = re.compile(r"(?<![\w:])codistill_[a-z_]+")
_LABEL_VALUES = re.compile(r"label_values\((.+), (\w+)\)")


@dataclass(frozen=True)
class Query:
    """A query of the dashboard or of a rule; `title` names it in failures."""

    title: str
    expr: str
    instant: bool = False

    def __str__(self) -> str:
        return self.title

    @property
    def metrics(self) -> set[str]:
        """The metrics of ours that it names."""
        return set(_METRIC.findall(self.expr))


def panel_queries() -> list[Query]:
    return [
        Query(f"{panel['title']}, {target['refId']}", target["expr"], target.get("instant", False))
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]


def rules(kind: str) -> dict[str, Query]:
    """Return the rules that record ("record") or alert ("alert"), by name."""
    groups = [
        group
        for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    ]
    return {
        rule[kind]: Query(rule[kind], rule["expr"], instant=True)
        for group in groups
        for rule in group["rules"]
        if kind in rule
    }


def substituted(expr: str, **values: str) -> str:
    """Return a query with its variables filled in, as Grafana does; one that is not given stays and is no PromQL."""
    return re.sub(r"\$(\w+)", lambda found: values.get(found[1], found[0]), expr)


def label_values(query: str) -> tuple[str, str]:
    """Return the series and the label of a variable's query."""
    found = _LABEL_VALUES.fullmatch(query)
    assert found is not None, f"{query!r} is not label_values(SERIES, LABEL)"
    return found[1], found[2]
