"""The fixtures of the model tests."""

from __future__ import annotations

from worker.models.support import one_thread

__all__ = ["one_thread"]
