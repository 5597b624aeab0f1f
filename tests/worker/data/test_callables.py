"""A user's own data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.config.data import Data
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.plugins import LoadError
from codistill_worker.data import Dataset, load
from codistill_worker.data.dataset import StreamedSplit
from codistill_worker.errors import ConfigurationError
from worker.data.support import CPU, TINY, everything

# --- a user's own


def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    (tmp_path / "own_data.py").write_text("import numpy as np, torch\n" + source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_data", raising=False)


def load_own(**settings: Any) -> Dataset:
    return load(Data(dataset="own_data:make", **{"classes": 3, **settings}), CPU)


@pytest.mark.parametrize(
    "source",
    [
        """
def make():
    test = torch.full((3, 4, 4), 9, dtype=torch.uint8)
    return np.full((6, 4, 4), 7, np.uint8), [0, 1, 2] * 2, test, np.arange(3)
""",
        """
def make(data):
    train = torch.full((6, 1, 4, 4), data.classes + 4, dtype=torch.uint8)
    return [train, torch.arange(6) % 3, np.full((3, 1, 4, 4), 9, np.uint8), np.arange(3, dtype=np.int32)]
""",
        """
class make:
    def __new__(cls, *, size=4):
        train = np.broadcast_to(np.uint8(7), (6, 1, size, size))
        return train, (0, 1, 2, 0, 1, 2), np.full((3, 1, size, size), 9, np.uint8), [0, 1, 2]
""",
    ],
)
def test_a_callable_gives_arrays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    own(monkeypatch, tmp_path, source)
    data = load_own()
    assert everything(data.train).tolist() == torch.full((6, 1, 4, 4), 7).tolist()
    assert everything(data.test).tolist() == torch.full((3, 1, 4, 4), 9).tolist()
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.std == (1 / 255,)  # constant images, and nothing is divided by 0


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4", ">u2"]
)
@pytest.mark.parametrize(
    "made", ["np.array({}, '{}')", "torch.tensor(np.array({}, '{}').astype(np.dtype('{}').newbyteorder('=')))"]
)
def test_labels_are_integers_of_every_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, made: str
) -> None:
    labels = made.format("[2, 0, 1, 2]", kind, kind)
    own(monkeypatch, tmp_path, f"def make(): return (np.zeros((4, 4, 4), np.uint8), {labels}) * 2")
    data = load_own()
    assert data.train.labels.tolist() == [2, 0, 1, 2]
    assert data.train.labels.dtype is torch.int64


def test_arrays_may_be_turned_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own(
        monkeypatch,
        tmp_path,
        """
def make():
    images = np.broadcast_to(np.arange(4, dtype=np.uint8)[:, None, None], (4, 4, 4))
    return (images[::-1], np.array([0, 1, 2, 2], np.uint16)[::-1]) * 2
