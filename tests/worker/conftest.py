"""The fixtures of the worker's tests."""

from __future__ import annotations

from worker.support import load_data, same, state, student, targets_for, tiny, train
from worker.support_server import serving
from worker.support_student import learn

__all__ = ["learn", "load_data", "same", "serving", "state", "student", "targets_for", "tiny", "train"]
