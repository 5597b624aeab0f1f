"""The fixtures of the peer's tests: real servers, and transports to them."""

from __future__ import annotations

from worker.support import tiny
from worker.support_server import connect, serving

__all__ = ["connect", "serving", "tiny"]
