"""The server that runs in a folder is found, waited for, or missed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from codistill.rundir.address import Addresses, write_addresses
from codistill.rundir.layout import RunLayout
from codistill_deploy.errors import CommandError
from codistill_deploy.supervise.discovery import find_server

ADDRESSES = Addresses("127.0.0.1:1", "")


def test_a_server_that_comes_up_late_is_waited_for(tmp_path: Path) -> None:
    late = threading.Timer(0.2, write_addresses, [RunLayout(tmp_path).address_file, ADDRESSES])
    late.start()
    assert find_server(tmp_path, 30, threading.Event()) == "127.0.0.1:1"
    late.join()


@pytest.mark.parametrize("stopped", [True, False])
def test_a_folder_without_a_server_is_an_error(stopped: bool, tmp_path: Path) -> None:
    stop = threading.Event()
    if stopped:
        stop.set()
    with pytest.raises(CommandError, match=rf"no server runs in {tmp_path}: .*server\.json is not there") as missed:
        find_server(tmp_path, 600 if stopped else 0, stop)
    assert missed.value.code is ExitCode.UNREACHABLE
