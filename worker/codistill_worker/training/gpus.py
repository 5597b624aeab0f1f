"""The GPUs of this process: which to train on, that it can be used, and why there is none.

A worker leaves itself one GPU before CUDA starts, and makes it the current one. So it has no context on another.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from codistill.config.experiment import Experiment
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.gpus import (
    OWN_GPU_VARIABLE,
    VISIBLE_VARIABLE,
    device_files,
    gpu_environment,
    gpu_names,
    granted,
    spread,
)
from codistill_worker.errors import ConfigurationError, is_devices_fault, is_out_of_memory

__all__ = ["check_gpus", "choose_device", "choose_devices", "take_device", "visible_gpus"]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process could use, each as `CUDA_VISIBLE_DEVICES` names it alone."""
    # A build for the CPU asks no driver. A build with CUDA is not asked first where it would start CUDA.
    if not (torch.backends.cuda.is_built() or torch.cuda.device_count()):
        return []
    if "MIG-" in os.environ.get(VISIBLE_VARIABLE, ""):
        return gpu_names(os.environ, 1)
    return gpu_names(os.environ, torch.cuda.device_count())


def choose_device(wanted: str, number: int, count: int | None = None) -> torch.device:
    """Return the device to train on.

    Args:
        wanted: `training.device`; "auto" is a GPU, or the CPU where no GPU is there and none was granted.
        number: of the GPU to take for "auto" and "cuda"; see :func:`codistill.process.gpus.spread`.
        count: how many GPUs there are; None asks.

    Raises:
        ConfigurationError: the device is not there, or a GPU was granted to this process and cannot be found.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    count = len(visible_gpus()) if count is None else count
    if not count:
        grant = granted(os.environ)
        if wanted == "auto" and grant is None:
            return torch.device("cpu")
        if wanted == "auto":
            raise ConfigurationError(
                f"training.device: 'auto' takes the GPU that {grant} grants, but PyTorch finds no GPU here: {_why_none()}; "
                "to train on the CPU, set training.device: cpu"
            )
        raise ConfigurationError(
            f"training.device: {wanted!r}, but PyTorch finds no GPU here: {_why_none()}; allowed: "
            f"{'auto, cpu' if grant is None else 'cpu'}"
        )
    _, _, suffix = wanted.partition(":")
    index = int(suffix) if suffix else number % count
    if index >= count:
        allowed = ", ".join(f"cuda:{present}" for present in range(count))
        there = "is 1 GPU" if count == 1 else f"are {count} GPUs"
        raise ConfigurationError(f"training.device: {wanted!r}, but there {there}; allowed: auto, cpu, {allowed}")
    return torch.device("cuda", index)


def choose_devices(experiment: Experiment) -> list[torch.device]:
    """Return the device of each participant of an experiment that one process trains.

    With MIG, CUDA shows one process a single device. So its own count is asked, which makes no context.

    Raises:
        ConfigurationError: a device is not there; see :func:`choose_device`.
    """
    count = len(visible_gpus())
    if count:
        count = _started_count()
    numbers = spread(experiment.devices, count)
    return [
        choose_device(wanted, number or 0, count) for wanted, number in zip(experiment.devices, numbers, strict=True)
    ]


def take_device(experiment: Experiment, participant: str) -> torch.device:
    """Leave this process the one GPU that a participant trains on, and return the device; call it before CUDA is started.

    Raises:
        ConfigurationError: the device is not there; see :func:`choose_device`.
        PeerError: it is there and cannot be used.
    """
    position = experiment.participants.index(participant)
    wanted = experiment.devices[position]
    names = visible_gpus()
    chosen = OWN_GPU_VARIABLE in os.environ  # by the command that started this process, among those that it saw itself
    if chosen and ":" in wanted:
        wanted = "cuda"
    number = 0 if chosen else spread(experiment.devices, len(names))[position] or 0
    device = choose_device(wanted, number, len(names))
    if device.type == "cuda":
        if not chosen:
            os.environ.update(gpu_environment(names, device.index))
        # Where the driver was asked already, it shows them all, whatever the variable says by now.
        device = torch.device("cuda", 0 if _started_count() == 1 else int(os.environ[OWN_GPU_VARIABLE]))
    check_gpus([device])
    return device


def check_gpus(devices: Iterable[torch.device]) -> None:
    """Compute something on each GPU among some devices, and make the first one current.

    What the driver counts need not be usable. Page-locked memory would make a context on GPU 0 if another were not current.

    Raises:
        PeerError: one cannot be used.
    """
    for device in sorted({each for each in devices if each.type == "cuda"}, key=lambda each: -each.index):
        try:
            torch.cuda.set_device(device)
            torch.ones(1, device=device).add_(1).item()
        except (RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                code = ExitCode.OUT_OF_MEMORY
            else:
                code = ExitCode.ERROR if is_devices_fault(error) else ExitCode.CONFIGURATION
            raise PeerError(
                f"training.device: {device}{_described()} cannot be used: {_first_line(error)}; see nvidia-smi, give another "
                f"by {VISIBLE_VARIABLE}, or set training.device: cpu",
                code,
            ) from error


def _started_count() -> int:
    """Start CUDA, and return how many GPUs it shows this process; no context is made."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"training.device: CUDA cannot be started{_described()}: {_first_line(error)}; see nvidia-smi, or set "
            "training.device: cpu"
        ) from error
    return torch.cuda.device_count()


def _described() -> str:
    visible = os.environ.get(VISIBLE_VARIABLE)
    return "" if visible is None else f" ({VISIBLE_VARIABLE}={visible})"


def _why_none() -> str:
    """Return half a sentence on why PyTorch finds no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this PyTorch ({torch.__version__}) is a build for the CPU; install one with CUDA, or use an image with it"
        )
    if torch.version.hip is None and not device_files():
        return "there is no NVIDIA driver, as /dev/nvidia0 is missing; install it, or start the container with NVIDIA's toolkit"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return f"no device is visible{_described()}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
