"""What the command raises."""

from __future__ import annotations

from codistill.exit_codes import ExitCode

__all__ = ["CommandError", "lacking"]

_EXTRAS = {
    "grpc_reflection": "server",
    "prometheus_client": "server",
    "PIL": "worker",
    "safetensors": "worker",
    "sklearn": "worker",
    "timm": "worker",
    "torchvision": "worker",
}


class CommandError(RuntimeError):
    """A command cannot do what it was asked; the text is for people, `code` how the process ends."""

    def __init__(self, message: str, code: ExitCode = ExitCode.CONFIGURATION) -> None:
        self.code = code
        super().__init__(message)


def lacking(error: ModuleNotFoundError) -> CommandError | None:
    """Returns which part of codistill is to be installed; None where it is no module of one of ours."""
    package = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    if extra is None:
        return None
    return CommandError(
        f"this command needs what is not installed here ({package}); install it with: pip install 'codistill[{extra}]'"
    )
