"""What the tests of the trainer share: their students, and what the fixtures are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from codistill.config.experiment import Experiment
from codistill_worker.training.trainer import Trainer

Tiny = Callable[..., Experiment]
MakeStudent = Callable[..., Trainer]
Train = Callable[[Trainer, int], list[torch.Tensor]]
State = Callable[[Trainer], dict[str, Any]]
Same = Callable[[Any, Any], bool]
Answer = Callable[[Any], dict[str, torch.Tensor]]

STUDENTS = ["cnn", "mlp"]  # batch normalisation and SGD's momentum; AdamW; both with dropout
