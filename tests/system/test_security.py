"""Real processes where the wire is protected: who is refused and how that looks, that no secret shows, and the bits."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from codistill.config.experiment import load
from codistill.process.exit_codes import ExitCode
from codistill_deploy.console.progress import PlainProgress
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder
from support_certificates import TOKEN, WRONG_TOKEN, Certificates
from system.support import (
    EXPERIMENT,
    assert_bit_equal,
    environment,
    experiment_file,
    processes_of,
    run,
    start,
    wait_for,
    weights,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

SECRETS = (TOKEN, WRONG_TOKEN, "PRIVATE KEY")


def refused(output: str, *fragments: str) -> None:
    """Check that the output ends in one line of error that holds all fragments, and has nothing else of note."""
    assert "Traceback" not in output, output
    assert "Handshake failed" not in output, "gRPC's own lines are no help"
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    for fragment in fragments:
        assert fragment in errors[0], f"{fragment!r} not in {errors[0]!r}"


def no_secret_in(*texts: str) -> None:
    for text in texts:
        for secret in SECRETS:
            assert secret not in text


def no_secret_in_files_of(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    no_secret_in(*(path.read_bytes().decode(errors="replace") for path in files))


def command_lines() -> list[str]:
    """Return every process's command line, as anybody on this machine can read it."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:
                continue
    return found


def tls(certificates: Certificates, name: str | None) -> list[str | Path]:
    """Return the options that give a certificate, or just the CA."""
    folder = certificates.folder
    own: list[str | Path] = (
        [] if name is None else ["--tls-cert", folder / f"{name}.pem", "--tls-key", folder / f"{name}.key"]
    )
    return [*own, "--tls-ca", folder / "ca.pem"]


def test_a_training_over_mutual_tls_with_a_token_goes_on_beside_those_who_are_refused_and_ends_with_the_same_bits(
    tmp_path: Path, certificates: Certificates
) -> None:
    """One run, as on several machines: a server that is told by options, one worker by options, the other by variables."""
    path = experiment_file(tmp_path, students=EXPERIMENT["students"][:2])
    folder = tmp_path / "run"
    token, wrong = certificates.token_file(), certificates.token_file(WRONG_TOKEN)
    serve = ["serve", path, "--listen", "0.0.0.0:0", "--run-dir", folder]
    server = start(*serve, *tls(certificates, "server"), "--token-file", token, cwd=tmp_path)
    by_options = [*tls(certificates, "worker"), "--token-file", token]
    by_environment = environment(
        CODISTILL_TLS_CERT=str(certificates.folder / "worker.pem"),
        CODISTILL_TLS_KEY=str(certificates.folder / "worker.key"),
        CODISTILL_TLS_CA=str(certificates.folder / "ca.pem"),
        CODISTILL_TOKEN=TOKEN,
    )
    running = [server]
    outputs: list[str] = []
    try:
        wait_for(lambda: (folder / "server.json").exists() or server.poll() is not None, "the server is up")

        def work(student: str) -> list[str | Path]:
            return ["work", path, "--student", student, "--run-dir", folder]

        running.append(start(*work("mlp"), *by_options, cwd=tmp_path))
        lines = wait_for(
            lambda: len(found := [line for line in command_lines() if str(folder) in line]) == 2 and found, "both run"
        )
        no_secret_in(*lines)
        # The other is not let in, whatever it tries; the first waits for it meanwhile.
        for others, fragments in (
            ([*tls(certificates, "worker"), "--token-file", wrong], ["the token given is not this server's"]),
            ([*tls(certificates, None), "--token-file", token], ["asks for a client's certificate", "--tls-cert"]),
            ([*tls(certificates, "expired"), "--token-file", token], ["does not take the certificate", "expired.pem"]),
            (["--token-file", token], ["it speaks TLS, and this side does not", "--tls-ca"]),
        ):
            code, output = run("status", "--run-dir", folder, *others, cwd=tmp_path)
            outputs.append(output)
            assert code == ExitCode.REFUSED, output
            refused(output, *fragments)
        code, output = run(*work("cnn"), *tls(certificates, "worker"), cwd=tmp_path)
        outputs.append(output)
        assert code == ExitCode.REFUSED, output
        refused(
            output, "asks for a token, and none was given", "--token-file (CODISTILL_TOKEN_FILE)", "CODISTILL_TOKEN"
        )

        code, output = run("status", "--run-dir", folder, cwd=tmp_path, env=by_environment)
        assert code == 0, output
        assert "cnn" in output
        outputs.append(output)
        assert all(process.poll() is None for process in running)
        running.append(start(*work("cnn"), cwd=tmp_path, env=by_environment))
        for process in running:
            output, _ = process.communicate(timeout=100)
            assert process.returncode == 0, output
            outputs.append(output)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert not any("Handshake failed" in output for output in outputs), "whoever knocks must not fill the server's log"
    assert "on 0.0.0.0:" in outputs[-3]
    assert "(mutual TLS, token)" in outputs[-3]
    no_secret_in(*outputs)
    no_secret_in_files_of(folder)

    experiment = load(path)
    alone = RunFolder(tmp_path / "in-process")
    alone.start(experiment, mode="in-process", resume=False)
    assert run_in_process(experiment, alone, PlainProgress(Console(quiet=True)), threading.Event()) == 0
    assert_bit_equal(weights(folder), weights(alone.path))


