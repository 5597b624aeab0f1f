"""`codistill status`: where a run stands."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from codistill_deploy.cli.options import DEFAULT_SERVER, SecurityFiles, whole_path, with_security_options
from codistill_deploy.cli.stdio import console
from codistill_deploy.run_folder import RunFolder

__all__ = ["status"]


@with_security_options
def status(
    *,
    server: Annotated[str | None, typer.Option(help=f"The server's HOST:PORT; {DEFAULT_SERVER} by default.")] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", parser=whole_path, help="The folder of a run on this machine."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole state as JSON.")] = False,
    security_files: SecurityFiles,
) -> None:
    """Show each participant's steps and for whom the run waits.

    If no server serves the run any more, show where it ended.
    """
    from codistill_deploy.console.recorded import describe_recorded, supervisor_events
    from codistill_deploy.console.status import print_status, status_document
    from codistill_deploy.supervise.status_client import fetch_status

    if server is None and run_dir is not None and not as_json:
        line = describe_recorded(RunFolder(run_dir))
        if line is not None:
            console.print(line, soft_wrap=True)
            return
    security = security_files.read(run_dir if server is None else None)
    if server is None and run_dir is not None:
        from codistill_deploy.supervise.discovery import find_server

        server = find_server(run_dir, 0, threading.Event())
    run = fetch_status(server or DEFAULT_SERVER, security)
    more = supervisor_events(RunFolder(run_dir)) if run_dir is not None else []
    if as_json:
        sys.stdout.write(json.dumps(status_document(run, more), indent=2) + "\n")
        return
    print_status(run, console, more)
