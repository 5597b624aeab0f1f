"""Words and numbers that YAML reads otherwise than they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from codistill.config.experiment import parse
from protos.config.support import A_NAME, changed, document, problems

WAY_OUT = ("no", "on", "off", "yes", "null", "~", "0x1F", "1_000", "12:30", "1e3")


class TestWordsThatYamlReadsOtherwise:
    @pytest.mark.parametrize(
        ("word", "meaning"),
        [
            ("no", "false"),
            ("on", "true"),
            ("Off", "false"),
            ("yes", "true"),
            ("null", "null"),
            ("~", "null"),
            ("0x1F", "the number 31"),
            ("1_000", "the number 1000"),
            ("12:30", "the number 750"),
            ("1e3", "the number 1000.0"),
            ("031", "the number 25"),
        ],
    )
    def test_as_a_name(self, word: str, meaning: str) -> None:
        others = ", ".join(other for other in WAY_OUT if other != word)
        line = f'YAML reads `{word}` as {meaning}; write "{word}" in quotes (as well: {others})'
        text = yaml.safe_dump(document())
        assert problems(text.replace("ant", word)) == [f"students.0.name: {line}"]
        assert problems(text.replace("name: tiny", f"name: {word}")) == [f"name: {line}"]

    def test_a_quoted_word_is_a_name_in_the_resolved_file_too(self) -> None:
        for word in ("no", "031", "1e3", "1_000", "0x1F", "null"):
            read = parse(yaml.safe_dump(document()).replace("ant", f'"{word}"'))
            assert read.names[0] == word
            assert parse(read.to_yaml()) == read

    @pytest.mark.parametrize(
        ("word", "advice"),
        [
            ("031", "the number 25; write 31 without the zero in front"),
            ("-0_31", "the number -25; write -31 without the zero in front"),
            ("12:30", "the number 750; write 750"),
            ("1:30.5", "the number 90.5; write 90.5"),
        ],
    )
    def test_as_a_number(self, word: str, advice: str) -> None:
        text = yaml.safe_dump(changed({"students.0.model_args": {"hidden": [1, "HERE"]}})).replace("HERE", word)
        line = f'students.0.model_args.hidden.1: YAML reads `{word}` as {advice}, or "{word}" in quotes if it is text'
        assert problems(text) == [line]
        assert problems(text.replace("tiny", "no"))[1:] == [line]
        text = "base: &base {epochs: 2, batch_size: 031}\n" + yaml.safe_dump(document()).replace(
            "training:\n  epochs: 2", "training: {<<: *base, epochs: 3}"
        )
        assert any(line.startswith("training.batch_size: YAML reads `031` as the number 25") for line in problems(text))

    def test_a_word_that_a_merge_replaces_is_not_read(self) -> None:
        text = yaml.safe_dump(document()).replace(
            "training:\n  epochs: 2", "training: {<<: {epochs: 031, threads: 2}, epochs: 3}"
        )
        assert parse(text).training.epochs == 3

    def test_as_a_key(self) -> None:
        text = yaml.safe_dump(changed({"students.0.model_args": {"HERE": 1}}))
        others = ", ".join(WAY_OUT[:1] + WAY_OUT[2:])
        line = f'YAML reads the key `on` as true; write "on" in quotes (as well: {others})'
        assert problems(text.replace("HERE", "on")) == [f"students.0.model_args.on: {line}"]
        assert problems(yaml.safe_dump(document()) + "on: 1\n") == [f"on: {line}"]

    def test_as_a_choice(self) -> None:
        text = yaml.safe_dump(changed({"exchange": {"on_absence": "HERE"}}))
        assert problems(text.replace("HERE", "off"))[0].startswith(
            "exchange.on_absence: `off`, which YAML reads as false, is not allowed: input should be 'wait'"
        )
        assert problems(text.replace("HERE", ""))[0].startswith("exchange.on_absence: no value is not allowed")

    @pytest.mark.parametrize(
        ("word", "meaning"),
        [
            ("no", "false"),
            ("~", "null"),
            ("031", "the number 25"),
            ("12:30", "the number 750"),
            ("1e3", "the number 1000.0"),
        ],
    )
    def test_as_a_method(self, word: str, meaning: str) -> None:
        (line,) = problems(yaml.safe_dump(changed({"distillation": {"method": "HERE"}})).replace("HERE", word))
        assert line.startswith(
            f'distillation.method: YAML reads `{word}` as {meaning}; write "{word}" in quotes if it is text; allowed: independent, '
        )

    def test_as_an_override_that_is_checked_with_the_other_sections(self) -> None:
        text = yaml.safe_dump(changed({"students.0.training": {"optimizer": {"name": "HERE"}}}))
        assert problems(text.replace("HERE", "off")) == [
            "students.0.training.optimizer.name: `off`, which YAML reads as false, is not allowed: input should be 'sgd' or 'adamw'"
        ]

    @pytest.mark.parametrize("word", ["12:30", "00777777777"])
    def test_a_number_that_may_not_be_meant_is_asked_about_before_its_range(self, word: str) -> None:
        text = yaml.safe_dump(changed({"training.batch_size": "HERE", "data.train_size": 100})).replace("HERE", word)
        (line,) = problems(text)
        assert line.startswith(f"training.batch_size: YAML reads `{word}` as the number ")

    @pytest.mark.parametrize(
        ("field", "word", "line"),
        [
            ("training.batch_size", "1e3", "1000.0, is not allowed: input should be an integer"),
            ("training.batch_size", "0x3E8", "1000, is larger than the 100 training samples (data.train_size less data.held_out)"),
            ("training.epochs", "-1_0", "-10, is not allowed: input should be greater than or equal to 1"),
        ],
    )  # fmt: skip
    def test_a_number_is_quoted_as_the_file_has_it(self, field: str, word: str, line: str) -> None:
        text = yaml.safe_dump(changed({field: "HERE", "data.train_size": 100})).replace("HERE", word)
        assert problems(text) == [f"{field}: `{word}`, which YAML reads as the number {line}"]

    def test_where_no_type_shows_what_is_meant(self) -> None:
        text = yaml.safe_dump(changed({"students.0.model_args": {"a": ["HERE"]}}))
        assert problems(text.replace("HERE", "no")) == [
            'students.0.model_args.a.0: YAML reads `no` as false; write false, or "no" in quotes if it is text'
        ]
        for word in ("false", "null", "1e3", '"no"'):
            parse(text.replace("HERE", word))
        assert parse(
            yaml.safe_dump(changed({"data.augment": {"flip": "HERE"}})).replace("HERE", "yes")
        ).data.augment.flip

    def test_as_a_key_below_any_key(self) -> None:
        text = yaml.safe_dump(changed({"students.0.model_args": {"a": [{"HERE": 1}]}}))
        assert problems(text.replace("HERE", "1e3"))[0].startswith(
            "students.0.model_args.a.0.1e3: YAML reads the key `1e3` as the number 1000.0; write "
        )

    @pytest.mark.parametrize("word", ["=", "<<"])
    def test_signs_that_yaml_gives_a_meaning_are_text(self, word: str) -> None:
        text = yaml.safe_dump(document())
        assert problems(text.replace("tiny", word)) == [f"name: '{word}' is not allowed: {A_NAME}"]
        read = parse(text.replace("mlp", word))
        assert read.students[0].model == word
        assert parse(read.to_yaml()) == read

    @pytest.mark.parametrize("path", ["~/data", "~"])
    def test_a_path_that_a_shell_would_expand(self, path: str) -> None:
        home = str(Path.home()) + path[1:]
        way = f"`~` is not expanded here; write the whole path, {home}, or ./{path} for a folder of that name"
        assert problems(yaml.safe_dump(changed({"data.root": path}))) == [f"data.root: {path!r}: {way}"]
        taught = changed(
            {"distillation": {"method": "kd"}, "teachers": [{"name": "t", "model": "mlp", "weights": path}]}
        )
        assert problems(yaml.safe_dump(taught)) == [f"teachers.0.weights: {path!r}: {way}"]
