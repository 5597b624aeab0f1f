"""The package gives what its families give."""

from __future__ import annotations

import pytest

from codistill_server import ensembles
from codistill_server.ensembles import dense, kdcl, peers


@pytest.mark.parametrize("family", [dense, kdcl, peers], ids=lambda family: family.__name__.rpartition(".")[2])
def test_every_function_of_a_family_is_one_of_the_packages(family: object) -> None:
    for name in family.__dict__["__all__"]:
        assert name in ensembles.__all__
        assert getattr(ensembles, name) is getattr(family, name)
