"""Finds what a file of weights is by its bytes, whatever its suffix says."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

__all__ = ["SAFETENSORS", "TORCH", "kind_of"]

SAFETENSORS = "safetensors"
TORCH = "a file of torch.save"

_STATE_DICT = "save the state_dict() of the model that it was made from"
_LARGEST_HEADER = 100_000_000
"""Bytes that safetensors allows for a header."""

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled number that begins a file of torch.save from before it wrote zip archives."""

_BEGINNINGS = {
    b"\x80": "a pickle that torch.save did not write, or is damaged; it is never unpickled",
    b"\x93NUMPY": "an array of NumPy",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"\xfd7zXZ": "compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"version https://git-lfs": "a pointer of Git LFS; get the file itself with `git lfs pull`",
}


def kind_of(file: Path) -> str:
    """Return :data:`SAFETENSORS` or :data:`TORCH` for a file that may hold weights, or else what it is and what to do.

    Raises:
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(4096)
    if not head:
        return "an empty file"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= _LARGEST_HEADER:
        return SAFETENSORS if header + 8 <= size else "cut off within the header of safetensors; get it again"
    if head.startswith(_LEGACY):
        return TORCH
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_archive(file)
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if tarfile.is_tarfile(file):
        return "a tar archive; unpack it"
    return _kind_of_text(head) or "of no known kind, or damaged"


def _kind_of_archive(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "damaged: a zip archive that is cut off or changed; get it again"
    inner = {name.partition("/")[2] for name in names}
    if {"models/model.json", "archive_format"} & inner or "serialized_exported_program.json" in {*names, *inner}:
        beside = file.with_suffix(".safetensors")
        return (
            f"an exported program; give {beside} beside it"
            if beside.is_file()
            else f"an exported program; {_STATE_DICT}"
        )
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return f"a TorchScript program; {_STATE_DICT}"
    if "data.pkl" in inner:
        return TORCH
    if all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays"
    return "a zip archive that torch.save did not write"


def _kind_of_text(head: bytes) -> str | None:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return None
        text = head[: error.start].decode("utf-8")
    if any(ord(letter) < 32 and not letter.isspace() for letter in text):
        return None
    page = text.lstrip().lower().startswith(("<!doctype html", "<html"))
    return "a web page; get the file itself" if page else "a text file"
