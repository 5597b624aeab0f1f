"""Bad networks between real processes: the run goes on and ends with the bits of a run on a good one.

Every worker has a proxy of its own to the one server. The reference is trained once, in one process.
"""

from __future__ import annotations

import contextlib
import queue
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment, load
from codistill.config.fingerprint import identity_sha256
from codistill.process.exit_codes import ExitCode
from codistill.v1 import distillation_pb2 as pb
from codistill.v1.distillation_pb2_grpc import DistillationServiceStub
from codistill.wire.channel import SESSION_KEY
from codistill.wire.checksum import append_checksum, format_session
from codistill.wire.tensors import encode
from codistill.wire.times import seconds
from codistill_worker import data
from system.run_harness import ALL_WELL, CHANGES, PACE, ROUNDS, STUDENTS, running
from system.support import EXPERIMENT, assert_bit_equal, experiment_file, rounds_trained, weights

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


def test_a_slow_narrow_lossy_link_and_dozens_of_cuts(tmp_path: Path, reference: Any) -> None:
    with running(tmp_path) as run:
        # 200 ms there and back, 5 % loss (as stalls: see the proxy), 1 MB/s, from the very first byte on.
        run.links(delay=0.1, loss=0.05, stall_seconds=0.3, rate=1e6)
        run.until(lambda: rounds_trained(run.folder) >= 12, "rounds on a bad link")
        assert run.count(lambda proxy: proxy.up.stalls + proxy.down.stalls) > 5
        assert run.events("disconnected") == [], "nobody's session ended"
        run.links(delay=PACE, loss=0.0, rate=None)

        # Resets in the middle of what the workers send, then ends in the middle of replies, then all at once.
        for proxy in run.proxies.values():
            proxy.up.cut_after = 9000
        run.until(lambda: run.count(lambda proxy: proxy.cuts) >= 16, "16 resets")
        for proxy in run.proxies.values():
            proxy.up.cut_after, proxy.down.cut_after, proxy.cut_as = None, 6000, "end"
        run.until(lambda: run.count(lambda proxy: proxy.cuts) >= 32, "16 ends")
        run.links(cut_after=None)
        for how in ("reset", "end", "reset", "end"):
            run.progress(3)
            for proxy in run.proxies.values():
                proxy.cut("reset" if how == "reset" else "end")
        run.progress(3)
        assert run.ended() == ALL_WELL
        assert run.count(lambda proxy: proxy.cuts) >= 36
        assert set(run.events("disconnected")) == set(STUDENTS)
        assert_bit_equal(weights(run.folder), reference)


def test_damaged_bytes_never_become_numbers(tmp_path: Path, reference: Any) -> None:
    with running(tmp_path) as run:
        run.until(lambda: rounds_trained(run.folder) >= 5, "the first rounds")
        run.links(corrupt_every=12_000)
        run.until(lambda: run.count(lambda proxy: proxy.up.damaged + proxy.down.damaged) >= 30, "30 flipped bits", 120)
        run.links(corrupt_every=None)
        run.progress(3)
        assert run.ended() == ALL_WELL
        assert run.events("damaged"), "some were found by their checksum only"
        assert_bit_equal(weights(run.folder), reference)


def test_a_silent_link_that_comes_back_before_and_after_the_connection_is_given_up(
    tmp_path: Path, reference: Any
) -> None:
    # The shortest pings there are: the server cuts a dead link after 5 + 10 s.
    with running(tmp_path, exchange__keepalive=5, exchange__waiting_notice=3) as run:
        run.until(lambda: rounds_trained(run.folder) >= 5, "the first rounds")
        link = run.proxies["cnn"]
        link.up.hold = link.down.hold = True
        run.until(
            lambda: run.state().waiting_for == ["cnn"] and seconds(run.state().waiting_time) > 1.5, "cnn is waited for"
        )
        assert run.connected() == set(STUDENTS), "a short silence ends no session"
        link.up.hold = link.down.hold = False
        run.progress(10)
        assert run.events("disconnected") == []

        # Now nothing arrives any more, either way, nor will it: neither side is told.
        link.up.swallow = link.down.swallow = True
        run.until(lambda: run.connected() == {"mlp"}, "the server frees the session")
        assert run.events("disconnected") == ["cnn"]
        link.up.swallow = link.down.swallow = False
        run.progress(10)
        assert run.ended() == ALL_WELL
        assert_bit_equal(weights(run.folder), reference)


