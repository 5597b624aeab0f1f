"""Seeds the global generators, from which a user's code draws: Python's, NumPy's and torch's.

No generator's state is kept in a checkpoint. The generators are seeded anew for each step, each evaluation and each round's
targets. They are seeded too while a user's model, method or data set is made.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["seed_generators", "seeded"]

_NUMPYS_BITS = 0xFFFF_FFFF  # a wider seed takes NumPy 13 times as long


def seed_generators(seed: int) -> None:
    """Seed `random`, `numpy.random` and torch's global generators; takes about 30 µs.

    torch's generators are seeded directly. `torch.manual_seed` also records a traceback where CUDA is not started yet. CUDA's
    generators exist once CUDA is started, as it is by a model on a GPU.

    Args:
        seed: of 63 bits at most.
    """
    random.seed(seed)
    np.random.seed(seed & _NUMPYS_BITS)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed the global generators for a block of code; afterwards the CPU's are as they were before it."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed_generators(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
