"""Reaching a Ray cluster, or starting one of our own on this machine, with the wrong token or address told in one line."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import signal
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import grpc

from codistill.process.exit_codes import ExitCode
from codistill_deploy.errors import CommandError

__all__ = ["MODE", "TOKEN", "TOKEN_PATH", "connected", "credentials"]

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_ADDRESS = "RAY_ADDRESS"
_LOOK_SECONDS = 10.0
_OBJECT_STORE_BYTES = 100 * 2**20  # nothing large goes through it
_MISSING = "codistill ray needs Ray; install it with: pip install 'codistill[ray]'"
_PING = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_WRONG_TOKEN = (
    f"give the cluster's own with {TOKEN} or {TOKEN_PATH}, and {MODE}=token; or {MODE}=disabled where it has none"
)


@contextlib.contextmanager
def connected(address: str | None, cpus: int) -> Generator[Any, None, None]:
    """Connects this process to a Ray cluster; gives the module `ray`. Afterwards it is disconnected.

    Args:
        address: the cluster's "HOST:PORT", or "auto" for the one that runs on this machine. None takes RAY_ADDRESS, which
            Ray sets for a job; without that a Ray is started here, and ended afterwards.
        cpus: how many CPUs a Ray that is started here says it has at least.

    Raises:
        CommandError: Ray is not installed, or there is no such cluster, or it does not take the token.
    """
    address = address or os.environ.get(_ADDRESS)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "warning"}
        if address is None:
            # Its sockets lie there, and their paths must be short; so it is not put below TMPDIR.
            made = tempfile.TemporaryDirectory(prefix="codistill-ray-", dir="/tmp", ignore_cleanup_errors=True)
            options |= _own(Path(stack.enter_context(made)), cpus)
        elif "://" in address:
            raise CommandError(
                f"--address: {address!r} is not a cluster's HOST:PORT; to run on a cluster from elsewhere, submit a job: "
                "ray job submit --address http://HOST:8265 --working-dir . -- codistill ray EXPERIMENT"
            )
        elif address != "auto" and os.environ.get("RAY_USE_TLS", "0") == "0":
            _look(address)
        ray = _import()
        told = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            why = str(error).splitlines()[0]
            raise CommandError(
                f"--address: no Ray cluster can be used at {address}: {why}", ExitCode.UNREACHABLE
            ) from error
        finally:
            signal.signal(signal.SIGTERM, told)  # Ray's own handler would end the process without the students saved
        try:
            yield ray
        finally:
            ray.shutdown()


def credentials(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Returns the metadata that shows Ray's token, as Ray itself finds it; none where it is not to be shown.

    Raises:
        CommandError: a token is to be shown and there is none.
    """
    if environment.get(MODE, "disabled") != "token":
        return ()
    token = environment.get(TOKEN, "")
    path = Path(environment.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    if not token:
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            raise CommandError(
                f"{MODE} is token, and {TOKEN} is not set and {path} cannot be read; {_WRONG_TOKEN}"
            ) from None
    return (("authorization", f"Bearer {token}"),)


def _import() -> Any:
    """Returns the module `ray`. In a checkout without Ray, Python takes the folder deploy/ray for one that is empty."""
    with contextlib.suppress(ImportError):
        ray: Any = importlib.import_module("ray")
        if hasattr(ray, "init"):
            return ray
    raise CommandError(_MISSING)


def _own(folder: Path, cpus: int) -> dict[str, Any]:
    """Returns how a Ray of our own is started: on loopback, with a token that nobody else knows and no file holds."""
    os.environ.setdefault(MODE, "token")
    if os.environ[MODE] == "token":
        os.environ[TOKEN] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else the students yield to whatever else runs here
    # Else Ray takes the address below for that of this machine in its network, and listens for all of it. It is read when
    # Ray is imported, and is about its addresses on every system.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return {
        "address": "local",
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder),
    }


def _look(address: str) -> None:
    """Asks a cluster whether it is there, as Ray takes minutes to find out that it is not, and does not say why."""
    with grpc.insecure_channel(address) as channel:
        ping = channel.unary_unary(_PING, request_serializer=None, response_deserializer=None)
        try:
            ping(b"", timeout=_LOOK_SECONDS, metadata=credentials(os.environ))
        except grpc.RpcError as error:
            code = error.code()  # pyright: ignore[reportAttributeAccessIssue] - what a failed call raises is the call itself
            if code is grpc.StatusCode.UNAUTHENTICATED:
                raise CommandError(
                    f"--address: the Ray cluster at {address} does not take the token; {_WRONG_TOKEN}", ExitCode.REFUSED
                ) from error
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise CommandError(
                    f"--address: no Ray cluster answers at {address}; check the address (Ray's own port, 6379 by default) and "
                    "that `ray start --head` runs there",
                    ExitCode.UNREACHABLE,
                ) from error