def test_a_local_run_hands_what_it_was_given_to_its_processes_and_without_restarts_a_killed_one_ends_it(
    tmp_path: Path, certificates: Certificates
) -> None:
    path = experiment_file(tmp_path, training__epochs=100_000, students=EXPERIMENT["students"][:2])
    folder = tmp_path / "run"
    options = [*tls(certificates, "server"), "--token-file", certificates.token_file(), "--restarts", "0"]
    process = start("run", path, "--run-dir", folder, *options, cwd=tmp_path)
    shown = ""
    try:
        assert process.stdout is not None
        while not re.search(r": step [1-9]", shown):  # the view is fed over the same protected wire
            line = process.stdout.readline()
            assert line, shown
            shown += line
        code, output = run("status", "--run-dir", folder, *tls(certificates, "worker"), cwd=tmp_path)
        assert code == ExitCode.REFUSED, output
        pids = processes_of(folder)
        assert set(pids) == {"server", "mlp", "cnn"}
        no_secret_in(output, *command_lines())
        os.kill(pids["server"], signal.SIGKILL)
        printed, _ = process.communicate(timeout=90)
        printed = shown + printed
        assert process.returncode == ExitCode.WORKER_FAILED, printed
    finally:
        process.kill()
        process.communicate()
    refused(printed, "error: the server was killed by SIGKILL; its log: ", "--resume")
    assert processes_of(folder) == {}
    assert "(mutual TLS, token)" in (folder / "server.log").read_text()
    no_secret_in(printed)
    no_secret_in_files_of(folder)


def test_what_is_wrong_with_the_settings_is_said_before_anything_starts(
    tmp_path: Path, certificates: Certificates
) -> None:
    path = experiment_file(tmp_path)
    (tmp_path / "empty").write_text("\n")
    folder = tmp_path / "run"
    started = time.monotonic()
    cases: list[tuple[list[str | Path], dict[str, str], list[str]]] = [
        (["run", path, "--token-file", tmp_path / "empty"], {}, ["--token-file (CODISTILL_TOKEN_FILE)", "is empty"]),
        (["run", path], {"CODISTILL_TOKEN": ""}, ["CODISTILL_TOKEN", "the token is empty"]),
        (["run", path, "--tls-cert", certificates.folder / "server.pem"], {}, ["--tls-key", "is needed too"]),
        (["serve", path, "--listen", "0.0.0.0:0"], {}, ["nothing protects the port", "--token-file", "--insecure"]),
    ]
    for arguments, variables, fragments in cases:
        code, output = run(*arguments, "--run-dir", folder, cwd=tmp_path, env=environment(**variables))
        assert code == ExitCode.CONFIGURATION, output
        refused(output, *fragments)
        assert not folder.exists()
    assert time.monotonic() - started < 90
