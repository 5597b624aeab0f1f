"""The transport over a protected wire: who may join, who may not, and the errors of both."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity_sha256
from codistill.peer.errors import PeerError
from codistill.peer.grpc import GrpcTransport
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.security import Security
from support_certificates import TOKEN, WRONG_TOKEN, Certificates

Tiny = Callable[..., Experiment]

CONNECT_TIMEOUT = 10.0


def request(experiment: Experiment, participant: str) -> pb.JoinRequest:
    exchanges = experiment.distillation.exchanges
    return pb.JoinRequest(
        protocol_version=PROTOCOL_VERSION,
        participant=participant,
        experiment_sha256=identity_sha256(experiment),
        data=pb.DataFingerprint(data_sha256=bytes(32), train_samples=48, classes=10),
        outputs={"logits": pb.Shape(dims=[10])} if exchanges else {},
        total_rounds=9 if exchanges else 0,
        total_steps=9,
    )


def join(experiment: Experiment, address: str, security: Security, participant: str = "mlp") -> None:
    """Join and leave again."""
    transport = GrpcTransport(
        address, connect_timeout=CONNECT_TIMEOUT, give_up_after=5, stop=threading.Event(), security=security
    )
    try:
        transport.join(request(experiment, participant))
        transport.leave(pb.LEAVE_REASON_STOPPED, "")
    finally:
        transport.close()


# The server's certificate, CA and token; the worker's; what its error says.
REFUSED: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], list[str]]] = {
    "no token": ((None, None, TOKEN), (None,), ["asks for a token, and none was given", "--token-file"]),
    "wrong token": (
        (None, None, TOKEN),
        (None, None, WRONG_TOKEN),
        ["the token given is not this server's", "--token-file (CODISTILL_TOKEN_FILE)"],
    ),
    "no token over TLS": (("server", None, TOKEN), (None, "ca"), ["asks for a token"]),
    "wrong token over mutual TLS": (
        ("server", "ca", TOKEN),
        ("worker", "ca", WRONG_TOKEN),
        ["the token given is not this server's"],
    ),
    "no certificate": (
        ("server", "ca"),
        (None, "ca"),
        ["asks for a client's certificate", "--tls-cert (CODISTILL_TLS_CERT)", "--tls-key"],
    ),
    "the right token and no certificate": (
        ("server", "ca", TOKEN),
        (None, "ca", TOKEN),
        ["asks for a client's certificate"],
    ),
    "an expired certificate": (
        ("server", "ca"),
        ("expired", "ca"),
        ["does not take the certificate", "expired.pem", "it has expired, or"],
    ),
    "another CA's certificate": (
        ("server", "ca"),
        ("stranger", "ca"),
        ["does not take the certificate", "stranger.pem", "--tls-ca (CODISTILL_TLS_CA) did not sign it"],
    ),
    "a server of an unknown CA": (
        ("server", None),
        (None, "other-ca"),
        ["is not signed by a CA in", "other-ca.pem", "give the right CA with --tls-ca"],
    ),
    "a server whose certificate has expired": (("expired", None), (None, "ca"), ["has expired", "renew it"]),
    "a server of another name": (
        ("elsewhere", None),
        (None, "ca"),
        ["its certificate is not for 127.0.0.1", "subjectAltName"],
    ),
    "plain text to TLS": (("server", None), (None,), ["it speaks TLS, and this side does not", "--tls-ca"]),
    "plain text to mutual TLS": (("server", "ca"), (None,), ["it speaks TLS, and this side does not"]),
    "a token in plain text to TLS": (("server", None, TOKEN), (None, None, TOKEN), ["it speaks TLS"]),
    "TLS to plain text": ((None,), (None, "ca"), ["it does not speak TLS, and this side does", "--tls-cert"]),
    "mutual TLS to plain text": ((None,), ("worker", "ca"), ["it does not speak TLS, and this side does"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_worker_that_is_refused_reads_what_to_change(
    case: str,
    tiny: Tiny,
    serving: Any,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    theirs, ours, fragments = REFUSED[case]
    experiment = tiny()
    server = serving(experiment, certificates.of(*theirs))
    started = time.monotonic()
    with pytest.raises(PeerError) as caught:
        join(experiment, server.address, certificates.of(*ours))
    assert time.monotonic() - started < CONNECT_TIMEOUT
    assert caught.value.code is ExitCode.REFUSED
    text = str(caught.value)
    assert "\n" not in text
    assert server.address in text
    for fragment in fragments:
        assert fragment in text
    assert not (server.folder / "events.jsonl").read_bytes(), "nobody was let in, and nobody fills the run's folder"

    # A worker with the right things is let in, right after and by the same server.
    worker, ca, token = theirs[0] and "worker", theirs[0] and "ca", theirs[2] if len(theirs) > 2 else None
    if theirs[0] in (None, "server"):
        join(experiment, server.address, certificates.of(worker, ca, token))
        assert server.events() == [("joined", "mlp"), ("stopped", "mlp")]
    server.stop()
    seen = [text, caplog.text, *capfd.readouterr(), *(_text(path) for path in _files(server.folder))]
    assert not any(secret in part for secret in (TOKEN, WRONG_TOKEN) for part in seen)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def test_a_server_that_does_not_answer_is_waited_for(tiny: Tiny, certificates: Certificates, serving: Any) -> None:
    """No judgement without evidence: where nobody listens, the worker waits as ever."""
    experiment = tiny()
    server = serving(experiment)
    server.stop()
    transport = GrpcTransport(
        server.address,
        connect_timeout=0.5,
        give_up_after=5,
        stop=threading.Event(),
        security=certificates.of("worker", "ca", TOKEN),
    )
    with pytest.raises(PeerError, match=r"cannot be reached within 0\.5 s") as caught:
        transport.join(request(experiment, "mlp"))
    transport.close()
    assert caught.value.code is ExitCode.UNREACHABLE


def test_a_worker_that_had_joined_waits_for_a_server_whose_certificate_is_renewed(
    tiny: Tiny, certificates: Certificates, serving: Any
) -> None:
    experiment = tiny(distillation={"method": "independent"})
    server = serving(experiment, certificates.of("server", None, TOKEN))
    transport = GrpcTransport(
        server.address,
        connect_timeout=CONNECT_TIMEOUT,
        give_up_after=30,
        stop=threading.Event(),
        security=certificates.of(None, "ca", TOKEN),
    )
    joined = request(experiment, "mlp")
    joined.steps_trained = 9
    transport.join(joined)
    server.stop()
    server.security = certificates.of("expired", None, TOKEN)
    server.start()
    leaving = threading.Thread(target=transport.leave, args=(pb.LEAVE_REASON_FINISHED, ""))
    leaving.start()
    leaving.join(1)
    assert leaving.is_alive(), "it keeps trying"
    server.stop()
    server.security = certificates.of("server", None, TOKEN)
    server.start()
    leaving.join(30)
    assert not leaving.is_alive()
    assert server.events()[-1] == ("finished", "mlp")
    transport.close()


def test_a_worker_that_had_joined_and_is_kept_out_for_too_long_says_why(
    tiny: Tiny, certificates: Certificates, serving: Any
) -> None:
    experiment = tiny()
    server = serving(experiment, certificates.of("server"))
    transport = GrpcTransport(
        server.address,
        connect_timeout=CONNECT_TIMEOUT,
        give_up_after=1,
        stop=threading.Event(),
        security=certificates.of(None, "ca"),
    )
    transport.join(request(experiment, "mlp"))
    server.stop()
    server.security = certificates.of("expired")
    server.start()
    with pytest.raises(PeerError, match=r"did not come back within 1 s: its certificate.* has expired") as caught:
        transport.receive(0)
    transport.close()
    assert caught.value.code is ExitCode.UNREACHABLE


def test_too_many_joins_are_waited_out(tiny: Tiny, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit is no verdict: the server says after how long to come back, and the worker does."""
    experiment = tiny()
    server = serving(experiment)
    with grpc.insecure_channel(server.address) as channel:
        ask = channel.unary_unary("/codistill.v1.DistillationService/Join", pb.JoinRequest.SerializeToString)
        error: Any = None
        for _ in range(1000):
            try:
                ask(request(experiment, "mlp"), timeout=10)
            except grpc.RpcError as refused:
                error = refused
                break
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "participant 'mlp': more than 5 joins a second" in error.details()
    assert "try again in" in error.details()
    assert 1 <= int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) <= 200
    join(experiment, server.address, Security())  # its first tries meet the limit too
    assert server.events()[-1] == ("stopped", "mlp")
    join(experiment, server.address, Security(), "cnn")
