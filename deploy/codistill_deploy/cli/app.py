"""The `codistill` command line."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codistill import __version__
from codistill.config.experiment import Experiment, ExperimentError, load
from codistill.process.exit_codes import ExitCode
from codistill.process.watchdog import Watchdog
from codistill_deploy.cli.extras import missing
from codistill_deploy.cli.options import (
    DEFAULT_SERVER,
    ExperimentArgument,
    InProcessOption,
    InsecureOption,
    LastingDirOption,
    ResumeOption,
    RunDirOption,
    TlsCaOption,
    TlsCertOption,
    TlsKeyOption,
    TokenFileOption,
)
from codistill_deploy.cli.run import (
    Wire,
    console,
    find_modules_beside,
    read_security_for_both,
    run_here,
    run_in_folder,
    stop_on_signals,
    write_report,
)
from codistill_deploy.cli.stdio import flush_or_drop, tolerate_lost_stderr, tolerate_lost_stdout
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_deploy.supervise.heartbeat import announce_exit, start_heartbeat
from codistill_deploy.supervise.parent_death import exit_with_parent
from codistill_deploy.supervise.restart_policy import DEFAULT_RESTARTS

if TYPE_CHECKING:
    from codistill_deploy.console.progress import View

__all__ = ["app", "main"]

# The command's modules import torch, which takes seconds; each command imports what it needs, so that help, usage
# errors and a wrong experiment file are answered at once. gRPC too: `main` has something to tell it before.

app = typer.Typer(
    help="Online distillation between students of different architectures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_log = logging.getLogger("codistill")

_DEBUG_VARIABLE = "CODISTILL_DEBUG"
_EXIT_SECONDS = 60.0


class Which(StrEnum):
    """Which weights to export."""

    last = "last"
    best = "best"


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"codistill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and debug messages; may stand anywhere.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del debug, version  # --debug is read in main, before anything can fail


@app.command()
def run(
    experiment: ExperimentArgument,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    in_process: InProcessOption = False,
    listen: Annotated[str, typer.Option(help="The server's HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:0",
    metrics: Annotated[
        str, typer.Option(help="HOST:PORT of the live page and the Prometheus metrics.")
    ] = "127.0.0.1:0",
    insecure: InsecureOption = False,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    token_file: TokenFileOption = None,
    restarts: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="How often each process that dies is started again.")
    ] = DEFAULT_RESTARTS,
) -> None:
    """Run an experiment on this machine.

    A server and one worker process per student, a live table, and a report at the end.
    """
    loaded = load(experiment)
    folder = RunFolder(run_dir) if run_dir is not None else RunFolder.default(loaded.name)
    tolerate_lost_stdout()
    stop = stop_on_signals()
    security = None if in_process else read_security_for_both(tls_cert, tls_key, tls_ca, token_file)
    wire = Wire(security, listen, metrics, announce=True, insecure=insecure)
    from codistill_deploy.compare import generations

    runs = generations.runs_in_order(loaded, folder.path, loaded.name)
    code = ExitCode.OK
    for one, place, title in runs:
        if len(runs) > 1 and resume and generations.is_trained(place):
            console.print(f"{title}: trained already")
            continue
        again = resume and (len(runs) == 1 or place.experiment_file.exists())
        code = run_here(one, place, title, experiment, stop, again, in_process, wire, restarts, report=True)
        if code is not ExitCode.OK:
            break
    if code is ExitCode.INTERRUPTED:
        again = f"codistill run {experiment} --run-dir {folder.path} --resume" + (" --in-process" if in_process else "")
        console.print(f"stopped; go on with: {again}", soft_wrap=True)
    raise typer.Exit(code)


@app.command()
def ray(
    experiment: ExperimentArgument,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir", help="The run's folder, on storage that all nodes share; runs/NAME-TIME on a Ray of its own."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="The cluster's HOST:PORT, or auto; else RAY_ADDRESS; else a Ray of its own on this machine."),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            help="The host by which nodes reach the server; else CODISTILL_ADVERTISE on its node; else its IP."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The server's port; 0 takes a free one.")] = 0,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="The Prometheus metrics' port; by default one on the node's loopback."),
    ] = None,
    wait_for_resources: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for CPUs and GPUs that are not there.")
    ] = 600.0,
    gpus_per_student: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="GPUs of each student that uses one; below 1 it shares one.")
    ] = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    token_file: TokenFileOption = None,
    restarts: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="How often each actor that dies is made anew.")
    ] = DEFAULT_RESTARTS,
) -> None:
    """Run an experiment on a Ray cluster; a run that the folder holds is gone on with.

    A server and one worker per student in actors, each with its CPUs and GPUs, and a report at the end.
    """
    loaded = load(experiment)
    from codistill_deploy.compare import generations
    from codistill_deploy.launch.preflight import check
    from codistill_deploy.launch.ray.actor import Serving
    from codistill_deploy.launch.ray.driver import RayOptions, run_on_ray
    from codistill_deploy.launch.ray.plan import check_devices

    if run_dir is None and (address or os.environ.get("RAY_ADDRESS")):
        raise CommandError("--run-dir: on a cluster the run's folder must be on storage that all nodes share; name it")
    folder = RunFolder(run_dir.absolute()) if run_dir is not None else RunFolder.default(loaded.name)
    tolerate_lost_stdout()
    stop = stop_on_signals()
    security = read_security_for_both(tls_cert, tls_key, tls_ca, token_file)
    options = RayOptions(
        address,
        Serving(port, metrics_port, advertise),
        restarts,
        wait_for_resources,
        gpus_per_student,
        experiment.parent,
        security,
    )
    generations.require_single_run(loaded)
    find_modules_beside(experiment)
    check(loaded, str(experiment), here=False)
    check_devices(loaded, str(experiment))
    again = folder.experiment_file.exists()
    folder.check(loaded, resume=again)

    def go(view: View, lock: int) -> ExitCode:
        del lock  # an actor holds one of its own, as no descriptor goes from machine to machine
        return run_on_ray(loaded, folder, view, stop, options)

    code = run_in_folder(loaded, folder, loaded.name, go, mode="grpc", resume=again, report=True)
    if code is ExitCode.INTERRUPTED:
        console.print(f"stopped; go on with: codistill ray {experiment} --run-dir {folder.path}", soft_wrap=True)
    raise typer.Exit(code)


@app.command()
def compare(
    experiment: ExperimentArgument,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas: independent, dml, kdcl, kdcl/linear …; or all.")
    ] = ("independent,kdcl"),
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many seeds; from the experiment's own on.")] = 3,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    in_process: InProcessOption = False,
) -> None:
    """Compare methods: who gains how much.

    Runs every method with every seed, then shows the table and writes a report. A method that needs a teacher, where the
    experiment has none, is taught by the student that is best alone with the same seed.
    """
    from codistill_deploy.compare.runner import compare as run_comparison
    from codistill_deploy.launch.preflight import check

    loaded = load(experiment)
    folder = run_dir or RunFolder.default(f"{loaded.name}-compare").path
    tolerate_lost_stdout()
    stop = stop_on_signals()
    wire = Wire(None if in_process else read_security_for_both())
    find_modules_beside(experiment)

    def check_one(variant: Experiment) -> None:
        check(variant, str(experiment))

    def run_one(variant: Experiment, place: RunFolder, title: str) -> ExitCode:
        begun = resume and place.experiment_file.exists()
        return run_here(variant, place, title, experiment, stop, begun, in_process, wire)

    wanted = list(dict.fromkeys(part.strip() for part in methods.split(",") if part.strip()))
    if not wanted:
        raise CommandError("--methods: '' names no method; give some, separated by commas: independent,kdcl")
    each_seed = range(loaded.seed, loaded.seed + seeds)
    code = run_comparison(loaded, wanted, each_seed, folder, run_one, stop, check=check_one, resume=resume)
    if code is ExitCode.INTERRUPTED:
        console.print("stopped; go on with the same command and", f"--run-dir {folder} --resume", soft_wrap=True)
        raise typer.Exit(code)
    from codistill_deploy.console.tables import comparison_table

    console.print()
    console.print(comparison_table(folder, console))
    console.print()
    write_report(folder)
    raise typer.Exit(code)


@app.command()
def serve(
    experiment: ExperimentArgument,
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = DEFAULT_SERVER,
    run_dir: LastingDirOption = None,
    metrics: Annotated[
        str | None, typer.Option(help="HOST:PORT of the live page and the Prometheus metrics; none by default.")
    ] = None,
    insecure: InsecureOption = False,
    reflection: Annotated[bool, typer.Option("--reflection", help="Serve gRPC reflection.")] = False,
    stay: Annotated[bool, typer.Option("--stay", help="Serve on after the run is complete.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the report once the run is complete.")] = False,
    advertise: Annotated[
        str | None, typer.Option(help="The host by which others reach the server, written into the run's folder.")
    ] = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Run one aggregation server. A journal in the run's folder is gone on with."""
    stop = threading.Event()
    exit_with_parent(stop)
    loaded = load(experiment)
    from codistill.wire.security import read
    from codistill_deploy.compare.generations import require_single_run
    from codistill_server.app import ServeOptions, check
    from codistill_server.app import serve as run_server

    start_heartbeat()  # the imports above may hold up every thread, for long on a distant disk
    require_single_run(loaded)
    find_modules_beside(experiment)
    folder = RunFolder(run_dir) if run_dir is not None else RunFolder.lasting(loaded.name)
    security = read(tls_cert, tls_key, tls_ca, token_file)

    def write_report() -> None:
        from codistill_deploy import report as reports

        _log.info("report: %s", reports.write(folder.path))

    options = ServeOptions(
        listen,
        folder.path,
        metrics,
        insecure,
        reflection,
        stay,
        security,
        on_complete=write_report if report else None,
        advertise=advertise,
    )
    check(options)
    folder.join(loaded)
    raise typer.Exit(run_server(loaded, options, stop))


