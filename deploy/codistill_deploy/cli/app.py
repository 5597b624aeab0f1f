"""The `codistill` command line: its commands put together, its exit codes, and how it shows errors."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from codistill import __version__
from codistill.config.experiment import ExperimentError
from codistill.process.exit_codes import ExitCode
from codistill.process.interrupts import mark_interrupts
from codistill.process.printable import printable
from codistill.process.watchdog import Watchdog
from codistill.rundir.storage import explain, outlasts_restarts
from codistill_deploy.cli.compare import compare
from codistill_deploy.cli.export import export
from codistill_deploy.cli.extras import describe_missing
from codistill_deploy.cli.health import health
from codistill_deploy.cli.process_setup import refusing_exit
from codistill_deploy.cli.ray import ray
from codistill_deploy.cli.report import report
from codistill_deploy.cli.run import run
from codistill_deploy.cli.serve import serve
from codistill_deploy.cli.status import status
from codistill_deploy.cli.stdio import console, flush_or_drop, print_in_any_encoding, tolerate_lost_stderr
from codistill_deploy.cli.work import work
from codistill_deploy.supervise.heartbeat import announce_exit

__all__ = ["app", "main"]

# What the commands do imports torch, which takes seconds; each command imports what it needs, so that help, usage
# errors and a wrong experiment file are answered at once. gRPC too: `main` sets its verbosity before.

app = typer.Typer(
    help="Online distillation between students of different architectures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (run, ray, compare, serve, work, status, health, report, export):
    app.command()(refusing_exit(command))

_DEBUG_VARIABLE = "CODISTILL_DEBUG"
_EXIT_SECONDS = 60.0


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"codistill {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and debug messages; place it anywhere.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del debug, version  # --debug is read in main, before anything can fail


def main() -> None:
    """Run the command and end the process with a documented exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1 or os.environ.get(_DEBUG_VARIABLE) == "1"
    if debug:
        os.environ[_DEBUG_VARIABLE] = "1"  # for the processes that this one starts
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # processes of loaders and of Ray: no module of the working folder
    print_in_any_encoding()
    tolerate_lost_stderr()
    _set_up_logging(debug)
    mark_interrupts()
    code = _run_command(arguments, debug)
    # How the process ends is settled: another Ctrl-C would only cut the clean-up short, and show a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    announce_exit()
    watchdog = Watchdog()
    watchdog.begin("the end of this process", _EXIT_SECONDS)
    watchdog.start()
    flush_or_drop()
    sys.exit(code)


class _LiteralFormatter(logging.Formatter):
    """Show what acts on a terminal as escapes; a traceback, and messages of others, keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line of a record."""
        line = super().formatMessage(record)
        if record.name.partition(".")[0].startswith("codistill"):
            return printable(line)
        return "\n".join(map(printable, line.split("\n")))


def _set_up_logging(debug: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LiteralFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    if not debug:
        # gRPC writes a line for every handshake that fails, so that any caller could fill a server's disk. What matters
        # of it is in the client's error. gRPC reads the variable when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _run_command(arguments: list[str], debug: bool) -> int | str | None:
    """Return what `sys.exit` takes."""
    try:
        code = app(args=arguments, prog_name="codistill", standalone_mode=True)
    except SystemExit as ended:
        code = ended.code
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except Exception as error:
        if debug:
            logging.getLogger().exception("the command failed")
        code = _print_error(error)
    return int(code) if isinstance(code, int) else code


def _print_error(error: Exception) -> ExitCode:
    """Print one line for each thing wrong, and return how the process ends."""
    if isinstance(error, ExperimentError):
        code = ExitCode.CONFIGURATION
    else:
        found = getattr(error, "code", None)
        code = found if isinstance(found, ExitCode) else None
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = describe_missing(error)
    if line is not None:
        code, lines = ExitCode.CONFIGURATION, [line]
    if code is None and isinstance(error, OSError) and outlasts_restarts(error):
        file = error.filename if isinstance(error.filename, str) else None
        why = f"a file: {error.strerror}" if file is None else f"{file}: {explain(error, Path(file))}"
        code, lines = ExitCode.STORAGE, [f"{why}; a restart does not help: free what is missing, then try again"]
    if code is None:
        code = ExitCode.ERROR
        lines = [f"{type(error).__name__}: {lines[0]} (--debug shows where)"]
    for line in lines:
        sys.stderr.write(f"error: {printable(line)}\n")
    for note in getattr(error, "__notes__", ()):
        console.print(note, soft_wrap=True)
    return code
