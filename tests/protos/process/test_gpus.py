"""Which GPUs an environment grants, how CUDA is told of one alone, and how participants are spread over them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.process import gpus
from codistill.process.gpus import gpu_environment, gpu_names, granted, spread

MIG = ["MIG-0e0c", "MIG-1f1d", "MIG-2a2b"]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a stand-in for `nvidia-smi`, first on the path; it prints the file `listing` beside it."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\n[ "$*" = -L ] && exec cat {tmp_path}/listing\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "listing"


@pytest.mark.parametrize(
    ("environment", "grant"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a"}, "CUDA_VISIBLE_DEVICES=MIG-a"),
        *(
            ({"CUDA_VISIBLE_DEVICES": nothing}, None)
            for nothing in ("", "-1", " ", "none", "NoDevFiles", "-1,0", "nonsense")
        ),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-a"}, "NVIDIA_VISIBLE_DEVICES=GPU-a"),
        ({"NVIDIA_VISIBLE_DEVICES": "0"}, "NVIDIA_VISIBLE_DEVICES=0"),
        ({"NVIDIA_VISIBLE_DEVICES": "0:1"}, "NVIDIA_VISIBLE_DEVICES=0:1"),  # a MIG device
        ({"NVIDIA_VISIBLE_DEVICES": "nvidia.com/gpu=0"}, "NVIDIA_VISIBLE_DEVICES=nvidia.com/gpu=0"),
        *(({"NVIDIA_VISIBLE_DEVICES": nothing}, None) for nothing in ("", "void", "none", "all")),
        ({"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "GPU-a"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_what_grants_a_gpu(environment: dict[str, str], grant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "device_files", list)
    assert granted(environment) == grant


@pytest.mark.parametrize(
    "environment", [{"NVIDIA_VISIBLE_DEVICES": "all"}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}], ids=str
)
def test_a_container_that_has_a_gpus_file_was_granted_it(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "device_files", lambda: ["/dev/nvidia3"])
    assert granted(environment) == "/dev/nvidia3"
    assert granted({}) is None, "a machine's own GPU is granted to nobody"
    assert granted({**environment, "CUDA_VISIBLE_DEVICES": ""}) is None


@pytest.mark.parametrize(
    ("environment", "count", "names"),
    [
        ({}, 0, []),
        ({}, 2, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "3, 1"}, 2, ["3", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 2, ["GPU-a", "GPU-b"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,7"}, 2, ["0", "1"]),  # CUDA ends at the first that is not there
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1, ["0"]),
        ({"CUDA_VISIBLE_DEVICES": "0,nonsense,1"}, 1, ["0"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, []),
        ({"CUDA_VISIBLE_DEVICES": ",".join(MIG)}, 1, MIG),
        ({"NVIDIA_VISIBLE_DEVICES": ",".join(MIG)}, 1, MIG),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 2, ["0", "1"]),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 1, ["0"]),
    ],
)
def test_the_names_of_gpus(environment: dict[str, str], count: int, names: list[str]) -> None:
    assert gpu_names({"PATH": "/nowhere", **environment}, count) == names


LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6)
  MIG 3g.20gb     Device  0: (UUID: MIG-0e0c)
  MIG 3g.20gb     Device  1: (UUID: MIG-1f1d)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-6e6cb1e7)
  MIG 7g.40gb     Device  0: (UUID: MIG-2a2b)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-7f7dc2f8)
"""


def test_mig_devices_stand_for_the_gpus_that_they_divide(nvidia_smi: Path) -> None:
    nvidia_smi.write_text(LISTING)
    assert gpu_names(os.environ, 3) == [*MIG, "GPU-7f7dc2f8"]
    assert gpu_names({**os.environ, "CUDA_VISIBLE_DEVICES": "1"}, 1) == ["1"]
    assert gpu_names(os.environ, 0) == [], "a build for the CPU uses none"


@pytest.mark.parametrize(
    "listing", ["GPU 0: NVIDIA H100 (UUID: GPU-a)\nGPU 1: NVIDIA H100 (UUID: GPU-b)\n", "nonsense", ""]
)
def test_whole_gpus_have_their_numbers(listing: str, nvidia_smi: Path) -> None:
    nvidia_smi.write_text(listing)
    assert gpu_names(os.environ, 2) == ["0", "1"]


def test_a_driver_whose_tool_fails_has_no_mig(nvidia_smi: Path) -> None:
    assert not nvidia_smi.exists()
    assert gpu_names(os.environ, 2) == ["0", "1"]


@pytest.mark.parametrize(
    ("wanted", "count", "numbers"),
    [
        (["auto", "cuda", "auto"], 3, [0, 1, 2]),
        (["cpu", "auto", "cpu", "auto"], 2, [None, 0, None, 1]),
        (["cuda:1", "auto", "auto"], 2, [1, 0, 0]),
        (["auto", "auto", "cuda:0"], 2, [1, 0, 0]),
        (["auto", "cuda"], 0, [None, None]),
        (["cuda:5", "auto"], 2, [5, 0]),
        (["auto"] * 5, 2, [0, 1, 0, 1, 0]),
    ],
)
def test_participants_are_spread(wanted: list[str], count: int, numbers: list[int | None]) -> None:
    assert spread(wanted, count) == numbers


@given(st.lists(st.sampled_from(["auto", "cuda", "cpu", "cuda:0", "cuda:1"]), max_size=12), st.integers(2, 5))
def test_no_two_share_a_gpu_while_another_is_idle(wanted: list[str], count: int) -> None:
    numbers = spread(wanted, count)
    loads = Counter(number for number in numbers if number is not None)
    free = Counter(number for number, device in zip(numbers, wanted, strict=True) if device in ("auto", "cuda"))
    for number, chosen_freely in free.items():
        if chosen_freely:
            assert loads[number] - 1 <= min(loads[each] for each in range(count))
    assert [number is None for number in numbers] == [device == "cpu" for device in wanted]


def test_a_process_is_shown_its_own_gpu_alone() -> None:
    assert gpu_environment(MIG, 1) == {"CUDA_VISIBLE_DEVICES": "MIG-1f1d", "CODISTILL_GPU": "1"}
    assert gpu_environment(["3", "1"], 0) == {"CUDA_VISIBLE_DEVICES": "3", "CODISTILL_GPU": "0"}
    assert gpu_environment(["0"], None) == gpu_environment([], 0) == {}