""",
    )
    data = load_own()
    assert everything(data.train)[:, 0, 0, 0].tolist() == [3, 2, 1, 0]
    assert data.train.labels.tolist() == [2, 2, 1, 0]


def test_arrays_beyond_the_limit_stay_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own(monkeypatch, tmp_path, "def make(): return (np.zeros((4, 4, 4), np.uint8), [0] * 4) * 2")
    meta = torch.device("meta")  # a device that nothing can be read back from shows where images are
    own_data = Data(dataset="own_data:make", classes=3, normalize={"mean": [0], "std": [1]}, memory_limit_gib=TINY)  # pyright: ignore[reportArgumentType]
    train = load(own_data, meta).train
    assert isinstance(train, StreamedSplit)
    assert train.images(torch.tensor([1])).device == meta


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make(a, b): pass", r"called with the `data` settings or with nothing, but its signature is \(a, b\)"),
        ("def make(): return 5", "returned int; expected"),
        ("def make(): return 1, 2, 3", r"returned tuple of 3; expected \(train_images, train_labels, test_images"),
        (
            "def make(): return (np.zeros((4, 4, 4)), [0] * 4) * 2",
            "train_images are float64; expected uint8, from 0 to 255",
        ),
        (
            "def make(): return (np.zeros((4, 4), np.uint8), [0] * 4) * 2",
            r"train_images have shape \[4, 4\]; expected \[N, C, H, W\]",
        ),
        (
            "def make(): return (np.zeros((4, 1, 4, 5), np.uint8), [0] * 4) * 2",
            r"shape \[4, 1, 4, 5\]; expected .* with H = W",
        ),
        ("def make(): return (np.zeros((0, 4, 4), np.uint8), []) * 2", r"shape \[0, 1, 4, 4\]; expected"),
        (
            "def make(): return (np.zeros((4, 4, 4), np.uint8), [.5] * 4) * 2",
            r"train_labels are float64 of shape \[4\]; expected integers",
        ),
        (
            "def make(): return (np.zeros((4, 4, 4), np.uint8), [[0]] * 4) * 2",
            r"train_labels are int64 of shape \[4, 1\]",
        ),
        ("def make(): return (np.zeros((4, 4, 4), np.uint8), [0] * 3) * 2", "train_images are 4 and .*train_labels 3"),
        (
            "def make(): return (np.zeros((4, 4, 4), np.uint8), [0, 1, 2, 3]) * 2",
            r"from 0 to 3; with data.classes: 3 they must lie in 0..2",
        ),
        ("def make(): return (np.zeros((4, 4, 4), np.uint8), [-1, 1, 2, 2]) * 2", "go from -1 to 2"),
        (
            "def make(): return (np.zeros((2, 4, 4), np.uint8), np.array([0, 2**64 - 1], np.uint64)) * 2",
            "go from 0 to 18446744073709551615; with data.classes: 3",
        ),
        (
            "def make(): return (np.zeros((2, 4, 4), np.uint8), np.array([True, False])) * 2",
            r"train_labels are bool of shape \[2\]; expected integers",
        ),
        (
            "def make(): return (np.zeros((4, 4, 4), np.uint8), ['a'] * 4) * 2",
            "train_labels are of type list and make no tensor",
        ),
        (
            "def make(): return np.zeros((4, 4, 4), np.uint8), [0] * 4, np.zeros((4, 5, 5), np.uint8), [0] * 4",
            "train_images are 1×4×4 and test_images 1×5×5",
        ),
    ],
)
def test_what_a_callable_returns_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str
) -> None:
    own(monkeypatch, tmp_path, source)
    with pytest.raises(ConfigurationError, match=message):
        load_own()


def test_a_callables_own_error_says_where_it_was_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own(monkeypatch, tmp_path, "def make(): raise KeyError('disk')")
    with pytest.raises(PeerError, match=r"data\.dataset: 'own_data:make': KeyError at .*own_data\.py:2: 'disk'$"):
        load_own()


def test_a_callable_that_ends_the_process_is_an_error_that_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own(monkeypatch, tmp_path, "import sys\ndef make():\n    print('prepared; run me again')\n    sys.exit()")
    with pytest.raises(
        LoadError, match=r"data\.dataset: 'own_data:make': it ended .*SystemExit at .*own_data\.py:5\); let"
    ):
        load_own()


@pytest.mark.parametrize(
    ("body", "line", "text"),
    [
        (
            "class Odd:\n    def __array__(s, *a, **k): raise KeyError('q')\ndef make(): return [Odd()] * 4",
            3,
            "KeyError at ",
        ),
        (
            "class Odd(tuple):\n    def __len__(s): raise SystemExit(0)\ndef make(): return Odd()",
            3,
            "it ended the process",
        ),
        (
            "class Odd(list):\n    @property\n    def __array__(s): raise GeneratorExit\ndef make(): return [Odd()] * 4",
            4,
            "GeneratorExit at ",
        ),
    ],
)
def test_what_a_callable_returned_raises_errors_of_the_data_set(
    body: str, line: int, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own(monkeypatch, tmp_path, body)
    with pytest.raises((ConfigurationError, LoadError)) as caught:
        load_own()
    assert str(caught.value).startswith(f"data.dataset: 'own_data:make': {text}")
    assert f"own_data.py:{line}" in str(caught.value)
    assert caught.value.code is ExitCode.CONFIGURATION


def test_what_a_callable_draws_follows_the_split_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own(
        monkeypatch,
        tmp_path,
        """
import random


def make():
    noise = torch.randint(0, 256, (6, 1, 4, 4)) * np.random.randint(1, 9) * random.randint(1, 9)
    return noise.to(torch.uint8), torch.arange(6) % 3, noise.to(torch.uint8)[:3], torch.arange(3)
""",
    )
    first = everything(load_own().train)
    torch.rand(3)
    assert torch.equal(everything(load_own().train), first)
    assert not torch.equal(everything(load_own(split_seed=1).train), first)
