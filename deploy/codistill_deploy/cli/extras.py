"""What of codistill's own needs is installed only where it was asked for."""

from __future__ import annotations

__all__ = ["missing"]

_EXTRAS = {
    "grpc_reflection": "server",
    "prometheus_client": "server",
    "PIL": "worker",
    "safetensors": "worker",
    "sklearn": "worker",
    "timm": "worker",
    "torchvision": "worker",
}


def missing(error: Exception) -> str | None:
    """Returns a line that says how to get what an import did not find; None where no extra of codistill's brings it."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    module = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(module)
    if extra is None:
        return None
    return (
        f"{module} is not installed, which codistill's {extra} needs; install it with: pip install 'codistill[{extra}]'"
    )
