"""Hidden layers, embeddings and auxiliary classifiers: read beside the plain model, which stays the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codistill_worker.errors import ConfigurationError
from codistill_worker.methods.features import FeatureExtractor
from codistill_worker.methods.stages import stage_layers
from worker.methods.support import MODELS, built


def extractor_of(name: str, **changes: Any) -> tuple[FeatureExtractor, int]:
    model, size = built(name)
    layers = stage_layers(model, 2, channels=1, size=size)
    settings: dict[str, Any] = {"features": layers, "heads": layers, "embedding": True, **changes}
    return FeatureExtractor(model, channels=1, size=size, classes=10, **settings), size


def images_of(size: int) -> Tensor:
    return torch.randn(6, 1, size, size, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    """Every layer by hand: the maps of an image are it and its double, the vector their means."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(1, 2, 1, bias=False)
        self.blocks = nn.Sequential(nn.Identity(), nn.ReLU())
        self.last = nn.Linear(2, 3)
        with torch.no_grad():
            self.twice.weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.blocks(self.twice(images)).mean((2, 3)))


class Branching(nn.Module):
    """No tracing gets past a branch on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.last(-flat if flat.sum() > 0 else flat)


def small(**settings: Any) -> FeatureExtractor:
    return FeatureExtractor(Small(), channels=1, size=16, classes=3, **settings)


def test_what_is_read_is_what_the_layers_compute() -> None:
    images = images_of(16)
    outputs = small(features=["twice", "blocks"], embedding=True)(images)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))  # 16×16 pooled to 8×8
    torch.testing.assert_close(outputs["features/1"], torch.cat([patches, 2 * patches], 1))
    rectified = images.relu()
    patches = rectified.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(outputs["features/2"], torch.cat([patches, 2 * patches], 1))
    mean = rectified.mean((2, 3))
    torch.testing.assert_close(outputs["embedding"], torch.cat([mean, 2 * mean], 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_student_stays_the_plain_model_to_the_bit(name: str, training: bool) -> None:
    """Logits, dropout, batch statistics, gradients and names, with everything that can be read being read."""
    wrapped, size = extractor_of(name)
    plain = copy.deepcopy(wrapped.student)
    images = images_of(size)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for model in (wrapped.train(training), plain.train(training)):
        torch.manual_seed(5)
        outputs = model(images)
        found.append((outputs["logits"] if isinstance(outputs, dict) else outputs, {}))
        found[-1][0].square().sum().backward()
    assert torch.equal(found[0][0], found[1][0])
    ours, theirs = wrapped.student.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours.values(), theirs.values(), strict=True))
    for one, other in zip(wrapped.student.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or other.grad is None or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_have_the_shapes_that_are_told(name: str) -> None:
    wrapped, size = extractor_of(name)
    assert wrapped.training
    outputs = wrapped(images_of(size))
    assert {key: tuple(value.shape[1:]) for key, value in outputs.items()} == wrapped.shapes
    assert list(wrapped.shapes) == ["logits", "features/1", "features/2", "logits/stage1", "logits/stage2", "embedding"]
    assert wrapped.shapes["logits/stage1"] == (10,)
    assert max(*wrapped.shapes["features/1"][1:], *wrapped.shapes["features/2"][1:]) <= 8


def test_all_weights_have_one_name_and_the_students_can_be_told_from_the_others() -> None:
    wrapped, _ = extractor_of("cnn")
    names = list(wrapped.state_dict())
    assert {name.partition(".")[0] for name in names} == {"student", "heads"}
    assert [name.removeprefix("student.") for name in names if name.startswith("student.")] == list(
        wrapped.student.state_dict()
    )
    assert len(list(wrapped.parameters())) == len({id(each) for each in wrapped.parameters()})
    assert not list(wrapped.heads.buffers())


def test_restored_weights_and_buffers_are_those_that_are_read() -> None:
    wrapped, size = extractor_of("cnn")
    images = images_of(size)
    before = copy.deepcopy(wrapped.state_dict())
    expected = wrapped.eval()(images)
    wrapped.train()(images)["logits"].sum().backward()
    torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
    assert not torch.equal(wrapped.eval()(images)["features/1"], expected["features/1"])
    wrapped.load_state_dict(before)
    assert all(torch.equal(value, expected[name]) for name, value in wrapped.eval()(images).items())


def test_an_abandoned_step_leaves_no_trace_where_hidden_layers_are_read(
    tiny: Any, student: Any, state: Any, same: Any
) -> None:
    """Batch statistics move in the traced form, and must be put back in it."""
    experiment = tiny(distillation={"method": "dcm"})
    trainer = student(experiment, "cnn")
    before = state(trainer)
    first = trainer.begin()
    assert not same(state(trainer), before)
    trainer.abandon()
    assert same(state(trainer), before)
    again = trainer.begin()
    assert list(first.batch.arrays) == ["logits/stage1", "logits/stage2", "logits"]
    assert same(first.batch.arrays, again.batch.arrays)


def test_every_loss_reaches_the_weights_below_it_and_no_others() -> None:
    for output, reached in {
        "features/1": {"student.0"},
        "logits/stage1": {"student.0", "heads.0"},
        "logits/stage2": {"student.0", "student.3", "student.7", "heads.1"},
        "embedding": {"student.0", "student.3", "student.7"},
        "logits": {"student.0", "student.3", "student.7", "student.12"},
    }.items():
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Identity(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Identity(), nn.Identity(),
            nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity(), nn.Linear(4, 3),
        )  # fmt: skip
        wrapped = FeatureExtractor(
            model, channels=1, size=8, classes=3, features=["1", "4"], heads=["1", "8"], embedding=True
        )
        wrapped(images_of(8))[output].square().sum().backward()
        with_gradients = {name for name, each in wrapped.named_parameters() if each.grad is not None}
        assert {".".join(name.split(".")[:2]) for name in with_gradients} == reached


def test_classifiers_follow_from_their_seed() -> None:
    students = [Small() for _ in range(3)]
    state = torch.get_rng_state()
    one, same, other = (
        FeatureExtractor(student, channels=1, size=16, classes=3, heads=["twice"], seed=seed)
        for student, seed in zip(students, (3, 3, 4), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    weights = [torch.cat([each.flatten() for each in model.heads.parameters()]) for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_nothing_is_left_on_the_student_between_calls() -> None:
    wrapped = small(features=["twice"], embedding=True)
    wrapped(images_of(16))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in wrapped.student.modules())


def test_the_mode_is_that_of_before() -> None:
    model = Small().eval()
    wrapped = FeatureExtractor(model, channels=1, size=16, classes=3, features=["twice"])
    stage_layers(model, 1, channels=1, size=16)
    assert not wrapped.training
    assert not any(module.training for module in model.modules())


def test_layers_may_lie_in_one_another_and_be_the_same() -> None:
    outputs = small(features=["blocks", "blocks.1", "twice", "blocks"])(images_of(16))
    for number in (2, 4):
        assert torch.equal(outputs["features/1"], outputs[f"features/{number}"])
    assert not torch.equal(outputs["features/1"], outputs["features/3"])


def test_a_layer_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigurationError) as caught:
        small(features=["twise"])
    assert str(caught.value) == (
        "hidden layers: 'twise' is not there; did you mean 'twice'? "
        "The model has: twice, blocks.0, blocks.1, mean, and what is in them"
    )


def test_a_layer_that_gives_the_logits_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^hidden layers: 'last' gives the logits and is no hidden layer; The"
    ):
        small(heads=["last"])


def test_an_operation_without_a_map_is_refused() -> None:
    class Sized(Small):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images * images.size(0) / images.size(0))

    with pytest.raises(ConfigurationError, match=r"^hidden layers: 'size' gives int for 2 images; allowed are "):
        FeatureExtractor(Sized(), channels=1, size=16, classes=3, features=["size"])


def test_a_model_that_cannot_be_traced_is_refused_for_layers_and_taken_for_its_embedding() -> None:
    with pytest.raises(ConfigurationError, match=r"^hidden layers: the model cannot be traced: .*; choose a model "):
        FeatureExtractor(Branching(), channels=1, size=4, classes=3, features=["last"])
    outputs = FeatureExtractor(Branching(), channels=1, size=4, classes=3, embedding=True)(torch.ones(2, 1, 4, 4))
    assert torch.equal(outputs["embedding"], -torch.ones(2, 16))


def test_the_embedding_of_a_convolutional_classifier_is_the_mean_of_its_map() -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = images_of(4)
    outputs = FeatureExtractor(model, channels=1, size=4, classes=3, embedding=True)(images)
    torch.testing.assert_close(outputs["embedding"], images.mean((2, 3)))


def test_a_model_without_weights_has_no_embedding() -> None:
    with pytest.raises(ConfigurationError, match=r"^embedding: the model has no layer with weights; "):
        FeatureExtractor(nn.Flatten(), channels=1, size=2, classes=4, embedding=True)
