from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from codistill.config.experiment import Experiment, ExperimentError
from codistill.config.method_base import Method
from codistill.config.methods import KDCL_ENSEMBLES, METHODS, BornAgain, Distillation, Dml, Independent, Kd, Kdcl
from codistill.rundir.records import Joined, Measured
from codistill_deploy.compare import generations
from codistill_deploy.compare.plan import VARIANTS, best_alone, choose
from codistill_deploy.compare.statistics import BASELINE
from codistill_deploy.errors import CommandError
from codistill_deploy.run_folder import RunFolder

TEACHER = {"name": "old", "model": "cnn", "weights": "runs/old"}


def experiment(students: int = 2, **sections: Any) -> Experiment:
    document = {
        "name": "tiny",
        "seed": 5,
        "data": {"dataset": "digits"},
        "training": {"epochs": 1},
        "distillation": {"method": "kdcl", "ensemble": "naive", "temperature": 3},
        "students": [{"name": name, "model": "mlp", "model_args": {"hidden": 8}} for name in "abc"[:students]],
    }
    return Experiment.model_validate(document | sections)


def only(method: str, of: Experiment) -> Experiment:
    (*_, variant), _ = choose(of, ["independent", method])
    return variant.experiment


class TestSettings:
    def test_the_experiments_own_hold_for_its_own_method(self) -> None:
        assert only("kdcl", experiment()).distillation == Kdcl(ensemble="naive", temperature=3)
        assert only("kdcl/linear", experiment()).distillation == Kdcl(ensemble="linear", temperature=3)
        assert only("dml", experiment()).distillation == Dml()
        assert only("independent", experiment()).distillation == Independent()

    def test_students_settings_hold_where_the_method_has_them(self) -> None:
        students = [{"name": name, "model": "mlp", "distillation": {"temperature": 2}} for name in "ab"]
        own = experiment().replace(students=students)
        variants, left_out = choose(own, ["all"])
        assert [*left_out] == ["kdcl/general"]
        kept = {v.title for v in variants if v.experiment.students[0].distillation.temperature == 2}
        assert kept == {"kd", "born_again", "fddml", "kdcl/naive", "kdcl/linear", "kdcl/min_logit"}
        assert only("hddml", own).students[1].distillation.temperature == 2

    def test_an_unknown_method_names_the_known_ones(self) -> None:
        with pytest.raises(
            CommandError, match=r"--methods: 'kdlc' is not a method; allowed: independent, kd, .*, kdcl, all$"
        ):
            choose(experiment(), ["kdlc"])
        with pytest.raises(
            CommandError, match=r"'custom' is not a method; .*is for an experiment that has its own pair"
        ):
            choose(experiment(), ["custom"])

    def test_a_custom_pair_is_compared_too(self) -> None:
        pair = {"method": "custom", "server": "pairs:Server", "worker": "pairs:Worker"}
        own = experiment(distillation=pair)
        assert only("custom", own).distillation == own.distillation
        variants, _ = choose(own, ["all"])
        assert variants[-1].title == "custom/pairs:Worker"

    def test_none_is_chosen_twice_and_alone_comes_first(self) -> None:
        variants, _ = choose(experiment(), ["dml", "kdcl", "independent", "kdcl/naive", "dml"])
        assert [variant.title for variant in variants] == ["independent", "dml", "kdcl/naive"]


class TestAll:
    def test_it_is_every_method_of_which_the_experiment_meets_the_needs(self) -> None:
        variants, left_out = choose(experiment(), ["all"])
        assert [*left_out] == ["kdcl/general"]
        assert "data.held_out: 0" in left_out["kdcl/general"]
        assert {variant.title for variant in variants} == set(VARIANTS) - {"kdcl/general"}
        variants, left_out = choose(experiment(students=3, data={"dataset": "digits", "held_out": 9}), ["all"])
        assert {variant.title for variant in variants} | set(left_out) == set(VARIANTS)
        assert left_out.keys() == {"fddml", "hddml"}
        assert left_out["fddml"] == "'fddml' is for 2 students, there are 3; remove some, or choose another method"

    def test_what_is_named_beside_it_is_refused_all_the_same(self) -> None:
        with pytest.raises(ExperimentError, match="'fddml' is for 2 students, there are 3"):
            choose(experiment(students=3), ["all", "fddml"])

    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_with_defaults_is_in_it(self, name: str) -> None:
        settings = METHODS[name]
        needed = [key for key, field in settings.model_fields.items() if field.is_required()]
        compared = [title for title in VARIANTS if title.partition("/")[0] == name]
        assert bool(compared) == (not needed)

    @pytest.mark.parametrize("title", VARIANTS)
    def test_a_variant_is_listed_under_its_own_title(self, title: str) -> None:
        distillation: Method = TypeAdapter[Any](Distillation).validate_python(VARIANTS[title])
        assert distillation.title == title

    def test_the_baseline_comes_first_and_the_others_follow_the_settings(self) -> None:
        assert next(iter(VARIANTS)) == BASELINE
        of_kdcl = [title for title in VARIANTS if title.startswith("kdcl/")]
        assert of_kdcl == [f"kdcl/{ensemble}" for ensemble in KDCL_ENSEMBLES]
        named = list(dict.fromkeys(title.partition("/")[0] for title in VARIANTS))
        assert named == [name for name in METHODS if name != "custom"]


class TestTeachers:
    def test_the_experiments_own_teaches_where_there_is_one(self) -> None:
        own = experiment(teachers=[TEACHER], distillation={"method": "kd", "temperature": 2})
        variants, _ = choose(own, ["independent", "kd", "vid", "dml", "born_again"])
        by_title = {variant.title: variant for variant in variants}
        assert not any(variant.finds_teacher for variant in variants)
        assert by_title["kd"].experiment.distillation == Kd(temperature=2)
        assert by_title["vid"].experiment.teacher_names == ("old",)
        assert not by_title["dml"].experiment.teachers
        assert by_title["born_again"].experiment.distillation == BornAgain()
        assert generations.has_generations(by_title["born_again"].experiment)

    def test_without_one_the_best_of_the_students_alone_does(self, tmp_path: Path) -> None:
        variants, _ = choose(experiment(), ["kd", "independent"])
        assert [(variant.title, variant.finds_teacher) for variant in variants] == [
            ("independent", False),
            ("kd", True),
        ]
        alone = RunFolder(tmp_path)
        alone.start(variants[0].experiment, mode="grpc", resume=False)
        lines = [
            record.model_dump_json()
            for student, accuracy in (("a", 0.7), ("b", 0.8))
            for record in (
                Joined(
                    time=1, participant=student, model="m", parameters=1, device="cpu", total_rounds=0, total_steps=9
                ),
                Measured(
                    time=2,
                    participant=student,
                    split="test",
                    steps_trained=9,
                    epochs_trained=1,
                    accuracy=accuracy,
                    loss=1,
                ),
            )
        ]
        alone.metrics_file.write_text("\n".join(lines) + "\n")
        teacher = best_alone(variants[1].experiment, alone)
        assert (teacher.name, teacher.model_args) == ("b.alone", {"hidden": 8})
        assert teacher.weights == str(alone.student("b").path)
        taught = variants[1].with_seed(7, teacher)
        assert (taught.seed, taught.teachers) == (7, (teacher,))

    def test_without_a_possible_teacher_the_error_says_what_to_add(self) -> None:
        with pytest.raises(
            CommandError, match=r"'kd' needs a teacher, there is none; add `teachers` .* or independent to"
        ):
            choose(experiment(), ["kd", "dml"])
