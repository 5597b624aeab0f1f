"""The GPUs of a process, with a driver that is a stand-in: which is taken, how it is tried, and why there is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from codistill.config.experiment import Experiment
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill_worker.errors import ConfigurationError
from codistill_worker.participant import describe_device
from codistill_worker.training import gpus
from codistill_worker.training.gpus import check_gpus, choose_device, choose_devices, take_device, visible_gpus

Tiny = Callable[..., Experiment]


class Driver:
    """A driver and PyTorch's view of it.

    Attributes:
        listed: how many GPUs are counted before CUDA is started.
        shown: how many CUDA shows once it is started; None follows `CUDA_VISIBLE_DEVICES`, as CUDA does.
        calls: what was asked of CUDA, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.listed = 0
        self.shown: int | None = None
        self.started = False
        self.fails: Exception | None = None
        self.calls: list[str] = []
        ones = torch.ones

        def allocate(*shape: Any, device: Any = None, **named: Any) -> torch.Tensor:
            if device is not None and torch.device(device).type == "cuda":
                self.calls.append(f"compute on {device}")
                if self.fails is not None:
                    raise self.fails
                device = None
            return ones(*shape, device=device, **named)

        monkeypatch.setattr(torch, "ones", allocate)
        monkeypatch.setattr(torch.cuda, "device_count", self.count)
        monkeypatch.setattr(torch.cuda, "init", self.start)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: self.calls.append(f"make {device} current"))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")

    def count(self) -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        named = self.listed if visible is None else min(self.listed, len([each for each in visible.split(",") if each]))
        return self.shown if self.started and self.shown is not None else named

    def start(self) -> None:
        self.calls.append("start")
        self.started = True


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "KUBERNETES_SERVICE_HOST", "CODISTILL_GPU"):
        monkeypatch.setenv(name, "")  # so that what is set by the tested code is undone too
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi
    return Driver(monkeypatch)


def on(tiny: Tiny, *devices: str) -> Experiment:
    """Return an experiment whose students s0, s1, ... train on some devices."""
    students = [
        {"name": f"s{position}", "model": "mlp", "training": {"device": device}}
        for position, device in enumerate(devices)
    ]
    return tiny(distillation={"method": "dml"}, students=students)


@pytest.mark.parametrize(
    ("count", "wanted", "position", "device"),
    [
        (0, "auto", 3, "cpu"),
        (0, "cpu", 0, "cpu"),
        (4, "cpu", 1, "cpu"),
        (2, "auto", 0, "cuda:0"),
        (2, "auto", 3, "cuda:1"),
        (2, "cuda", 2, "cuda:0"),
        (2, "cuda:1", 0, "cuda:1"),
    ],
)
def test_devices(count: int, wanted: str, position: int, device: str, driver: Driver) -> None:
    driver.listed = count
    assert choose_device(wanted, position) == torch.device(device)
    assert not driver.calls, "the driver is asked, and CUDA is not started"


@pytest.mark.parametrize(
    ("count", "wanted", "text"),
    [
        (0, "cuda", "training.device: 'cuda', but PyTorch finds no GPU here: "),
        (0, "cuda:0", "training.device: 'cuda:0', but PyTorch finds no GPU here: "),
        (1, "cuda:1", "training.device: 'cuda:1', but there is 1 GPU; allowed: auto, cpu, cuda:0"),
        (2, "cuda:2", "training.device: 'cuda:2', but there are 2 GPUs; allowed: auto, cpu, cuda:0, cuda:1"),
    ],
)
def test_devices_that_are_not_there(count: int, wanted: str, text: str, driver: Driver) -> None:
    driver.listed = count
    with pytest.raises(ConfigurationError) as refused:
        choose_device(wanted, 0)
    assert str(refused.value).startswith(text)
    assert str(refused.value).count("allowed: ") == 1
    assert refused.value.code is ExitCode.CONFIGURATION


