"""The port that a server comes back to after each of its lives."""

from __future__ import annotations

import contextlib
import socket
import sys

from codistill.wire.channel import AddressError, format_address, parse_address

__all__ = ["Port"]


class Port:
    """An address that a server can come back to.

    A free port is chosen here, once. The bound socket that is kept does not listen: it lets our server bind the port too,
    and keeps it from everybody else while the server is away, be it the kernel that looks for a client's port. A worker
    that tries to reach the absent server could otherwise be given that very port and be connected to itself.

    Attributes:
        address: "HOST:PORT"; as given where it cannot be bound, so that the server can say why.
    """

    def __init__(self, address: str, field: str) -> None:
        self.address = address
        self._socket: socket.socket | None = None
        with contextlib.suppress(AddressError, OSError):
            host, port = parse_address(address, field)
            kept = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            try:
                kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                kept.bind((host, port))
                bound = kept.getsockname()[1]
            except BaseException:
                kept.close()
                raise
            self.address = format_address(host, bound)
            if sys.platform == "linux":
                self._socket = kept
            else:  # elsewhere two sockets cannot bind one port in this way
                kept.close()

    def close(self) -> None:
        """Lets the port go."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
