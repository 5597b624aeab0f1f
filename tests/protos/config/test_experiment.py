from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from codistill.config.datasets import DATASETS
from codistill.config.experiment import Experiment, ExperimentError, load, parse
from codistill.config.fingerprint import identity
from codistill.config.methods import Dml, Independent, Kd, Kdcl
from codistill.config.participants import Student
from protos.config.support import DATASET_NAMES, METHOD_ALLOWED, TOP, changed, experiment

EXAMPLE = Path(__file__).parents[3] / "examples" / "digits.yaml"


class TestDefaults:
    def test_the_smallest_experiment(self) -> None:
        small = experiment()
        assert small.names == ("ant", "bee")
        assert small.seed == 0
        assert small.distillation == Kdcl(ensemble="min_logit", weight=1, temperature=2)
        assert small.distillation.title == "kdcl/min_logit"
        assert small.exchange.dtype == "float32"
        assert small.exchange.journal.keep == "needed"
        assert (small.exchange.give_up_after, small.exchange.waiting_notice) == (600, 5)
        assert (small.training.batch_size, small.training.optimizer.name, small.training.optimizer.lr) == (
            64,
            "sgd",
            0.1,
        )
        assert small.data.class_count == 10

    def test_the_methods(self) -> None:
        assert (Dml().title, Dml().exchanges, Dml().temperature) == ("dml", True, 1)
        assert (Independent().title, Independent().exchanges) == ("independent", False)
        assert Kdcl(ensemble="naive").title == "kdcl/naive"

    def test_the_example_of_the_documentation(self) -> None:
        digits = load(EXAMPLE)
        assert digits.names == ("mlp", "cnn", "vit")
        assert digits.training.optimizer.lr == 4e-3
        assert digits.distillation == Kdcl(ensemble="naive")
        assert load(str(EXAMPLE)) == digits

    def test_every_field_says_what_it_is(self) -> None:
        seen: set[type[BaseModel]] = set()

        def visit(model: type[BaseModel]) -> None:
            if model in seen:
                return
            seen.add(model)
            for name, field in model.model_fields.items():
                assert field.description, f"{model.__name__}.{name} has no description"
                assert field.description.endswith("."), f"{model.__name__}.{name}: {field.description!r}"
                for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
                    if isinstance(inner, type) and issubclass(inner, BaseModel):
                        visit(inner)

        visit(Experiment)
        assert {Experiment, Student, Kdcl, Dml, Independent} <= seen

    @pytest.mark.parametrize("reference", ["torchvision:resnet18", "my_package.data:load"])
    def test_a_data_set_of_ones_own(self, reference: str) -> None:
        own = experiment(data__dataset=reference, data__classes=7)
        assert own.data.class_count == 7

    def test_data_sets_are_described(self) -> None:
        assert ", ".join(DATASETS) == DATASET_NAMES


class TestPlan:
    def test_overrides_change_their_key_and_no_other(self) -> None:
        whole = experiment(
            training={
                "epochs": 2,
                "threads": 2,
                "optimizer": {"name": "adamw", "lr": 0.5, "weight_decay": 0.01},
                "schedule": {"name": "steps", "milestones": [1]},
            },
            data={"dataset": "digits", "augment": {"crop_padding": 2}},
            students__0__training={
                "optimizer": {"lr": 0.25},
                "schedule": {"name": "cosine"},
                "clip_norm": 1,
                "device": "cpu",
                "channels_last": True,
            },
            students__0__data={"augment": {"flip": True}},
            students__0__distillation={"weight": 0, "temperature": 3},
        )
        own = whole.plan("ant")
        assert own.student == whole.students[0]
        assert own.training == whole.training.model_copy(
            update={
                "optimizer": whole.training.optimizer.model_copy(update={"lr": 0.25}),
                "schedule": whole.training.schedule.model_copy(update={"name": "cosine"}),
                "clip_norm": 1.0,
                "device": "cpu",
                "channels_last": True,
            }
        )
        assert own.data == whole.data.model_copy(
            update={"augment": whole.data.augment.model_copy(update={"flip": True})}
        )
        assert own.distillation == Kdcl(weight=0, temperature=3)
        other = whole.plan("bee")
        assert (other.data, other.training, other.distillation) == (whole.data, whole.training, whole.distillation)

    def test_an_unknown_student(self) -> None:
        with pytest.raises(KeyError, match="cat"):
            experiment().plan("cat")

    def test_null_is_as_in_the_experiment(self) -> None:
        whole = experiment(training__clip_norm=2, students__0__training={"clip_norm": None, "threads": None})
        assert whole.plan("ant").training == whole.training

    def test_a_plan_is_the_same_after_writing_and_reading(self) -> None:
        whole = experiment(students__0__training={"optimizer": {"betas": [0.5, 0.9]}})
        assert parse(whole.to_yaml()).plan("ant") == whole.plan("ant")


