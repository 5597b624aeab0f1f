"""Models of torchvision, of timm, and of a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.peer.errors import PeerError
from codistill.process.plugins import LoadError
from codistill_worker.errors import ConfigurationError
from codistill_worker.lazy_imports import timm, torchvision
from codistill_worker.models import external
from worker.models.support import built, parameters


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
        (
            "torchvision:resnet18",
            {"weights": "DEFAULT"},
            "model_args.weights: models are built untrained; .*callable of your",
        ),
        ("timm:resnet18", {"pretrained": True}, "model_args.pretrained: models are built untrained"),
        ("timm:resnet18", {"checkpoint_path": "a.pth"}, "model_args.checkpoint_path: models are built untrained"),
        ("mlp", {"pretrained": True}, "model_args.pretrained: models are built untrained"),
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


def test_timm_models_are_told_the_images_size() -> None:
    model: Any = built("timm:vit_tiny_patch16_224", 7, 1, 32, depth=1, patch_size=4)
    assert model.patch_embed.num_patches == 64
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_timm_models_of_any_size_are_built() -> None:
    assert built("timm:resnet10t", 7, 1, 32)(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert timm().is_model("resnet10t")


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

def leaving(classes):
    raise SystemExit

class Leaving(nn.Module):
    def __init__(self, classes):
        super().__init__()
    def forward(self, images):
        raise SystemExit(0)

def loaded(classes, channels, size, weights):
    model = plain(classes, channels, size)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model
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


@pytest.mark.usefixtures("own")
def test_a_callable_that_ends_the_process_is_an_error_that_says_where() -> None:
    with pytest.raises(
        LoadError, match=r"model: 'own_models:leaving': it ended the process \(SystemExit at .*own_models\.py"
    ):
        built("own_models:leaving")
    with pytest.raises(
        ConfigurationError, match=r"model 'own_models:Leaving' cannot .*: it ended .*SystemExit: 0 at .*own_mod"
    ):
        built("own_models:Leaving")


@pytest.mark.usefixtures("own")
def test_a_callable_may_begin_from_weights(tmp_path: Path) -> None:
    first = built("own_models:plain", seed=1)
    torch.save(first.state_dict(), tmp_path / "w.pth")
    again = built("own_models:loaded", seed=2, weights=str(tmp_path / "w.pth"))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in first.state_dict().items())


@pytest.mark.parametrize("args", [{}, {"dropout": 0.1}])
def test_memory_that_is_short_is_no_error_of_the_models_arguments(args: dict[str, Any]) -> None:
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    def construct(**_: Any) -> None:
        raise error

    with pytest.raises(RuntimeError) as caught:
        external._constructed(construct, {"num_classes": 3}, args)  # type: ignore[arg-type]
    assert caught.value is error
