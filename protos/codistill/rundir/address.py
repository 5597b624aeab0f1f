"""The file in a run's folder that says where its server is reached, for as long as one is at work there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from codistill.rundir.files import write_atomically

__all__ = ["Addresses", "read_addresses", "write_addresses"]

_LOOPBACK = ("127.", "localhost:", "[::1]:")


@dataclass(frozen=True)
class Addresses:
    """Where a server is reached: "HOST:PORT" of each; `metrics` is "" where there are none."""

    server: str
    metrics: str

    def __str__(self) -> str:
        apart = self.metrics.startswith(_LOOPBACK) and not self.server.startswith(_LOOPBACK)
        where = " on the server's own machine" if apart else ""
        web = f"http://{self.metrics}"
        return f"live page{where}: {web}/ (server {self.server}, metrics on {web}/metrics)"


def read_addresses(path: Path) -> Addresses | None:
    """Return what an address file says; None if there is none, or none that can be read."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return Addresses(str(written["address"]), str(written["metrics"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_addresses(path: Path, addresses: Addresses) -> None:
    """Write an address file; a reader meanwhile finds the one before, or none.

    Raises:
        OSError: it cannot be written.
    """
    written = json.dumps({"address": addresses.server, "metrics": addresses.metrics, "pid": os.getpid()})
    write_atomically(path, written)
