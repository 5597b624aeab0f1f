"""Whose a KeyboardInterrupt is."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from codistill.process.interrupts import SignalInterrupt, is_interrupt, mark_interrupts


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def librarys(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("handler", "plain"),
    [(signal.default_int_handler, True), (librarys, True), (signal.SIG_IGN, False), (signal.SIG_DFL, False)],
    ids=["Python's", "a library's", "ignored", "default"],
)
def test_a_plain_one_is_a_signals_where_the_handler_may_raise_it(handler: Any, plain: bool) -> None:
    signal.signal(signal.SIGINT, handler)
    assert is_interrupt(KeyboardInterrupt()) is plain
    assert is_interrupt(SignalInterrupt())
    assert not is_interrupt(SystemExit())


def test_codistills_handler_marks_its_own() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mark_interrupts()
    assert not is_interrupt(KeyboardInterrupt())
    with pytest.raises(SignalInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_asyncio_loops_handler_raises_none() -> None:
    async def plain() -> bool:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, print)
        return is_interrupt(KeyboardInterrupt())

    assert not asyncio.run(plain())
