from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from codistill.config.errors import PRETRAINED
from codistill.config.experiment import ExperimentError, load
from codistill.config.methods import KDCL_ENSEMBLES
from protos.config.support import A_NAME, DATASET_NAMES, METHOD_ALLOWED, TOP, changed, document, problems

OVERRIDES = "channels_last, clip_norm, device, optimizer, precision, schedule, threads"
OPTIMIZER = "betas, decay_norm_and_bias, lr, momentum, name, nesterov, weight_decay"
KDCL = {"method": "kdcl"}
ENSEMBLES = ", ".join(map(repr, KDCL_ENSEMBLES)).rsplit(", ", 1)

BAD: list[tuple[dict[str, Any], list[str]]] = [
    # keys that are not known
    ({"trainig": {}}, [f"trainig: unknown key; did you mean 'training'? Allowed: {TOP}"]),
    (
        {"students": [{"name": "a", "model": "mlp", "weights": "a.pth"}, {"name": "b", "model": "mlp"}]},
        [
            f"students.0.weights: unknown key; {PRETRAINED}; allowed: data, distillation, model, model_args, name, training"
        ],
    ),
    ({"zzz": 1}, [f"zzz: unknown key; allowed: {TOP}"]),
    ({"kdcl": {"temperature": 2}}, [f"kdcl: unknown key; allowed: {TOP}"]),
    (
        {"training.optimizer.learning_rate": 0.1},
        [f"training.optimizer.learning_rate: unknown key; allowed: {OPTIMIZER}"],
    ),
    (
        {"training.optimizer.momentun": 0.1},
        [f"training.optimizer.momentun: unknown key; did you mean 'momentum'? Allowed: {OPTIMIZER}"],
    ),
    (
        {"distillation": {**KDCL, "temprature": 2}},
        [
            (
                "distillation.temprature: unknown key; did you mean 'temperature'? Allowed: ensemble, method, temperature, "
                "weight"
            )
        ],
    ),
    (
        {"distillation": {**KDCL, "kdcl": 2}},
        ["distillation.kdcl: unknown key; allowed: ensemble, method, temperature, weight"],
    ),
    (
        {"distillation": {"method": "dml", "ensemble": "naive"}},
        ["distillation.ensemble: unknown key; allowed: method, temperature, weight"],
    ),
    (
        {"exchange.journal.kep": "all"},
        ["exchange.journal.kep: unknown key; did you mean 'keep'? Allowed: durability, keep"],
    ),
    (
        {"students.1.modell": "mlp"},
        [
            (
                "students.1.modell: unknown key; did you mean 'model'? Allowed: data, distillation, model, model_args, name, "
                "training"
            )
        ],
    ),
    # a student's own keys
    ({"students.1.training": {"epochs": 3}}, [f"students.1.training.epochs: unknown key; allowed: {OVERRIDES}"]),
    (
        {"students.1.training": {"optimizer": {"lrr": 3}}},
        [f"students.1.training.optimizer.lrr: unknown key; did you mean 'lr'? Allowed: {OPTIMIZER}"],
    ),
    (
        {"students.1.training": {"optimizer": {"lr": -3}}},
        ["students.1.training.optimizer.lr: -3 is not allowed: input should be greater than 0"],
    ),
    (
        {"students.0.training": {"schedule": {"name": "steps"}}},
        ["students.0.training.schedule: schedule `steps` needs `milestones`, the epochs at which it lowers the rate"],
    ),
    (
        {"students.0.data": {"augment": {"flipp": True}}},
        ["students.0.data.augment.flipp: unknown key; did you mean 'flip'? Allowed: crop_padding, flip, view"],
    ),
    ({"students.0.data": {"root": "x"}}, ["students.0.data.root: unknown key; allowed: augment"]),
    (
        {"students.0.distillation": {"dml": 1}},
        ["students.0.distillation.dml: unknown key; allowed: temperature, weight"],
    ),
    (
        {"students.0.distillation": {"weight": -1}},
        ["students.0.distillation.weight: -1 is not allowed: input should be greater than or equal to 0"],
    ),
    (
        {"students.0.model_args": {"width": 3, "limit": float("inf")}},
        [
            (
                "students.0.model_args: limit: inf is not allowed; allowed are text, finite numbers, true, false, null, "
                "lists and maps of them"
            )
        ],
    ),
    # values of a wrong type or out of range
    (
        {"training.epochs": "sixty"},
        ["training.epochs: 'sixty' is not allowed: input should be an integer"],
    ),
    ({"training.epochs": 0}, ["training.epochs: 0 is not allowed: input should be greater than or equal to 1"]),
    (
        {"training.epochs": 1.5},
        ["training.epochs: 1.5 is not allowed: input should be an integer"],
    ),
    ({"training.epochs": True}, ["training.epochs: True is not allowed: input should be an integer"]),
    ({"training.epochs": "3"}, ["training.epochs: '3' is not allowed: input should be an integer"]),
    ({"training.clip_norm": True}, ["training.clip_norm: True is not allowed: input should be a number"]),
    ({"training.clip_norm": "3"}, ["training.clip_norm: '3' is not allowed: input should be a number"]),
    (
        {"training.channels_last": 1},
        ["training.channels_last: 1 is not allowed: input should be true or false"],
    ),
    (
        {"training.schedule.milestones": 3},
        ["training.schedule.milestones: 3 is not allowed: input should be a list"],
    ),
    (
        {"training.optimizer.betas": [0.9, 0.9, 0.9]},
        ["training.optimizer.betas: [0.9, 0.9, 0.9] is not allowed: input should have at most 2 items"],
    ),
    (
        {"exchange.round_deadline": "soon"},
        ["exchange.round_deadline: 'soon' is not allowed: input should be 'auto' or a number"],
    ),
    (
        {"exchange.round_deadline": -1},
        ["exchange.round_deadline: -1 is not allowed: input should be 'auto' or greater than 0"],
    ),
    ({"training": 5}, ["training: 5 is not allowed: input should be a section of keys and values"]),
    (
        {"training.optimizer.name": "adam"},
        ["training.optimizer.name: 'adam' is not allowed: input should be 'sgd' or 'adamw'"],
    ),
    (
        {"training.optimizer.lr": float("nan")},
        ["training.optimizer.lr: nan is not allowed: input should be a finite number"],
    ),
    (
        {"training.optimizer.betas": [0.9, 1.0]},
        ["training.optimizer.betas.1: 1.0 is not allowed: input should be less than 1"],
    ),
    (
        {"training.precision": "float64"},
        ["training.precision: 'float64' is not allowed: input should be 'float32' or 'bfloat16'"],
    ),
    (
        {"training.device": "gpu"},
        ["training.device: 'gpu' is not allowed: input should be auto, cpu, cuda or cuda:N"],
    ),
    ({"seed": -1}, ["seed: -1 is not allowed: input should be greater than or equal to 0"]),
    ({"seed": 2**63}, [f"seed: {2**63} is not allowed: input should be less than {2**63}"]),
    (
        {"name": 7},
        [
            'name: YAML reads `7` as the number 7; write "7" in quotes (as well: no, on, off, yes, null, ~, 0x1F, 1_000, 12:30, 1e3)'
        ],
    ),
    (
        {"name": "a/b"},
        [f"name: 'a/b' is not allowed: {A_NAME}"],
    ),
    (
        {"students.0.name": "../up"},
        [f"students.0.name: '../up' is not allowed: {A_NAME}"],
    ),
    ({"students.0.model": ""}, ["students.0.model: '' is not allowed: input should not be empty"]),
    ({"data.root": " "}, ["data.root: ' ' is not allowed: input should not be empty"]),
    (
        {"distillation": {"method": "kd"}, "teachers": [{"name": "t", "model": "", "weights": ""}]},
        [
            "teachers.0.model: '' is not allowed: input should not be empty",
            "teachers.0.weights: '' is not allowed: input should not be empty",
        ],
    ),
    ({"students": []}, ["students: [] is not allowed: input should have at least 1 item"]),
    (
        {"distillation": {**KDCL, "ensemble": "mean"}},
        [f"distillation.ensemble: 'mean' is not allowed: input should be {ENSEMBLES[0]} or {ENSEMBLES[1]}"],
    ),
    (
        {"exchange.dtype": "int8"},
        ["exchange.dtype: 'int8' is not allowed: input should be 'float32', 'float16' or 'bfloat16'"],
    ),
    (
        {"exchange.waiting_notice": 600},
        ["exchange: waiting_notice: 600.0 s must be shorter than give_up_after: 600.0 s"],
    ),
    (
        {"training.schedule": {"name": "steps"}},
        ["training.schedule: schedule `steps` needs `milestones`, the epochs at which it lowers the rate"],
    ),
    # names that are not known
    ({"distillation": {"method": "kdc"}}, [f"distillation.method: 'kdc' is not a method; {METHOD_ALLOWED}"]),
    ({"distillation": {"weight": 1}}, [f"distillation.method: is needed and not given; {METHOD_ALLOWED}"]),
    (
        {"data.dataset": "cifar-10"},
        [
            (
                "data.dataset: 'cifar-10': unknown data set; did you mean 'cifar10'? "
                f"Allowed: {DATASET_NAMES}, or package.module:callable"
            )
        ],
    ),
    (
        {"data.dataset": "zzz"},
        [f"data.dataset: 'zzz': unknown data set; allowed: {DATASET_NAMES}, or package.module:callable"],
    ),
    # fields that do not go together
    ({"data.classes": 11}, ["data: classes: 11, but digits has 10; leave it out"]),
    ({"data.dataset": "mine:load"}, ["data: dataset mine:load needs `classes`, its number of classes"]),
    (
        {"data.dataset": "imagenet"},
        ["data: dataset imagenet needs `image_size`, the height and width to resize images to"],
    ),
    (
        {"data.normalize": {"mean": [0.5, 0.5], "std": [1]}},
        ["data.normalize: mean has 2 channels, std has 1; give as many of each"],
    ),
    (
        {"data.normalize": {"mean": [0.5, 0.5], "std": [1, 0]}},
        ["data.normalize.std.1: 0 is not allowed: input should be greater than 0"],
    ),
    (
        {"data.normalize": {"mean": [0.5], "std": [0]}},
        ["data.normalize.std.0: 0 is not allowed: input should be greater than 0"],
    ),
    (
        {"data.normalize": {"mean": [0.5] * 3, "std": [1] * 3}},
        ["data.normalize: 3 channels, but the images of digits have 1"],
    ),
    (
        {"data.train_size": 1797},
        ["data.train_size: 1797 is more than digits has to train on; allowed: 1 to 1796"],
    ),
    (
        {"data.train_size": 1000, "data.test_size": 798},
        ["data.test_size: 798 is more than digits has to test on; allowed: 1 to 797"],
    ),
    (
        {"data.dataset": "cifar10", "data.train_size": 50_001},
        ["data.train_size: 50001 is more than cifar10 has to train on; allowed: 1 to 50000"],
    ),
    (
        {"data.held_out": 1347},
        ["data.held_out: 1347 leaves nothing of 1347 training samples; allowed: 0 to 1346"],
    ),
    (
        {"data.held_out": 47, "training.batch_size": 1301},
        [
            "training.batch_size: 1301 is larger than the 1300 training samples (1347 of digits less data.held_out)",
        ],
    ),
    (
        {"training.optimizer": {"nesterov": True, "momentum": 0}},
        ["training.optimizer.nesterov: true, but momentum is 0; leave it out, or set momentum above 0"],
    ),
    (
        {"training.optimizer.nesterov": True, "students.1.training.optimizer": {"momentum": 0}},
        ["students.1.training.optimizer.nesterov: true, but momentum is 0; leave it out, or set momentum above 0"],
    ),
    (
        {"training.schedule.warmup_epochs": 2},
        [
            (
                "training.schedule.warmup_epochs: 2 is not allowed; allowed is less than the 2 of training.epochs, or the "
                "rate never gets to its peak"
            )
        ],
    ),
    (
        {"students.1.name": "Ant"},
        [
            (
                "students.1.name: 'Ant' is already the name of students.0, because file systems may ignore case; give "
                "each its own"
            )
        ],
    ),
    (
        {"students.1.name": "ant"},
        ["students.1.name: 'ant' is already the name of students.0; give each its own"],
    ),
    (
        {"students": [{"name": "ant", "model": "mlp"}] * 3},
        [f"students.{at}.name: 'ant' is already the name of students.0; give each its own" for at in (1, 2)],
    ),
    *(
        (
            {"distillation": {"method": method}, "students": [{"name": "ant", "model": "mlp"}]},
            [
                f"distillation.method: '{method}' needs at least 2 students, there is 1; add one, or choose `independent`"
            ],
        )
        for method in ("dml", "kdcl")
    ),
    (
        {"distillation": {**KDCL, "ensemble": "general"}},
        [
            (
                "data.held_out: 0, but the `general` ensemble measures its weights on held-out samples; set it, for example "
                "to 1000"
            )
        ],
    ),
    (
        {"data.train_size": 63},
        ["training.batch_size: 64 is larger than the 63 training samples (data.train_size less data.held_out)"],
    ),
    (
        {"data.train_size": 100, "data.held_out": 50},
        ["training.batch_size: 64 is larger than the 50 training samples (data.train_size less data.held_out)"],
    ),
    (
        {"data.train_size": 10, "data.held_out": 50},
        ["training.batch_size: 64 is larger than the 0 training samples (data.train_size less data.held_out)"],
    ),
    # several at once
    (
        {"training.epochs": 0, "data.root": 5, "students.0.nam": "x"},
        [
            'data.root: YAML reads `5` as the number 5; write "5" in quotes (as well: no, on, off, yes, null, ~, 0x1F, 1_000, 12:30, 1e3)',
            "training.epochs: 0 is not allowed: input should be greater than or equal to 1",
            (
                "students.0.nam: unknown key; did you mean 'name'? Allowed: data, distillation, model, model_args, name, "
                "training"
            ),
        ],
    ),
    (
        {"students.1": {"name": "ant", "model": "mlp", "training": {"optimizer": {"lr": 0}}}, "data.train_size": 1},
        [
            "students.1.name: 'ant' is already the name of students.0; give each its own",
            "training.batch_size: 64 is larger than the 1 training samples (data.train_size less data.held_out)",
            "students.1.training.optimizer.lr: 0 is not allowed: input should be greater than 0",
        ],
    ),
]


