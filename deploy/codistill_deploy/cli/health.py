"""`codistill health`: whether a server serves, or has a participant; for a container's healthcheck."""

from __future__ import annotations

from typing import Annotated

import typer

from codistill_deploy.cli.options import DEFAULT_SERVER, SecurityFiles, with_security_options
from codistill_deploy.cli.stdio import console

__all__ = ["health"]


@with_security_options
def health(
    *,
    server: Annotated[str, typer.Option(help="The server's HOST:PORT.")] = DEFAULT_SERVER,
    student: Annotated[
        str | None, typer.Option(help="Ask whether this participant's worker is connected, or has finished.")
    ] = None,
    security_files: SecurityFiles,
) -> None:
    """End with 0 if the server serves; for a container's healthcheck.

    With --student, end with 0 if that participant's worker is connected to the server, or has finished.
    """
    from codistill_deploy.supervise.health import check_participant, check_server

    security = security_files.read()
    line = check_server(server, security) if student is None else check_participant(server, student, security)
    console.print(line, soft_wrap=True)
