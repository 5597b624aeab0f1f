"""The fixtures of the worker's tests."""

from __future__ import annotations

from worker.support import connect, load_data, same, serving, state, student, targets_for, tiny, train

__all__ = ["connect", "load_data", "same", "serving", "state", "student", "targets_for", "tiny", "train"]