# --- a GPU that was granted


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CUDA_VISIBLE_DEVICES", "0"), ("CUDA_VISIBLE_DEVICES", "MIG-a"), ("NVIDIA_VISIBLE_DEVICES", "GPU-a")],
)
@pytest.mark.parametrize(
    ("cuda", "files", "why"),
    [
        (None, [], f"this PyTorch ({torch.__version__}) is a build for the CPU; install one with CUDA"),
        ("13.0", [], "there is no NVIDIA driver, as /dev/nvidia0 is missing"),
        ("13.0", ["/dev/nvidia0"], "The NVIDIA driver on your system is too old"),
    ],
)
def test_auto_requires_a_gpu_that_was_granted_and_says_why_there_is_none(
    variable: str,
    value: str,
    cuda: str | None,
    files: list[str],
    why: str,
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore lines.")

    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.setattr(gpus, "device_files", lambda: files)
    assert driver.count() == 0
    with pytest.raises(ConfigurationError) as refused:
        choose_device("auto", 0)
    assert str(refused.value).startswith(
        f"training.device: 'auto' takes the GPU that {variable}={value} grants, but PyTorch finds no GPU here: {why}"
    )
    assert str(refused.value).endswith("; to train on the CPU, set training.device: cpu")
    assert "\n" not in str(refused.value)
    assert choose_device("cpu", 0) == torch.device("cpu")


def test_a_grant_of_devices_that_are_not_there(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpus, "device_files", lambda: ["/dev/nvidia0"])
    with pytest.raises(
        ConfigurationError, match=r"no device is visible \(CUDA_VISIBLE_DEVICES=7\); to train on the CPU"
    ):
        choose_device("auto", 0)
    assert driver.calls == ["start"]


def test_hidden_gpus_are_no_grant(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    del driver
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "GPU-a")
    assert choose_device("auto", 0) == torch.device("cpu")


# --- a worker's own GPU


def test_a_worker_leaves_itself_one_gpu_and_makes_it_current_before_anything_else(tiny: Tiny, driver: Driver) -> None:
    driver.listed = 2
    assert take_device(on(tiny, "cpu", "auto", "auto"), "s2") == torch.device("cuda:0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert driver.calls == ["start", "make cuda:0 current", "compute on cuda:0"]
    assert describe_device(torch.device("cuda:0")) == "cuda:1 (NVIDIA H100)", "reports name the machine's GPU"


def test_a_worker_on_the_cpu_asks_nothing_of_cuda(tiny: Tiny, driver: Driver) -> None:
    driver.listed = 2
    assert take_device(on(tiny, "cpu", "auto"), "s0") == torch.device("cpu")
    assert not driver.calls
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:1"])
def test_a_worker_that_was_given_a_gpu_takes_it(
    wanted: str, tiny: Tiny, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.listed = 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-b")
    monkeypatch.setenv("CODISTILL_GPU", "1")
    assert take_device(on(tiny, "auto", wanted), "s1") == torch.device("cuda:0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-b"


def test_each_worker_has_a_mig_device_of_its_own_although_cuda_shows_one(
    tiny: Tiny, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.listed = driver.shown = 1
    taken: list[str] = []
    for name in ("s0", "s1", "s2"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b,MIG-c")
        monkeypatch.delenv("CODISTILL_GPU", raising=False)
        assert take_device(on(tiny, "auto", "cuda:2", "auto"), name) == torch.device("cuda:0")
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert taken == ["MIG-a", "MIG-c", "MIG-b"]


def test_where_cuda_had_been_started_the_number_counts(tiny: Tiny, driver: Driver) -> None:
    driver.listed = driver.shown = 2
    assert take_device(on(tiny, "auto", "auto"), "s1") == torch.device("cuda:1")
    assert driver.calls[1:] == ["make cuda:1 current", "compute on cuda:1"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"), ExitCode.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore"), ExitCode.ERROR),
        (RuntimeError("No CUDA GPUs are available"), ExitCode.CONFIGURATION),
    ],
)
def test_a_gpu_that_is_listed_and_cannot_be_used(error: Exception, code: ExitCode, driver: Driver) -> None:
    driver.fails = error
    with pytest.raises(PeerError) as refused:
        check_gpus([torch.device("cuda:1")])
    line = str(error).splitlines()[0]
    assert str(refused.value).startswith(f"training.device: cuda:1 cannot be used: {line}; see nvidia-smi")
    assert refused.value.code is code


def test_a_driver_that_cannot_be_started(tiny: Tiny, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA unknown error")

    driver.listed = 1
    monkeypatch.setattr(torch.cuda, "init", refuse)
    with pytest.raises(
        ConfigurationError,
        match=r"^training\.device: CUDA cannot be started \(CUDA_VISIBLE_DEVICES=0\): CUDA unknown error; see",
    ):
        take_device(on(tiny, "auto", "cpu"), "s0")


# --- one process for all


def test_one_process_spreads_its_participants_over_what_cuda_shows_it(tiny: Tiny, driver: Driver) -> None:
    driver.listed = 2
    experiment = on(tiny, "auto", "cpu", "cuda:0", "auto")
    assert list(map(str, choose_devices(experiment))) == ["cuda:1", "cpu", "cuda:0", "cuda:0"]
    driver.shown = 1  # with MIG on both
    assert list(map(str, choose_devices(experiment))) == ["cuda:0", "cpu", "cuda:0", "cuda:0"]


def test_one_process_tries_each_gpu_that_it_uses_and_none_besides(driver: Driver) -> None:
    check_gpus(torch.device(each) for each in ("cuda:2", "cpu", "cuda:1", "cuda:2"))
    assert driver.calls == [
        f"{act} cuda:{number}{rest}" for number in (2, 1) for act, rest in (("make", " current"), ("compute on", ""))
    ]


def test_a_build_for_the_cpu_sees_no_gpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert driver.count() == 0
    assert visible_gpus() == ([] if not torch.backends.cuda.is_built() else ["MIG-a", "MIG-b"])
