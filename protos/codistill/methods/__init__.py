"""The two sides of a method: a server's :class:`Aggregator` makes a round's targets, a student's :class:`Objective` its loss.

A method of your own needs nothing but this package on either side.
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
from codistill.methods.objective import (
    ImageShape,
    Logits,
    LogitsObjective,
    Loss,
    Objective,
    Step,
    StudentContext,
    label_loss,
)

__all__ = [
    "EMBEDDING",
    "FEATURES",
    "LOGITS",
    "NOTHING",
    "Aggregator",
    "Arrays",
    "ImageShape",
    "Logits",
    "LogitsObjective",
    "Loss",
    "Objective",
    "Output",
    "RoundInputs",
    "Step",
    "StudentContext",
    "Targets",
    "label_loss",
]
