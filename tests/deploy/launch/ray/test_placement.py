"""Waiting for room on a Ray cluster, with a cluster made up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from codistill.process.exit_codes import ExitCode
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.ray import placement
from codistill_deploy.launch.ray.placement import Placement
from codistill_deploy.launch.ray.plan import Bundle

BUNDLES = [Bundle("the server", 1), Bundle("student 'a'", 4)]


class Notes:
    """A view that keeps the lines that it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


class Cluster:
    """Stands for the module `ray`: one node, and a placement group that is ready after some polls."""

    def __init__(self, ready_after: int) -> None:
        self.polls = 0
        self.removed: list[object] = []
        self.group = SimpleNamespace(wait=self._wait)
        self.util = SimpleNamespace(placement_group=self._create, remove_placement_group=self.removed.append)
        self._ready_after = ready_after

    def _create(self, resources: Sequence[dict[str, float]], strategy: str) -> object:
        assert (resources, strategy) == ([{"CPU": 1.0}, {"CPU": 4.0}], "PACK")
        return self.group

    def _wait(self, seconds: int) -> bool:
        assert seconds == 0
        self.polls += 1
        return self.polls > self._ready_after

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(placement, "_FIRST_NOTE_SECONDS", 0.0)


def made(cluster: Cluster, wait: float = 60) -> tuple[Placement, Notes]:
    notes: Any = Notes()
    return Placement(cluster, BUNDLES, notes, wait), notes


def test_a_group_is_waited_for_and_the_lack_noted_once() -> None:
    cluster = Cluster(ready_after=3)
    placed, notes = made(cluster)
    assert placed.node_count == 1
    assert placed.reserve(threading.Event()) is cluster.group
    assert cluster.removed == []
    (line,) = notes.lines
    assert line.startswith("waiting for the Ray cluster, 60 s left: student 'a' needs 4 CPUs and 0 GPUs")


def test_a_run_that_is_stopped_meanwhile_leaves_no_group() -> None:
    cluster, stop = Cluster(ready_after=1000), threading.Event()
    threading.Timer(0.1, stop.set).start()
    assert made(cluster)[0].reserve(stop) is None
    assert cluster.removed == [cluster.group]


def test_a_cluster_without_room_for_the_whole_wait_is_an_error() -> None:
    cluster = Cluster(ready_after=1000)
    with pytest.raises(CommandError, match=r"the Ray cluster lacks resources: student 'a' needs 4 CPUs") as lacking:
        made(cluster, wait=0.05)[0].reserve(threading.Event())
    assert lacking.value.code is ExitCode.NO_RESOURCES
    assert cluster.removed == [cluster.group]


def test_an_actor_without_a_place_has_some_seconds_then_is_noted_then_is_an_error() -> None:
    placed, notes = made(Cluster(ready_after=0))
    placed.check_pending({})
    placed.check_pending({1: 14.9})
    assert notes.lines == []
    placed.check_pending({1: 15.0})
    assert len(notes.lines) == 1
    with pytest.raises(CommandError, match="waited 60 s"):
        placed.check_pending({1: 60.0})
