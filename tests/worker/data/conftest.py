"""The fixtures of the data tests."""

from __future__ import annotations

from worker.data.support import two_classes

__all__ = ["two_classes"]
