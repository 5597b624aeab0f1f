"""Image files: decoded, streamed or kept, and named where they are broken."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.peer.draws import permutation
from codistill_worker.data import sources
from codistill_worker.data.dataset import MemorySplit, StreamedSplit
from codistill_worker.data.sources import Arrays, Files
from codistill_worker.errors import ConfigurationError
from worker.data.support import CPU, TINY, everything, folder


def test_streamed_and_kept_images_are_the_same(two_classes: Path) -> None:
    kept = folder(two_classes, held_out=3)
    batches = [torch.tensor([3, 1]), torch.tensor([8]), torch.tensor([0, 1, 2, 3]), torch.tensor([5, 5])]
    for workers in (0, 1, 3):
        streamed = folder(two_classes, held_out=3, memory_limit_gib=TINY, loader_workers=workers)
        assert isinstance(streamed.train, StreamedSplit)
        assert isinstance(kept.train, MemorySplit)
        assert streamed.fingerprint() == kept.fingerprint()
        assert (streamed.mean, streamed.std) == (kept.mean, kept.std)
        for one, other in (
            (kept.train, streamed.train),
            (kept.test, streamed.test),
            (kept.held_out, streamed.held_out),
        ):
            assert torch.equal(everything(one), everything(other))
        for one, other in zip(kept.train.stream(batches), streamed.train.stream(iter(batches)), strict=True):
            assert torch.equal(one, other)


def test_arrays_that_are_streamed_and_kept_are_the_same() -> None:
    pixels = torch.arange(200 * 3 * 5 * 7).remainder(251).to(torch.uint8).view(3, 200, 5, 7).transpose(0, 1)
    arrays = Arrays(pixels, torch.zeros(200, dtype=torch.int64))
    batches = list(permutation(3, 200).split(64))
    kept = arrays.split(CPU, on_device=True, threads=None)
    for threads in (0, 1, 3):
        streamed = StreamedSplit(arrays.read, arrays.shape, arrays.labels, CPU, threads)
        with torch.inference_mode(threads == 3):  # an evaluation streams in this mode, which the threads do not share
            for one, other in zip(kept.stream(batches), streamed.stream(iter(batches)), strict=True):
                assert torch.equal(one, other)


def test_an_id_beyond_the_arrays_is_an_error() -> None:
    arrays = Arrays(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        StreamedSplit(arrays.read, arrays.shape, arrays.labels, CPU, 2).images(torch.tensor([4]))


def test_arrays_are_streamed_to_other_devices_alone() -> None:
    arrays = Arrays(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    assert isinstance(arrays.split(CPU, on_device=False, threads=2), MemorySplit)
    assert isinstance(arrays.split(torch.device("meta"), on_device=False, threads=2), StreamedSplit)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (6, 6), (64, 16)])
def test_images_are_read_by_a_thread_for_each_core(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    monkeypatch.setattr(sources.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    files = Files(["a.png"], torch.zeros(1, dtype=torch.int64), 6)
    by_cores, as_told = (files.split(CPU, on_device=False, threads=told) for told in (None, 3))
    assert isinstance(by_cores, StreamedSplit)
    assert isinstance(as_told, StreamedSplit)
    assert (by_cores._threads, as_told._threads) == (threads, 3)


@pytest.mark.parametrize("settings", [{}, {"memory_limit_gib": TINY}])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n cut short"])
def test_a_broken_file_is_named(two_classes: Path, content: bytes, settings: dict[str, Any]) -> None:
    (two_classes / "train" / "dog" / "3.png").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"data.root: .*dog/3.png cannot be decoded: .*; replace or remove it"):
        folder(two_classes, **settings)


def test_a_truncated_file_is_named(two_classes: Path) -> None:
    path = two_classes / "test" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(ConfigurationError, match=r"cat/1\.png cannot be decoded"):
        folder(two_classes)


def test_a_long_load_says_how_far_it_is(
    two_classes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sources, "_FILES_PER_JOB", 2)
    with caplog.at_level(logging.INFO):
        folder(two_classes)
    lines = [record.getMessage() for record in caplog.records if record.name == sources.__name__]
    assert lines[0].startswith("decoded 2 of 12 images, about ")
    assert not any("12 of 12" in line for line in lines)
