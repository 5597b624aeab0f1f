"""Which GPUs an environment grants, how they are named to CUDA, and who trains on which; without torch."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["OWN_GPU_VARIABLE", "VISIBLE_VARIABLE", "device_files", "gpu_environment", "gpu_names", "granted", "spread"]

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
"""The environment variable by which CUDA shows a process some of the machine's GPUs, in this order."""

OWN_GPU_VARIABLE = "CODISTILL_GPU"
"""The environment variable of a process that sees one GPU alone: its number among those of the run, for reports."""

_CONTAINER_VARIABLE = "NVIDIA_VISIBLE_DEVICES"  # what NVIDIA's container toolkit and Kubernetes' device plugin put in
_POD_VARIABLE = "KUBERNETES_SERVICE_HOST"  # in every pod
_DEVICE = re.compile(
    r"\+?\d.*|(?:GPU|MIG)-.+|nvidia\.com/.+"
)  # a number, an id, or a name of the Container Device Interface
_MIG = "MIG-"
_LISTED = re.compile(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)")
_LIST_SECONDS = 30.0  # without its persistence daemon, the driver starts each GPU first


def granted(environment: Mapping[str, str]) -> str | None:
    """Return what grants this process a GPU, as "NAME=VALUE" or a device file; None where nothing does.

    `CUDA_VISIBLE_DEVICES` decides where it is set, as CUDA obeys it. Images are often built with
    `NVIDIA_VISIBLE_DEVICES=all`. There, and in a pod, device files tell whether GPUs were put into the container.
    """
    if VISIBLE_VARIABLE in environment:
        value = environment[VISIBLE_VARIABLE]
        return f"{VISIBLE_VARIABLE}={value}" if _entries(value) else None
    value = environment.get(_CONTAINER_VARIABLE, "")
    if _entries(value):
        return f"{_CONTAINER_VARIABLE}={value}"
    if value == "all" or _POD_VARIABLE in environment:
        return next(iter(device_files()), None)
    return None


def device_files() -> list[str]:
    """Return the files in /dev by which the processes here reach NVIDIA's GPUs."""
    return sorted(str(path) for pattern in ("nvidia[0-9]*", "dxg") for path in Path("/dev").glob(pattern))


def gpu_names(environment: Mapping[str, str], count: int) -> list[str]:
    """Return the GPUs of an environment, each as `CUDA_VISIBLE_DEVICES` names it alone.

    CUDA shows a process one MIG device, however many there are. So MIG devices are listed by their ids, which
    `nvidia-smi -L` prints.

    Args:
        environment: a process's environment.
        count: how many GPUs PyTorch counts in it.
    """
    if VISIBLE_VARIABLE in environment:
        visible = _entries(environment[VISIBLE_VARIABLE])
        return visible if _has_mig(visible) else visible[:count]
    if not count:
        return []
    for listed in (_entries(environment.get(_CONTAINER_VARIABLE, "")), _listed(environment)):
        if _has_mig(listed):
            return listed
    return [str(number) for number in range(count)]


def spread(wanted: Sequence[str], count: int) -> list[int | None]:
    """Return on which GPU each participant trains, from 0, and None for one on the CPU.

    A GPU by its number is taken as it is. All others go to a GPU that has the fewest participants so far.

    Args:
        wanted: `training.device` of each participant.
        count: how many GPUs there are.
    """
    numbers = [int(device.partition(":")[2]) if ":" in device else None for device in wanted]
    loads = [numbers.count(number) for number in range(count)]
    for position, device in enumerate(wanted):
        if count and device in ("auto", "cuda"):
            emptiest = loads.index(min(loads))
            loads[emptiest] += 1
            numbers[position] = emptiest
    return numbers


def gpu_environment(names: Sequence[str], number: int | None) -> dict[str, str]:
    """Return the variables that leave a process GPU `number` of `names` alone; none for a participant on the CPU."""
    if number is None or number >= len(names):
        return {}
    return {VISIBLE_VARIABLE: names[number], OWN_GPU_VARIABLE: str(number)}


def _entries(value: str) -> list[str]:
    """Return the devices of a variable; as in CUDA, the first that is none ends them."""
    entries: list[str] = []
    for part in value.split(","):
        entry = part.strip()
        if not _DEVICE.fullmatch(entry):
            break
        entries.append(entry)
    return entries


def _has_mig(names: Sequence[str]) -> bool:
    return any(name.startswith(_MIG) for name in names)


def _listed(environment: Mapping[str, str]) -> list[str]:
    """Return the ids that the driver lists: of a GPU's MIG devices where it has some, else the GPU's own."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=_LIST_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found: list[str] = []
    for name in _LISTED.findall(listing):
        if name.startswith(_MIG) and found and not found[-1].startswith(_MIG):
            found.pop()  # the GPU that is divided comes right before its first part
        found.append(name)
    return found
