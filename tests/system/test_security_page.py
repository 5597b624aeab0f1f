"""docs/security.md is true: its commands make certificates that work, and its table holds the limits in force."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from codistill.wire.channel import server_options
from codistill.wire.diagnose import explain
from codistill.wire.security import Security, read
from codistill.wire.security_settings import TLS_CA, TLS_CERT, TLS_KEY, TOKEN_FILE, TOKEN_VARIABLE
from codistill_server.rpc.quotas import Limits

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_commands_make_what_a_server_and_its_workers_need(tmp_path: Path) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    made = subprocess.run(["sh", "-ec", commands], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert not [path for path in tmp_path.iterdir() if path.stat().st_mode & 0o077], "nobody else reads them"

    def of(name: str) -> Security:
        pem, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        return read(pem, key, tmp_path / "ca.pem", tmp_path / "run.token", {})

    server = grpc.server(ThreadPoolExecutor(1))
    credentials = of("server").server_credentials()
    assert credentials is not None
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        for host in ("127.0.0.1", "localhost"):
            assert explain(f"{host}:{port}", of("worker")) is None
            with of("worker").channel(f"{host}:{port}") as channel:
                grpc.channel_ready_future(channel).result(30)
        told = explain(f"127.0.0.1:{port}", of("server"))
        assert told is not None, "a server's certificate is not a worker's"
        assert "does not take the certificate" in told
    finally:
        server.stop(None).wait()


def test_every_setting_is_named() -> None:
    for setting in (TLS_CERT, TLS_KEY, TLS_CA, TOKEN_FILE):
        assert f"`{setting.option}`" in PAGE
        assert f"`{setting.variable}`" in PAGE
    assert f"`{TOKEN_VARIABLE}`" in PAGE


def test_the_table_holds_the_limits_in_force() -> None:
    table = PAGE.partition("## Limits")[2]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    told = {row[0]: row[1:3] for row in rows}

    def row(start: str) -> list[str]:
        (found,) = [cells for what, cells in told.items() if what.startswith(start)]
        return found

    limits, options = Limits(), dict(server_options(0))
    assert row("joins of one student") == [f"{limits.joins.burst:g}", f"{limits.joins.per_second:g}"]
    assert row("unary calls") == [f"{limits.calls.burst:g}", f"{limits.calls.per_second:g}"]
    sizes = (limits.call_bytes.burst, limits.call_bytes.per_second)
    assert row("bytes of unary calls") == [f"{size / 2**20:g} MiB" for size in sizes]
    assert row("contributions of one session") == [f"{limits.repeats.burst:g}", f"{limits.repeats.per_second:g}"]
    assert row("`WatchRun` streams")[0] == str(limits.watchers)
    assert row("streams of one connection")[0] == str(options["grpc.max_concurrent_streams"])
    assert row("seconds until a connection")[0] == str(options["grpc.server_handshake_timeout_ms"] // 1000)
    assert row("seconds that a connection")[0] == str(options["grpc.max_connection_idle_ms"] // 1000)
