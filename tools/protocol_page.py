"""Makes docs/protocol.md from the proto: its structure from the compiled descriptor, its comments from the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    MethodDescriptorProto,
)

from codistill import PROTOCOL_VERSION
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.checksum import CHECKSUM_FIELD, CHECKSUM_TAG, append_checksum

__all__ = ["page", "read_comments"]

PROTO = Path(pb.__file__).with_name("distillation.proto")

_OPENING = re.compile(r"(service|message|enum|oneof) (\w+) \{(\})?")
_DECLARATION = re.compile(r"(?:rpc (\w+)\(|(?:[\w.<>, ]+ )?(\w+) = \d+\b)")
_HEADING = re.compile(r"[A-Z][a-z ]+")
_STATUS = re.compile(r"  ([A-Z][A-Z_]+) +(\S.*)")
_SCALARS: Mapping[int, str] = {
    value.number: value.name.removeprefix("TYPE_").lower() for value in FieldDescriptorProto.Type.DESCRIPTOR.values
}

_INTRODUCTION = """\
It is the file `protos/codistill/v1/distillation.proto`, and its calls are gRPC's. From it protobuf's compiler makes messages
and stubs for many languages. This page is made from the same file.
"""

_CHECKSUMS = """\
## Checksums with any protobuf library

Protobuf promises no order of the fields on the wire. That `checksum` comes last is a rule of this contract alone. Every
protobuf library can follow it, as a message's bytes may be continued by those of another field:

