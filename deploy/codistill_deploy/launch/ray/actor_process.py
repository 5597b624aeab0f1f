"""A process in an actor, as the supervisor manages it: a :class:`codistill_deploy.supervise.child.ManagedProcess`."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import replace
from typing import Any

from codistill.process.exit_codes import ExitCode
from codistill_deploy.launch.ray.actor import ProcessActor
from codistill_deploy.launch.ray.plan import Bundle
from codistill_deploy.launch.ray.task import ActorNode, Task
from codistill_deploy.supervise.restart_policy import Ending

__all__ = ["ActorProcess"]

_CLOSE_SECONDS = 5.0


class ActorProcess:
    """A new actor and the process that it runs, to their end.

    Args:
        ray: the module `ray`, connected.
        group: the run's placement group.
        index: of the actor's bundle in the group.
        bundle: what the actor needs.
        task: the process.

    Attributes:
        created_at: when the actor was created, in seconds of the monotonic clock.
    """

    def __init__(self, ray: Any, group: Any, index: int, bundle: Bundle, task: Task) -> None:
        self.created_at = time.monotonic()
        self._ray = ray
        self._ending: Ending | None = None
        self._node: ActorNode | None = None
        options: dict[str, Any] = {
            "num_cpus": bundle.cpus,
            "num_gpus": bundle.gpus,
            "max_concurrency": 4,  # signals are sent to it while it runs
            "max_restarts": 0,
            "scheduling_strategy": ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            ),
        }
        if not bundle.gpus:
            # A student that is to train on the CPU must not find a GPU, which `device: auto` would take.
            task = replace(task, environment={**task.environment, "CUDA_VISIBLE_DEVICES": ""})
        self._actor = ray.remote(ProcessActor).options(**options).remote()
        self._node_result = self._actor.node.remote()
        self._run_result = self._actor.run.remote(task)

    @property
    def pending(self) -> bool:
        """Whether the actor has not come up yet."""
        return self.code is None and self._find_node() is None

    @property
    def code(self) -> int | None:
        """See :class:`codistill_deploy.supervise.child.ManagedProcess`."""
        if self._ending is None and self._is_ready(self._run_result):
            self._ending = self._read_ending()
        return None if self._ending is None else self._ending.code

    def ending(self, ran: float) -> Ending:
        """See :class:`codistill_deploy.supervise.child.ManagedProcess`."""
        assert self.code is not None  # noqa: S101 - the caller looked
        assert self._ending is not None  # noqa: S101
        return replace(self._ending, ran=ran)

    def send_signal(self, number: signal.Signals) -> None:
        """See :class:`codistill_deploy.supervise.child.ManagedProcess`."""
        if self.code is None:
            self._actor.send_signal.remote(int(number))

    def close(self) -> None:
        """See :class:`codistill_deploy.supervise.child.ManagedProcess`."""
        if self.code is None and self._find_node() is not None:
            self.send_signal(signal.SIGKILL)
            self._ray.wait([self._run_result], timeout=_CLOSE_SECONDS)
        self._ray.kill(self._actor)

    def _find_node(self) -> ActorNode | None:
        """Return the node that the actor came up on; None while it has not."""
        if self._node is None and self._is_ready(self._node_result):
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._node = self._ray.get(self._node_result)
        return self._node

    def _is_ready(self, result: Any) -> bool:
        ready, _ = self._ray.wait([result], timeout=0)
        return bool(ready)

    def _read_ending(self) -> Ending:
        errors = self._ray.exceptions
        try:
            return self._ray.get(self._run_result)
        except errors.RuntimeEnvSetupError as error:
            return Ending(ExitCode.CONFIGURATION, f"the job's runtime environment cannot be made: {_last_line(error)}")
        except errors.RayTaskError as error:
            return Ending(ExitCode.ERROR, _last_line(error))
        except errors.RayError as error:
            return Ending(-signal.SIGKILL, lost=self._describe_loss(error))

    def _describe_loss(self, error: Exception) -> str:
        node = self._find_node()
        name = "its node" if node is None else f"its node {node.address}"
        if getattr(error, "preempted", False):
            return f"{name} was drained or pre-empted"
        alive = {each["NodeID"] for each in self._ray.nodes() if each["Alive"]}
        if "its node has died" in str(error) or (node is not None and node.node_id not in alive):
            return f"{name} died"
        return f"its actor on {name.removeprefix('its ')} died"


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
