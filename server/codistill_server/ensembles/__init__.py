"""Soft targets from the logits of several students: pure functions of arrays, a module for each family.

Example:
    >>> import torch
    >>> logits = torch.tensor([[[2.0, 0.0, 1.0]], [[0.0, 1.0, 3.0]]])
    >>> min_logit(logits, torch.tensor([2]))
    tensor([[-3., -2.,  0.]])
"""

from __future__ import annotations

from codistill_server.ensembles import dense, kdcl, peers
from codistill_server.ensembles.dense import *  # noqa: F403 - a new ensemble is named in its family alone
from codistill_server.ensembles.kdcl import *  # noqa: F403
from codistill_server.ensembles.peers import *  # noqa: F403

__all__: list[str] = []
__all__ += dense.__all__
__all__ += kdcl.__all__
__all__ += peers.__all__
