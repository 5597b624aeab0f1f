"""Shared by the tests of the wire's protection."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from codistill.process.exit_codes import ExitCode
from codistill.wire.security_settings import SecurityError

__all__ = ["refused"]


def refused(call: Callable[[], object]) -> str:
    """Return the one line of a call's error."""
    with pytest.raises(SecurityError) as caught:
        call()
    assert caught.value.code is ExitCode.CONFIGURATION
    text = str(caught.value)
    assert "\n" not in text
    return text
