"""Models, by name: built, initialised and checked; errors say what is allowed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from codistill.config.data import Data
from codistill.peer.order import Order
from codistill.process.plugins import LoadError
from codistill.process.randomness import seed_generators
from codistill_worker.data import load
from codistill_worker.data.augmentation import normalise
from codistill_worker.errors import ConfigurationError
from codistill_worker.lazy_imports import torchvision
from codistill_worker.models import build, builtin_names, check
from worker.models.support import built, parameters

SMALL = ("mlp", "cnn", "vit", "resnet8", "wrn16_1")


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 4), (2, 13)])
@pytest.mark.parametrize("name", SMALL)
def test_built_in_models_take_images_of_any_size(name: str, channels: int, size: int) -> None:
    model = built(name, 7, channels, size)
    assert model.training
    assert model(torch.randn(3, channels, size, size)).shape == (3, 7)


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights_follow_from_the_seed(name: str) -> None:
    state = torch.get_rng_state()
    one, same, other = (built(name, channels=1, size=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_defaults_suit_the_digits(name: str) -> None:
    assert 5_000 <= parameters(built(name, channels=1, size=8)) <= 60_000


@pytest.mark.parametrize(
    ("name", "steps", "accuracy"), [("mlp", 60, 0.8), ("cnn", 60, 0.8), ("vit", 90, 0.6), ("resnet8", 60, 0.8)]
)
def test_built_in_models_learn(name: str, steps: int, accuracy: float) -> None:
    data = load(Data(dataset="digits", train_size=300, test_size=500), torch.device("cpu"))
    model, order = built(name, channels=1, size=8), Order(0, 300, 50)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for number in range(steps):
        ids = order.samples(number)
        images = normalise(data.train.images(ids), data.mean, data.std)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), data.train.labels[ids]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = model(normalise(data.test.images(torch.arange(500)), data.mean, data.std))
    assert (logits.argmax(1) == data.test.labels).float().mean() > accuracy


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_is_learnt_and_the_bits_repeat(name: str) -> None:
    def gradients() -> list[torch.Tensor]:
        model = built(name, channels=1, size=8)
        functional.cross_entropy(model(images), labels).backward()
        found = [each.grad for each in model.parameters()]
        assert all(each is not None and each.abs().sum() > 0 for each in found)
        return [each for each in found if each is not None]

    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 10
    assert all(torch.equal(one, other) for one, other in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit", "wrn16_1"])
def test_dropout_follows_the_seed_of_the_forward_pass(name: str) -> None:
    model = built(name, channels=1, size=8, dropout=0.5)
    images = torch.randn(4, 1, 8, 8)

    def forward(number: int) -> torch.Tensor:
        seed_generators(number)
        with torch.no_grad():
            return model(images)

    state = torch.get_rng_state()
    try:
        assert torch.equal(forward(1), forward(1))
        assert not torch.equal(forward(1), forward(2))
    finally:
        torch.set_rng_state(state)
    model.eval()
    assert torch.equal(model(images), model(images))


def test_arguments_are_used() -> None:
    assert parameters(built("mlp", channels=1, size=8, hidden=4, depth=1)) == 64 * 4 + 4 + 4 * 10 + 10
    assert parameters(built("cnn", width=4)) < parameters(built("cnn", width=8))
    assert parameters(built("resnet8", width=64)) > 15 * parameters(built("resnet8", width=16))
    assert parameters(built("wrn", depth=10, width=1)) < parameters(built("wrn")) == parameters(built("wrn16_2"))
    assert parameters(built("vit", patch=8, dim=12, heads=3, depth=1)) < parameters(built("vit"))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "mlp",
            {"hiden": 5},
            r"model 'mlp': model_args.hiden: is not an argument .*did you mean 'hidden'\? Accepted: hidden, depth, dropout",
        ),
        ("resnet8", {"depth": 20}, "model_args.depth: is not an argument .*Accepted: width$"),
        ("cnn", {"classes": 3}, "model_args.classes: is not an argument"),
        ("mlp", {"hidden": "wide"}, "model_args.hidden: 'wide' is not allowed: Input should be a valid integer"),
        ("mlp", {"hidden": True}, "model_args.hidden: True is not allowed"),
        ("mlp", {"depth": 0}, "model_args.depth: 0 is not allowed: Input should be greater than or equal to 1"),
        ("cnn", {"dropout": 1}, "model_args.dropout: 1 is not allowed: Input should be less than 1"),
        ("vit", {"patch": 5}, "model_args.patch: 5 does not divide images of 32×32; allowed: 1, 2, 4, 8, 16, 32"),
        ("vit", {"dim": 30}, "model_args.heads: 4 does not divide model_args.dim: 30"),
        ("wrn", {"depth": 17}, "model_args.depth: 17 is not 6n"),
    ],
)
def test_arguments_are_checked(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(name, classes=10, channels=3, size=32, args=args, seed=0)


def test_dropout_may_be_a_whole_number() -> None:
    assert built("mlp", dropout=0).training


@pytest.mark.parametrize("ask", [check, built])
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "resnet21",
            r"there is no model 'resnet21'; did you mean .*'resnet20'.*Allowed: mlp, cnn, .*torchvision:NAME, timm:NAME, or package",
        ),
        ("", "there is no model ''; Allowed: mlp"),
        (
            "torchvision:resnet19",
            r"torchvision has no classifier 'resnet19'; did you mean 'resnet18'.*Allowed: alexnet",
        ),
        ("torchvision:fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),
        ("timm:resnet18x", r"timm has no model 'resnet18x'; did you mean 'resnet18'.*Allowed: what timm.list_models"),
    ],
)
def test_unknown_names_are_explained(ask: Callable[[str], Any], reference: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ask(reference)


@pytest.mark.parametrize("ask", [check, built])
def test_a_callable_that_is_not_there_is_explained(ask: Callable[[str], Any]) -> None:
    with pytest.raises(LoadError, match="there is no module 'nowhere_at_all'"):
        ask("nowhere_at_all:model")


@pytest.mark.parametrize("reference", [*builtin_names(), "torchvision:vgg16", "timm:resnet18"])
def test_known_names_pass(reference: str) -> None:
    check(reference)


@pytest.mark.parametrize(("reference", "package"), [("torchvision:resnet18", "torchvision"), ("timm:resnet18", "timm")])
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, reference: str, package: str) -> None:
    torchvision()
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails as if it were not there
    with pytest.raises(ConfigurationError, match=f"{package} is not installed; .* pip install 'codistill\\[worker\\]'"):
        check(reference)


def test_heavy_libraries_are_not_imported_before_they_are_needed() -> None:
    program = (
        "import sys, torch, codistill_worker.models as m, codistill_worker.data, codistill_worker.data.augmentation\n"
        "m.build('cnn', classes=10, channels=1, size=8, args={}, seed=0)\n"
        "print(sorted({'torchvision', 'timm', 'sklearn', 'scipy', 'PIL'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "[]\n"
