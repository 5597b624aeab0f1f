"""The objectives with teachers, hidden layers and schedules: each has the loss of its formula, every weight in it.

The formulas are written out here in float64 once more, from the probabilities up, and share nothing with the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from codistill.config.methods import (
    BornAgain,
    CrossArchitecture,
    Dcm,
    Distillation,
    Fddml,
    Hddml,
    Kd,
    LogitRegression,
    Rkd,
    RkdAngle,
    RkdDistance,
    Vid,
)
from codistill.methods import Loss, Objective, Step, StudentContext
from codistill_worker.methods import create, teacher_network

Values = NDArray[np.float64]
Arrays = Mapping[str, Values]

B, C, SIZE = 6, 4, 8
SHAPE: Any = {"classes": C, "channels": 1, "size": SIZE}
STAGES = ("logits/stage1", "logits/stage2", "logits")
EPOCH, EPOCHS = 2.5, 8


def small(width: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, C),
    )


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def objective_of(method: Distillation) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        shapes = {"features/1": (3, 8, 8), "features/2": (7, 4, 4)}
        return create(method, StudentContext("a", small(), SHAPE, lambda: shapes, seed=2))


IMAGES, LABELS = drawn(3, B, 1, SIZE, SIZE), torch.arange(B) % C
TARGETS: Mapping[str, torch.Tensor] = {
    "logits": drawn(4, B, C),
    "probabilities": drawn(5, B, C).softmax(-1),
    "embedding": drawn(6, B, 9),
    "features/1": drawn(7, B, 3, 8, 8),
    "features/2": drawn(8, B, 7, 4, 4),
    "same": drawn(9, B, 3, C).softmax(-1),
    "other": drawn(10, B, 3, C).softmax(-1),
}


def log_softmax(logits: Values, temperature: float = 1.0) -> Values:
    scaled = logits / temperature
    top = scaled.max(-1, keepdims=True)
    return scaled - top - np.log(np.exp(scaled - top).sum(-1, keepdims=True))


def entropy(logits: Values) -> float:
    return float(-log_softmax(logits)[range(B), LABELS.numpy()].mean())


def mimicked(target: Values, logits: Values, temperature: float = 1.0) -> float:
    """T²·KL(target ‖ softmax(z/T))."""
    own = log_softmax(logits, temperature)
    return float(temperature**2 * (target * (np.log(target) - own)).sum() / B)


def distilled(target: Values, logits: Values, temperature: float) -> float:
    return mimicked(np.exp(log_softmax(target, temperature)), logits, temperature)


def huber(values: Values) -> float:
    return float(np.where(np.abs(values) <= 1, values**2 / 2, np.abs(values) - 0.5).mean())


def distances(rows: Values) -> Values:
    found = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    return found / found[~np.eye(len(rows), dtype=bool)].mean()


def cosines(rows: Values) -> Values:
    found = np.zeros((B, B, B))
    for i, j, k in np.ndindex(B, B, B):
        if j not in (i, k):
            one, other = rows[i] - rows[j], rows[k] - rows[j]
            found[i, j, k] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    return found


def informed(objective: Objective, outputs: Arrays, targets: Arrays) -> float:
    total = 0.0
    learnt = {name: value.detach().double().numpy() for name, value in objective.extra.named_parameters()}
    for number in (1, 2):
        found = outputs[f"features/{number}"]
        for layer in (0, 2, 4):
            found = np.einsum("oc,bchw->bohw", learnt[f"{number - 1}.mean.{layer}.weight"][:, :, 0, 0], found)
            found = found if layer == 4 else np.maximum(found, 0)
        variance = (np.log1p(np.exp(learnt[f"{number - 1}.alpha"])) + 1e-5)[:, None, None]
        total += float((((found - targets[f"features/{number}"]) ** 2 / variance + np.log(variance)) / 2).mean())
    return total


def dense(outputs: Arrays, targets: Arrays, auxiliary: float, same: float, other: float) -> float:
    total = entropy(outputs["logits"])
    for place, name in enumerate(STAGES):
        total += same * mimicked(targets["same"][:, place], outputs[name])
        total += 2 * other * mimicked(targets["other"][:, place], outputs[name])
        total += 0 if name == "logits" else auxiliary * entropy(outputs[name])
    return total


FORMULAS: dict[str, tuple[Distillation, Callable[[Objective, Arrays, Arrays], float]]] = {
    "kd": (
        Kd(weight=0.7, temperature=3),
        lambda _, o, t: 0.3 * entropy(o["logits"]) + 0.7 * distilled(t["logits"], o["logits"], 3),
    ),
    "logit_regression": (
        LogitRegression(weight=0.7, label_weight=0.2),
        lambda _, o, t: 0.2 * entropy(o["logits"]) + 0.7 * float(((o["logits"] - t["logits"]) ** 2).mean()),
    ),
    "born_again": (
        BornAgain(generations=1, weight=0.7, temperature=3),
        lambda _, o, t: entropy(o["logits"]) + 0.7 * distilled(t["logits"], o["logits"], 3),
    ),
    "vid": (Vid(weight=0.7), lambda objective, o, t: entropy(o["logits"]) + 0.7 * informed(objective, o, t)),
    "rkd_distance": (
        RkdDistance(distance_weight=3),
        lambda _, o, t: entropy(o["logits"]) + 3 * huber(distances(o["embedding"]) - distances(t["embedding"])),
    ),
    "rkd_angle": (
        RkdAngle(angle_weight=5),
        lambda _, o, t: entropy(o["logits"]) + 5 * huber(cosines(o["embedding"]) - cosines(t["embedding"])),
    ),
    "rkd": (
        Rkd(distance_weight=3, angle_weight=5),
        lambda _, o, t: (
            entropy(o["logits"])
            + 3 * huber(distances(o["embedding"]) - distances(t["embedding"]))
            + 5 * huber(cosines(o["embedding"]) - cosines(t["embedding"]))
        ),
    ),
    "fddml": (
        Fddml(weight=0.7, peer_weight=0.4, temperature=3),
        lambda _, o, t: (
            entropy(o["logits"])
            + 0.7 * distilled(t["logits"], o["logits"], 3)
            + 0.4 * mimicked(t["probabilities"], o["logits"])
        ),
    ),
    "dcm": (
        Dcm(auxiliary_weight=0.5, same_weight=1.5, other_weight=0.3),
        lambda _, o, t: dense(o, t, 0.5, 1.5, 0.3),
    ),
    "cross_architecture": (
        CrossArchitecture(start_epoch=1, full_epoch=7, weight=0.8, temperature=3, rise="linear"),
        lambda _, o, t: (
            entropy(o["logits"]) + 0.8 * (EPOCH - 1) / 6 * mimicked(t["probabilities"], o["logits"], 3)
        ),
    ),
    "cross_architecture, to the end": (
        CrossArchitecture(start_epoch=1, weight=0.8, temperature=3, rise="linear"),
        lambda _, o, t: entropy(o["logits"]) + 0.8 * (EPOCH - 1) / 7 * mimicked(t["probabilities"], o["logits"], 3),
    ),
}  # fmt: skip


def step_of(objective: Objective, without: str = "") -> Step:
    objective.network.train()
    targets = {name: value for name, value in TARGETS.items() if name != without}
    return Step(objective.network(IMAGES), LABELS, targets, EPOCH, EPOCHS)


def plain(arrays: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: value.detach().double().numpy() for name, value in arrays.items()}


def reported(loss: Loss) -> float:
    assert loss.distillation is not None
    assert not loss.cross_entropy.requires_grad
    assert not loss.distillation.requires_grad
    return loss.distillation.item()


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_formula(name: str) -> None:
    method, formula = FORMULAS[name]
    objective = objective_of(method)
    step = step_of(objective)
    loss = objective.loss(step)
    assert loss.total.item() == pytest.approx(formula(objective, plain(step.outputs), plain(step.targets)), rel=1e-5)
    assert loss.cross_entropy.item() == pytest.approx(entropy(plain(step.outputs)["logits"]), rel=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_gradient_is_that_of_the_formula(name: str) -> None:
    """By finite differences of the float64 formula, in some entries of every output."""
    method, formula = FORMULAS[name]
    objective = objective_of(method)
    step = step_of(objective)
    outputs, targets = plain(step.outputs), plain(step.targets)
    gradients = torch.autograd.grad(objective.loss(step).total, list(step.outputs.values()), allow_unused=True)
    random = np.random.default_rng(0)
    for (output, value), gradient in zip(outputs.items(), gradients, strict=True):
        for _ in range(4):
            place = tuple(random.integers(side) for side in value.shape)
            sides: list[float] = []
            for move in (1e-5, -1e-5):
                moved = value.copy()
                moved[place] += move
                sides.append(formula(objective, {**outputs, output: moved}, targets))
            slope = (sides[0] - sides[1]) / 2e-5
            assert (0 if gradient is None else gradient[place].item()) == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_reported_adds_up(name: str) -> None:
    method, _ = FORMULAS[name]
    objective = objective_of(method)
    loss = objective.loss(step_of(objective))
    of_labels = {"kd": 0.3, "logit_regression": 0.2}.get(name, 1.0)
    assert of_labels * loss.cross_entropy.item() + reported(loss) == pytest.approx(loss.total.item(), rel=1e-5)


def test_hddml_is_fddml_for_the_taught_student_and_dml_for_the_other() -> None:
    settings: dict[str, Any] = {"weight": 0.7, "peer_weight": 0.4, "temperature": 3}
    full, objective = objective_of(Fddml(**settings)), objective_of(Hddml(**settings))
    assert objective.loss(step_of(objective)).total.item() == full.loss(step_of(full)).total.item()
    step = step_of(objective, without="logits")
    logits, peer = plain(step.outputs)["logits"], plain(step.targets)["probabilities"]
    assert objective.loss(step).total.item() == pytest.approx(entropy(logits) + 0.4 * mimicked(peer, logits), rel=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_all_that_a_method_trains_has_a_gradient_and_no_target_has(name: str) -> None:
    method, _ = FORMULAS[name]
    objective = objective_of(method)
    step = step_of(objective)
    for target in step.targets.values():
        target.requires_grad_()
    objective.loss(step).total.backward()
    for target in step.targets.values():
        assert target.grad is None
        target.requires_grad_(False)
    assert all(each.grad is not None and bool(each.grad.any()) for each in objective.network.parameters())
    assert all(each.grad is not None and bool(each.grad.any()) for each in objective.extra.parameters())
    assert bool(list(objective.extra.parameters())) == (name in ("vid", "dcm"))


@pytest.mark.parametrize("name", FORMULAS)
def test_what_a_student_publishes(name: str) -> None:
    objective = objective_of(FORMULAS[name][0])
    mutual = {"dcm": STAGES, "fddml": ("logits",), "cross_architecture": ("logits",)}
    assert objective.publishes == mutual.get(name.partition(",")[0], ())
    assert set(objective.publishes) <= set(objective.network(IMAGES))
    assert not objective.measures_held_out


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (Kd(), {"logits"}),
        (Vid(), {"features/1", "features/2"}),
        (Vid(stages=1), {"features/1"}),
        (RkdDistance(), {"embedding"}),
        (RkdAngle(), {"embedding"}),
        (Rkd(), {"embedding"}),
        (Fddml(), {"logits"}),
    ],
)
def test_what_a_teacher_publishes(method: Distillation, names: set[str]) -> None:
    network = teacher_network(method, StudentContext("old", small(), SHAPE, dict))
    assert set(network(IMAGES)) == names
