"""Which extra of codistill brings a package that was not found."""

from __future__ import annotations

__all__ = ["describe_missing"]

_EXTRAS = {
    "grpc_reflection": "server",
    "prometheus_client": "server",
    "PIL": "worker",
    "safetensors": "worker",
    "sklearn": "worker",
    "timm": "worker",
    "torchvision": "worker",
}


def describe_missing(error: Exception) -> str | None:
    """Return a line that says how to install what an import did not find; None where no extra brings it."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    module = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(module)
    if extra is None:
        return None
    return (
        f"{module} is not installed, which codistill's {extra} needs; install it with: pip install 'codistill[{extra}]'"
    )
