"""docs/protocol.md shows the whole proto, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import codistill
from codistill.v1 import distillation_pb2 as pb

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")


def section(title: str, level: int = 3) -> str:
    return PAGE.partition(f"\n{'#' * level} {title}\n")[2].partition("\n#")[0]


def rows(title: str) -> list[list[str]]:
    """Return the rows of a section's table, without its own."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_every_call_names_its_messages() -> None:
    for service in pb.DESCRIPTOR.services_by_name.values():
        assert f"Service `{service.full_name}`. " in PAGE
        for method in service.methods:
            text = section(method.name)
            for end, streams in (
                (method.input_type, method.client_streaming),
                (method.output_type, method.server_streaming),
            ):
                assert f"{'stream of ' if streams else ''}[{end.name}](#{end.name.lower()})" in text


def test_every_field_and_value_has_a_row() -> None:
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        fields = [(f"`{field.name}`", str(field.number)) for field in message.fields]
        assert [(row[0], row[1]) for row in rows(message.name)] == fields, message.name
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert [(row[0], row[1]) for row in rows(enum.name)] == [
            (f"`{value.name}`", str(value.number)) for value in enum.values
        ]


def test_a_row_does_not_repeat_its_own_name() -> None:
    for title in (*pb.DESCRIPTOR.message_types_by_name, *pb.DESCRIPTOR.enum_types_by_name):
        for name, _, *_, meaning in rows(title):
            assert not meaning.startswith((name, name.strip("`"))), f"{title}.{name}: {meaning}"


def test_every_link_leads_to_a_heading() -> None:
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]*)\)", PAGE))
    assert len(links) > 20
    assert links <= headings


def test_the_status_codes_are_grpcs_and_all_that_the_page_speaks_of() -> None:
    head = PAGE.partition("\n## Status codes\n")[2].partition("\n## ")[0]
    codes = set(re.findall(r"^\| `([A-Z_]+)` \|", head, re.MULTILINE))
    values = {value.name for enum in pb.DESCRIPTOR.enum_types_by_name.values() for value in enum.values}
    values |= {value.rpartition("_")[2] for value in values}
    assert {"ABORTED", "FAILED_PRECONDITION", "UNAVAILABLE"} <= codes
    assert set(re.findall(r"`([A-Z]{4,}(?:_[A-Z]+)*)`", PAGE)) <= codes | values


def test_the_version_is_the_one_that_is_spoken() -> None:
    assert f"`protocol_version` in [JoinRequest](#joinrequest) is {codistill.PROTOCOL_VERSION} now." in section(
        "Versions", 2
    )
