"""A port that is kept for a server while it is restarted."""

from __future__ import annotations

import contextlib
import socket
import sys

from codistill.wire.channel import AddressError, format_address, parse_address

__all__ = ["Port"]


class Port:
    """An address that a server can come back to after each restart.

    A free port is chosen here, once, and the bound socket is kept. It does not listen, so our server can bind the port
    too. But nobody else gets the port while the server is away, the kernel's choice of a client's port included. A worker
    that tries to reach the absent server could otherwise be given that very port and be connected to itself.

    Args:
        address: "HOST:PORT"; port 0 takes a free one.
        field: the option that gave it, for errors.

    Attributes:
        address: "HOST:PORT"; as given where it cannot be bound, so that the server can say why.
    """

    def __init__(self, address: str, field: str) -> None:
        self.address = address
        self._socket: socket.socket | None = None
        with contextlib.suppress(AddressError, OSError):
            host, port = parse_address(address, field)
            bound = _bind(host, port)
            self.address = format_address(host, bound.getsockname()[1])
            if sys.platform == "linux":
                self._socket = bound
            else:  # elsewhere two sockets cannot bind one port in this way
                bound.close()

    def close(self) -> None:
        """Release the port."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound
