"""Image files become 8-bit RGB, or are refused by name."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from codistill_worker.data import decoding
from codistill_worker.data.decoding import decode_image
from codistill_worker.errors import ConfigurationError


def decoded(path: Path, size: int = 4) -> np.ndarray:
    out = np.empty((3, size, size), np.uint8)
    decode_image(str(path), out)
    return out


def rgb_of_grey(values: Any) -> list[list[list[int]]]:
    return np.broadcast_to(np.asarray(values, np.uint8), (3, 4, 4)).tolist()


def ramp(highest: int) -> np.ndarray:
    """16 values of shape [4, 4], from 0 to the highest."""
    return np.linspace(0, highest, 16).round().astype(np.int64).reshape(4, 4)


def tiff(pixels: bytes, **tags: int) -> bytes:
    """A 4×4 TIFF of one strip, grey; `tags` are bits, photometric and sample_format."""
    entries = [(256, 4), (257, 4), (258, tags.get("bits", 16)), (259, 1), (262, tags.get("photometric", 1))]
    entries += [(273, 8 + 2 + 12 * 10 + 4), (277, 1), (278, 4), (279, len(pixels))]
    entries.append((339, tags.get("sample_format", 1)))
    directory = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + directory + struct.pack("<L", 0) + pixels


def png(width: int, height: int) -> bytes:
    """A bi-level PNG of black pixels; 1 kB holds some 8 million of them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


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


@pytest.mark.parametrize("size", [6, 9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp", "gif", "ppm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_of_8_bits_are_those_of_pillow(tmp_path: Path, mode: str, suffix: str, size: int) -> None:
    path = tmp_path / f"image.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    with Image.open(path) as opened:
        box = (1.0, 0.0, 9.0, 8.0)
        expected = opened.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box)
    assert decoded(path, size).tobytes() == np.asarray(expected).transpose(2, 0, 1).tobytes()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    if suffix == "jp2" and not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(ramp(65535).astype(np.uint16)).save(path)
    assert decoded(path).tolist() == rgb_of_grey(ramp(255))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
@pytest.mark.parametrize("order", ["I;16", "I;16B"])
def test_16_bit_tiff_is_scaled_in_both_byte_orders(tmp_path: Path, order: str, compression: str | None) -> None:
    path = tmp_path / "image.tif"
    values = ramp(65535).astype("<u2" if order == "I;16" else ">u2")
    Image.frombytes(order, (4, 4), values.tobytes()).save(path, compression=compression)
    assert decoded(path).tolist() == rgb_of_grey(ramp(255))


@pytest.mark.parametrize("highest", [1000, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_pgm_is_scaled_by_its_own_highest_value(tmp_path: Path, highest: int, plain: bool) -> None:
    path = tmp_path / "image.pgm"
    values = ramp(highest)
    content = " ".join(map(str, values.flatten())).encode() if plain else values.astype(">u2").tobytes()
    path.write_bytes(b"%s 4 4 %d\n" % (b"P2" if plain else b"P5", highest) + content)
    assert np.abs(decoded(path).astype(int) - ramp(255)).max() <= 1  # rounded twice


def test_12_bit_tiff_is_scaled_by_4095(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    first, second = ramp(4095).reshape(-1, 2).T
    path.write_bytes(
        tiff(
            np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes(), bits=12
        )
    )
    assert decoded(path).tolist() == rgb_of_grey(ramp(255))


def test_white_is_zero_is_inverted(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(ramp(65535).astype("<u2").tobytes(), photometric=0))
    assert decoded(path).tolist() == rgb_of_grey(255 - ramp(255))
    path.write_bytes(tiff(ramp(255).astype(np.uint8).tobytes(), bits=8, photometric=0))
    assert decoded(path).tolist() == rgb_of_grey(255 - ramp(255))


def test_resizing_follows_scaling(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 12), 40_000, np.uint16)).save(tmp_path / "image.png")
    assert set(decoded(tmp_path / "image.png").flatten().tolist()) == {156}  # 40,000 / 257 = 155.6


@pytest.mark.parametrize("colour", [2, 4, 6])  # RGB, LA, RGBA
def test_16_bit_colour_keeps_its_high_byte(tmp_path: Path, colour: int) -> None:
    channels = {2: 3, 4: 2, 6: 4}[colour]
    values = np.full((4, 4, channels), 0x9C40, ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in (
        (b"IHDR", struct.pack(">LLBBBBB", 4, 4, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        content += struct.pack(">L", len(part)) + name + part + struct.pack(">L", zlib.crc32(name + part))
    (tmp_path / "image.png").write_bytes(content)
    assert set(decoded(tmp_path / "image.png").flatten().tolist()) == {0x9C}


@pytest.mark.parametrize(
    ("mode", "suffix", "message"),
    [
        ("I", "tif", r"mode I \(32-bit or signed integers\)"),
        ("F", "tif", r"mode F \(floating point\)"),
        ("LAB", "tif", r"mode LAB \(CIELab\)"),
        ("F", "pfm", r"mode F \(floating point\)"),
    ],
)
def test_pixels_without_a_defined_white_are_refused(tmp_path: Path, mode: str, suffix: str, message: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(
        ConfigurationError, match=rf"data\.root: .*image\.{suffix} has pixels of {message}; allowed: grey"
    ):
        decoded(path)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_integers_are_refused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(bytes(2 * bits), bits=bits, sample_format=2))
    with pytest.raises(ConfigurationError, match=r"image\.tif has pixels of mode .*signed integers\); allowed"):
        decoded(path)


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_a_palettes_transparency_is_dropped(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 10, 20, 30, 7, 7, 7])
    image.save(tmp_path / "image.png", transparency=transparency)
    assert decoded(tmp_path / "image.png")[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4), (50, 0) if mode == "LA" else (50, 50, 50, 0)).save(tmp_path / "image.png")
    assert set(decoded(tmp_path / "image.png").flatten().tolist()) == {50}


def test_an_orientation_in_exif_is_ignored(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    assert decoded(tmp_path / "image.png").tolist() == pixels.transpose(2, 0, 1).tolist()


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_the_first_of_several_frames_is_taken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    frames = [Image.new("RGB", (4, 4), (value,) * 3) for value in (40, 90, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    assert set(decoded(path).flatten().tolist()) == {40}


def test_the_format_is_that_of_the_content(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (40, 40, 40)).save(tmp_path / "image.jpg", format="PNG")
    assert set(decoded(tmp_path / "image.jpg").flatten().tolist()) == {40}


def test_no_program_is_started_for_postscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="EPS")
    (tmp_path / "image.png").write_bytes(buffer.getvalue())
    with pytest.raises(ConfigurationError, match="cannot be decoded: no image of a format"):
        decoded(tmp_path / "image.png")


@pytest.mark.parametrize(("width", "height"), [(12_000, 8_000), (13_000, 13_000), (32_768, 32_768), (2**31 - 1, 1)])
def test_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_rgb", None)
    path = tmp_path / "image.png"
    path.write_bytes(png(width, 1).replace(struct.pack(">LL", width, 1), struct.pack(">LL", width, height)))
    data = bytearray(path.read_bytes())
    data[29:33] = struct.pack(">L", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(ConfigurationError) as raised:  # a warning of Pillow's would be the error here
        decoded(path)
    assert str(raised.value) == (
        f"data.root: {path} has {width:,}×{height:,} pixels; allowed: at most 89,478,485 in one image; "
        "scale it down or remove it"
    )


def test_as_many_pixels_as_allowed_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image.png").write_bytes(png(40, 10))
    monkeypatch.setattr(decoding, "_MOST_PIXELS", 400)
    assert not decoded(tmp_path / "image.png").any()
    monkeypatch.setattr(decoding, "_MOST_PIXELS", 399)
    with pytest.raises(ConfigurationError, match="40×10 pixels; allowed: at most 399"):
        decoded(tmp_path / "image.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp", "webp", "pgm", "jp2"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    """Each of 200 damaged copies is decoded, or refused by name; no other error comes out."""
    generator = np.random.default_rng(0)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged[: generator.integers(1, len(content) + 1)] if generator.random() < 0.3 else damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                decoded(path)
            except ConfigurationError as error:
                assert f"image.{suffix}" in str(error)  # noqa: PT017 - most copies raise no error
