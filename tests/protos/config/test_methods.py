"""The needs of methods, and the errors of experiments that do not meet them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from codistill.config.experiment import ExperimentError, parse
from codistill.config.methods import METHODS
from protos.config.support import changed

TEACHER = {"name": "old", "model": "mlp", "weights": "runs/old"}
TWO = [{"name": "ant", "model": "mlp"}, {"name": "bee", "model": "cnn"}]


def problems(**changes: Any) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        parse(yaml.safe_dump(changed({"students": TWO, **changes})))
    return caught.value.problems


@pytest.mark.parametrize(
    "method", ["kd", "logit_regression", "vid", "rkd_distance", "rkd_angle", "rkd", "fddml", "hddml"]
)
def test_a_method_without_its_teacher_says_what_to_add(method: str) -> None:
    assert problems(distillation={"method": method}) == [
        (
            f"distillation.method: '{method}' needs a teacher, there is none; add one, for example "
            "teachers: [{name: teacher, model: MODEL, weights: FILE}]"
        )
    ]


@pytest.mark.parametrize("method", ["independent", "dml", "kdcl", "dcm", "cross_architecture"])
def test_a_teacher_without_a_use_is_rejected(method: str) -> None:
    assert problems(distillation={"method": method}, teachers=[TEACHER]) == [
        f"teachers: old, but method '{method}' has no use for a teacher; remove `teachers`"
    ]


@pytest.mark.parametrize("method", ["fddml", "hddml"])
@pytest.mark.parametrize(
    ("students", "problem"),
    [
        (TWO[:1], "needs 2 students, there is 1; add one, or choose `independent`"),
        (
            [*TWO, {"name": "cat", "model": "mlp"}],
            "is for 2 students, there are 3; remove some, or choose another method",
        ),
    ],
)
def test_two_students_are_two(method: str, students: list[Any], problem: str) -> None:
    assert problems(distillation={"method": method}, teachers=[TEACHER], students=students) == [
        f"distillation.method: '{method}' {problem}"
    ]


def test_more_teachers_than_a_method_takes_are_refused() -> None:
    assert problems(distillation={"method": "kd"}, teachers=[TEACHER, {**TEACHER, "name": "older"}]) == [
        "teachers: there are 2, but method 'kd' takes 1; remove some"
    ]


def test_a_teachers_name_is_not_a_students() -> None:
    assert problems(distillation={"method": "kd"}, teachers=[{**TEACHER, "name": "Bee"}]) == [
        "teachers.0.name: 'Bee' is already the name of students.1, because file systems may ignore case; give each its own"
    ]


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ({"cat": ["a", "b"]}, "cat: no student or teacher has this name; allowed: ant, bee, old"),
        ({"ant": ["a"]}, "ant: 1 layers are not allowed; allowed are the 2 of distillation.stages"),
    ],
)
def test_layers_belong_to_a_participant_and_are_as_many_as_stages(layers: dict[str, list[str]], problem: str) -> None:
    found = problems(distillation={"method": "vid", "layers": layers}, teachers=[TEACHER])
    assert found == [f"distillation.layers.{problem}"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"start_epoch": 3},
            "start_epoch: 3 is not allowed; allowed is less than the 3 of training.epochs, as otherwise nothing is exchanged",
        ),
        (
            {"start_epoch": 1, "full_epoch": 1},
            "full_epoch: 1 is not allowed; allowed is more than the 1 of distillation.start_epoch",
        ),
        ({"every": 0}, "every: 0 is not allowed: input should be greater than or equal to 1"),
    ],
)
def test_a_schedule_that_never_exchanges_is_rejected(changes: dict[str, Any], problem: str) -> None:
    found = problems(distillation={"method": "cross_architecture", **changes}, training={"epochs": 3, "batch_size": 2})
    assert found == [f"distillation.{problem}"]


@pytest.mark.parametrize(
    ("epochs", "allowed"),
    [({"start_epoch": 2.7}, True), ({"start_epoch": 2.76}, False), ({"start_epoch": 2.99}, False)],
)
def test_a_start_after_the_last_round_begins_is_rejected(epochs: dict[str, float], allowed: bool) -> None:
    """Of 4 rounds an epoch, the last of three begins at 2.75."""
    changes: dict[str, Any] = {
        "distillation": {"method": "cross_architecture", **epochs},
        "training": {"epochs": 3, "batch_size": 10},
        "data": {"dataset": "digits", "train_size": 45},
    }
    if allowed:
        parse(yaml.safe_dump(changed({"students": TWO, **changes})))
    else:
        assert problems(**changes) == [
            (
                f"distillation.start_epoch: {epochs['start_epoch']:g} is not allowed; allowed is up to 2.75, where the last of 12 "
                "rounds begins, as otherwise nothing is exchanged"
            )
        ]


@pytest.mark.parametrize("method", ["rkd_distance", "rkd_angle", "rkd"])
@pytest.mark.parametrize("size", [1, 2])
def test_batches_without_relations_are_refused(method: str, size: int) -> None:
    """The only distance of two samples is 1 mean distance, and they have no angle."""
    assert problems(
        distillation={"method": method}, teachers=[TEACHER], training={"epochs": 1, "batch_size": size}
    ) == [
        (
            f"training.batch_size: {size} is not allowed; allowed is 3 or more, as `{method}` compares the relations among a "
            "batch's samples, and in smaller batches all are the same"
        )
    ]


@pytest.mark.parametrize(
    ("changes", "teachers", "problem"),
    [
        ({"generations": 1}, [], "distillation.generations: 1 is not allowed without `teachers`; allowed: 2 to 100"),
        (
            {},
            [TEACHER],
            "distillation.generations: 2, but `teachers` are the generation before; set it to 1, or remove `teachers`",
        ),
        ({"generations": 1}, [TEACHER], "teachers: there are 1, but `born_again` needs one for each of the 2 students"),
        (
            {"generations": 1},
            [TEACHER, {**TEACHER, "name": "older"}],
            "teachers.1.model: 'mlp' with {}, but `born_again` has the student's own architecture: 'cnn' with {}",
        ),
    ],
)
def test_generations_follow_one_another(changes: dict[str, Any], teachers: list[Any], problem: str) -> None:
    assert problems(distillation={"method": "born_again", **changes}, teachers=teachers) == [problem]


def test_a_custom_pair_is_two_references() -> None:
    assert problems(distillation={"method": "custom", "server": "mine", "worker": "mine:objective"}) == [
        "distillation.server: 'mine': is not of the form package.module:callable"
    ]
    assert problems(
        distillation={"method": "custom", "server": "mine:a", "worker": "mine:b", "parameters": {"rate": float("nan")}}
    ) == [
        "distillation.parameters: rate: nan is not allowed; allowed are text, finite numbers, true, false, null, lists and maps of them"
    ]


def test_where_a_teacher_teaches_all_see_the_same_view() -> None:
    def shared(**changes: Any) -> bool:
        return parse(yaml.safe_dump(changed({"students": TWO, **changes}))).shared_view

    taught = {"distillation": {"method": "kd"}, "teachers": [TEACHER]}
    assert not shared()
    assert shared(**taught)
    assert not shared(**taught, data={"dataset": "digits", "augment": {"view": "own"}})
    assert shared(data={"dataset": "digits", "augment": {"view": "shared"}})


NEEDED: dict[str, Any] = {
    "custom": {"server": "mine:a", "worker": "mine:b"},
    "born_again": {"generations": 1},
}
BOTH, WEIGHT, NONE = ("weight", "temperature"), ("weight",), ()
OWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "independent": (NONE, NONE),
    "kd": (BOTH, BOTH),
    "logit_regression": (WEIGHT, WEIGHT),
    "born_again": (BOTH, BOTH),
    "vid": (WEIGHT, WEIGHT),
    "rkd_distance": (NONE, NONE),
    "rkd_angle": (NONE, NONE),
    "rkd": (NONE, NONE),
    "fddml": (BOTH, BOTH),
    "hddml": (NONE, BOTH),
    "dml": (WEIGHT, WEIGHT),
    "dcm": (NONE, NONE),
    "kdcl": (BOTH, BOTH),
    "cross_architecture": (WEIGHT, WEIGHT),
    "custom": (NONE, NONE),
}
"""The settings that the first and the second student may have of their own, by method."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("field", BOTH)
def test_a_setting_of_a_students_own_has_an_effect_or_is_refused(method: str, position: int, field: str) -> None:
    least, most = METHODS[method].teacher_limits
    teachers = [{**student, "name": f"{student['name']}.old", "weights": "x"} for student in TWO]
    count = 2 if method == "born_again" else min(most, max(least, 1))
    students = [dict(student) for student in TWO]
    students[position]["distillation"] = {field: 0.625}
    changes = {
        "distillation": {"method": method, **NEEDED.get(method, {})},
        "students": students,
        "teachers": teachers[:count],
    }
    if field in OWN[method][position]:
        whole = parse(yaml.safe_dump(changed(changes)))
        own = whole.plan(TWO[position]["name"]).distillation
        assert own == whole.distillation.model_copy(update={field: 0.625})
        assert own != whole.distillation
    else:
        (problem,) = problems(**changes)
        assert problem.startswith(f"students.{position}.distillation.{field}: 0.625, but `{method}` ")


