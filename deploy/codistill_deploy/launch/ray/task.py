"""The task that the driver gives to an actor, and the actor's answer about where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codistill.wire.channel import format_address

__all__ = ["ActorNode", "ServerAddress", "Task"]


@dataclass(frozen=True)
class ServerAddress:
    """Where a server listens: on its node's address, or on all where another host is advertised.

    Attributes:
        port: of the exchange; 0 for a free one.
        metrics_port: of the metrics; None leaves them on the node's loopback.
        advertise: the host by which the others reach it; None for the node's own.
    """

    port: int = 0
    metrics_port: int | None = None
    advertise: str | None = None

    def arguments(self, node_address: str) -> list[str]:
        """Return the arguments of `codistill serve` on a node."""
        host = "0.0.0.0" if self.advertise else node_address  # noqa: S104 - the advertised host leads here by another interface
        metrics = "127.0.0.1:0" if self.metrics_port is None else format_address(host, self.metrics_port)
        arguments = ["--listen", format_address(host, self.port), "--metrics", metrics]
        return [*arguments, "--advertise", self.advertise] if self.advertise else arguments


@dataclass(frozen=True)
class Task:
    """One process for an actor to run.

    Attributes:
        folder: the run's folder.
        marker: what the driver wrote into the run's `driver.json`.
        arguments: the command line, after the Python.
        log: the file for the process's output.
        hang_after: seconds without a heartbeat after which it is killed.
        lock: the file that the actor locks while the process lives, so that the next one waits for its end.
        environment: what it needs besides what it inherits. It may hold the token, so it is never shown.
        search_path: a folder with the user's own modules; one that is not absolute is looked for in the job's files.
        server_address: where it listens, if it is the server.
    """

    folder: Path
    marker: str
    arguments: Sequence[str]
    log: Path
    hang_after: float
    lock: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    search_path: Path = Path()
    server_address: ServerAddress | None = None


@dataclass(frozen=True)
class ActorNode:
    """The node on which an actor came up: Ray's id of it, and its host address."""

    node_id: str
    address: str
