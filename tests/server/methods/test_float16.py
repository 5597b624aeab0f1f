"""How far float16 on the wire, to the server and back, moves the probabilities that a student learns from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from codistill.config.methods import CrossArchitecture, Dcm, Dml, Fddml, Kd, Kdcl, Method
from codistill.methods.aggregator import Arrays, RoundInputs
from codistill.wire.tensors import decode, encode
from server.methods.support import PAIR, aggregator_of

ROWS = 4_000
INPUT, PEERS = 2**-10, 2**-10 + 2**-12
"""Of a softmax whose logits are off by 2⁻⁹, half a unit below 8, at T = 1; and of its mean, rounded once more below 1."""


def logits(seed: int, classes: int, *before: int) -> Tensor:
    """Return float64 logits within ±8, near ties of rounding, with several likely classes: almost the worst there are."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*before, ROWS, classes)
    steps = torch.randint(1024, shape, generator=generator)
    steps[..., :2] = torch.randint(900, 1024, (*shape[:-1], 2), generator=generator)
    grid = 4 + steps.double() / 256
    side = torch.where(torch.rand(shape, generator=generator) < 0.5, -1, 1)
    side[..., : classes // 2] = 1
    sign = 1 if seed % 2 else -1
    return (grid + sign * side * 0.499 / 256).clamp(-8, 8)


def wired(tensor: Tensor) -> Tensor:
    return decode(encode(tensor, "float16"))


def targets_by_float16(settings: Method, outputs: Arrays, labels: Tensor, teacher: Arrays) -> tuple[Arrays, Arrays]:
    """Return the first and the second student's targets, rounded on the way to the server and back."""
    aggregator = aggregator_of(settings, ("old",) if teacher else ())
    sent = {name: wired(value) for name, value in outputs.items()}
    taught = {"old": {name: wired(value) for name, value in teacher.items()}} if teacher else {}
    made = aggregator.targets(RoundInputs(PAIR, sent, labels, teachers=taught))
    first, second = ((made.each or {}).get(student, made.shared) or {} for student in PAIR)
    return tuple({name: wired(value) for name, value in arrays.items()} for arrays in (first, second))  # pyright: ignore[reportReturnType]


def moved(target: Tensor, exact: Tensor) -> float:
    """Return how far a target's probabilities are off, divided by their sum as the losses do."""
    rows = target.double()
    return float((rows / rows.sum(-1, keepdim=True) - exact).abs().max())


def of_peers(settings: Any, classes: int, seed: int) -> float:
    z = logits(seed, classes, 2)
    (first, second) = targets_by_float16(settings, {"logits": z}, torch.zeros(ROWS, dtype=torch.int64), {})
    p = (z / settings.temperature).softmax(-1)
    exact = (p[1], p[0]) if isinstance(settings, Dml) else (p.mean(0), p.mean(0))
    return max(moved(first["probabilities"], exact[0]), moved(second["probabilities"], exact[1]))


SEEDS_AND_CLASSES = [(seed, classes) for seed in (1, 2) for classes in (2, 3, 10, 100)]


@pytest.mark.parametrize(("seed", "classes"), SEEDS_AND_CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_peers_probabilities(seed: int, classes: int, temperature: float) -> None:
    bound = INPUT / temperature + 2**-12 + classes * 2**-26
    for settings in (Dml(temperature=temperature), CrossArchitecture(temperature=temperature)):
        assert of_peers(settings, classes, seed) <= bound
    assert INPUT + 2**-12 + 1000 * 2**-26 < 1.25e-3, "the bound that the documentation has, for 1,000 classes"


def test_peers_probabilities_come_near_to_the_bound_at_temperature_one() -> None:
    assert 1.1e-3 < max(of_peers(Dml(), 3, seed) for seed in (1, 2)) <= PEERS


@pytest.mark.parametrize(("seed", "classes"), SEEDS_AND_CLASSES)
def test_a_teachers_and_a_peers_probabilities(seed: int, classes: int) -> None:
    z, teacher = logits(seed, classes, 2), logits(seed + 2, classes)
    first, second = targets_by_float16(
        Fddml(), {"logits": z}, torch.zeros(ROWS, dtype=torch.int64), {"logits": teacher}
    )
    for target, peer in ((first, z[1]), (second, z[0])):
        assert moved(target["logits"].double().softmax(-1), teacher.softmax(-1)) <= INPUT < 1e-3
        assert moved(target["probabilities"], peer.softmax(-1)) < 1.25e-3


@pytest.mark.parametrize(("seed", "classes"), SEEDS_AND_CLASSES)
def test_a_teachers_probabilities(seed: int, classes: int) -> None:
    teacher = logits(seed, classes)
    for target in targets_by_float16(Kd(), {}, torch.zeros(ROWS, dtype=torch.int64), {"logits": teacher}):
        assert moved(target["logits"].double().softmax(-1), teacher.softmax(-1)) <= INPUT < 1e-3


@pytest.mark.parametrize(("seed", "classes"), SEEDS_AND_CLASSES)
def test_probabilities_of_several_stages(seed: int, classes: int) -> None:
    outputs = {"logits/stage1": logits(seed, classes, 2), "logits": logits(seed + 2, classes, 2)}
    first, _ = targets_by_float16(Dcm(stages=1), outputs, torch.zeros(ROWS, dtype=torch.int64), {})
    peer = torch.stack([value[1].softmax(-1) for value in outputs.values()], 1)
    assert moved(first["same"], peer) < 1.25e-3
    assert moved(first["other"], peer.flip(1)) < 1.25e-3


@pytest.mark.parametrize(("seed", "classes"), SEEDS_AND_CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_least_margins(seed: int, classes: int, temperature: float) -> None:
    """Margins are within ±16, off by 2⁻⁸, and rounded once more by 2⁻⁸: 2⁻⁸/T for their softmax."""
    labels = torch.arange(ROWS) % classes
    z = logits(seed, classes, 2)
    z[:, torch.arange(ROWS), labels] *= -1  # the label is unlikely, and margins are large
    first, _ = targets_by_float16(Kdcl(ensemble="min_logit", temperature=temperature), {"logits": z}, labels, {})
    exact = (z - z[:, torch.arange(ROWS), labels].unsqueeze(-1)).amin(0)
    off = moved((first["logits"].double() / temperature).softmax(-1), (exact / temperature).softmax(-1))
    assert off < 4e-3 / temperature
    if classes in (3, 10):
        assert off > 1e-3 / temperature, "else these margins show nothing"
