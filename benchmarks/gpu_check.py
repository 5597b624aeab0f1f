"""Checks codistill on the GPU of this machine, in about eight minutes.

It compares the GPU's numbers with the CPU's, and runs over gRPC with runs in one process, to the bit. It kills a worker and a
whole run. It runs ten methods, provokes errors, and compares images per second with a plain loop. Each line begins with
PASS, FAIL or INFO. The exit code is 1 if any check failed, and 0 where there is no GPU.

Linux only: the processes to kill are found in /proc.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from codistill.config.data import Data
from codistill.process.exit_codes import ExitCode
from codistill.rundir import records
from codistill.rundir.layout import RunLayout

_HERE = Path(__file__).resolve().parent
_SIDE = 32
_MEMORY_VARIABLE = "GPU_CHECK_MEMORY_GIB"
_TOO_LONG = 124
_METHODS = (
    "vid",
    "rkd",
    "dcm",
    "kd",
    "fddml",
    "dml",
    "kdcl_general",
    "cross_architecture",
    "born_again",
    "logit_regression",
)
_Array = np.ndarray[Any, Any]


def images(data: Data) -> tuple[_Array, _Array, _Array, _Array]:
    """Return images that can be learnt, 32×32 pixels in three channels: a data set of `codistill`.

    The memory of the worker's GPU is limited where a variable asks for it, to provoke an error.
    """
    if os.environ.get(_MEMORY_VARIABLE):
        import torch

        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(float(os.environ[_MEMORY_VARIABLE]) * 2**30 / total)
    generator = np.random.default_rng(0)
    means = generator.integers(60, 196, size=(data.class_count, 3, _SIDE, _SIDE))

    def split(size: int | None) -> tuple[_Array, _Array]:
        assert size is not None  # noqa: S101 - the experiments give both sizes
        labels = generator.integers(data.class_count, size=size)
        noisy = means[labels] + generator.normal(0, 60, size=(size, 3, _SIDE, _SIDE))
        return np.clip(noisy, 0, 255).astype(np.uint8), labels

    return (*split(data.train_size), *split(data.test_size))


@dataclass(frozen=True)
class Scale:
    """How much is checked, and where.

    Attributes:
        device: of the students, "cuda" or "cpu".
        model: of the throughput.
        batch: images of a step of the throughput.
        steps: in an epoch of the throughput.
        epochs: of the throughput.
        long_epochs: of the run that is killed.
        methods: to run; their experiments are in examples/methods.
        students: of the runs that are compared.
        patience: factor of every command's time limit.
    """

    device: str
    model: str
    batch: int
    steps: int
    epochs: int
    long_epochs: int
    methods: Sequence[str] = ()
    students: Sequence[str] = ("mlp", "cnn", "vit")
    patience: float = 1


GPU = Scale("cuda", "torchvision:resnet18", 128, 100, 6, 250, _METHODS)
CPU = Scale("cpu", "cnn", 8, 4, 2, 40, ("dcm",), ("mlp", "cnn"), patience=5)


@dataclass
class Job:
    """A command under way."""

    process: subprocess.Popen[bytes]
    log: Path
    limit: float
    started: float = field(default_factory=time.monotonic)

    def wait(self) -> int:
        """Return the exit code; kill the command after its limit, and return 124."""
        try:
            return self.process.wait(max(0.0, self.started + self.limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()  # its server and workers end with it
            self.process.wait()
            return _TOO_LONG

    def children(self) -> dict[str, int]:
        """Return the process ids of the run's workers by student, and that of the server."""
        found: dict[str, int] = {}
        pid = self.process.pid
        try:
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
                arguments = Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8").split("\0")
                found[arguments[arguments.index("--student") + 1] if "--student" in arguments else "server"] = int(
                    child
                )
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended meanwhile
        return found

    def problem(self) -> str:
        """Return the last line that names an error."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip()[:200] for line in reversed(lines) if "error" in line.lower()), "")


class Check:
    """Runs commands in a folder and writes down what they show.

    Args:
        scale: how much to check.
        folder: of experiments, runs, logs and results.
        limit: seconds for all checks.
    """

    def __init__(self, scale: Scale, folder: Path, limit: float) -> None:
        self.scale = scale
        self.folder = folder
        self.failed = 0
        self._began = time.monotonic()
        self._limit = limit

    def say(self, kind: str, text: str) -> None:
        """Write a line to the standard output and to results.txt."""
        self.failed += kind == "FAIL"
        line = f"{kind} {time.monotonic() - self._began:4.0f} s  {text}"
        typer.echo(line)
        with (self.folder / "results.txt").open("a", encoding="utf-8") as results:
            results.write(line + "\n")

    def verdict(self, passed: bool, text: str, problem: str = "") -> bool:
        """Write whether a check passed."""
        self.say("PASS" if passed else "FAIL", text if passed or not problem else f"{text}; {problem}")
        return passed

    def has_time(self, seconds: float, what: str) -> bool:
        """Return whether so much time is left; say so if not."""
        if self._began + self._limit - time.monotonic() >= seconds:
            return True
        self.say("INFO", f"left out, as the time is over: {what}")
        return False

    def write(self, name: str, experiment: Mapping[str, Any]) -> None:
        """Write an experiment."""
        document = json.dumps({**experiment, "name": name}, indent=1)  # JSON is YAML
        (self.folder / f"{name}.yaml").write_text(document + "\n", encoding="utf-8")

    def run(
        self, name: str, run: str, *options: str, limit: float = 120.0, environment: Mapping[str, str] | None = None
    ) -> Job:
        """Start `codistill run` on an experiment, into a run folder."""
        command = ["-m", "codistill_deploy", "run", f"{name}.yaml", "--run-dir", run, *options]
        return self.start(f"{run.replace('/', '-')}{''.join(options)}", command, limit, environment)

    def start(
        self, name: str, command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
    ) -> Job:
        """Start Python with arguments; its output goes to a log."""
        paths = [str(_HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return Job(process, log, limit * self.scale.patience)


def digits(scale: Scale, device: str, epochs: int, dropout: float, **training: Any) -> dict[str, Any]:
    """Return an experiment of students of different architectures on digits."""
    arguments = {"mlp": {}, "cnn": {"dropout": dropout}, "vit": {"dropout": dropout}}
    return {
        "data": {"dataset": "digits", "train_size": 300, "augment": {"crop_padding": 1}},
        "training": {
            "epochs": epochs,
            "batch_size": 50,
            "device": device,
            "evaluate_every": 10,
            "optimizer": {"name": "adamw", "lr": 0.004},
            **training,
        },
        "distillation": {"method": "kdcl", "ensemble": "naive", "temperature": 2, "weight": 1},
        "students": [{"name": name, "model": name, "model_args": arguments[name]} for name in scale.students],
    }


def large(scale: Scale, students: int, **training: Any) -> dict[str, Any]:
    """Return an experiment of the throughput: one student alone, or several together."""
    method = {"method": "independent"} if students == 1 else {"method": "kdcl", "ensemble": "min_logit"}
    return {
        "data": {
            "dataset": "gpu_check:images",
            "classes": 10,
            "train_size": scale.steps * scale.batch,
            "test_size": 64,
            "augment": {"crop_padding": 4, "flip": True},
        },
        "training": {
            "epochs": scale.epochs,
            "batch_size": scale.batch,
            "device": scale.device,
            "precision": "bfloat16",
            "channels_last": True,
            "evaluate_every": scale.epochs,
            "checkpoint_every": 3600,
            "optimizer": {"name": "sgd", "lr": 0.05},
            **training,
        },
        "distillation": method,
        "students": [{"name": name, "model": scale.model} for name in "abcdefgh"[:students]],
    }


def differences(one: Path, other: Path) -> dict[str, float]:
    """Return how far the last weights of two runs are apart, by student.

    The distance is the largest of any tensor, relative to its norm. It is 0 only if every tensor of the checkpoints has the
    same bits, the optimiser's too. Weights that are not finite, or are missing, are infinitely far apart.
    """
    import torch
    from safetensors.torch import load_file

    found: dict[str, float] = {}
    for folder in sorted(RunLayout(one).students.iterdir()):
        left, right = (load_file(RunLayout(run).student(folder.name).checkpoint) for run in (one, other))
        apart = 0.0 if left.keys() == right.keys() else math.inf
        for name in left.keys() & right.keys():
            value = left[name]
            if torch.equal(value, right[name]):
                continue
            apart = max(apart, sys.float_info.min)
            if name.startswith("model."):
                change = float((value.double() - right[name].double()).norm() / value.double().norm().clamp(min=1e-12))
                apart = max(apart, change if math.isfinite(change) else math.inf)
        found[folder.name] = apart
    return found


def compare(check: Check, one: str, other: str, tolerance: float, text: str) -> None:
    """Check that the last weights of two runs are as near as they should be."""
    try:
        apart = differences(check.folder / one, check.folder / other)
    except (FileNotFoundError, NotADirectoryError) as error:
        check.verdict(False, text, f"no weights: {error}")
        return
    shown = ", ".join(f"{student} {value:.1e}" for student, value in apart.items())
    check.verdict(bool(apart) and max(apart.values()) <= tolerance, f"{text}: {shown}")


def check_numbers(check: Check) -> None:
    """Compare two runs on the GPU with each other, and with one on the CPU."""
    check.write("short_cpu", digits(check.scale, "cpu", 2, 0.0))
    check.write("short_gpu", digits(check.scale, check.scale.device, 2, 0.0))
    jobs = [
        check.run("short_cpu", "on-cpu", "--in-process"),
        check.run("short_gpu", "on-gpu", "--in-process"),
        check.run("short_gpu", "on-gpu-again", "--in-process"),
        check.run("short_gpu", "on-gpu-float32", "--in-process", environment={"NVIDIA_TF32_OVERRIDE": "0"}),
    ]
    codes = [job.wait() for job in jobs]
    check.verdict(not any(codes), f"12 steps on the CPU and on the GPU: codes {codes}", jobs[1].problem())
    compare(check, "on-gpu", "on-gpu-again", 0.0, "the GPU twice, bit for bit")
    compare(check, "on-cpu", "on-gpu-float32", 1e-3, "CPU and GPU without TF32, within 1e-3")
    compare(check, "on-cpu", "on-gpu", 2e-2, "CPU and GPU, within 2e-2")


def check_equality(check: Check) -> None:
    """Compare a run in one process with one over gRPC, one with a killed worker, and one that was killed and resumed."""
    check.write("long", digits(check.scale, check.scale.device, check.scale.long_epochs, 0.1, checkpoint_every=0.5))
    reference = check.run("long", "in-process", "--in-process", limit=200)
    undisturbed = check.run("long", "over-grpc", limit=200)
    loses_worker = check.run("long", "worker-killed", limit=200)
    cut = check.run("long", "run-killed", limit=200)
    killed = strike(check, loses_worker, "worker-killed", lambda children: {"cnn": children["cnn"]})
    check.verdict(killed, "a worker was killed while it trained")
    killed = strike(check, cut, "run-killed", lambda children: {**children, "run": cut.process.pid})
    check.verdict(killed, "every process of a run was killed while it trained")
    cut.wait()
    resumed = check.run("long", "run-killed", "--resume", limit=200)
    jobs = {"in process": reference, "gRPC": undisturbed, "worker killed": loses_worker, "resumed": resumed}
    for name, job in jobs.items():
        code = job.wait()
        check.verdict(code == 0, f"{len(check.scale.students)} students, {name}: code {code}", job.problem())
    compare(check, "in-process", "over-grpc", 0.0, "gRPC and in-process, bit for bit")
    compare(check, "in-process", "worker-killed", 0.0, "in-process and gRPC with a killed worker, bit for bit")
    compare(check, "in-process", "run-killed", 0.0, "in-process and killed, resumed, bit for bit")


def strike(check: Check, job: Job, run: str, victims: Callable[[Mapping[str, int]], Mapping[str, int]]) -> bool:
    """Kill processes of a run once it trains; return whether it was still training then."""
    checkpoint = RunLayout(check.folder / run).student("cnn").checkpoint
    while job.process.poll() is None and time.monotonic() < job.started + job.limit:
        children = job.children()
        if checkpoint.exists() and "cnn" in children:
            for pid in victims(children).values():
                os.kill(pid, signal.SIGKILL)
            return True
        time.sleep(0.05)
    return False


def check_methods(check: Check) -> None:
    """Run methods of every kind, to see that all tensors are on one device."""
    import yaml

    examples = _HERE.parent / "examples" / "methods"
    for name in ("teacher", *check.scale.methods):
        experiment = yaml.safe_load((examples / f"{name}.yaml").read_text(encoding="utf-8"))
        held_out = experiment["data"].get("held_out", 0)
        experiment["data"] = {
            "dataset": "gpu_check:images",
            "classes": 10,
            "train_size": 256 + held_out,
            "test_size": 64,
            "held_out": held_out,
            "augment": {"crop_padding": 4},
        }
        experiment["training"] |= {
            "epochs": 4,  # one of the methods exchanges from the third epoch on
            "batch_size": 64,
            "device": check.scale.device,
            "evaluate_every": 1,
            "optimizer": {"name": "adamw", "lr": 0.004},
        }
        experiment["training"].pop("schedule", None)
        check.write(name, experiment)
    teacher = check.run("teacher", "runs/teacher", "--in-process", limit=60)
    code = teacher.wait()
    check.verdict(code == 0, f"a teacher is trained: code {code}", teacher.problem())
    at_once = max(2, (os.cpu_count() or 2) // 2)
    for first in range(0, len(check.scale.methods), at_once):
        names = check.scale.methods[first : first + at_once]
        for name, job in [(name, check.run(name, f"runs/{name}", "--in-process", limit=90)) for name in names]:
            code = job.wait()
            check.verdict(code == 0, f"method {name}: code {code}", job.problem())


def check_exit_codes(check: Check) -> None:
    """Provoke errors, whose exit codes decide about restarts."""
    small = Scale(check.scale.device, "mlp", 8, 2, 1, 1)
    check.write("elsewhere", large(small, 1, device="cuda:99"))
    check.write("auto", large(small, 1, device="auto"))
    expected = [
        ("a GPU that is not there", ExitCode.CONFIGURATION, check.run("elsewhere", "elsewhere")),
        (
            "auto without a GPU",
            ExitCode.OK,
            check.run("auto", "auto", "--in-process", environment={"CUDA_VISIBLE_DEVICES": ""}),
        ),
    ]
    if check.scale.device == "cuda":
        check.write("memory", large(Scale("cuda", check.scale.model, 4096, 2, 1, 1), 1, precision="float32"))
        for name, options in (("over gRPC", ("--restarts", "0")), ("in-process", ("--in-process",))):
            job = check.run("memory", f"memory-{name.split()[-1]}", *options, environment={_MEMORY_VARIABLE: "0.8"})
            expected.append((f"too little memory, {name}", ExitCode.OUT_OF_MEMORY, job))
    for what, wanted, job in expected:
        code = job.wait()
        check.verdict(code == wanted, f"{what}: code {code}, expected {int(wanted)}", job.problem())


def check_throughput(check: Check) -> None:
    """Compare images per second with a plain loop: one student alone, and two on one GPU."""
    scale = check.scale
    arguments = (scale.device, scale.model, scale.batch, scale.steps * scale.epochs)
    plain = ("-c", f"import gpu_check; gpu_check.plain_loop{arguments!r}")
    check.write("one", large(scale, 1))
    check.write("two", large(scale, 2))
    alone = plain_rates(check, [check.start("plain", plain, 90)])
    one = rates(check, "one", "one", check.run("one", "one", limit=90))
    beside = plain_rates(check, [check.start(f"plain-{each}", plain, 90) for each in range(2)])
    two = rates(check, "two over gRPC", "two", check.run("two", "two", limit=120))
    for what, ours, theirs in (("alone", one, alone), ("two on one device", two, beside)):
        if ours and theirs:
            share = statistics.mean(ours) / statistics.mean(theirs)
            numbers = f"codistill {statistics.mean(ours):,.0f}, plain loop {statistics.mean(theirs):,.0f}"
            check.say("INFO", f"{scale.model}, {what}: images/s of a student: {numbers}, ratio {share:.2f}")
    if check.has_time(60, "two in one process"):
        together = rates(check, "two in-process", "two-in", check.run("two", "two-in", "--in-process", limit=120))
        if together:
            check.say("INFO", f"two in one process: {statistics.mean(together):,.0f} images/s of each student")


def plain_rates(check: Check, jobs: Sequence[Job]) -> list[float]:
    """Return the images per second of plain loops that run side by side."""
    found: list[float] = []
    for job in jobs:
        code = job.wait()
        if check.verdict(code == 0, f"plain loop: code {code}", job.problem()):
            found.append(float(job.log.read_text(encoding="utf-8").split()[-1]))
    return found


def rates(check: Check, what: str, run: str, job: Job) -> list[float]:
    """Return the images per second of each student of a run."""
    code = job.wait()
    if not check.verdict(code == 0, f"throughput, {what}: code {code}", job.problem()):
        return []
    steps: dict[str, list[float]] = {}
    for record in records.read(RunLayout(check.folder / run).metrics_file):
        if isinstance(record, records.Paced) and record.step_seconds > 0:
            steps.setdefault(record.participant, []).append(record.step_seconds)
    return [check.scale.batch / statistics.median(seconds) for seconds in steps.values()]


def plain_loop(device: str, model_name: str, batch: int, steps: int) -> None:
    """Print the images per second of a loop without codistill: same network, batch, precision, layout and augmentation."""
    import torch
    from torch.nn import functional

    from codistill_worker import models

    torch.set_num_threads(1)  # as a student has by default
    layout = torch.channels_last
    model = models.build(model_name, classes=10, channels=3, size=_SIDE, args={}, seed=0)
    model = model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pixels = torch.randint(256, (100 * batch, 3, _SIDE, _SIDE), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (len(pixels),), device=device)
    warm_up = max(2, steps // 8)
    began = 0.0
    for step in range(warm_up + steps):
        if step == warm_up:
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
        ids = torch.randint(len(pixels), (batch,), device=device)
        top, left = torch.randint(9, (2,)).tolist()
        cropped = functional.pad(pixels[ids], (4,) * 4)[:, :, top : top + _SIDE, left : left + _SIDE]
        inputs = cropped.to(torch.float32, memory_format=layout).div_(255).sub_(0.5)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            logits = model(inputs)
        functional.cross_entropy(logits.float(), labels[ids]).backward()
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    typer.echo(f"images per second: {batch * steps / (time.perf_counter() - began)}")


def describe(check: Check) -> None:
    """Say what the checks ran on."""
    import torch

    name = (
        torch.cuda.get_device_name(0) if check.scale.device == "cuda" else "no GPU: the checks themselves are checked"
    )
    check.say("INFO", f"torch {torch.__version__}, CUDA {torch.version.cuda}, {name}, {os.cpu_count()} cores")


# The seconds are what each part may need; one that has less time is left out.
_PARTS: Sequence[tuple[str, float, Callable[[Check], None]]] = (
    ("numbers", 60, check_numbers),
    ("equality and faults", 120, check_equality),
    ("methods", 100, check_methods),
    ("exit codes", 60, check_exit_codes),
    ("throughput", 100, check_throughput),
)


def main(
    cpu: Annotated[bool, typer.Option("--cpu", help="Check the checks: a small form of them on the CPU.")] = False,
    limit: Annotated[float, typer.Option(min=1, help="Seconds; what does not fit is left out.")] = 480.0,
    folder: Annotated[
        Path | None, typer.Option(help="Keep experiments, runs, logs and results.txt in this new folder.")
    ] = None,
) -> None:
    """Check codistill on the GPU of this machine: PASS, FAIL or INFO on each line."""
    import torch

    if not cpu and not torch.cuda.is_available():
        typer.echo("INFO PyTorch finds no GPU here, so nothing was checked; --cpu runs a small form on the CPU")
        return
    if folder is not None:
        folder.mkdir(parents=True)
    place = folder or Path(tempfile.mkdtemp(prefix="codistill-gpu-check-"))
    check = Check(CPU if cpu else GPU, place.resolve(), limit)
    describe(check)
    for name, seconds, part in _PARTS:
        if check.has_time(seconds, name):
            part(check)
    check.say("INFO", f"{check.failed} checks failed; logs and results.txt are in {check.folder}")
    raise typer.Exit(1 if check.failed else 0)


if __name__ == "__main__":
    typer.run(main)
