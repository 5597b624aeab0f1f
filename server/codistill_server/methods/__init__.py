"""The server halves of the methods: each turns the outputs of a round into targets.

Halves are chosen by the experiment's ``distillation.method``; the worker's half of the same name turns the targets into
a loss. :mod:`.mechanism` says what a half is; a family of methods has a module of its own.
"""

from __future__ import annotations

from codistill.methods.aggregator import (
    EMBEDDING,
    FEATURES,
    LOGITS,
    NOTHING,
    Aggregator,
    Arrays,
    Output,
    RoundInputs,
    Targets,
)
from codistill_server.methods.registry import create

__all__ = [
    "EMBEDDING",
    "FEATURES",
    "LOGITS",
    "NOTHING",
    "Aggregator",
    "Arrays",
    "Output",
    "RoundInputs",
    "Targets",
    "create",
]