1. Leave `checksum` unset, and serialise the message.
2. Compute the CRC-32C of these bytes. For an [ExchangeRequest](#exchangerequest), compute it over the session's number
   in decimal, as ASCII, followed by these bytes.
3. Append the bytes `{tag}`, the tag of field {field} as a fixed32.
4. Append the CRC-32C as 4 bytes, little-endian.

A library that writes fields in the order of their numbers, as Python's does, gives the same bytes if it sets `checksum` and
serialises again. Protobuf does not promise that order, so a peer that relies on it tests it.

A receiver checks the bytes as they came, before it parses them. Of the last six, the first two must be `{tag}`, and the
other four the CRC-32C of everything before them. To serialise a parsed message again is no check: a map's entries may
come in another order. gRPC hands out the bytes to a codec (Go), a marshaller (Java), a `ByteBuffer` (C++), or a
deserialiser (Python, JavaScript).

| message | bytes, hexadecimal |
|---|---|
{examples}
"""


def page() -> str:
    """Return docs/protocol.md, below its notice."""
    file = FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    return "\n".join(_Page(file, read_comments(PROTO.read_text(encoding="utf-8"))).lines())


def read_comments(text: str) -> dict[str, list[str]]:
    """Return the comment above each declaration of a proto file as lines, by its full name without the package.

    The comment at the head of the file has the name "". A oneof's fields have the names that they have without it.

    Args:
        text: the file. Each declaration and each closing brace begins a line, as `buf format` writes them.
    """
    comments: dict[str, list[str]] = {}
    scopes: list[tuple[str, str]] = []
    above: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("//"):
            above.append(line[2:].removeprefix(" "))
            continue
        names = [name for kind, name in scopes if kind != "oneof"]
        if line.startswith("syntax"):
            comments[""] = above
        elif opening := _OPENING.match(line):
            comments[".".join([*names, opening[2]])] = above
            if not opening[3]:
                scopes.append((opening[1], opening[2]))
        elif line == "}":
            scopes.pop()
        elif scopes and (declaration := _DECLARATION.match(line)):
            comments[".".join([*names, declaration[1] or declaration[2]])] = above
        above = []
    return comments


class _Page:
    """The page of one proto file.

    Args:
        file: the file's descriptor.
        comments: its comments, from :func:`read_comments`.
    """

    def __init__(self, file: FileDescriptorProto, comments: Mapping[str, list[str]]) -> None:
        self._file = file
        self._comments = comments
        self._prefix = f".{file.package}."
        rpcs = [method.name for service in file.service for method in service.method]
        types = [name for name, _ in (*self._messages(), *self._enums())]
        self._targets = {*rpcs, *types}
        values = [value.name for _, enum in self._enums() for value in enum.value]
        statuses = [found[1] for found in map(_STATUS.match, comments[""]) if found]
        # FINISHED for LEAVE_REASON_FINISHED
        code = {*values, *self._short_values(), *statuses, "authorization"}
        self._code = re.compile(rf"\b(?:{'|'.join(sorted(code, key=len, reverse=True))})\b")

    def _short_values(self) -> Iterator[str]:
        """Yield the values of enums without the enum's name."""
        for name, enum in self._enums():
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name.rpartition(".")[2]).upper() + "_"
            yield from (value.name.removeprefix(prefix) for value in enum.value)

    def lines(self) -> Iterator[str]:
        """Yield the page."""
        yield "# The protocol\n"
        yield from self._head()
        yield "## Calls\n"
        for service in self._file.service:
            yield f"Service `{self._file.package}.{service.name}`. {self._text(service.name)}\n"
            yield "| call | request | response |\n|---|---|---|"
            for method in service.method:
                request, response = self._ends(method)
                yield f"| [{method.name}](#{method.name.lower()}) | {request} | {response} |"
            for method in service.method:
                yield f"\n### {method.name}\n"
                yield f"{' → '.join(self._ends(method))}\n"
                yield "\n\n".join(self._paragraphs(f"{service.name}.{method.name}"))
        yield "\n## Messages"
        for name, message in self._messages():
            yield from self._message(name, message)
        yield "\n## Enums"
        for name, enum in self._enums():
            yield from self._enum(name, enum)
        yield "\n" + self._checksums()

    def _head(self) -> Iterator[str]:
        """Yield the file's own comment: its headings, paragraphs, and the table of status codes."""
        rows: list[str] = []
        first, *others = _split(self._comments[""])
        yield f"{self._linked(' '.join(first))}\n"
        yield _INTRODUCTION
        for paragraph in others:
            if any(_STATUS.match(line) for line in paragraph):
                yield "| status | meaning |\n|---|---|"
                for line in paragraph:
                    found = _STATUS.match(line)
                    rows += [f"| `{found[1]}` | {found[2]}"] if found else []
                    if not found:
                        rows[-1] += f" {line.strip()}"
                yield from (f"{self._linked(row)} |" for row in rows)
                yield ""
            elif len(paragraph) == 1 and _HEADING.fullmatch(paragraph[0]):
                yield f"## {paragraph[0]}\n"
                if paragraph[0] == "Versions":
                    yield f"`protocol_version` in [JoinRequest](#joinrequest) is {PROTOCOL_VERSION} now.\n"
            else:
                yield f"{self._linked(' '.join(paragraph))}\n"

    def _message(self, name: str, message: DescriptorProto) -> Iterator[str]:
        yield f"\n### {name}\n"
        yield "\n\n".join(self._paragraphs(name))
        if message.field:
            yield "\n| field | number | type | meaning |\n|---|---|---|---|"
        for field in message.field:
            meaning = self._meaning(f"{name}.{field.name}")
            if _in_oneof(field):
                meaning += f" One of `{message.oneof_decl[field.oneof_index].name}`."
            yield f"| `{field.name}` | {field.number} | {self._type(field, message)} | {meaning} |"
        for oneof in sorted({field.oneof_index for field in message.field if _in_oneof(field)}):
            own = message.oneof_decl[oneof].name
            yield f"\n`{own}`: {self._meaning(f'{name}.{own}')}"
        spans = [(span.start, span.end - 1) for span in message.reserved_range]
        yield from _reserved(spans, message.reserved_name)

    def _enum(self, name: str, enum: EnumDescriptorProto) -> Iterator[str]:
        yield f"\n### {name}\n"
        yield "\n\n".join(self._paragraphs(name))
        yield "\n| value | number | meaning |\n|---|---|---|"
        for value in enum.value:
            yield f"| `{value.name}` | {value.number} | {self._meaning(f'{name}.{value.name}')} |"
        yield from _reserved([(span.start, span.end) for span in enum.reserved_range], enum.reserved_name)

    def _messages(self) -> Iterator[tuple[str, DescriptorProto]]:
        """Yield all messages with their names, nested ones after those that hold them."""
        pending = [(message.name, message) for message in self._file.message_type]
        while pending:
            name, message = pending.pop(0)
            yield name, message
            nested = [each for each in message.nested_type if not each.options.map_entry]
            pending[:0] = [(f"{name}.{each.name}", each) for each in nested]

    def _enums(self) -> Iterator[tuple[str, EnumDescriptorProto]]:
        """Yield all enums with their names, those inside messages last."""
        yield from ((enum.name, enum) for enum in self._file.enum_type)
        for name, message in self._messages():
            yield from ((f"{name}.{enum.name}", enum) for enum in message.enum_type)

    def _ends(self, method: MethodDescriptorProto) -> tuple[str, str]:
        """Return the request and the response of a call."""
        request, response = self._reference(method.input_type), self._reference(method.output_type)
        return (
            f"stream of {request}" if method.client_streaming else request,
            f"stream of {response}" if method.server_streaming else response,
        )

    def _type(self, field: FieldDescriptorProto, message: DescriptorProto) -> str:
        for entry in message.nested_type:
            if entry.options.map_entry and field.type_name.endswith(f".{message.name}.{entry.name}"):
                key, value = (self._type(each, entry) for each in entry.field)
                return f"map of {key} to {value}"
        shown = self._reference(field.type_name) if field.type_name else _SCALARS[field.type]
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {shown}"
        return f"optional {shown}" if field.proto3_optional else shown

    def _reference(self, type_name: str) -> str:
        """Return a link to a type of this file, or the name of another one."""
        name = type_name.removeprefix(self._prefix)
        return _link(name) if name != type_name else f"`{type_name.removeprefix('.')}`"

    def _meaning(self, name: str) -> str:
        """Return a declaration's comment for its row, without its name, and without "is" or "means that" after it."""
        own = name.rpartition(".")[2]
        text = re.sub(rf"^{own} (?:is |means that )?", "", " ".join(self._comment(name)))
        return self._linked(text[:1].upper() + text[1:]).replace("|", "\\|")

    def _text(self, name: str) -> str:
        return self._linked(" ".join(self._comment(name)), own=name)

    def _paragraphs(self, name: str) -> list[str]:
        own = name.rpartition(".")[2]
        return [self._linked(" ".join(paragraph), own=own) for paragraph in _split(self._comment(name))]

    def _comment(self, name: str) -> list[str]:
        comment = self._comments.get(name)
        if not comment:
            raise ValueError(f"{PROTO.name}: {name} has no comment above it")
        return comment

    def _linked(self, text: str, own: str = "") -> str:
        """Return a text with links to what it names, and with code set as code.

        Args:
            text: the text.
            own: the name of what the text is about, which is no link.
        """
        text = re.sub(r'"[^"]*"|\b(?:codistill|grpc)-[a-z-]+\b|\b[a-z]+(?:_[a-z]+)+\b', _as_code, text)
        text = self._code.sub(lambda found: f"`{found[0]}`", text)
        text = re.sub(r"`+([^`]+)`+", r"`\1`", text)
        text = text.replace("see Damage above", "see [Damage](#damage)")
        parts = re.split(r"(`[^`]*`|\[[^]]*\]\([^)]*\))", text)
        names = "|".join(sorted(self._targets - {own}, key=len, reverse=True))
        # A word that begins a sentence is a word.
        word = re.compile(rf"(?<![.:;] )(?<!^)\b({names})\b(?!')")
        parts[::2] = [word.sub(lambda found: _link(found[0]), part) for part in parts[::2]]
        return "".join(parts)

    def _checksums(self) -> str:
        leave = pb.LeaveRequest(session_id=7, reason=pb.LEAVE_REASON_FINISHED)
        contribution = pb.ExchangeRequest(round=3)
        examples = [
            f"| LeaveRequest: session 7, reason FINISHED | `{append_checksum(leave).hex(' ')}` |",
            f"| ExchangeRequest: round 3, sent in session 7 | `{append_checksum(contribution, '7').hex(' ')}` |",
        ]
        return _CHECKSUMS.format(
            field=CHECKSUM_FIELD,
            tag=CHECKSUM_TAG.hex(" "),
            examples="\n".join(examples),
        )


def _in_oneof(field: FieldDescriptorProto) -> bool:
    """Return whether a field is one of several that exclude each other; an optional field is not."""
    return field.HasField("oneof_index") and not field.proto3_optional


def _reserved(spans: Iterable[tuple[int, int]], names: Iterable[str]) -> Iterator[str]:
    """Yield a line on reserved numbers, as the first and last of each span, and names, if there are any."""
    reserved = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    reserved += [f"`{name}`" for name in names]
    if reserved:
        yield f"\nReserved: {', '.join(reserved)}."


def _split(lines: list[str]) -> Iterator[list[str]]:
    """Yield the paragraphs of a comment."""
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield paragraph
            paragraph = []


def _link(name: str) -> str:
    return f"[{name}](#{name.lower().replace('.', '')})"


def _as_code(found: re.Match[str]) -> str:
    return f"`{found[0]}`"
