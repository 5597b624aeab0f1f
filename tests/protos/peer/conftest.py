"""The fixtures of the peer's tests: real servers, and transports to them."""

from __future__ import annotations

from worker.support import connect, serving, tiny

__all__ = ["connect", "serving", "tiny"]
