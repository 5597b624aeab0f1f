from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.process.exit_codes import ExitCode
from codistill.rundir.layout import RunLayout
from codistill.rundir.records import Happened, read
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceStub
from codistill.wire.channel import SESSION_KEY, AddressError
from codistill.wire.checksum import format_session
from codistill.wire.security_settings import SecurityError
from codistill_server import app
from codistill_server.app import ServeOptions, serve
from codistill_server.errors import ServerError
from codistill_server.ratelimit import Rate
from codistill_server.rounds.events import Samples
from codistill_server.rpc.quotas import Limits
from codistill_server.storage.journal import ClosedRound, Journal, JournalError
from server.support import TOTAL_ROUNDS, contribution, join_request, make_experiment, with_checksum
from server.support_app import PATIENCE, get, serving, until
from support_certificates import TOKEN, Certificates


def refused(folder: Path, experiment: Experiment | None = None, **options: Any) -> ServerError | AddressError:
    options = {"listen": "127.0.0.1:0", "run_dir": folder / "run", **options}
    with pytest.raises((ServerError, AddressError)) as caught:
        serve(experiment or make_experiment(), ServeOptions(**options))
    assert not (RunLayout(folder / "run").address_file).exists()
    return caught.value


@pytest.fixture
def busy() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield f"127.0.0.1:{taken.getsockname()[1]}"


