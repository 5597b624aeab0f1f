"""The aggregation server as a process: listens, serves one run, ends when it is complete or asked to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.process.exit_codes import ExitCode
from codistill.process.watchdog import Watchdog
from codistill.rundir.address import Addresses, write_addresses
from codistill.rundir.files import locked
from codistill.rundir.info import record_code
from codistill.rundir.layout import RunLayout
from codistill.rundir.storage import FolderGuard, StorageError, unwritable
from codistill.rundir.writer import RecordWriter
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import format_address, is_loopback, parse_address
from codistill.wire.security import Security
from codistill_server.admission.contributions import receive_limit
from codistill_server.coordinator import Coordinator
from codistill_server.errors import ServerError
from codistill_server.observability.dashboard.live import POLL_SECONDS, LivePage
from codistill_server.observability.http import HttpServer
from codistill_server.observability.prometheus import registry
from codistill_server.observability.state import RunState
from codistill_server.rpc.exposure import (
    check_protection,
    protection,
    reachable_address,
    warn_of_partial_protection,
)
from codistill_server.rpc.log_filter import limit_grpc_log
from codistill_server.rpc.quotas import Limits
from codistill_server.rpc.server import GrpcServer
from codistill_server.rpc.service import DistillationService
from codistill_server.rpc.submit import EventLoopSubmit
from codistill_server.storage.journal import Journal, JournalError

__all__ = ["ServeOptions", "check", "serve"]

_log = logging.getLogger(__name__)

_DRAIN_SECONDS = 5.0
_LOCK_SECONDS = 1.0
_LEAVE_SECONDS = 30.0  # longer than a worker waits for the answer to Leave
_RETURN_SECONDS = 1.0
_SNAPSHOT_SECONDS = 5.0
_LAST_POLL_SECONDS = POLL_SECONDS + 1
_TURN_SECONDS = 0.25
_FOLDER_SECONDS = 1.0


@dataclass(frozen=True)
class ServeOptions:
    """How a server is run.

    Attributes:
        listen: "HOST:PORT" for gRPC; port 0 takes a free one.
        metrics: "HOST:PORT" for the live page and the metrics; None for neither.
        run_dir: the run folder, for journal and records.
        insecure: listen beyond this machine although nothing protects the port.
        reflect: serve gRPC reflection, so that generic clients can list the service.
        stay: keep serving after the run is complete, until stopped.
        security: TLS and token.
        limits: how much one peer may ask for.
        on_complete: called in a thread of its own once the run is complete, before the server goes down.
        advertise: the host by which others reach the server, if it differs from the one listened on.
    """

    listen: str
    run_dir: Path
    metrics: str | None = None
    insecure: bool = False
    reflect: bool = False
    stay: bool = False
    security: Security = field(default_factory=Security)
    limits: Limits = field(default_factory=Limits)
    on_complete: Callable[[], None] | None = None
    advertise: str | None = None


def check(options: ServeOptions) -> None:
    """Check a server's settings before anything is made.

    Raises:
        AddressError: an address is malformed.
        ServerError: an address can be reached from other machines although nothing protects it.
        SecurityError: a certificate or key cannot be used.
    """
    host, _ = parse_address(options.listen, "--listen")
    if options.metrics is not None:
        parse_address(options.metrics, "--metrics")
    options.security.server_credentials()
    check_protection(host, options.security, insecure=options.insecure)


def serve(experiment: Experiment, options: ServeOptions, stop: threading.Event | None = None) -> ExitCode:
    """Serve one run until it is complete, or until SIGTERM, SIGINT or `stop`.

    Raises:
        AddressError: an address is malformed.
        ServerError: an address cannot be listened on, or the run folder belongs to another run.
        SecurityError: a certificate or key cannot be used.
    """
    torch.set_num_threads(1)
    with asyncio.Runner() as runner:
        return runner.run(_Server(experiment, options).run(stop))


class _Server:
    def __init__(self, experiment: Experiment, options: ServeOptions) -> None:
        self._experiment = experiment
        self._options = options
        self._layout = RunLayout(options.run_dir)
        self._failure: Exception | None = None
        self._done = asyncio.Event()
        self._concluding: asyncio.Task[None] | None = None
        self._watchdog = Watchdog()
        self._page: LivePage | None = None

    async def run(self, stop: threading.Event | None) -> ExitCode:
        options = self._options
        check(options)
        host, port = parse_address(options.listen, "--listen")
        credentials = options.security.server_credentials()
        warn_of_partial_protection(host, options.security)
        with _only_server_in(self._layout), limit_grpc_log(), Watchdog() as self._watchdog:
            self._mark("starting")
            return await self._serve(host, port, credentials, stop)

    async def _serve(
        self, host: str, port: int, credentials: grpc.ServerCredentials | None, stop: threading.Event | None
    ) -> ExitCode:
        options = self._options
        writer, journal = self._open_files()
        layout = self._layout
        files = (layout.journal_file, layout.metrics_file, layout.events_file)
        guard = FolderGuard("run folder", layout.path, "its journal and records", files)
        run_state = RunState(self._experiment, writer.write)
        submit = EventLoopSubmit(self._fail)
        try:
            coordinator = Coordinator(self._experiment, journal, run_state, submit)
        except JournalError as error:
            journal.close()
            writer.close()
            raise _unusable(error) from error
        record_code(layout)
        service = DistillationService(coordinator, self._fail, options.limits)
        limit = receive_limit(self._experiment)
        server = GrpcServer(
            service,
            receive_limit=limit,
            keepalive=self._experiment.exchange.keepalive,
            token=options.security.token,
            reflect=options.reflect,
        )
        coordinator.on_complete = lambda: self._complete(coordinator, service)
        http: HttpServer | None = None
        tasks: list[asyncio.Task[None]] = []
        try:
            bound_port = server.bind(host, port, credentials)
            http = self._serve_http(run_state, coordinator)
            await server.start()
            tasks = [
                asyncio.create_task(service.tick()),
                asyncio.create_task(self._mark_turns(coordinator)),
                asyncio.create_task(self._fail_if_listening_stops(server)),
                asyncio.create_task(self._fail_if_folder_changes(guard)),
            ]
            self._end_on(stop)
            self._announce(host, bound_port, http, limit)
            if coordinator.complete:
                self._complete(coordinator, service)
            await self._done.wait()
            await server.stop_being_healthy()
            service.end()
            await asyncio.gather(self._stop(server, _DRAIN_SECONDS), self._wait_for_last_polls())
            self._check_folder(guard)
        finally:
            for task in (*tasks, self._concluding):
                if task is not None:
                    task.cancel()
            self._mark("going down")
            await self._stop(server, 0)
            if http is not None:
                http.close()
            submit.close()
            coordinator.close()
            writer.close()
            with contextlib.suppress(OSError):
                self._layout.address_file.unlink(missing_ok=True)
        if self._failure is not None:
            raise ServerError(str(self._failure), _code_of(self._failure, ExitCode.ERROR)) from self._failure
        return ExitCode.OK

    async def _mark_turns(self, coordinator: Coordinator) -> None:
        """Show the watchdog that the event loop turns, until cancelled."""
        while True:
            self._mark(f"one turn of its event loop, round {coordinator.frontier}")
            await asyncio.sleep(_TURN_SECONDS)

    def _mark(self, phase: str) -> None:
        self._watchdog.begin(f"the server at {phase}", self._experiment.training.hang_after)

    async def _stop(self, server: GrpcServer, grace: float) -> None:
        try:
            await server.stop(grace)
        except Exception:
            if self._failure is None:  # else gRPC's own loop has ended, and repeats the error
                raise

    async def _fail_if_listening_stops(self, server: GrpcServer) -> None:
        """End the process if gRPC stops listening by itself, so that its supervisor starts it again.

        A call whose path is not UTF-8 ends grpc.aio's own loop; everybody who reaches the port can send one. Nothing would
        answer any more, and a second listener in the same process is not safe.
        """
        why = "it gave no reason"
        try:
            await server.wait_for_termination()
        except Exception as error:  # noqa: BLE001 - whichever it is, nothing listens any more
            why = f"{type(error).__name__}: {error}"
        if not self._done.is_set():
            message = f"gRPC stopped listening ({why}); start the server again: the journal is whole"
            self._fail(ServerError(message, ExitCode.ERROR))

    async def _fail_if_folder_changes(self, guard: FolderGuard) -> None:
        """End the process if the run's folder is deleted, moved or made read-only: what it writes would be lost."""
        while self._failure is None:
            self._check_folder(guard)
            await asyncio.sleep(_FOLDER_SECONDS)

    def _check_folder(self, guard: FolderGuard) -> None:
        """Fail if the run's folder is no longer the one that it was."""
        try:
            guard.check()
        except StorageError as error:
            self._fail(error)

    def _open_files(self) -> tuple[RecordWriter, Journal]:
        exchange = self._experiment.exchange
        try:
            journal = Journal(
                self._layout.journal_file,
                identity(self._experiment),
                exchange.journal.durability,
                may_grow=exchange.journal.keep == "all",
            )
        except JournalError as error:
            raise _unusable(error) from error
        try:
            return RecordWriter(self._layout.events_file, self._layout.metrics_file), journal
        except OSError as error:
            journal.close()
            raise _unwritable(self._options.run_dir, error) from error

    def _serve_http(self, run_state: RunState, coordinator: Coordinator) -> HttpServer | None:
        """Start the HTTP port of page and metrics, if the options name one."""
        loop = asyncio.get_running_loop()

        async def snapshot() -> pb.Run:
            return coordinator.snapshot()

        def snapshot_from_thread() -> pb.Run:
            future = asyncio.run_coroutine_threadsafe(snapshot(), loop)
            try:
                return future.result(_SNAPSHOT_SECONDS)
            except TimeoutError:
                future.cancel()
                raise TimeoutError(f"the rounds have not answered for {_SNAPSHOT_SECONDS:g} s") from None

        metrics = registry(run_state, snapshot_from_thread)
        if self._options.metrics is None:
            return None
        host, port = parse_address(self._options.metrics, "--metrics")
        self._page = LivePage(self._experiment, self._options.run_dir, snapshot_from_thread)
        try:
            return HttpServer(host, port, self._page, metrics)
        except OSError as error:
            raise ServerError(
                f"metrics: {self._options.metrics} cannot be listened on: {error.strerror}; choose another address for the "
                "live page and the metrics with --metrics",
                ExitCode.CONFIGURATION,
            ) from error

    async def _wait_for_last_polls(self) -> None:
        """Wait until the open pages have shown how the run ended."""
        if self._page is not None and self._failure is None:
            self._page.end()
            if self._page.watched:
                await asyncio.sleep(_LAST_POLL_SECONDS)

    def _announce(self, host: str, port: int, http: HttpServer | None, limit: int) -> None:
        """Write the addresses to the run folder, and log them with the port's protection."""
        advertise = self._options.advertise
        metrics = ""
        if http is not None and self._options.metrics is not None:
            http_host, _ = parse_address(self._options.metrics, "--metrics")
            metrics = reachable_address(
                http_host if advertise is None or is_loopback(http_host) else advertise, http.port
            )
        address = reachable_address(host if advertise is None else advertise, port)
        write_addresses(self._layout.address_file, Addresses(address, metrics))
        _log.info(
            "run %s (%s) on %s (%s), messages up to %.1f MiB%s",
            self._experiment.name,
            self._experiment.distillation.title,
            format_address(host, port),
            protection(self._options.security),
            limit / 2**20,
            f"; live page on http://{metrics}/, metrics on http://{metrics}/metrics" if metrics else "",
        )

    def _end_on(self, stop: threading.Event | None) -> None:
        """End the server once `stop` is set and, in the main thread, on SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        if stop is not None:

            def wait() -> None:
                stop.wait()
                with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                    loop.call_soon_threadsafe(self._done.set)

            threading.Thread(target=wait, name="codistill-stop", daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            for signal_number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(signal_number, self._end_on_signal, signal_number.name)

    def _end_on_signal(self, name: str) -> None:
        _log.info("%s: going down", name)
        self._done.set()

    def _complete(self, coordinator: Coordinator, service: DistillationService) -> None:
        _log.info("the run is complete%s", "; serving on until stopped" if self._options.stay else "")
        self._concluding = asyncio.get_running_loop().create_task(self._conclude(coordinator, service))

    async def _conclude(self, coordinator: Coordinator, service: DistillationService) -> None:
        """Call `on_complete` and log its error, if any; then end the server unless it is to stay."""
        if self._options.on_complete is not None:
            try:
                await asyncio.to_thread(self._options.on_complete)
            except Exception as error:  # noqa: BLE001 - the run is whole, whatever it is
                _log.error("%s", error)
        if not self._options.stay:
            await self._end_without_workers(coordinator, service)

    async def _end_without_workers(self, coordinator: Coordinator, service: DistillationService) -> None:
        """End the server of a complete run once its workers are gone, and none has come back for a moment.

        A worker that got no answer to Leave keeps its stream until it gives that up, and then leaves again. One whose
        connection broke comes back at once. A student that joins again makes the run incomplete.
        """
        latest = time.monotonic() + _LEAVE_SECONDS
        gone = time.monotonic() + _RETURN_SECONDS
        while coordinator.complete:
            now = time.monotonic()
            if service.streams:
                gone = now + _RETURN_SECONDS
            if now >= min(gone, latest):
                self._done.set()
                return
            await asyncio.sleep(_RETURN_SECONDS / 20)

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
            _log.error("%s", error, exc_info=None if isinstance(error, JournalError | StorageError) else error)
        self._done.set()


@contextlib.contextmanager
def _only_server_in(layout: RunLayout) -> Generator[None, None, None]:
    """Keep a second server out of a run folder for as long as this one runs; the kernel unlocks it when it dies.

    A process that looks whether a server runs holds the lock for an instant, so locking is tried for a moment.

    Raises:
        ServerError: another server runs in the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            layout.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(locked(layout.server_lock, _LOCK_SECONDS))
        except TimeoutError as error:
            raise ServerError(
                f"run folder {layout.path}: another server runs in it; stop that one, or give another --run-dir"
            ) from error
        except OSError as error:
            raise _unwritable(layout.path, error) from error
        with contextlib.suppress(OSError):  # the address of one that was killed must not be taken for this one's
            layout.address_file.unlink(missing_ok=True)
        yield


def _unwritable(run_dir: Path, error: OSError) -> ServerError:
    return ServerError(*unwritable(run_dir, error))


def _unusable(error: JournalError) -> ServerError:
    return ServerError(str(error), _code_of(error, ExitCode.CONFIGURATION))


def _code_of(error: Exception, otherwise: ExitCode) -> ExitCode:
    code = getattr(error, "code", None)
    return code if isinstance(code, ExitCode) else otherwise