@app.command()
def work(
    experiment: ExperimentArgument,
    student: Annotated[str, typer.Option(help="The student to train, or the teacher to run.")],
    server: Annotated[
        str | None, typer.Option(help="The server's HOST:PORT; by default the one that runs in --run-dir.")
    ] = None,
    run_dir: LastingDirOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Train one student, or run one teacher, against an aggregation server. A checkpoint in the run's folder is gone on with."""
    stop = threading.Event()
    exit_with_parent(stop)
    loaded = load(experiment)
    from codistill.wire.security import read
    from codistill_deploy.compare.generations import require_single_run
    from codistill_worker.app import WorkOptions, check_student
    from codistill_worker.app import work as run_worker

    start_heartbeat()  # the imports above may hold up every thread, for long on a distant disk
    require_single_run(loaded)
    find_modules_beside(experiment)
    if server is None and run_dir is None:
        raise CommandError("--server: give the server's HOST:PORT, or the --run-dir of a server on this machine")
    check_student(loaded, student)
    folder = RunFolder(run_dir) if run_dir is not None else RunFolder.lasting(loaded.name)
    security = read(tls_cert, tls_key, tls_ca, token_file)
    folder.join(loaded, [student] if student in loaded.names else [])
    options = WorkOptions(student, server or "", folder.path, security)
    if server is None:
        from codistill.rundir.address import read_addresses
        from codistill_deploy.supervise.discovery import find_server

        def find() -> str | None:
            found = read_addresses(folder.address_file)
            return None if found is None else found.server

        first = find_server(folder.path, loaded.exchange.connect_timeout, stop)
        options = WorkOptions(student, first, folder.path, security, find)
    raise typer.Exit(run_worker(loaded, options, stop))


@app.command()
def status(
    server: Annotated[str | None, typer.Option(help=f"The server's HOST:PORT; {DEFAULT_SERVER} by default.")] = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="The folder of a run on this machine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole state as JSON.")] = False,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Show who is at which round, and who is waited for; or where a run ended that no server serves any more."""
    from codistill.wire.security import read
    from codistill_deploy.cli.status import add_supervisor_events, fetch_status, print_status, recorded

    if server is None and run_dir is not None and not as_json:
        line = recorded(RunFolder(run_dir))
        if line is not None:
            console.print(line, soft_wrap=True)
            return
    if server is None and run_dir is not None:
        from codistill_deploy.supervise.discovery import find_server

        server = find_server(run_dir, 0, threading.Event())
    state = fetch_status(server or DEFAULT_SERVER, read(tls_cert, tls_key, tls_ca, token_file))
    if run_dir is not None:
        add_supervisor_events(state, RunFolder(run_dir))
    if as_json:
        from google.protobuf.json_format import MessageToDict

        fields = MessageToDict(state, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        sys.stdout.write(json.dumps(fields, indent=2) + "\n")
        return
    print_status(state, console)


@app.command()
def health(
    server: Annotated[str, typer.Option(help="The server's HOST:PORT.")] = DEFAULT_SERVER,
    student: Annotated[
        str | None, typer.Option(help="Ask whether this student's worker is there, or has finished.")
    ] = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_ca: TlsCaOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """End with 0 if the server serves, or if it has the student; for a container's healthcheck."""
    from codistill.wire.security import read
    from codistill_deploy.cli.health import check_server, check_student

    security = read(tls_cert, tls_key, tls_ca, token_file)
    line = check_server(server, security) if student is None else check_student(server, student, security)
    console.print(line, soft_wrap=True)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run or a comparison.")],
) -> None:
    """Write a run's report: one HTML page that needs no network."""
    from codistill_deploy import report as reports

    console.print(f"report: {reports.write(run_dir)}", soft_wrap=True)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's folder.")],
    student: Annotated[str, typer.Option(help="The student whose weights to write.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("exported"),
    which: Annotated[Which, typer.Option(help="After the last round, or with the best test accuracy.")] = Which.last,
) -> None:
    """Write a student's weights for plain PyTorch."""
    from codistill_deploy.export import export as write

    folder = RunFolder(run_dir)
    sys.path.insert(0, str(Path.cwd()))
    written = write(folder, student, out, which.value)
    console.print(f"weights: {written.weights}", soft_wrap=True)
    console.print(f"program: {written.program}", soft_wrap=True)
    console.print(f"about:   {written.about}", soft_wrap=True)


def main() -> None:
    """Runs the command and ends the process with a documented exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1 or os.environ.get(_DEBUG_VARIABLE) == "1"
    if debug:
        os.environ[_DEBUG_VARIABLE] = "1"  # for the processes that this one starts
    tolerate_lost_stderr()
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    if not debug:
        # gRPC writes a line for every handshake that fails, so that whoever knocks could fill a server's disk; what
        # matters of it, the client's error says. It is read when gRPC is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        code = app(args=arguments, prog_name="codistill", standalone_mode=True)
    except SystemExit as ended:
        code = ended.code
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    except Exception as error:
        if debug:
            logging.getLogger().exception("the command failed")
        code = _explain(error)
    # How the process ends is settled: another Ctrl-C would only tear what is cleaned up, and show a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    announce_exit()
    watchdog = Watchdog()
    watchdog.begin("the end of this process", _EXIT_SECONDS)
    watchdog.start()
    flush_or_drop()
    sys.exit(int(code) if isinstance(code, int) else code)


def _explain(error: Exception) -> ExitCode:
    """Prints an error as one line for each thing wrong, and returns how the process ends."""
    if isinstance(error, ExperimentError):
        code = ExitCode.CONFIGURATION
    else:
        found = getattr(error, "code", None)
        code = found if isinstance(found, ExitCode) else None
    lines = str(error).splitlines() or [type(error).__name__]
    line = missing(error)
    if line is not None:
        code, lines = ExitCode.CONFIGURATION, [line]
    if code is None:
        code = ExitCode.ERROR
        lines = [f"{type(error).__name__}: {lines[0]} (--debug shows where)"]
    for line in lines:
        sys.stderr.write(f"error: {line}\n")
    return code
