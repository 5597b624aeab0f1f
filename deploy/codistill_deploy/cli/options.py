"""Options and arguments that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codistill.config.base import require_whole_path
from codistill.rundir.layout import RunLayout

if TYPE_CHECKING:
    from codistill.wire.security import Security

__all__ = [
    "DEFAULT_SERVER",
    "ExperimentArgument",
    "InProcessOption",
    "InsecureOption",
    "LastingDirOption",
    "ResumeOption",
    "RunDirOption",
    "SecurityFiles",
    "whole_path",
    "with_security_options",
]

DEFAULT_SERVER = "127.0.0.1:50551"


def whole_path(given: str | Path) -> Path:
    """Return an option's path.

    Args:
        given: the text, or the option's default.

    Raises:
        typer.BadParameter: it is empty, or begins with `~`, which only a shell expands.
    """
    text = str(given)
    try:
        if not text:
            raise ValueError("the path is empty; name one, or leave the option out")
        path = Path(require_whole_path(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text}: {error}" if text else str(error)) from error
    return (
        path.absolute() if str(path).startswith("~") else path
    )  # Path leaves out ./, and child processes are given text


ExperimentArgument = Annotated[
    Path, typer.Argument(metavar="EXPERIMENT", parser=whole_path, help="The experiment file.")
]
RunDirOption = Annotated[
    Path | None,
    typer.Option("--run-dir", parser=whole_path, help="The run's folder; runs/NAME-TIME by default."),
]
LastingDirOption = Annotated[
    Path | None,
    typer.Option("--run-dir", parser=whole_path, help="The run's folder; runs/NAME by default."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run that the folder holds.")]
InProcessOption = Annotated[
    bool,
    typer.Option("--in-process", help="Train all students in one process, without a server; the numbers are the same."),
]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Listen on other interfaces without a token or TLS.")]


@dataclass(frozen=True)
class SecurityFiles:
    """The files that hold certificates and the token; None leaves each to its environment variable.

    Each field is an option of the commands decorated with :func:`with_security_options`.
    """

    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert",
            parser=whole_path,
            help="This side's certificate, PEM; else CODISTILL_TLS_CERT.",
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option(
            "--tls-key",
            parser=whole_path,
            help="The certificate's private key, PEM; else CODISTILL_TLS_KEY.",
        ),
    ] = None
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca",
            parser=whole_path,
            help="The CA that signed the other side's certificate, PEM; else CODISTILL_TLS_CA.",
        ),
    ] = None
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            parser=whole_path,
            help="The file with the token; else CODISTILL_TOKEN_FILE or CODISTILL_TOKEN.",
        ),
    ] = None

    def read(self, run_dir: Path | None = None) -> Security:
        """Read TLS and token from the files and the environment.

        Args:
            run_dir: the folder of the run whose server is called: its own token serves where no other is given.

        Raises:
            SecurityError: a file or a variable cannot be used.
        """
        from codistill.wire.security import read  # it imports gRPC

        security = read(self.tls_cert, self.tls_key, self.tls_ca, self.token_file)
        if security.token is None and run_dir is not None and RunLayout(run_dir).token_file.exists():
            return read(self.tls_cert, self.tls_key, self.tls_ca, RunLayout(run_dir).token_file)
        return security


def with_security_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :class:`SecurityFiles` in place of its keyword parameter of that type."""
    options = inspect.signature(SecurityFiles, eval_str=True).parameters
    signature = inspect.signature(command, eval_str=True)
    (files,) = (found for found in signature.parameters.values() if found.annotation is SecurityFiles)

    @functools.wraps(command)
    def command_with_options(**values: Any) -> None:
        values[files.name] = SecurityFiles(**{name: values.pop(name) for name in options})
        command(**values)

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        replaced = parameter is files
        parameters += [option.replace(kind=files.kind) for option in options.values()] if replaced else [parameter]
    command_with_options.__dict__["__signature__"] = signature.replace(parameters=parameters)  # typer asks for it
    return command_with_options