class TestWithMethod:
    def test_students_keep_of_their_own_settings_those_that_the_method_has(self) -> None:
        whole = experiment(
            students__0__distillation={"weight": 0.5, "temperature": 3}, students__1__distillation={"weight": 0.25}
        )
        alone = whole.with_method(Independent(), seed=3)
        assert (alone.distillation, alone.seed) == (Independent(), 3)
        assert [student.distillation.given() for student in alone.students] == [{}, {}]
        mutual = whole.with_method(Dml())
        assert [student.distillation.given() for student in mutual.students] == [{"weight": 0.5}, {"weight": 0.25}]
        assert mutual.plan("ant").distillation == Dml(weight=0.5)
        assert whole.with_method(Kdcl()) == whole

    def test_a_method_whose_needs_are_not_met_is_refused(self) -> None:
        with pytest.raises(ExperimentError, match="'kd' needs a teacher"):
            experiment().with_method(Kd())


class TestReplace:
    def test_a_field_is_replaced_and_the_others_stay(self) -> None:
        whole = experiment(students__0__training={"threads": 2}, distillation={"method": "dml"})
        other = whole.replace(seed=3)
        assert other.seed == 3
        assert other.replace(seed=0) == whole
        assert whole.seed == 0

    def test_replacing_twice(self) -> None:
        assert experiment().replace(distillation=Dml()).replace(seed=1).distillation == Dml()

    def test_plain_values_are_read_as_in_a_file(self) -> None:
        assert experiment().replace(distillation={"method": "kdcl", "ensemble": "naive"}).distillation == Kdcl(
            ensemble="naive"
        )

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"seed": -1}, "seed: -1 is not allowed: input should be greater than or equal to 0"),
            ({"sed": 1}, f"sed: unknown key; did you mean 'seed'? Allowed: {TOP}"),
            (
                {"students": (Student(name="ant", model="mlp"),)},
                "distillation.method: 'kdcl' needs at least 2 students, there is 1; add one, or choose `independent`",
            ),
            (
                {"distillation": {"method": "okd"}},
                f"distillation.method: 'okd' is not a method; {METHOD_ALLOWED}",
            ),
        ],
    )
    def test_what_is_replaced_is_checked(self, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(ExperimentError) as caught:
            experiment().replace(**changes)
        assert str(caught.value) == f"tiny: {problem}"

    def test_nothing_is_changed_in_place(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            experiment().seed = 3  # type: ignore[misc]


class TestYaml:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"distillation": {"method": "independent", "label_smoothing": 0.1}},
            {"distillation": {"method": "dml", "temperature": 3}},
            {"training.optimizer.lr": 1e-7, "training.optimizer.weight_decay": 1e22},
            {"data.normalize": {"mean": [0.1], "std": [1e-5]}, "data.root": "Größe/ディ"},
            {"students.0.model_args": {"a": [1, {"b": None}], "c": "1e-3", "d": "2024-01-01", "e": "yes", "f": 0.1}},
            {"students.0.training": {"optimizer": {"lr": 0.3}, "schedule": {"milestones": [1, 2], "name": "steps"}}},
        ],
    )
    def test_the_resolved_experiment_reads_back_equal(self, changes: dict[str, Any]) -> None:
        whole = parse(yaml.safe_dump(changed(changes), allow_unicode=True))
        again = parse(whole.to_yaml())
        assert again == whole
        assert again.to_yaml() == whole.to_yaml()
        assert identity(again) == identity(whole)

    def test_the_example_too(self) -> None:
        assert parse(load(EXAMPLE).to_yaml()) == load(EXAMPLE)
