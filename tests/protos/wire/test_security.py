"""Which settings protect the wire, and which files are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc
import pytest

from codistill.wire.security import Security, read
from protos.wire.support import refused
from support_certificates import TOKEN, WRONG_TOKEN, Certificates

BOTH = {"CODISTILL_TLS_CERT": "c.pem", "CODISTILL_TLS_KEY": "c.key", "CODISTILL_TLS_CA": "ca.pem"}


class TestRead:
    def test_nothing(self) -> None:
        assert read(environment={}) == Security()

    def test_the_environment(self) -> None:
        found = read(environment={**BOTH, "CODISTILL_TOKEN": TOKEN})
        assert (found.cert, found.key, found.ca) == (Path("c.pem"), Path("c.key"), Path("ca.pem"))
        assert found.token is not None
        assert found.token.matches(f"Bearer {TOKEN}")

    def test_an_option_wins(self) -> None:
        found = read(ca=Path("mine.pem"), environment=BOTH)
        assert (found.cert, found.ca) == (Path("c.pem"), Path("mine.pem"))

    @pytest.mark.parametrize("variable", [*BOTH, "CODISTILL_TOKEN_FILE", "CODISTILL_TOKEN"])
    def test_a_variable_that_is_empty_is_no_protection_that_was_meant(self, variable: str) -> None:
        assert refused(lambda: read(environment={variable: ""})).startswith(f"{variable}: ")

    @pytest.mark.parametrize("variable", [*BOTH, "CODISTILL_TOKEN_FILE"])
    def test_a_variable_with_a_path_that_only_a_shell_expands(self, variable: str) -> None:
        line = refused(lambda: read(environment={variable: "~/c.pem"}))
        assert line.startswith(f"{variable}: ~/c.pem: `~` is not expanded here; write the whole path, ")

    def test_a_file_wins_over_a_token_in_the_environment(self, certificates: Certificates) -> None:
        file = certificates.token_file()
        found = read(token_file=file, environment={"CODISTILL_TOKEN": WRONG_TOKEN})
        assert found.token is not None
        assert found.token.matches(f"Bearer {TOKEN}")
        assert found.environment == {"CODISTILL_TOKEN_FILE": str(file)}

    def test_what_a_child_needs(self, certificates: Certificates) -> None:
        given = {**BOTH, "CODISTILL_TOKEN_FILE": str(certificates.token_file())}
        assert read(environment=given).environment == given
        assert read(environment={"CODISTILL_TOKEN": TOKEN}).environment == {}, "it inherits that one"

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (None, "cannot be read: No such file"),
            (b"", "the token is empty"),
            (b"\xff" * 32, "is not text"),
            (b"x" * 5000, "is larger than 4096 bytes"),
        ],
    )
    def test_a_token_file_that_is_none(self, content: bytes | None, what: str, tmp_path: Path) -> None:
        path = tmp_path / "token"
        if content is not None:
            path.write_bytes(content)
        told = refused(lambda: read(token_file=path, environment={}))
        assert told.startswith(f"--token-file (CODISTILL_TOKEN_FILE): {path}")
        assert what in told

    @pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
    def test_a_token_file_that_others_can_read(
        self, mode: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "token"
        path.write_text(TOKEN)
        path.chmod(mode)
        with caplog.at_level(logging.WARNING):
            read(token_file=path, environment={})
        told = f"{path} can be read by other users (mode {mode:03o}); chmod 600 it"
        assert [told in record.getMessage() for record in caplog.records] == [True] * warned
        assert TOKEN not in caplog.text


class TestCertificates:
    def test_none(self) -> None:
        assert Security().server_credentials() is None
        assert not Security().serves_tls

    def test_a_servers(self, certificates: Certificates) -> None:
        for ca in (None, "ca"):
            security = certificates.of("server", ca)
            assert security.serves_tls
            assert isinstance(security.server_credentials(), grpc.ServerCredentials)

    def test_a_ca_is_not_enough_for_a_server(self, certificates: Certificates) -> None:
        told = refused(certificates.of(None, "ca").server_credentials)
        assert told == (
            "--tls-ca (CODISTILL_TLS_CA): a server needs --tls-cert (CODISTILL_TLS_CERT) and --tls-key (CODISTILL_TLS_KEY) too, "
            "or none of them"
        )

    def test_a_certificate_is_not_enough_for_a_client(self, certificates: Certificates) -> None:
        told = refused(lambda: certificates.of("worker").channel("127.0.0.1:1"))
        assert told.startswith("--tls-cert (CODISTILL_TLS_CERT): a client needs --tls-ca (CODISTILL_TLS_CA) too")

    @pytest.mark.parametrize("side", ["server", "client"])
    @pytest.mark.parametrize("missing", ["cert", "key"])
    def test_half_a_pair(self, side: str, missing: str, certificates: Certificates) -> None:
        whole = certificates.of("server", "ca")
        half = Security(whole.cert if missing == "key" else None, whole.key if missing == "cert" else None, whole.ca)
        told = refused(half.server_credentials if side == "server" else lambda: half.channel("127.0.0.1:1"))
        assert f"--tls-{missing} (CODISTILL_TLS_{missing.upper()}) is needed too" in told

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"cert": "nothing.pem"}, "--tls-cert (CODISTILL_TLS_CERT): "),
            ({"key": "nothing.pem"}, "--tls-key (CODISTILL_TLS_KEY): "),
            ({"ca": "nothing.pem"}, "--tls-ca (CODISTILL_TLS_CA): "),
            ({"key": "worker.key"}, "key values mismatch"),
            ({"cert": "server.key"}, "cannot be used together"),
            ({"key": "server.pem"}, "cannot be used together"),
            ({"key": "locked.key"}, "without a password"),
            ({"cert": "text"}, "cannot be used together"),
            ({"ca": "text"}, "expected the CA's certificates as PEM"),
            ({"ca": "server.key"}, "expected the CA's certificates as PEM"),
        ],
    )
    def test_files_that_cannot_be_used(self, changes: dict[str, str], what: str, certificates: Certificates) -> None:
        folder = certificates.folder
        (folder / "text").write_text("my notes")
        _lock(folder / "server.key", folder / "locked.key")
        names = {"cert": "server.pem", "key": "server.key", "ca": "ca.pem", **changes}
        security = Security(**{name: folder / file for name, file in names.items()})
        for call in (security.server_credentials, lambda: security.channel("127.0.0.1:1")):
            told = refused(call)
            assert what in told
            assert str(folder / next(iter(changes.values()))) in told

    def test_a_key_that_others_can_read(self, certificates: Certificates, caplog: pytest.LogCaptureFixture) -> None:
        key = certificates.folder / "server.key"
        key.chmod(0o644)
        try:
            certificates.of("server").server_credentials()
        finally:
            key.chmod(0o600)
        assert f"{key} can be read by other users (mode 644)" in caplog.text


def _lock(key: Path, locked: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    loaded: Any = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    locked.chmod(0o600)
