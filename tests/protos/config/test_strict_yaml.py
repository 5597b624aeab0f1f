from __future__ import annotations

import pytest
import yaml

from codistill.config.experiment import parse
from codistill.config.strict_yaml import parse_yaml
from protos.config.support import document


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1,\n", "expected the node content, but found '<stream end>' at line 2, column 1"),
        ("a: 1\n\tb: 2\n", "found character '\\t' that cannot start any token at line 2, column 1"),
        ("a: *b\n", "found undefined alias 'b' at line 1, column 4"),
        ("a: \x00\n", "unacceptable character #x0000: special characters are not allowed"),
        ("a: 0x_\n", "invalid literal for int() with base 16: ''"),
        ("? [1]\n: 2\n", "found unhashable key at line 1, column 3"),
        ("name: a\nseed: 1\nname: b\n", "key 'name' is given twice at line 3, column 1"),
        ("name: a\n'name': b\n", "key 'name' is given twice at line 2, column 1"),
        ("data: {root: a, root: a}\n", "key 'root' is given twice at line 1, column 17"),
    ],
)
def test_a_text_that_is_not_yaml_says_what_and_where(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert str(caught.value) == problem


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", "+1e-3"])
def test_a_number_with_an_exponent_is_a_number(text: str) -> None:
    small = parse(yaml.safe_dump(document()).replace("epochs: 2", f"epochs: 2\n  clip_norm: {text}"))
    assert small.training.clip_norm == 0.001


def test_a_date_is_text() -> None:
    assert parse(yaml.safe_dump(document()).replace("tiny", "2024-12-31")).name == "2024-12-31"
    assert parse(yaml.safe_dump(document()).replace("tiny", "2024-31-12")).name == "2024-31-12"


def test_anchors_and_merges() -> None:
    text = yaml.safe_dump({key: value for key, value in document().items() if key != "students"}) + (
        "students:\n"
        "- &one {name: ant, model: mlp, training: &t {threads: 2, device: cpu}}\n"
        "- &two {<<: *one, name: bee, training: {<<: *t, threads: 3}}\n"
        "- {<<: *two, name: cat}\n"
    )
    read = parse(text)
    assert read.names == ("ant", "bee", "cat")
    assert [student.training.threads for student in read.students] == [2, 3, 3]
    assert [student.training.device for student in read.students] == ["cpu"] * 3
