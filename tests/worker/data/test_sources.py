"""Image files: decoded, streamed or kept, and named where they are broken."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codistill_worker.data import sources
from codistill_worker.data.dataset import MemorySplit, StreamedSplit
from codistill_worker.data.sources import decode_image
from codistill_worker.errors import ConfigurationError
from worker.data.support import TINY, everything, folder


@pytest.mark.parametrize("size", [4, 20, 32])
@pytest.mark.parametrize("shape", [(20, 40), (40, 20), (10, 10)])
def test_other_sizes_are_resized_and_cut_to_the_centre(tmp_path: Path, size: int, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    out = np.empty((3, size, size), np.uint8)
    decode_image(str(path), out)
    height, width = (side * size // min(shape) for side in shape)
    whole = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - size) // 2, (width - size) // 2
    expected = whole[top : top + size, left : left + size].transpose(2, 0, 1)
    assert np.abs(out.astype(int) - expected).max() <= 1  # Pillow rounds between its two passes


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tif"
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    out = np.empty((3, 4, 4), np.uint8)
    decode_image(str(path), out)
    assert out.min() == 255


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
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("decoded 2 of 12 images, about ")
    assert not any("12 of 12" in line for line in lines)
