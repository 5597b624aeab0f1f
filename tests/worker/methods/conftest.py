"""The fixtures of the methods' tests."""

from __future__ import annotations

from worker.methods.support import one_thread

__all__ = ["one_thread"]
