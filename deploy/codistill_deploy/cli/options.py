"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DEFAULT_SERVER",
    "ExperimentArgument",
    "InProcessOption",
    "InsecureOption",
    "LastingDirOption",
    "ResumeOption",
    "RunDirOption",
    "TlsCaOption",
    "TlsCertOption",
    "TlsKeyOption",
    "TokenFileOption",
]

DEFAULT_SERVER = "127.0.0.1:50551"

ExperimentArgument = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The experiment file.")]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", help="The run's folder; runs/NAME-TIME by default.")]
LastingDirOption = Annotated[Path | None, typer.Option("--run-dir", help="The run's folder; runs/NAME by default.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")]
InProcessOption = Annotated[
    bool, typer.Option("--in-process", help="All students in one process, without a server: the same numbers.")
]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without protection.")]
TlsCertOption = Annotated[
    Path | None, typer.Option("--tls-cert", help="This side's certificate, PEM; else CODISTILL_TLS_CERT.")
]
TlsKeyOption = Annotated[
    Path | None, typer.Option("--tls-key", help="The certificate's private key, PEM; else CODISTILL_TLS_KEY.")
]
TlsCaOption = Annotated[
    Path | None,
    typer.Option("--tls-ca", help="The CA that signed the other side's certificate, PEM; else CODISTILL_TLS_CA."),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option("--token-file", help="The file with the token; else CODISTILL_TOKEN_FILE or CODISTILL_TOKEN."),
]
