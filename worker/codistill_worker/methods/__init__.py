"""The worker halves of the methods: each turns a student's outputs and its targets into a loss.

Halves are chosen by the experiment's ``distillation.method``; the server's half of the same name makes the targets.
:mod:`.mechanism` says what a half is; a family of methods has a module of its own, and the losses themselves are pure
functions in :mod:`codistill_worker.methods.losses`.
"""

from __future__ import annotations

from codistill.methods.objective import (
    Arrays,
    ImageShape,
    Logits,
    LogitsObjective,
    Loss,
    Objective,
    Step,
    StudentContext,
    labels_alone,
)
from codistill_worker.methods.registry import create, teacher_network

__all__ = [
    "Arrays",
    "ImageShape",
    "Logits",
    "LogitsObjective",
    "Loss",
    "Objective",
    "Step",
    "StudentContext",
    "create",
    "labels_alone",
    "teacher_network",
]
