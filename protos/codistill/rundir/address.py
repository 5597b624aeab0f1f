"""The file in a run's folder that says where its server is reached, for as long as one is at work there."""

from __future__ import annotations

import json
import os
from pathlib import Path

__all__ = ["ADDRESS_FILE", "write_addresses"]

ADDRESS_FILE = "server.json"


def write_addresses(run_dir: Path, address: str, metrics: str) -> None:
    """Writes the file; who reads it meanwhile finds the one before, or none.

    Args:
        run_dir: the run's folder.
        address: "HOST:PORT" of the exchange.
        metrics: that of the live page and the metrics; "" for none.

    Raises:
        OSError: it cannot be written.
    """
    written = json.dumps({"address": address, "metrics": metrics, "pid": os.getpid()})
    part = run_dir / f"{ADDRESS_FILE}.part"
    part.write_text(written, encoding="utf-8")
    part.replace(run_dir / ADDRESS_FILE)
