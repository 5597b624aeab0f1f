from __future__ import annotations

import torch

from codistill.config.methods import CrossArchitecture
from codistill.methods.aggregator import RoundInputs
from codistill_server import ensembles
from server.methods.support import LABELS, PAIR, B, C, aggregator_of, drawn


def test_cross_architecture_is_the_mean_of_all() -> None:
    logits = drawn(5, 2, B, C)
    made = aggregator_of(CrossArchitecture(temperature=3), ()).targets(RoundInputs(PAIR, {"logits": logits}, LABELS))
    assert made.shared is not None
    assert torch.equal(made.shared["probabilities"], ensembles.mean_probabilities(logits, 3))