@pytest.mark.parametrize(
    ("method", "field", "problem"),
    [
        (
            "rkd",
            "weight",
            "has no weight; its settings are distance_weight, angle_weight, and a student can override none",
        ),
        (
            "dcm",
            "weight",
            (
                "has no weight; its settings are stages, layers, auxiliary_weight, same_weight, other_weight, and a student "
                "can override none"
            ),
        ),
        (
            "vid",
            "temperature",
            "has no temperature; its settings are stages, layers, weight, and a student can override weight",
        ),
        (
            "logit_regression",
            "temperature",
            "has no temperature; its settings are weight, label_weight, and a student can override weight",
        ),
        ("dml", "temperature", "softens all students' logits alike; set distillation.temperature"),
        (
            "hddml",
            "temperature",
            (
                "has no teacher for the first student, and the setting is of the teacher's term; its settings are weight, "
                "peer_weight, temperature, and only the second student can override weight, temperature"
            ),
        ),
    ],
)
def test_the_reason_names_the_methods_own_settings(method: str, field: str, problem: str) -> None:
    students = [{**TWO[0], "distillation": {field: 2}}, TWO[1]]
    teachers = [TEACHER] if METHODS[method].teacher_limits[0] else []
    assert problems(distillation={"method": method}, teachers=teachers, students=students) == [
        f"students.0.distillation.{field}: 2.0, but `{method}` {problem}"
    ]


def test_null_is_no_setting_of_a_students_own() -> None:
    students = [{**TWO[0], "distillation": {"weight": None, "temperature": None}}, TWO[1]]
    whole = parse(yaml.safe_dump(changed({"students": students, "distillation": {"method": "independent"}})))
    assert whole.plan("ant").distillation == whole.distillation


@pytest.mark.parametrize("view", ["own", "shared"])
def test_no_student_chooses_whether_views_are_shared(view: str) -> None:
    students = [{**TWO[0], "data": {"augment": {"view": view, "flip": True}}}, TWO[1]]
    assert problems(students=students) == [
        f"students.0.data.augment.view: '{view}', but one view is chosen for all; set data.augment.view"
    ]


def test_with_a_shared_view_no_student_has_its_own() -> None:
    own = [{**TWO[0], "data": {"augment": {"flip": True}}}, TWO[1]]
    assert problems(distillation={"method": "kd"}, teachers=[TEACHER], students=own) == [
        "students.0.data.augment: flip, but all see the same view of a sample; set data.augment, or data.augment.view: own"
    ]
