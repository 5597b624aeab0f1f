from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from codistill.rundir.records import Happened, Joined, Measured, Paced, ParticipantWait, RoundsClosed, read

ALL = [
    Joined(time=1.5, participant="mlp", model="mlp", parameters=12, device="cpu", total_rounds=360, total_steps=720),
    Measured(time=2.0, participant="mlp", split="train", steps_trained=6, epochs_trained=1.0, accuracy=0.25, loss=2.3),
    Measured(
        time=2.0,
        participant="mlp",
        split="test",
        steps_trained=6,
        epochs_trained=1.0,
        accuracy=1.0,
        loss=0,
        distillation_loss=0.1,
    ),
    Paced(time=3.0, participant="mlp", steps_trained=6, step_seconds=0.01, wait_seconds=0.0),
    RoundsClosed(
        time=4.0,
        first=0,
        last=5,
        steps_trained=12,
        seconds=0.5,
        wait_p50=0.001,
        wait_max=0.25,
        waits={"mlp": ParticipantWait(rounds=2, seconds=0.3)},
        ensemble_accuracy=0.5,
        disagreement={"mlp|cnn": 0.125},
    ),
    Happened(time=5.0, what="stopped", participant="mlp", message="Ctrl-C, ½ of the way\nsecond line"),
]


def write(path: Path, records: list[BaseModel], tail: bytes = b"") -> Path:
    path.write_bytes(b"".join(record.model_dump_json().encode() + b"\n" for record in records) + tail)
    return path


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    assert list(read(write(tmp_path / "metrics.jsonl", list(ALL)))) == ALL


@given(
    message=st.text(st.characters(exclude_categories=["Cs"])),
    time=st.floats(0, 1e12),
    participant=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
def test_any_text_and_time_survive(
    message: str, time: float, participant: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    record = Happened(time=time, what="failed", participant=participant, message=message)
    assert list(read(write(tmp_path_factory.mktemp("run") / "events.jsonl", [record]))) == [record]


def test_no_file_holds_no_records(tmp_path: Path) -> None:
    assert list(read(tmp_path / "metrics.jsonl")) == []


def test_an_empty_file_holds_no_records(tmp_path: Path) -> None:
    assert list(read(write(tmp_path / "metrics.jsonl", []))) == []


def test_a_last_line_cut_off_anywhere_is_passed_over(tmp_path: Path) -> None:
    last = ALL[-1].model_dump_json().encode()
    for length in range(len(last) + 1):
        path = write(tmp_path / "metrics.jsonl", list(ALL[:2]), tail=last[:length])
        assert list(read(path)) == ALL[:2]


@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"",
        b"null",
        b"\xff\xfe",
        b'{"kind": "joined", "time": 1}',
        b'{"kind": "other", "time": 1}',
        b'{"time": 1}',
    ],
)
def test_a_damaged_line_is_named_after_those_before_it(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, list(ALL[:2]), tail=damage + b"\n" + ALL[3].model_dump_json().encode() + b"\n")
    records = read(path)
    assert [next(records), next(records)] == ALL[:2]
    with pytest.raises(ValueError) as caught:
        next(records)
    assert str(caught.value).startswith(f"{path}: line 3 is not a record of a run: ")
    assert "\n" not in str(caught.value)


def test_a_split_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="'train' or 'test'"):
        Measured(time=0, participant="a", split="valid", steps_trained=0, epochs_trained=0, accuracy=0, loss=0)  # type: ignore[arg-type]


def test_records_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ALL[0].participant = "other"  # type: ignore[misc]