class TestRefused:
    def test_a_busy_port(self, tmp_path: Path, busy: str) -> None:
        error = refused(tmp_path, listen=busy)
        assert f"listen: {busy} cannot be listened on: " in str(error)
        assert "another address with --listen" in str(error)
        assert error.code is ExitCode.CONFIGURATION

    def test_a_busy_port_of_the_metrics(self, tmp_path: Path, busy: str) -> None:
        error = refused(tmp_path, metrics=busy)
        assert f"metrics: {busy} cannot be listened on: " in str(error)
        assert "--metrics" in str(error)

    @pytest.mark.parametrize("field", ["listen", "metrics"])
    def test_an_address_that_is_none(self, tmp_path: Path, field: str) -> None:
        error = refused(tmp_path, None, **{field: "nowhere"})
        assert f"--{field}: 'nowhere' is not an address" in str(error)
        assert error.code is ExitCode.CONFIGURATION

    def test_another_machines_address(self, tmp_path: Path) -> None:
        error = refused(tmp_path, listen="203.0.113.1:50051", insecure=True)  # kept for documentation; nobody's
        assert "listen: 203.0.113.1:50051 cannot be listened on: " in str(error)

    @pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "203.0.113.1", "some.host"])  # noqa: S104
    def test_beyond_this_machine_without_a_word(self, tmp_path: Path, host: str) -> None:
        error = refused(tmp_path, listen=f"{host}:0")
        assert "can be reached from other machines" in str(error)
        assert "--insecure" in str(error)
        assert not (tmp_path / "run").exists(), "nothing is begun"

    @pytest.mark.parametrize(
        ("certificate", "ca", "token", "warned"),
        [
            ("server", None, TOKEN, None),
            ("server", "ca", None, None),
            ("server", "ca", TOKEN, None),
            (None, None, TOKEN, "without TLS the token and all data can be read on the way; give --tls-cert"),
            ("server", None, None, "TLS alone keeps nobody out; give --tls-ca"),
        ],
    )
    def test_beyond_this_machine_with_protection(
        self,
        certificate: str | None,
        ca: str | None,
        token: str | None,
        warned: str | None,
        tmp_path: Path,
        certificates: Certificates,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        security = certificates.of(certificate, ca, token)
        with caplog.at_level("INFO"), serving(tmp_path, listen="0.0.0.0:0", security=security) as served:
            assert served.address.startswith("127.0.0.1:"), (
                "how it is reached from here, by a name to make a certificate for"
            )
            ours = certificates.of(ca and "worker", certificate and "ca", token)
            with ours.channel(served.address) as channel:
                assert DistillationServiceStub(channel).GetRun(pb.GetRunRequest(), timeout=PATIENCE).run.name == "small"
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [warned is not None and text.startswith(warned) for text in warnings] == [True] * (warned is not None)
        assert TOKEN not in caplog.text

    def test_certificates_that_cannot_be_used(self, tmp_path: Path, certificates: Certificates) -> None:
        options = ServeOptions("127.0.0.1:0", tmp_path / "run", security=certificates.of(None, "ca"))
        with pytest.raises(SecurityError, match=r"--tls-ca .* a server needs --tls-cert"):
            serve(make_experiment(), options)
        assert not (tmp_path / "run").exists(), "nothing is begun"

    def test_the_journal_of_another_run(self, tmp_path: Path) -> None:
        Journal(RunLayout(tmp_path / "run").journal_file, identity(make_experiment(seed=1))).close()
        error = refused(tmp_path, make_experiment(seed=2))
        assert "experiment field seed: the run has 1, this experiment has 2" in str(error)
        assert error.code is ExitCode.CONFIGURATION

    def test_a_journal_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (RunLayout(tmp_path / "run").journal_file).write_text("my notes")
        error = refused(tmp_path)
        assert str(RunLayout(tmp_path / "run").journal_file) in str(error)
        assert error.code is ExitCode.CONFIGURATION

    def test_a_journal_that_cannot_be_read_to_its_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def damaged(self: Journal) -> bytes:
            raise JournalError("journal x cannot be read: database disk image is malformed")

        monkeypatch.setattr(Journal, "last_state", damaged)
        error = refused(tmp_path)
        assert "malformed" in str(error)
        assert error.code is ExitCode.CONFIGURATION

    def test_a_run_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert "file/run" in str(refused(tmp_path / "file"))
        (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
        error = str(refused(tmp_path))
        assert f"run folder {tmp_path / 'run'} cannot be written" in error
        assert error.endswith("make it writable, or give another --run-dir")


class TestServing:
    @pytest.mark.parametrize("lost", ["run", "run/journal.sqlite", "run/metrics.jsonl", "run/events.jsonl"])
    def test_until_its_folder_or_a_file_that_it_writes_is_gone(self, tmp_path: Path, lost: str) -> None:
        with serving(tmp_path) as served:
            (tmp_path / lost).rename(tmp_path / "elsewhere")
            error = served.end()
        assert isinstance(error, ServerError)
        assert error.code is ExitCode.STORAGE
        assert str(error).startswith(f"run folder {tmp_path / 'run'}")
        assert "moved" in str(error)

    def test_until_it_is_stopped(self, tmp_path: Path) -> None:
        with serving(tmp_path) as served:
            assert served.announced == {"address": served.address, "metrics": "", "pid": os.getpid()}
            with grpc.insecure_channel(served.address) as channel:
                stub = DistillationServiceStub(channel)
                assert stub.GetRun(pb.GetRunRequest(), timeout=PATIENCE).run.name == "small"
                session_id = stub.Join(join_request(make_experiment(), "ant"), timeout=PATIENCE).session_id
                stream = stub.Exchange(
                    iter(()), metadata=((SESSION_KEY, format_session(session_id)),), timeout=PATIENCE
                )
                assert list(stream) == []
            served.stop.set()
            assert served.end() is ExitCode.OK
        events = [record.what for record in read(served.run_dir / "events.jsonl") if isinstance(record, Happened)]
        assert events == ["joined", "disconnected"]

    def test_until_the_run_is_complete(self, tmp_path: Path) -> None:
        experiment = _with_closed_rounds(tmp_path)
        with serving(tmp_path, experiment) as served:
            _finish(served.address, experiment)
            assert served.end() is ExitCode.OK
        with serving(tmp_path, experiment, stay=True) as again:
            with grpc.insecure_channel(again.address) as channel:
                assert DistillationServiceStub(channel).GetRun(pb.GetRunRequest(), timeout=PATIENCE).run.complete
            assert again.thread.is_alive(), "it stays where it is asked to"
        assert again.outcome == [ExitCode.OK]

    @pytest.mark.parametrize("silent", [True, False])
    def test_a_worker_that_heard_no_answer_to_its_goodbye_can_say_it_again(self, tmp_path: Path, silent: bool) -> None:
        """Its link was silent and its stream still stands, or its connection broke and it comes back at once."""
        experiment = _with_closed_rounds(tmp_path)
        with serving(tmp_path, experiment) as served, grpc.insecure_channel(served.address) as channel:
            stub, hold = DistillationServiceStub(channel), threading.Event()
            session_id = stub.Join(join_request(experiment, "ant", TOTAL_ROUNDS), timeout=PATIENCE).session_id
            metadata = ((SESSION_KEY, format_session(session_id)),)
            stream = stub.Exchange(_then_hold(iter(()), hold), metadata=metadata, timeout=PATIENCE)
            stream.initial_metadata()
            other = stub.Join(join_request(experiment, "bee"), timeout=PATIENCE).session_id
            stub.Leave(pb.LeaveRequest(session_id=other, reason=pb.LEAVE_REASON_FINISHED), timeout=PATIENCE)
            if not silent:
                hold.set()
                assert list(stream) == []
                session_id = stub.Join(join_request(experiment, "ant", TOTAL_ROUNDS), timeout=PATIENCE).session_id
            stub.Leave(pb.LeaveRequest(session_id=session_id, reason=pb.LEAVE_REASON_FINISHED), timeout=PATIENCE)
            if silent:
                served.thread.join(1.5)
                assert served.thread.is_alive(), "its stream stands"
                hold.set()
                assert list(stream) == []
            session_id = stub.Join(join_request(experiment, "ant", TOTAL_ROUNDS), timeout=PATIENCE).session_id
            assert not stub.GetRun(pb.GetRunRequest(), timeout=PATIENCE).run.complete
            stub.Leave(pb.LeaveRequest(session_id=session_id, reason=pb.LEAVE_REASON_FINISHED), timeout=PATIENCE)
            assert served.end() is ExitCode.OK

    def test_a_worker_that_does_not_let_go_holds_no_server_for_ever(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(app, "_LEAVE_SECONDS", 0.2)
        experiment = _with_closed_rounds(tmp_path)
        with serving(tmp_path, experiment) as served, grpc.insecure_channel(served.address) as channel:
            stub, hold = DistillationServiceStub(channel), threading.Event()
            session_id = stub.Join(join_request(experiment, "ant"), timeout=PATIENCE).session_id
            metadata = ((SESSION_KEY, format_session(session_id)),)
            stream = stub.Exchange(_then_hold(iter(()), hold), metadata=metadata, timeout=PATIENCE)
            stream.initial_metadata()
            stub.Leave(pb.LeaveRequest(session_id=session_id, reason=pb.LEAVE_REASON_FINISHED), timeout=PATIENCE)
            other = stub.Join(join_request(experiment, "bee"), timeout=PATIENCE).session_id
            stub.Leave(pb.LeaveRequest(session_id=other, reason=pb.LEAVE_REASON_FINISHED), timeout=PATIENCE)
            assert served.end() is ExitCode.OK
            hold.set()
            stream.cancel()

    def test_a_run_that_is_complete_already_ends(self, tmp_path: Path) -> None:
        experiment = _with_closed_rounds(tmp_path)
        with serving(tmp_path, experiment) as served:
            _finish(served.address, experiment)
            served.end()
        code = serve(experiment, ServeOptions("127.0.0.1:0", tmp_path / "run"))
        assert code is ExitCode.OK

    def test_what_is_asked_for_is_done_once_the_run_is_complete(self, tmp_path: Path) -> None:
        experiment = _with_closed_rounds(tmp_path)
        called: list[str] = []
        with serving(tmp_path, experiment, stay=True, on_complete=lambda: called.append("first")) as served:
            assert called == []
            _finish(served.address, experiment)
            until(lambda: called, "it is done while the server serves on")
        options = ServeOptions("127.0.0.1:0", tmp_path / "run", on_complete=lambda: called.append("second"))
        assert serve(experiment, options) is ExitCode.OK
        assert called == ["first", "second"], "and once more by its successor, which does not know"

    def test_what_fails_of_it_fails_no_run(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        def fail() -> None:
            raise OSError("no report today")

        experiment = _with_closed_rounds(tmp_path)
        with serving(tmp_path, experiment, on_complete=fail) as served:
            _finish(served.address, experiment)
            assert served.end() is ExitCode.OK
        assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["no report today"]

    def test_its_end_is_told_to_the_workers(self, tmp_path: Path) -> None:
        with serving(tmp_path) as served, grpc.insecure_channel(served.address) as channel:
            stub = DistillationServiceStub(channel)
            session_id = stub.Join(join_request(make_experiment(), "ant"), timeout=PATIENCE).session_id
            release = threading.Event()
            stream = stub.Exchange(
                _then_hold(iter(()), release), metadata=((SESSION_KEY, format_session(session_id)),), timeout=PATIENCE
            )
            stream.initial_metadata()
            served.stop.set()
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            release.set()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert served.end() is ExitCode.OK

    def test_a_journal_that_fails_ends_it_with_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: Journal, closed: ClosedRound) -> None:
            raise JournalError("the disk is full")

        monkeypatch.setattr(Journal, "append", full)
        experiment = make_experiment()
        with serving(tmp_path, experiment) as served, contextlib.ExitStack() as stack:
            channel = stack.enter_context(grpc.insecure_channel(served.address))
            stub = DistillationServiceStub(channel)
            streams = []
            for name in experiment.names:
                session_id = stub.Join(join_request(experiment, name), timeout=PATIENCE).session_id
                messages = iter([with_checksum(contribution(experiment, name, 0), session_id)])
                hold = threading.Event()
                stack.callback(hold.set)
                requests = _then_hold(messages, hold)
                streams.append(
                    stub.Exchange(requests, metadata=((SESSION_KEY, format_session(session_id)),), timeout=PATIENCE)
                )
            for stream in streams:
                with pytest.raises(grpc.RpcError) as caught:
                    list(stream)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            error = served.end()
            assert isinstance(error, ServerError)
            assert (str(error), error.code) == ("the disk is full", ExitCode.ERROR)

    def test_an_ipv6_address(self, tmp_path: Path) -> None:
        with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                pytest.skip("this machine has no IPv6")
        with serving(tmp_path, listen="[::1]:0") as served:
            assert served.address.startswith("[::1]:")
            with grpc.insecure_channel(served.address) as channel:
                assert DistillationServiceStub(channel).GetRun(pb.GetRunRequest(), timeout=PATIENCE).run.name == "small"


def test_the_journals_durability_is_the_experiments(tmp_path: Path) -> None:
    experiment = make_experiment(exchange={"journal": {"durability": "power"}})
    _close_rounds(tmp_path, experiment, 1)
    with serving(tmp_path, experiment) as served, grpc.insecure_channel(served.address) as channel:
        run = DistillationServiceStub(channel).GetRun(pb.GetRunRequest(), timeout=PATIENCE).run
        assert run.frontier == 1
        assert [event.kind for event in run.events] == [pb.EVENT_KIND_RESUMED]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_0(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(make_experiment().to_yaml())
    command = ["serve", path, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--run-dir", tmp_path / "run"]
    server = subprocess.Popen(
        [sys.executable, "-m", "codistill_deploy", *map(str, command)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = RunLayout(tmp_path / "run").address_file
    try:
        until(lambda: address.exists() or server.poll() is not None, "the server announces itself")
        announced = json.loads(address.read_text())
        assert announced["pid"] == server.pid
        with grpc.insecure_channel(announced["address"]) as channel:
            DistillationServiceStub(channel).Join(join_request(make_experiment(), "ant"), timeout=PATIENCE)
        assert "codistill_run_info" in get(f"http://{announced['metrics']}/metrics")
        server.send_signal(number)
        output, _ = server.communicate(timeout=PATIENCE)
    finally:
        server.kill()
    assert server.returncode == 0, output
    assert "Traceback" not in output
    assert not address.exists()


def _close_rounds(folder: Path, experiment: Experiment, rounds: int) -> None:
    """Write the journal of a run whose first rounds are closed."""
    journal = Journal(RunLayout(folder / "run").journal_file, identity(experiment))
    for number in range(rounds):
        journal.append(ClosedRound(number, Samples(bytes(8), bytes(8)), {"": b""}))
    journal.close()


def _with_closed_rounds(folder: Path) -> Experiment:
    """Return the experiment of a run whose every round is closed, so that its participants may finish."""
    experiment = make_experiment(("ant", "bee"))
    _close_rounds(folder, experiment, TOTAL_ROUNDS)
    return experiment


def _finish(address: str, experiment: Experiment) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = DistillationServiceStub(channel)
        for name in experiment.names:
            session_id = stub.Join(join_request(experiment, name), timeout=PATIENCE).session_id
            stub.Leave(pb.LeaveRequest(session_id=session_id, reason=pb.LEAVE_REASON_FINISHED), timeout=PATIENCE)


def _then_hold(messages: Iterator[pb.ExchangeRequest], hold: threading.Event) -> Iterator[pb.ExchangeRequest]:
    yield from messages
    hold.wait(PATIENCE)


def test_a_second_server_is_kept_out_of_a_run_folder(tmp_path: Path) -> None:
    with (tmp_path / "server.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ServerError, match="another server runs in it; stop that one, or give another --run-dir"):
            serve(make_experiment(), ServeOptions("127.0.0.1:0", tmp_path))


def test_who_only_looks_whether_a_server_runs_keeps_none_out(tmp_path: Path) -> None:
    with (tmp_path / "server.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        look = threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN))
        look.start()
        stop = threading.Event()
        stop.set()
        assert serve(make_experiment(), ServeOptions("127.0.0.1:0", tmp_path), stop) is ExitCode.OK
        look.join()


def test_the_address_of_a_server_that_was_killed_is_not_taken_for_the_next_ones(tmp_path: Path) -> None:
    address = RunLayout(tmp_path / "run").address_file
    address.parent.mkdir()
    address.write_text('{"address": "127.0.0.1:1", "metrics": "", "pid": 1}')
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        refused(tmp_path, listen=f"127.0.0.1:{busy.getsockname()[1]}")
    assert not address.exists()


def test_an_event_loop_that_does_not_turn_ends_the_server(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from codistill.config.experiment import load
        from codistill_server import app
        app.Coordinator.tick = lambda self: time.sleep(1000)
        app.serve(load(Path(sys.argv[1])), app.ServeOptions("127.0.0.1:0", Path(sys.argv[2])))
    """
    path = tmp_path / "experiment.yaml"
    path.write_text(make_experiment(training={"epochs": 1, "hang_after": 2}).to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == ExitCode.HUNG, done.stderr
    assert "error: hung for 2 s: the server at one turn of its event loop, round 0; " in done.stderr


def test_the_host_that_others_reach_it_by_is_advertised(tmp_path: Path) -> None:
    with serving(tmp_path, listen="127.0.0.1:0", advertise="localhost") as server:
        assert server.address.startswith("localhost:")
        with grpc.insecure_channel(server.address) as channel:
            grpc.channel_ready_future(channel).result(PATIENCE)


def test_the_limits_are_those_given(tmp_path: Path) -> None:
    limits = Limits(calls=Rate(1, 0.1))
    with serving(tmp_path, limits=limits) as served, grpc.insecure_channel(served.address) as channel:
        stub = DistillationServiceStub(channel)
        stub.GetRun(pb.GetRunRequest(), timeout=PATIENCE)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetRun(pb.GetRunRequest(), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


class TestMetrics:
    def test_over_http(self, tmp_path: Path) -> None:
        with serving(tmp_path, metrics="127.0.0.1:0") as served, grpc.insecure_channel(served.address) as channel:
            url = f"http://{served.announced['metrics']}/metrics"
            connected = 'codistill_participant_state{participant="ant",run="small",state="connected"}'
            assert f"{connected} 0.0" in get(url)
            DistillationServiceStub(channel).Join(join_request(make_experiment(), "ant"), timeout=PATIENCE)
            assert f"{connected} 1.0" in get(url)
        with pytest.raises(urllib.error.URLError):
            get(url)
