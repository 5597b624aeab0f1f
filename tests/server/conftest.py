from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.support import Run, close_runs


@pytest.fixture(autouse=True)
def runs_are_closed() -> Iterator[None]:
    yield
    close_runs()


@pytest.fixture
def run() -> Run:
    made = Run()
    made.join_all()
    return made