def test_a_reader_that_does_not_read_is_cut_off_and_nobody_else_notices(tmp_path: Path, reference: Any) -> None:
    """It is a student of its own, and skipped, so the others' targets are those of a run without it."""
    changes = {
        "exchange__on_absence": "proceed",
        "exchange__round_deadline": 4.0,
        # It says nothing for as long as the others need to start, and must not be evicted for that.
        "exchange__evict_after": 100.0,
        "exchange__keepalive": 120.0,
        "exchange__give_up_after": 200.0,
        "students": [
            *(each for each in EXPERIMENT["students"] if each["name"] in STUDENTS),
            {"name": "vit", "model": "vit"},
        ],
    }
    with running(tmp_path, workers=(), **changes) as run:
        experiment = load(run.path)
        # Of what is sent to it little fits on the way; the rest the server must hold, or not.
        small = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
        with grpc.insecure_channel(run.address, options=small) as channel:
            stub = DistillationServiceStub(channel)
            session = stub.Join(_join_request(experiment, "vit"), timeout=20).session_id
            sent: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
            metadata = ((SESSION_KEY, format_session(session)),)
            stream = stub.Exchange(iter(sent.get, None), metadata=metadata)
            try:
                for name in STUDENTS:
                    run.work(name)
                run.until(lambda: rounds_trained(run.folder) >= 150, "rounds to ask for")
                assert run.connected() == {*STUDENTS, "vit"}
                for number in range(140):
                    message = _contribution(run.folder, number)
                    sent.put(pb.ExchangeRequest.FromString(append_checksum(message, str(session))))
                run.until(lambda: run.events("disconnected") == ["vit"], "it is cut off")
                run.until(lambda: all(each.poll() == 0 for each in run.workers.values()), "the others' end")
            finally:
                sent.put(None)
                stream.cancel()
        assert run.events("disconnected") == ["vit"]
        assert set(run.events("skipped")) == {"vit"}
        assert rounds_trained(run.folder) == ROUNDS
        assert_bit_equal(weights(run.folder), reference)


def _join_request(experiment: Experiment, participant: str) -> pb.JoinRequest:
    """Return what a worker joins with."""
    dataset = data.load(experiment.plan(participant).data, torch.device("cpu"))
    return pb.JoinRequest(
        protocol_version=PROTOCOL_VERSION,
        participant=participant,
        experiment_sha256=identity_sha256(experiment),
        data=pb.DataFingerprint(
            data_sha256=bytes.fromhex(dataset.fingerprint()), train_samples=len(dataset.train), classes=dataset.classes
        ),
        outputs={"logits": pb.Shape(dims=[dataset.classes])},
        total_rounds=ROUNDS,
        total_steps=ROUNDS,
    )


def _contribution(folder: Path, number: int) -> pb.ExchangeRequest:
    """Return a contribution to a closed round, about its samples."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
        ((ids, labels),) = journal.execute("SELECT ids, labels FROM rounds WHERE round = ?", (number,)).fetchall()
    size = [len(ids) // 8]
    samples = pb.SampleOutputs(
        ids=pb.Tensor(dtype=pb.DTYPE_INT64, shape=size, data=ids),
        labels=pb.Tensor(dtype=pb.DTYPE_INT64, shape=size, data=labels),
        outputs={"logits": encode(torch.zeros(*size, 10), "float32")},
    )
    return pb.ExchangeRequest(round=number, batch=samples)


def test_a_server_gone_for_good_then_two_workers_of_one_student(tmp_path: Path, reference: Any) -> None:
    with running(tmp_path, exchange__give_up_after=3) as run:
        run.until(lambda: rounds_trained(run.folder) >= 20, "twenty rounds")
        run.server.kill()
        for name, worker in run.workers.items():
            output, _ = worker.communicate(timeout=60)
            assert worker.returncode == ExitCode.UNREACHABLE, output
            # counted from the break of the connection, a moment after the wait began
            assert re.search(r"went away and did not come back within (3|2\.\d) s", output), output
            assert "Traceback" not in output
            assert int(weights(run.folder)[name]["step"]) >= 20, "it was saved"

        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(run.folder / "students" / "cnn", elsewhere / "students" / "cnn")
        experiment_file(tmp_path, **CHANGES)  # the usual patience: the newer worker may take its time to come up
        run.serve()
        for name in STUDENTS:
            run.work(name)
        run.progress(10)
        run.links(delay=0.15)  # the run must not be over before the newer one is there
        older = run.workers["cnn"]
        run.work("cnn", elsewhere)
        output, _ = older.communicate(timeout=60)
        run.links(delay=PACE)
        assert older.returncode == ExitCode.SUPERSEDED, output
        assert "a newer worker of participant 'cnn' has joined" in output
        assert run.ended() == ALL_WELL
        assert run.events("superseded") == ["cnn"]
        shutil.rmtree(run.folder / "students" / "cnn")
        shutil.copytree(elsewhere / "students" / "cnn", run.folder / "students" / "cnn")
        assert_bit_equal(weights(run.folder), reference)
