"""HTTP proxies of the environment: which server gRPC reaches through one, and which it never does."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping

from codistill.wire.channel import is_loopback, split_address

__all__ = ["is_here", "proxy_advice", "proxy_variable"]

# As gRPC reads them: the first that is set counts, and only in lower case.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def is_here(address: str) -> bool:
    """Return whether "HOST:PORT" is on this machine: a loopback address, or one of an interface of its own."""
    found = split_address(address)
    if found is None:
        return False
    host = found[0]
    if is_loopback(host):
        return True
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))  # only possible with an address of this machine; sends nothing
    except (ValueError, OSError):
        return False
    return True


def proxy_variable(address: str, environment: Mapping[str, str] | None = None) -> str | None:
    """Return the variable whose proxy gRPC uses to reach "HOST:PORT"; None where it connects directly.

    Args:
        address: the server's.
        environment: the environment's variables; this process's own by default.
    """
    environment = os.environ if environment is None else environment
    name = next((name for name in _PROXIES if name in environment), None)
    if name is None or not environment[name] or is_here(address):
        return None
    excepted = next((environment[name] for name in _EXCEPTIONS if name in environment), "")
    found = split_address(address)
    host = (found[0] if found else address).lower()
    return None if any(_covers(entry.strip().lower(), host) for entry in excepted.split(",")) else name


def proxy_advice(address: str) -> str | None:
    """Return what to do about a server that stays away behind a proxy; None where there is no proxy between."""
    name = proxy_variable(address)
    if name is None:
        return None
    host = address.rpartition(":")[0]
    return f"{name} sends the connection through a proxy: set no_proxy={host} to connect directly"


def _covers(entry: str, host: str) -> bool:
    """Return whether an entry of `no_proxy` covers a host, by gRPC's rules: an ending of its name, or a network."""
    if entry and host.endswith(entry):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
