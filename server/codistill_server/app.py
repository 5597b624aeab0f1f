"""The aggregation server as a process: listens, serves one run, ends when it is complete or asked to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.process.exit_codes import ExitCode
from codistill.process.plugins import LoadError
from codistill.process.watchdog import Watchdog
from codistill.rundir.address import Addresses, write_addresses
from codistill.rundir.files import locked
from codistill.rundir.layout import RunLayout
from codistill.rundir.writer import RecordWriter
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.channel import format_address, is_loopback, parse_address, server_options
from codistill.wire.security import Security
from codistill.wire.security_settings import TLS_CA, TLS_CERT, TLS_KEY, TOKEN_FILE
from codistill_server.admission.contributions import receive_limit
from codistill_server.coordinator import Coordinator
from codistill_server.observability.dashboard.live import POLL_SECONDS, LivePage
from codistill_server.observability.http import HttpServer
from codistill_server.observability.prometheus import registry
from codistill_server.observability.state import RunState
from codistill_server.ratelimit import Limits
from codistill_server.rpc.auth import TokenInterceptor
from codistill_server.rpc.log_filter import limit_grpc_log
from codistill_server.rpc.service import DistillationService, EventLoopSubmit, ReadableRequests
from codistill_server.storage.journal import Journal, JournalError

__all__ = ["ServeOptions", "ServerError", "check", "serve"]

_log = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["Distillation"].full_name
_DRAIN_SECONDS = 5.0
_LOCK_SECONDS = 1.0
_GOODBYE_SECONDS = 30.0  # longer than a worker waits for the answer to its goodbye
_RETURN_SECONDS = 1.0
_SNAPSHOT_SECONDS = 5.0
_FAREWELL_SECONDS = POLL_SECONDS + 1
_BEAT_SECONDS = 0.25


class ServerError(RuntimeError):
    """The server cannot run; the text says why and what to do, `code` how the process should end."""

    def __init__(self, message: str, code: ExitCode = ExitCode.CONFIGURATION) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True)
class ServeOptions:
    """How a server is run.

    Attributes:
        listen: "HOST:PORT" for gRPC; port 0 takes a free one.
        metrics: "HOST:PORT" for the live page and the metrics; None for neither.
        run_dir: where journal and records go.
        insecure: listen beyond this machine although nothing protects the port.
        reflect: serve gRPC reflection, so that generic clients can list the service.
        stay: go on serving after the run is complete, until stopped.
        security: TLS and token.
        limits: how much one peer may ask for.
        on_complete: called in a thread of its own once the run is complete, before the server goes down.
        advertise: the host by which others reach the server, where that is not the one that it listens on.
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
    """Checks what can be found wrong with a server's settings before anything is made.

    Raises:
        AddressError: an address is none.
        ServerError: an address can be reached from other machines although nothing protects it.
        SecurityError: a certificate or key cannot be used.
    """
    host, _ = parse_address(options.listen, "--listen")
    if options.metrics is not None:
        parse_address(options.metrics, "--metrics")
    security = options.security
    security.server_credentials()
    if not (is_loopback(host) or security.serves_tls or security.token is not None or options.insecure):
        raise ServerError(
            f"--listen: {host} can be reached from other machines and nothing protects the port; listen on 127.0.0.1, give "
            f"{TLS_CERT} and {TLS_KEY}, or {TOKEN_FILE}; or give --insecure where the network is trusted"
        )


