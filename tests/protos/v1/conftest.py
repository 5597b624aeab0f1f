"""The fixtures of the protocol's tests: real servers, transports to them, and a peer that is not codistill's."""

from __future__ import annotations

from worker.support import tiny
from worker.support_server import connect, serving

__all__ = ["connect", "serving", "tiny"]
