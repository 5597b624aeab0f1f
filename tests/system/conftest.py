from __future__ import annotations

import pytest
import torch

from system.run_harness import undisturbed


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the run of :mod:`system.run_harness` in one process, trained once for all who compare with them."""
    return undisturbed(tmp_path_factory.mktemp("reference"))
