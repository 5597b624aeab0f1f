from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from codistill.rundir import records
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import TensorError, decode
from fuzz import generators
from fuzz.campaign import TOKEN, FoundError, Report, campaign, share

INPUTS = 2000


def run(folder: Path, inputs: int, seed: int, mutant: str = "", token: str = "") -> Report:
    async def go() -> Report:
        async with campaign(folder, seed, mutant, token) as ready:
            return await ready.run(share(inputs))

    return asyncio.run(go())


@pytest.mark.system
class TestCampaign:
    def test_a_server_stands_what_is_sent_to_it(self, tmp_path: Path) -> None:
        report = run(tmp_path, INPUTS, seed=2026)
        assert sum(report.inputs.values()) >= INPUTS - 2
        assert report.rounds > 50, "the healthy students went on beside it"
        kinds = {kind for kind, _ in report.seen}
        assert {"noise", "drawn message", "mutated traffic", "join that differs", "contribution", "superseded"} <= kinds
        statuses = {status for kind, status in report.seen if not kind.startswith("flood")}
        assert {"OK", "ABORTED", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"} <= statuses
        assert "UNAVAILABLE" in statuses, "what was damaged on the way is to be sent again"
        assert not statuses & {"UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED"}
        for flood in ("joins", "bytes", "watchers"):
            assert report.seen[f"flood of {flood}", "RESOURCE_EXHAUSTED"] > 0

    def test_nobody_gets_past_the_token(self, tmp_path: Path) -> None:
        report = run(tmp_path, INPUTS // 2, seed=2027, token=TOKEN)
        assert report.rounds > 20, "the healthy students have it"
        refused = {kind for kind, status in report.seen if status == "UNAUTHENTICATED"}
        outside = "without the token: "
        assert {f"{outside}{kind}" for kind in ("noise", "drawn message", "large message", "Join", "open")} <= refused
        assert all(kind.startswith(outside) for kind in refused)
        got_in = {(kind, status) for kind, status in report.seen if kind.startswith(outside)}
        assert {status for _, status in got_in} <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "CANCELLED", "lost"} | {
            status for kind, status in got_in if kind == f"{outside}health"
        }

    @pytest.mark.parametrize(
        ("mutant", "part"),
        [
            # in the answer to the call itself, or in the log, where something beside it met the server's end first
            ("raises", "answered UNAVAILABLE|KeyError: "),
            ("admits", "answered OK|names none of"),
            ("keeps", "rss has grown"),
            ("finishes", "answered OK"),
            ("turned", "not the pure function's"),
            ("matches", "allowed: UNAUTHENTICATED"),
        ],
    )
    def test_a_planted_bug_is_found(self, tmp_path: Path, mutant: str, part: str) -> None:
        token = TOKEN if mutant == "matches" else ""
        with pytest.raises(FoundError, match=part) as found:
            run(tmp_path, INPUTS, seed=7, mutant=mutant, token=token)
        assert "seed 7" in str(found.value)


class TestTensors:
    def test_any_message_is_decoded_or_refused(self) -> None:
        rng = random.Random(5)
        decoded, refused = 0, list[str]()
        for _ in range(4000):
            message = generators.fill(rng, pb.Tensor())
            assert isinstance(message, pb.Tensor)
            if rng.random() < 0.5:  # sizes that may well be right
                message.shape[:] = [rng.randrange(4) for _ in range(rng.randrange(4))]
                message.data = rng.randbytes(rng.choice((0, 2, 4, 8, 16, 24, 32)))
            try:
                value = decode(message)
            except TensorError as error:
                refused.append(str(error))
            else:
                decoded += 1
                assert list(value.shape) == list(message.shape)
                assert value.numel() * value.element_size() == len(message.data)
        assert decoded > 50
        assert all(text.startswith("tensor.") and len(text) < 500 for text in refused)


class TestRecords:
    def test_spoilt_lines_are_named_or_read(self, tmp_path: Path) -> None:
        rng = random.Random(6)
        whole = [
            records.Happened(time=1, what="joined", participant="ant", message="é\n").model_dump_json().encode()
            + b"\n",
            records.Measured(
                time=2, participant="ant", split="test", steps_trained=3, epochs_trained=1, accuracy=0.5, loss=1
            )
            .model_dump_json()
            .encode()
            + b"\n",
        ]
        path, refused = tmp_path / "metrics.jsonl", list[str]()
        for _ in range(1000):
            path.write_bytes(generators.mutate(rng, b"".join(whole), whole))
            try:
                list(records.read(path))
            except ValueError as error:
                refused.append(str(error))
        assert 100 < len(refused) < 1000
        assert all("is not a record of a run" in text for text in refused)
