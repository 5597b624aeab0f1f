"""Write a trained student for plain PyTorch, which loads it without this project.

``NAME.safetensors`` holds the weights under the model's own parameter names, for use with the model's code.
``NAME.pt2`` is the whole network as an exported program, for use without it. ``NAME.json`` describes both. The weights and
their description are written first, as not every network can be traced.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import nn

from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity
from codistill.config.plans import StudentPlan
from codistill.process.exit_codes import ExitCode
from codistill.process.interrupts import is_interrupt
from codistill.process.plugins import explain_error
from codistill.rundir.files import write_atomically
from codistill.rundir.storage import explain, outlasts_restarts
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder
from codistill_worker import data, models
from codistill_worker.errors import is_out_of_memory
from codistill_worker.training import weights
from codistill_worker.training.checkpoints import Checkpoint, CheckpointStore

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """The files that were written.

    Attributes:
        weights: ``NAME.safetensors``.
        program: ``NAME.pt2``.
        about: ``NAME.json``.
        steps_trained: the number of steps that the weights were trained for.
    """

    weights: Path
    program: Path
    about: Path
    steps_trained: int


class _FromPixels(nn.Module):
    """A network that takes pixels: it normalises as :func:`codistill_worker.data.augmentation.normalise` does, to the bit."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        means, stds = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
        self.register_buffer("scale", (1 / (255 * stds)).float())
        self.register_buffer("shift", (-means / stds).float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32 [B, C], of uint8 images [B, channels, height, width]."""
        return self.model(images.float() * self.scale + self.shift)


def export(folder: RunFolder, student: str, target: Path, which: Literal["last", "best"]) -> Exported:
    """Write one student's weights, then its program.

    A program of an earlier export is removed first, so that none stays beside weights that it does not have.

    Args:
        folder: the run's folder.
        student: the student's name.
        target: the folder to write to.
        which: "last", the weights after the last step; or "best", those with the best test accuracy on the way.

    Raises:
        CommandError: there is no such student, or it has no weights yet, or they cannot be written. Or only the weights
            and their description are written, as the program cannot be made.
        ConfigurationError: its checkpoint, model or data cannot be used.
    """
    experiment = folder.experiment()
    if student not in experiment.names:
        raise CommandError(f"--student: {student!r} is not one of the run's; allowed: {', '.join(experiment.names)}")
    checkpoint = _load_checkpoint(folder, experiment, student, which)
    plan = experiment.plan(student)
    dataset = data.load(plan.data, torch.device("cpu"))
    model = _build_model(plan, dataset, checkpoint, folder.student(student).path)
    about = {
        "student": student,
        "model": plan.student.model,
        "model_args": plan.student.model_args,
        "dataset": plan.data.dataset,
        "classes": dataset.classes,
        "image": [dataset.channels, dataset.height, dataset.width],
        "mean": dataset.mean,
        "std": dataset.std,
        "weights": which,
        "steps_trained": checkpoint.step,
        "method": experiment.distillation.title,
        "seed": experiment.seed,
    }
    exported = Exported(
        target / f"{student}.safetensors", target / f"{student}.pt2", target / f"{student}.json", checkpoint.step
    )
    with _writing(target):
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(exported.weights, save({name: value.clone() for name, value in model.state_dict().items()}))
        exported.program.unlink(missing_ok=True)
        write_atomically(exported.about, json.dumps(about, indent=2) + "\n")
    try:
        with _quiet():
            program = _export_program(model, dataset)
    except BaseException as error:  # a model's own code may raise anything
        if is_out_of_memory(error) or is_interrupt(error):
            raise
        raise CommandError(
            f"student {student!r}: {exported.weights} and {exported.about} are written, but {exported.program} is not: "
            f"torch.export cannot trace model {plan.student.model!r}: {_shorten(explain_error(error))}; load the weights "
            "with the model's code, or change that line so that torch.export can follow it, and export again"
        ) from error
    with _writing(target):
        write_atomically(exported.program, program)
    return exported


@contextlib.contextmanager
def _writing(target: Path) -> Generator[None]:
    """Explain what keeps a file from being written."""
    try:
        yield
    except OSError as error:
        code = ExitCode.STORAGE if outlasts_restarts(error) else ExitCode.CONFIGURATION
        raise CommandError(f"{target} cannot be written: {explain(error, target)}", code) from error


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep away what torch prints and logs of a network that it cannot trace; the error says it in one line."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _shorten(text: str) -> str:
    """Return an error of torch.export without its advice, which concerns torch's developers."""
    for advice in (
        " (unhinted: ",
        " consider using ",
        " Caused by: ",
        " For more information",
        " The following call",
        " The error above",
    ):
        text = text.partition(advice)[0]
    return text.strip()[:300].rstrip(".")


def _load_checkpoint(
    folder: RunFolder, experiment: Experiment, student: str, which: Literal["last", "best"]
) -> Checkpoint:
    store = CheckpointStore(folder.student(student).path)
    checkpoint = store.load(student, identity(experiment)) if which == "last" else store.load_best()
    if checkpoint is None:
        raise CommandError(
            f"student {student!r} has no {which} weights in {store.folder} yet; run the experiment first"
        )
    return checkpoint


def _build_model(plan: StudentPlan, dataset: data.Dataset, checkpoint: Checkpoint, source: Path) -> nn.Module:
    """Return the student's model with the checkpoint's weights, ready to be evaluated."""
    model = models.build(
        plan.student.model,
        classes=dataset.classes,
        channels=dataset.channels,
        size=dataset.height,
        args=plan.student.model_args,
        seed=0,
    )
    try:
        weights.load(model, checkpoint.model)
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise CommandError(
            f"the weights in {source} do not fit model {plan.student.model!r}: {why}; was the model's code changed?"
        ) from error
    return model.eval()


def _export_program(model: nn.Module, dataset: data.Dataset) -> bytes:
    """Return the network as a ``.pt2`` file that takes batches of uint8 images of any size B."""
    images = torch.zeros(2, dataset.channels, dataset.height, dataset.width, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        _FromPixels(model, dataset.mean, dataset.std).eval(), (images,), dynamic_shapes={"images": {0: batch}}
    )
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()
