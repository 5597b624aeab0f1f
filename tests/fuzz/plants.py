"""Bugs to plant in a server, so that a test sees that a campaign would find them."""

from __future__ import annotations


def plant(name: str) -> None:
    """Plants a bug in this process, before it serves."""
    raise KeyError(name)