def serve(experiment: Experiment, options: ServeOptions, stop: threading.Event | None = None) -> ExitCode:
    """Serves one run until it is complete, or until SIGTERM, SIGINT or `stop`.

    Raises:
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
        _warn_of_half_a_protection(host, options.security)
        with _only_server_in(self._layout), limit_grpc_log(), Watchdog() as self._watchdog:
            self._begin("starting")
            return await self._serve(host, port, credentials, stop)

    async def _serve(
        self, host: str, port: int, credentials: grpc.ServerCredentials | None, stop: threading.Event | None
    ) -> ExitCode:
        options = self._options
        recorder, journal = self._open_files()
        observations = RunState(self._experiment, recorder.write)
        submit = EventLoopSubmit(self._fail)
        try:
            coordinator = Coordinator(self._experiment, journal, observations, submit)
        except JournalError as error:
            journal.close()
            recorder.close()
            raise ServerError(str(error)) from error
        service = DistillationService(coordinator, self._fail, options.limits)
        limit = receive_limit(self._experiment)
        token = options.security.token
        guards = [*([] if token is None else [TokenInterceptor(token)]), ReadableRequests()]
        server = grpc.aio.server(
            interceptors=guards, options=server_options(limit, self._experiment.exchange.keepalive)
        )
        server.add_generic_rpc_handlers((service.handler(),))
        healthy = cast("Any", health).aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        if options.reflect:
            names = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        coordinator.on_complete = lambda: self._complete(coordinator, service)
        web: HttpServer | None = None
        ticking: asyncio.Task[None] | None = None
        beating: asyncio.Task[None] | None = None
        listening: asyncio.Task[None] | None = None
        try:
            bound = _listen(server, host, port, credentials)
            web = self._serve_web(observations, coordinator)
            await server.start()
            for name in ("", _SERVICE):
                await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
            ticking = asyncio.create_task(service.tick())
            beating = asyncio.create_task(self._beat(coordinator))
            listening = asyncio.create_task(self._listens(server))
            self._watch_for_the_end(stop)
            self._announce(host, bound, web, limit)
            if coordinator.complete:
                self._complete(coordinator, service)
            await self._done.wait()
            await healthy.enter_graceful_shutdown()
            service.end()
            await asyncio.gather(self._stop(server, _DRAIN_SECONDS), self._farewell())
        finally:
            for task in (ticking, beating, listening, self._concluding):
                if task is not None:
                    task.cancel()
            self._begin("going down")
            await self._stop(server, 0)
            if web is not None:
                web.close()
            submit.close()
            coordinator.close()
            recorder.close()
            with contextlib.suppress(OSError):
                self._layout.address_file.unlink(missing_ok=True)
        if self._failure is not None:
            code = self._failure.code if isinstance(self._failure, LoadError) else ExitCode.ERROR
            raise ServerError(str(self._failure), code) from self._failure
        return ExitCode.OK

    async def _beat(self, coordinator: Coordinator) -> None:
        """Shows the watchdog that the event loop turns, until cancelled."""
        while True:
            self._begin(f"one turn of its event loop, round {coordinator.frontier}")
            await asyncio.sleep(_BEAT_SECONDS)

    def _begin(self, what: str) -> None:
        self._watchdog.begin(f"the server at {what}", self._experiment.training.hang_after)

    async def _stop(self, server: grpc.aio.Server, grace: float) -> None:
        try:
            await server.stop(grace)
        except Exception:
            if self._failure is None:  # else it is what felled the listener, told once more
                raise

    async def _listens(self, server: grpc.aio.Server) -> None:
        """Ends the process if gRPC stops listening by itself, so that whoever supervises it starts it again.

        A call whose path is not UTF-8, which anybody can send who reaches the port, ends grpc.aio's own loop; nothing
        would answer any more, and a second listener in the same process is not safe.
        """
        why = "it gave no reason"
        try:
            await server.wait_for_termination()
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody listens any more
            why = f"{type(error).__name__}: {error}"
        if not self._done.is_set():
            self._fail(ServerError(f"gRPC stopped listening ({why}); start the server again: the journal is whole"))

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
            raise ServerError(str(error)) from error
        try:
            return RecordWriter(self._layout.events_file, self._layout.metrics_file), journal
        except OSError as error:
            journal.close()
            raise ServerError(
                f"run folder {self._options.run_dir} cannot be written: {error.strerror}; make it writable, or give another --run-dir"
            ) from error

    def _serve_web(self, observations: RunState, coordinator: Coordinator) -> HttpServer | None:
        """Starts the port of page and metrics, if it is wanted."""
        loop = asyncio.get_running_loop()

        async def snapshot() -> pb.Run:
            return coordinator.snapshot()

        def snapshot_from_elsewhere() -> pb.Run:
            asked = asyncio.run_coroutine_threadsafe(snapshot(), loop)
            try:
                return asked.result(_SNAPSHOT_SECONDS)
            except TimeoutError:
                asked.cancel()
                raise TimeoutError(f"the rounds have not answered for {_SNAPSHOT_SECONDS:g} s") from None

        made = registry(observations, snapshot_from_elsewhere)
        if self._options.metrics is None:
            return None
        host, port = parse_address(self._options.metrics, "--metrics")
        self._page = LivePage(self._experiment, self._options.run_dir, snapshot_from_elsewhere)
        try:
            return HttpServer(host, port, self._page, made)
        except OSError as error:
            raise ServerError(
                f"metrics: {self._options.metrics} cannot be listened on: {error.strerror}; choose another address for the "
                "live page and the metrics with --metrics",
                ExitCode.CONFIGURATION,
            ) from error

    async def _farewell(self) -> None:
        """Stays for long enough that the pages that watch learn how the run ended."""
        if self._page is not None and self._failure is None:
            self._page.end()
            if self._page.watched:
                await asyncio.sleep(_FAREWELL_SECONDS)

    def _announce(self, host: str, port: int, web: HttpServer | None, limit: int) -> None:
        advertise = self._options.advertise
        metrics = ""
        if web is not None and self._options.metrics is not None:
            web_host, _ = parse_address(self._options.metrics, "--metrics")
            metrics = _reached(web_host if advertise is None or is_loopback(web_host) else advertise, web.port)
        address = _reached(host if advertise is None else advertise, port)
        write_addresses(self._layout.address_file, Addresses(address, metrics))
        _log.info(
            "run %s (%s) on %s (%s), messages up to %.1f MiB%s",
            self._experiment.name,
            self._experiment.distillation.title,
            format_address(host, port),
            _protection(self._options.security),
            limit / 2**20,
            f"; live page on http://{metrics}/, metrics on http://{metrics}/metrics" if metrics else "",
        )

    def _watch_for_the_end(self, stop: threading.Event | None) -> None:
        loop = asyncio.get_running_loop()
        if stop is not None:

            def wait() -> None:
                stop.wait()
                with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                    loop.call_soon_threadsafe(self._done.set)

            threading.Thread(target=wait, name="codistill-stop", daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stopped, signal.Signals(number).name)

    def _stopped(self, name: str) -> None:
        _log.info("%s: going down", name)
        self._done.set()

    def _complete(self, coordinator: Coordinator, service: DistillationService) -> None:
        _log.info("the run is complete%s", "; serving on until stopped" if self._options.stay else "")
        self._concluding = asyncio.get_running_loop().create_task(self._conclude(coordinator, service))

    async def _conclude(self, coordinator: Coordinator, service: DistillationService) -> None:
        """Does what is to be done once the run is complete; what fails of it is told, and fails no run."""
        if self._options.on_complete is not None:
            try:
                await asyncio.to_thread(self._options.on_complete)
            except Exception as error:  # noqa: BLE001 - the run is whole, whatever it is
                _log.error("%s", error)
        if not self._options.stay:
            await self._see_off(coordinator, service)

    async def _see_off(self, coordinator: Coordinator, service: DistillationService) -> None:
        """Ends the server of a complete run once its workers are gone, and none has come back for a moment.

        A worker whose goodbye got no answer keeps its stream until it gives that up, and then says goodbye again; one
        whose connection broke comes back at once. A student that joins again takes the run's completion back.
        """
        last = time.monotonic() + _GOODBYE_SECONDS
        gone = time.monotonic() + _RETURN_SECONDS
        while coordinator.complete:
            now = time.monotonic()
            if service.streams:
                gone = now + _RETURN_SECONDS
            if now >= min(gone, last):
                self._done.set()
                return
            await asyncio.sleep(_RETURN_SECONDS / 20)

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
            _log.error("%s", error, exc_info=error if not isinstance(error, JournalError) else None)
        self._done.set()


@contextlib.contextmanager
def _only_server_in(layout: RunLayout) -> Generator[None, None, None]:
    """Keeps a second server out of a run's folder for as long as this one runs; the kernel lets go when it dies.

    Whoever looks whether a server runs takes the lock for an instant; so it is tried for a moment.
    """
    with contextlib.ExitStack() as stack:
        try:
            layout.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(layout.server_lock, _LOCK_SECONDS))
        except TimeoutError as error:
            raise ServerError(
                f"run folder {layout.path}: another server runs in it; stop that one, or give another --run-dir"
            ) from error
        except OSError as error:
            raise ServerError(
                f"run folder {layout.path} cannot be written: {error.strerror}; make it writable, or give another --run-dir"
            ) from error
        with contextlib.suppress(OSError):  # the address of one that was killed must not be taken for this one's
            layout.address_file.unlink(missing_ok=True)
        yield


def _warn_of_half_a_protection(host: str, security: Security) -> None:
    if is_loopback(host):
        return
    if not security.serves_tls and security.token is not None:
        _log.warning("without TLS the token and all data can be read on the way; give %s and %s", TLS_CERT, TLS_KEY)
    elif security.serves_tls and security.ca is None and security.token is None:
        _log.warning("TLS alone keeps nobody out; give %s for mutual TLS, or %s", TLS_CA, TOKEN_FILE)


def _listen(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Binds the port; gRPC's own refusal would not say why."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    text = format_address(host, port)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        return server.add_insecure_port(text) if credentials is None else server.add_secure_port(text, credentials)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "it is in use, or not this machine's"
        raise ServerError(
            f"listen: {text} cannot be listened on: {why}; choose another address with --listen"
        ) from error


def _reached(host: str, port: int, advertise: str | None = None) -> str:
    """Returns how a server is reached: one on every address as advertised, else by the loopback's; a certificate can hold it."""
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host)  # noqa: S104
    return format_address(host if loopback is None else advertise or loopback, port)


def _protection(security: Security) -> str:
    tls = "plain text" if not security.serves_tls else "TLS" if security.ca is None else "mutual TLS"
    return f"{tls}, {'no token' if security.token is None else 'token'}"