class TestBadInput:
    @pytest.mark.parametrize(("changes", "expected"), BAD, ids=[", ".join(changes) for changes, _ in BAD])
    def test_each_problem_is_one_line_with_path_value_and_what_is_allowed(
        self, changes: dict[str, Any], expected: list[str]
    ) -> None:
        assert problems(yaml.safe_dump(changed(changes))) == expected

    @pytest.mark.parametrize("key", ["name", "data", "training", "students"])
    def test_a_key_that_is_missing(self, key: str) -> None:
        whole = document()
        del whole[key]
        assert problems(yaml.safe_dump(whole)) == [f"{key}: is needed and not given"]

    @pytest.mark.parametrize(
        ("section", "key", "path"),
        [
            ("data", "dataset", "data.dataset"),
            ("training", "epochs", "training.epochs"),
        ],
    )
    def test_a_key_that_is_missing_in_a_section(self, section: str, key: str, path: str) -> None:
        whole = document()
        del whole[section][key]
        assert problems(yaml.safe_dump(whole)) == [f"{path}: is needed and not given"]

    @pytest.mark.parametrize("key", ["name", "model"])
    def test_a_key_that_a_student_misses(self, key: str) -> None:
        whole = document()
        del whole["students"][1][key]
        assert problems(yaml.safe_dump(whole)) == [f"students.1.{key}: is needed and not given"]

    def test_a_long_value_is_cut(self) -> None:
        (problem,) = problems(yaml.safe_dump(changed({"training.precision": "x" * 500})))
        assert problem == f"training.precision: '{'x' * 76}... is not allowed: input should be 'float32' or 'bfloat16'"

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "is empty; expected the keys name, seed, data, training, distillation, exchange, students, teachers"),
            (
                "# only a comment\n",
                "is empty; expected the keys name, seed, data, training, distillation, exchange, students, teachers",
            ),
            (
                "- 1\n",
                "is a list; expected the keys name, seed, data, training, distillation, exchange, students, teachers",
            ),
            (
                "digits\n",
                "is a str; expected the keys name, seed, data, training, distillation, exchange, students, teachers",
            ),
            ("a: !!python/object/apply:os.getcwd []\n", None),
        ],
    )
    def test_text_that_is_not_an_experiment(self, text: str, problem: str | None) -> None:
        if problem is None:
            problem = (
                "is not YAML: could not determine a constructor for the tag "
                "'tag:yaml.org,2002:python/object/apply:os.getcwd' at line 1, column 4"
            )
        assert problems(text) == [problem]

    def test_keys_are_text(self) -> None:
        assert problems(yaml.safe_dump({**document(), 5: 6})) == [
            '5: YAML reads the key `5` as the number 5; write "5" in quotes (as well: no, on, off, yes, null, ~, 0x1F, 1_000, 12:30, 1e3)'
        ]

    @given(st.text(max_size=40))
    def test_any_text_is_refused_with_its_source(self, text: str) -> None:
        assert problems(text)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "none.yaml"
        with pytest.raises(ExperimentError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: cannot be read: No such file or directory"

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ExperimentError) as caught:
            load(tmp_path)
        assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"

    def test_a_file_that_is_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "model.bin"
        path.write_bytes(b"name: \xff\xfe")
        with pytest.raises(ExperimentError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: is not UTF-8 text: invalid start byte at byte 6"

    def test_a_file_with_a_problem_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(changed({"seed": -1})))
        with pytest.raises(ExperimentError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: seed: -1 is not allowed: input should be greater than or equal to 0"

    @pytest.mark.parametrize("text", ["", "name: a\n", "\u20ac"])
    def test_a_file_that_is_too_large(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "large.yaml"
        path.write_text(text + "# " + "x" * 5_000_000, encoding="utf-8")
        with pytest.raises(ExperimentError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: is too large: over 4,000,000 bytes; is it the experiment's file?"
