"""The kernels that a process is set to; what a GPU would do is read from torch's settings."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from codistill.config.training import Training
from codistill_worker.training.devices import forward_pass, set_kernels

GPU, CPU = torch.device("cuda"), torch.device("cpu")
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def settings() -> dict[str, Any]:
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "benchmark": cudnn.benchmark,
        "cudnn deterministic": cudnn.deterministic,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "products": cuda.matmul.allow_tf32,
        "convolutions": cudnn.allow_tf32,
        "precision": torch.get_float32_matmul_precision(),
    }
    if hasattr(cudnn, "conv"):
        newer: Any = cudnn
        found |= {"newer": (newer.conv.fp32_precision, newer.rnn.fp32_precision, cuda.matmul.fp32_precision)}
    return found


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CUBLAS, raising=False)
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)
    set_kernels(Training(epochs=1, threads=threads))


def expected(*, threads: int = 1, tf32: bool = False) -> dict[str, Any]:
    found = {
        "threads": threads,
        "benchmark": False,
        "cudnn deterministic": True,
        "deterministic": True,
        "warns only": True,
        "fills memory": False,
        "products": tf32,
        "convolutions": tf32,
        "precision": "high" if tf32 else "highest",
    }
    newer = "tf32" if tf32 else "ieee"
    return found | ({"newer": (newer, newer, newer)} if hasattr(torch.backends.cudnn, "conv") else {})


@pytest.mark.parametrize("tf32", [False, True])
def test_kernels_are_deterministic_and_rounded_as_the_experiment_says(tf32: bool) -> None:
    for wanted in (tf32, not tf32, tf32):  # as of one process after another's experiment
        set_kernels(Training(epochs=1, threads=2, tf32=wanted))
    assert settings() == expected(threads=2, tf32=tf32)


def test_what_a_users_module_sets_does_not_last() -> None:
    set_kernels(Training(epochs=1))
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(3)
    set_kernels(Training(epochs=1))
    assert settings() == expected()


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older names alone")
def test_what_a_users_module_sets_by_the_newer_names_does_not_last() -> None:
    backends: Any = torch.backends
    backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = "tf32"
    backends.cuda.matmul.fp32_precision = "tf32"
    set_kernels(Training(epochs=1))
    assert settings() == expected()


@pytest.mark.parametrize(
    ("given", "used"),
    [(None, ":4096:8"), ("", ":4096:8"), (":0:0", ":4096:8"), (":16:8", ":16:8"), (":4096:8", ":4096:8")],
)
def test_the_workspaces_of_cublas(given: str | None, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is not None:
        monkeypatch.setenv(CUBLAS, given)
    set_kernels(Training(epochs=1))
    assert os.environ[CUBLAS] == used
    child = subprocess.run(  # a loader's process inherits it
        [sys.executable, "-c", f"import os; print(os.environ['{CUBLAS}'])"], capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == used


def test_an_operation_without_a_deterministic_kernel_warns() -> None:
    """`put_` is one on a CPU too."""
    set_kernels(Training(epochs=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        try:
            torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
        finally:
            torch.set_warn_always(False)
    assert any("put_" in str(each.message) and "deterministic" in str(each.message) for each in caught)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_attention_on_a_gpu_is_not_fused(precision: str) -> None:
    before = fused()
    training = Training(epochs=1, precision=precision)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast finds no GPU
        with forward_pass(GPU, training):
            assert fused() == (False, False, False, True)
    assert fused() == before


def test_attention_on_a_cpu_stays_as_it_is() -> None:
    before, x = fused(), torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    expected_value = functional.scaled_dot_product_attention(x, x, x)
    with forward_pass(CPU, Training(epochs=1)):
        assert fused() == before
        assert torch.equal(functional.scaled_dot_product_attention(x, x, x), expected_value)


def fused() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )
