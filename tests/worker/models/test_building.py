"""Models, by name: built, initialised, checked, and explained where they cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from codistill.config.data import Data
from codistill.peer.errors import PeerError
from codistill.peer.order import Order
from codistill_worker.data import load
from codistill_worker.data.augmentation import normalise
from codistill_worker.errors import ConfigurationError
from codistill_worker.lazy_imports import timm, torchvision
from codistill_worker.models import build, builtin_names, check
from codistill_worker.models.stems import STEMS
from codistill_worker.randomness import seed_forward

SMALL = ("mlp", "cnn", "vit", "resnet8", "wrn16_1")


def built(
    reference: str, classes: int = 10, channels: int = 3, size: int = 32, seed: int = 0, **args: Any
) -> nn.Module:
    return build(reference, classes=classes, channels=channels, size=size, args=args, seed=seed)


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def final_map(model: nn.Module, size: int, channels: int = 3) -> tuple[int, int]:
    """Returns height and width of the last activation that still has both."""
    shapes: list[torch.Size] = []
    handles = [
        each.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
        for each in model.modules()
        if isinstance(each, nn.Conv2d)
    ]
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, channels, size, size))
    for handle in handles:
        handle.remove()
    return shapes[-1][2], shapes[-1][3]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- built in


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


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # tables of He et al. 2016 (section 4.2, table 6) and of Zagoruyko & Komodakis 2016
        ("resnet20", 0.27),
        ("resnet32", 0.46),
        ("resnet44", 0.66),
        ("resnet56", 0.85),
        ("resnet110", 1.7),
        ("wrn16_2", 0.7),
        ("wrn40_2", 2.2),
        ("wrn28_10", 36.5),
    ],
)
def test_residual_networks_are_as_large_as_published(name: str, millions: float) -> None:
    assert parameters(built(name)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_residual_networks_are_as_deep_as_their_names_say() -> None:
    for name in builtin_names():
        if name.startswith("resnet"):
            layers = [each for each in built(name, size=8).modules() if isinstance(each, nn.Conv2d | nn.Linear)]
            assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_defaults_suit_the_digits(name: str) -> None:
    assert 5_000 <= parameters(built(name, channels=1, size=8)) <= 60_000


@pytest.mark.parametrize(
    ("name", "rounds", "accuracy"), [("mlp", 60, 0.8), ("cnn", 60, 0.8), ("vit", 90, 0.6), ("resnet8", 60, 0.8)]
)
def test_built_in_models_learn(name: str, rounds: int, accuracy: float) -> None:
    data = load(Data(dataset="digits", train_size=300, test_size=500), torch.device("cpu"))
    model, order = built(name, channels=1, size=8), Order(0, 300, 50)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for number in range(rounds):
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
        seed_forward(0, "student", number)
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


@pytest.mark.parametrize(("size", "patch"), [(4, 1), (8, 2), (28, 4), (32, 4), (48, 6), (64, 8), (224, 32)])
def test_patches_suit_the_image(size: int, patch: int) -> None:
    model: Any = built("vit", size=size)
    assert model.embed.kernel_size == (patch, patch)
    assert model.positions.shape[1] == (size // patch) ** 2


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


# --- names


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
        ("nowhere_at_all:model", "there is no module 'nowhere_at_all'"),
    ],
)
def test_unknown_names_are_explained(ask: Callable[[str], Any], reference: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ask(reference)


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


# --- torchvision


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [
        ("resnet18", 32, 4),
        ("resnet18", 64, 8),
        ("resnet18", 65, 3),  # beyond 64 as published
        ("densenet121", 32, 4),
        ("vgg11", 8, 1),
        ("alexnet", 32, 8),
        ("alexnet", 8, 2),
        ("squeezenet1_1", 32, 4),
        ("shufflenet_v2_x0_5", 32, 4),
        ("googlenet", 32, 4),
        ("mobilenet_v2", 32, 4),
        ("mobilenet_v3_small", 32, 4),
        ("mnasnet0_5", 32, 4),
        ("efficientnet_b0", 32, 4),
        ("regnet_x_400mf", 32, 4),
        ("convnext_tiny", 32, 2),
    ],
)
def test_small_images_are_halved_no_further_than_they_bear(name: str, size: int, last: int) -> None:
    assert final_map(built(f"torchvision:{name}", size=size), size) == (last, last)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 8),
        ("resnext50_32x4d", 28),
        ("wide_resnet50_2", 8),
        ("densenet121", 8),
        ("inception_v3", 28),
        ("efficientnet_v2_s", 8),
        ("regnet_y_400mf", 8),
        ("convnext_tiny", 8),
        ("swin_t", 28),
    ],
)
def test_small_grey_images_are_taken(name: str, size: int) -> None:
    model = built(f"torchvision:{name}", 5, 1, size)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 5)  # one tensor in training too


def test_every_family_has_a_stem() -> None:
    module = torchvision()
    families = set(module.models.list_models(module=module.models))
    bare = {name for name in families if not name.startswith(tuple(STEMS))}
    assert bare == {"maxvit_t", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"}


@pytest.mark.parametrize(("size", "patch"), [(8, 1), (28, 2), (32, 4), (96, 16)])
def test_vision_transformers_are_built_for_the_image(monkeypatch: pytest.MonkeyPatch, size: int, patch: int) -> None:
    full = torchvision().models.VisionTransformer
    narrow = {
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 16,
    }  # the smallest published one has 86 M weights
    monkeypatch.setattr("torchvision.models.vision_transformer.VisionTransformer", lambda **args: full(**args | narrow))
    model: Any = built("torchvision:vit_b_16", channels=1, size=size)
    assert model.conv_proj.kernel_size == (patch, patch)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 10)


def test_torchvision_weights_follow_from_the_seed() -> None:
    one, same, other = (built("torchvision:squeezenet1_1", channels=1, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["features.0.weight"], other["features.0.weight"])


def test_vgg_keeps_its_classifier() -> None:
    model: Any = built("torchvision:vgg11_bn", classes=100)
    assert final_map(model, 32) == (2, 2)  # and pooled once more
    assert [each.out_features for each in model.classifier if isinstance(each, nn.Linear)] == [4096, 4096, 100]
    assert model.classifier[0].in_features == 512


@pytest.mark.parametrize(
    ("reference", "args", "message"),
    [
        (
            "torchvision:mobilenet_v2",
            {"widthmult": 2},
            r"model_args.widthmult: is not an argument .*did you mean 'width_mult'\? Accepted: .*dropout",
        ),
        (
            "torchvision:resnet18",
            {"num_classes": 2},
            "model_args.num_classes: follows from the data set and may not be given",
        ),
        ("torchvision:resnet18", {"norm_layer": 3}, r"model_args: norm_layer: 3: .*not callable. Accepted: groups,"),
        ("torchvision:maxvit_t", {}, "model 'torchvision:maxvit_t': cannot be built: Input size .* partition size 7"),
        ("timm:resnet18", {"widht": 2}, "model_args.widht: is not an argument of this model; .*Accepted: .*base_width"),
        ("timm:resnet18", {"in_chans": 2}, "model_args.in_chans: follows from the data set"),
    ],
)
def test_arguments_of_libraries_are_checked(reference: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        built(reference, **args)


def test_images_too_small_for_a_model_are_explained() -> None:
    with pytest.raises(
        ConfigurationError, match=r"'torchvision:inception_v3' cannot take images of \[2, 3, 8, 8\]: .*; choose another"
    ):
        built("torchvision:inception_v3", size=8)


def test_arguments_of_torchvision_are_used() -> None:
    full, half = (parameters(built("torchvision:mobilenet_v2", width_mult=width)) for width in (1.0, 0.5))
    assert half < full / 2


# --- timm


def test_timm_models_are_told_the_images_size() -> None:
    model: Any = built("timm:vit_tiny_patch16_224", 7, 1, 32, depth=1, patch_size=4)
    assert model.patch_embed.num_patches == 64
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_timm_models_of_any_size_are_built() -> None:
    assert built("timm:resnet10t", 7, 1, 32)(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert timm().is_model("resnet10t")


# --- a user's own


OWN = """
import torch
from torch import nn

def plain(classes, channels, size, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size ** 2, width), nn.Linear(width, classes))

def fewer(classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(classes))

def anything(**settings):
    assert settings == {"classes": 10, "channels": 3, "size": 32, "depth": 2}
    return plain(10, 3, 32)

class Wrong(nn.Module):
    def __init__(self, kind="features"):
        super().__init__()
        self.kind = kind
    def forward(self, images):
        return {
            "features": torch.zeros(2, 512),
            "pair": (torch.zeros(2, 10), None),
            "labels": torch.zeros(2, 10, dtype=torch.int64),
        }[self.kind] if self.kind != "sizes" else images.reshape(7, 7)

def nothing():
    return None

def failing(classes):
    raise KeyError("weights")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own")
def test_a_callable_gets_what_its_signature_has() -> None:
    assert parameters(built("own_models:plain", channels=1, size=4, width=2)) == 16 * 2 + 2 + 2 * 10 + 10
    assert built("own_models:anything", depth=2).training
    assert built("own_models:fewer")(torch.zeros(4, 3, 32, 32)).shape == (4, 10)


@pytest.mark.usefixtures("own")
def test_a_callables_weights_follow_from_the_seed() -> None:
    weights = [next(iter(built("own_models:plain", seed=seed).parameters())) for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "plain",
            {"widht": 3},
            r"model 'own_models:plain': model_args.widht: .*did you mean 'width'\? Accepted: width$",
        ),
        ("fewer", {"width": 3}, "model_args.width: is not an argument of this model; Accepted: none"),
        ("nothing", {}, "model 'own_models:nothing': returned NoneType; expected a torch.nn.Module"),
        (
            "Wrong",
            {},
            r"model 'own_models:Wrong' gives \[2, 512\] for 2 images; expected \[2, 10\]: one logit for each class",
        ),
        ("Wrong", {"kind": "pair"}, r"gives a tuple for 2 images; expected a tensor \[2, 10\]"),
        ("Wrong", {"kind": "labels"}, r"gives torch.int64 for 2 images; expected a floating-point tensor \[2, 10\]"),
        (
            "Wrong",
            {"kind": "sizes"},
            r"cannot take images of \[2, 3, 32, 32\]: RuntimeError at .*own_models\.py:\d+: shape '\[7, 7\]' is invalid",
        ),
    ],
)
def test_what_a_callable_makes_is_checked(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        built(f"own_models:{name}", **args)


@pytest.mark.usefixtures("own")
def test_a_callables_own_error_says_where_it_was_raised() -> None:
    with pytest.raises(PeerError, match=r"model: 'own_models:failing': KeyError at .*own_models\.py:\d+: 'weights'$"):
        built("own_models:failing")
