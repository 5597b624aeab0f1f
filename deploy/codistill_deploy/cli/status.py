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
    """Show each student's round and for whom the run waits.

    If no server serves the run any more, show where it ended.
    """
    from codistill_deploy.console.recorded import add_supervisor_events, describe_recorded
    from codistill_deploy.console.status import print_status
    from codistill_deploy.supervise.status_client import fetch_status

    if server is None and run_dir is not None and not as_json:
        line = describe_recorded(RunFolder(run_dir))
        if line is not None:
            console.print(line, soft_wrap=True)
            return
    if server is None and run_dir is not None:
        from codistill_deploy.supervise.discovery import find_server

        server = find_server(run_dir, 0, threading.Event())
    run = fetch_status(server or DEFAULT_SERVER, security_files.read())
    if run_dir is not None:
        add_supervisor_events(run, RunFolder(run_dir))
    if as_json:
        from google.protobuf.json_format import MessageToDict

        fields = MessageToDict(run, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        sys.stdout.write(json.dumps(fields, indent=2) + "\n")
        return
    print_status(run, console)
