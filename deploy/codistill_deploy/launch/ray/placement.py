"""Wait until a Ray cluster has room for the actors of a run, and say meanwhile what it lacks."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from codistill.process.exit_codes import ExitCode
from codistill_deploy.console.progress import ProgressView
from codistill_deploy.errors import CommandError
from codistill_deploy.launch.ray.plan import Bundle, shortage

__all__ = ["Placement"]

_POLL_SECONDS = 0.2
_NOTE_SECONDS = 15.0
_FIRST_NOTE_SECONDS = 1.0  # a cluster that has room gives it by then
_STARTING_SECONDS = 15.0  # an actor that has its place takes some seconds to come up


class Placement:
    """The places of a run's actors on a cluster: first of all of them, then again of those that lost theirs.

    Args:
        ray: the module `ray`, connected.
        bundles: what each actor needs.
        view: where the lack of resources is noted now and then.
        wait: seconds to wait for resources that are not there, or not free.
    """

    def __init__(self, ray: Any, bundles: Sequence[Bundle], view: ProgressView, wait: float) -> None:
        self._ray = ray
        self._bundles = bundles
        self._view = view
        self._wait = wait
        self._noted_at = 0.0

    @property
    def node_count(self) -> int:
        """How many nodes are alive."""
        return len(self._nodes())

    def reserve(self, stop: threading.Event) -> Any:
        """Return Ray's placement group once it has all its resources; None if `stop` is set before.

        Raises:
            CommandError: the cluster has not had the resources for the whole wait.
        """
        group = self._ray.util.placement_group([bundle.resources for bundle in self._bundles], strategy="PACK")
        began = time.monotonic()
        self._noted_at = began + _FIRST_NOTE_SECONDS - _NOTE_SECONDS
        reserved = False
        try:
            while not stop.is_set():
                reserved = group.wait(0)  # Ray takes whole seconds only, too long where the run is to stop
                if reserved:
                    return group
                self._check_wait(self._bundles, (), time.monotonic() - began)
                stop.wait(_POLL_SECONDS)
            return None
        finally:
            if not reserved:
                self._ray.util.remove_placement_group(group)

    def check_pending(self, pending: Mapping[int, float]) -> None:
        """Note what is lacking where actors have no place for long, as after the loss of a node.

        Args:
            pending: by the index of its bundle, for how many seconds each such actor has not come up.

        Raises:
            CommandError: one has waited for long enough.
        """
        longest = max(pending.values(), default=0.0)
        if longest >= _STARTING_SECONDS:
            wanted = [self._bundles[index] for index in pending]
            placed = [bundle for index, bundle in enumerate(self._bundles) if index not in pending]
            self._check_wait(wanted, placed, longest)

    def _check_wait(self, wanted: Sequence[Bundle], placed: Sequence[Bundle], waited: float) -> None:
        """Note now and then what is lacking; raise where it has been waited for long enough."""
        lack = shortage(wanted, self._nodes(), self._ray.available_resources(), placed)
        if waited >= self._wait:
            raise CommandError(
                f"the Ray cluster lacks resources: {lack}; waited {waited:.0f} s; add nodes, free some, set training.device: "
                "cpu, give --gpus-per-student less than 1, or wait longer with --wait-for-resources",
                ExitCode.NO_RESOURCES,
            )
        if time.monotonic() - self._noted_at >= _NOTE_SECONDS:
            self._noted_at = time.monotonic()
            self._view.note(f"waiting for the Ray cluster, {self._wait - waited:.0f} s left: {lack}")

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
