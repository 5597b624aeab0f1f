"""Connect to a Ray cluster, or start one on this machine; a wrong token or address is an error of one line."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import signal
import tempfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc

from codistill.process.exit_codes import ExitCode
from codistill_deploy.errors import CommandError

__all__ = ["AUTH_MODE", "AUTH_TOKEN", "AUTH_TOKEN_PATH", "connect", "token_metadata"]

AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_ADDRESS = "RAY_ADDRESS"
_PING_SECONDS = 10.0
_OBJECT_STORE_BYTES = 100 * 2**20  # nothing large goes through it
_MISSING = "codistill ray needs Ray; install it with: pip install 'codistill[ray]'"
_PING = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_WRONG_TOKEN = f"give the cluster's own with {AUTH_TOKEN} or {AUTH_TOKEN_PATH}, and {AUTH_MODE}=token; or {AUTH_MODE}=disabled where it has none"


@contextlib.contextmanager
def connect(address: str | None, cpus: int) -> Generator[Any, None, None]:
    """Connect this process to a Ray cluster, and yield the module `ray`; disconnect afterwards.

    Args:
        address: the cluster's "HOST:PORT", or "auto" for the one that runs on this machine. None takes RAY_ADDRESS, which
            Ray sets for a job; without that a cluster is started here, and ended afterwards.
        cpus: how many CPUs a cluster that is started here declares at least.

    Raises:
        CommandError: Ray is not installed, or there is no such cluster, or it refuses the token.
    """
    address = address or os.environ.get(_ADDRESS)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "warning"}
        if address is None:
            # Its sockets lie there, and their paths must be short; so it is not put below TMPDIR.
            folder = tempfile.TemporaryDirectory(prefix="codistill-ray-", dir="/tmp", ignore_cleanup_errors=True)
            options |= _local_options(Path(stack.enter_context(folder)), cpus)
        elif "://" in address:
            raise CommandError(
                f"--address: {address!r} is not a cluster's HOST:PORT; to run on a cluster from elsewhere, submit a job: "
                "ray job submit --address http://HOST:8265 --working-dir . -- codistill ray EXPERIMENT"
            )
        elif address != "auto" and os.environ.get("RAY_USE_TLS", "0") == "0":
            _check_alive(address)
        ray = _import_ray()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options, job_config=_job_config(ray))
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            why = str(error).splitlines()[0]
            raise CommandError(
                f"--address: no Ray cluster can be used at {address}: {why}", ExitCode.UNREACHABLE
            ) from error
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray's own handler would end the process without the students saved
        try:
            yield ray
        finally:
            ray.shutdown()


def token_metadata(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the gRPC metadata with Ray's token, found as Ray itself finds it; none where Ray asks for none.

    Raises:
        CommandError: a token is asked for and there is none.
    """
    if environment.get(AUTH_MODE, "disabled") != "token":
        return ()
    token = environment.get(AUTH_TOKEN, "")
    path = Path(environment.get(AUTH_TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    if not token:
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            raise CommandError(
                f"{AUTH_MODE} is token, and {AUTH_TOKEN} is not set and {path} cannot be read; {_WRONG_TOKEN}"
            ) from None
    return (("authorization", f"Bearer {token}"),)


def _import_ray() -> Any:
    """Return the module `ray`. In a checkout without Ray, Python takes the folder deploy/ray for an empty one."""
    with contextlib.suppress(ImportError):
        ray: Any = importlib.import_module("ray")
        if hasattr(ray, "init"):
            return ray
    raise CommandError(_MISSING)


class _NoFolders(list[str]):
    """A list of folders that stays empty."""

    def extend(self, values: Iterable[str], /) -> None:
        """Add nothing."""


def _job_config(ray: Any) -> Any:
    """Return a job's settings with which actors do not take modules from this process's working folder first."""
    config = ray.job_config.JobConfig()
    # Ray adds the working folder to this list, and has no setting against that.
    setattr(config, "_py_driver_sys_path", _NoFolders())  # noqa: B010 - Ray gives it no public name
    return config


def _local_options(folder: Path, cpus: int) -> dict[str, Any]:
    """Return the options of a cluster on this machine: on loopback, with a token that nobody else knows and no file holds."""
    os.environ.setdefault(AUTH_MODE, "token")
    if os.environ[AUTH_MODE] == "token":
        os.environ[AUTH_TOKEN] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else the students yield to whatever else runs here
    # Else Ray takes the address below for that of this machine in its network, and listens for all of it. Ray reads it when
    # it is imported, and heeds it on every system.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return {
        "address": "local",
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder),
    }


def _check_alive(address: str) -> None:
    """Check that a cluster answers, as Ray takes minutes to find out that it does not, and does not say why.

    Like Ray itself, it connects without a proxy.
    """
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        ping = channel.unary_unary(_PING, request_serializer=None, response_deserializer=None)
        try:
            ping(b"", timeout=_PING_SECONDS, metadata=token_metadata(os.environ))
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
