"""The proto file: every declaration has a sentence, and the generated code is that of the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import codistill
from codistill.v1 import distillation_pb2 as pb
from codistill.v1 import distillation_pb2_grpc as rpc

PROTO = Path(pb.__file__).with_name("distillation.proto")
LINES = PROTO.read_text(encoding="utf-8").splitlines()
DECLARATIONS = {
    "service": re.compile(r"^service (\w+)"),
    "rpc": re.compile(r"^\s*rpc (\w+)\("),
    "message": re.compile(r"^\s*message (\w+)"),
    "enum": re.compile(r"^\s*enum (\w+)"),
    "oneof": re.compile(r"^\s*oneof (\w+)"),
    "value": re.compile(r"^\s*([A-Z][A-Z0-9_]*) = \d+;"),
    "field": re.compile(r"^\s*(?:repeated |optional )?(?:map<\w+, \w+>|[\w.]+) ([a-z]\w*) = \d+;"),
}


def declared(kind: str) -> list[tuple[str, str]]:
    """Return each declaration of a kind in the file with the comment right above it."""
    found: list[tuple[str, str]] = []
    for index, line in enumerate(LINES):
        match = DECLARATIONS[kind].match(line)
        if match is None:
            continue
        comment: list[str] = []
        for above in reversed(LINES[:index]):
            if not above.strip().startswith("//"):
                break
            comment.insert(0, above.strip().removeprefix("//").strip())
        found.append((match[1], " ".join(comment)))
    return found


def names(kind: str) -> list[str]:
    return [name for name, _ in declared(kind)]


def test_the_file_as_read_here_is_the_file_as_compiled() -> None:
    file = pb.DESCRIPTOR
    assert names("service") == list(file.services_by_name)
    assert names("rpc") == [method.name for method in file.services_by_name["DistillationService"].methods]
    assert names("message") == list(file.message_types_by_name)
    assert names("enum") == list(file.enum_types_by_name)
    assert names("value") == [value.name for enum in file.enum_types_by_name.values() for value in enum.values]
    fields = [field.name for message in file.message_types_by_name.values() for field in message.fields]
    assert names("field") == fields
    oneofs = [
        oneof.name
        for message in file.message_types_by_name.values()
        for oneof in message.oneofs
        if not oneof.name.startswith("_")  # an optional field's
    ]
    assert names("oneof") == oneofs


def test_every_declaration_has_a_sentence() -> None:
    for kind in DECLARATIONS:
        everything = declared(kind)
        assert everything
        for name, comment in everything:
            assert comment.endswith("."), f"{kind} {name} has no sentence above it: {comment!r}"
            assert len(comment.split()) >= 3, f"{kind} {name}: {comment!r} says too little"
            if kind not in ("service", "rpc"):
                assert comment.startswith((f"{name} ", f"{name}: ")), (
                    f"{kind} {name}: its comment speaks of something else"
                )


def test_every_rpc_names_its_errors_with_words_of_the_status_list() -> None:
    head = "\n".join(LINES[: LINES.index('syntax = "proto3";')])
    codes = set(re.findall(r"^//   ([A-Z_]+) ", head, re.MULTILINE))
    assert {"UNAVAILABLE", "ABORTED", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"} <= codes
    declared_names = {*names("value"), *names("message"), *names("enum")}
    short = {value.rsplit("_", 1)[-1] for value in names("value")}  # FINISHED for LEAVE_REASON_FINISHED
    for name, comment in declared("rpc"):
        shouted = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", comment))
        assert shouted <= codes | declared_names | short, f"rpc {name} speaks of {shouted - codes}"


class FakeChannel:
    """Records what a stub asks of its channel."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[bool, bool, Any, Any]] = {}

    def _record(self, client: bool, server: bool) -> Any:
        def make(path: str, *, request_serializer: Any, response_deserializer: Any, **_: Any) -> str:
            self.calls[path] = (client, server, request_serializer, response_deserializer)
            return path

        return make

    def __getattr__(self, name: str) -> Any:
        client, server = name.split("_")
        return self._record(client == "stream", server == "stream")


def test_the_stubs_speak_the_service_of_the_file() -> None:
    pattern = re.compile(r"^\s*rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);")
    rpcs = [match.groups() for match in map(pattern.match, LINES) if match]
    assert [name for name, *_ in rpcs] == names("rpc")
    channel = FakeChannel()
    rpc.DistillationServiceStub(channel)  # type: ignore[arg-type]
    assert sorted(channel.calls) == sorted(f"/codistill.v1.DistillationService/{name}" for name, *_ in rpcs)
    methods = pb.DESCRIPTOR.services_by_name["DistillationService"].methods_by_name
    for name, client, request, server, response in rpcs:
        streams = (client is not None, server is not None)
        assert (methods[name].client_streaming, methods[name].server_streaming) == streams
        assert (methods[name].input_type.name, methods[name].output_type.name) == (request, response)
        *stub_streams, serialize, parse = channel.calls[f"/codistill.v1.DistillationService/{name}"]
        assert tuple(stub_streams) == streams
        assert serialize(getattr(pb, request)()) == b""
        assert parse(b"") == getattr(pb, response)()
        assert callable(getattr(rpc.DistillationServiceServicer, name))


def test_nothing_on_the_wire_shares_a_number_and_zero_means_unspecified() -> None:
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        numbers = [field.number for field in message.fields if field.name != "checksum"]
        assert numbers == list(range(1, len(numbers) + 1)), f"{message.name} has a gap; a removed field is reserved"
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values[0].number == 0
        assert enum.values[0].name.endswith("_UNSPECIFIED")


def test_the_protocol_has_a_version() -> None:
    assert type(codistill.PROTOCOL_VERSION) is int
    assert codistill.PROTOCOL_VERSION >= 1
    assert codistill.PROTOCOL_VERSION < 2**32  # JoinRequest.protocol_version
