from __future__ import annotations

import pytest
import yaml

from codistill.config.experiment import ExperimentError, parse
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
        ("a: {'': 1}\n", "a key is empty, and needs a name at line 1, column 5"),
        ("? \n: 1\n", "a key is empty, and needs a name at line 1, column 2"),
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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: " + "[" * 5000, "more than 50 levels at line 1, column 53; allowed: 50"),
        ("a: " + "{a: " * 5000, "more than 50 levels at line 1, column 197; allowed: 50"),
        ("a:\n" + "".join(" " * level + "- \n" for level in range(200)), "more than 50 levels at line 51, column 50"),
        (
            "a: &a0 [x]\n" + "".join(f"b{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60)),
            "more than 50 levels at line 50, column 6; allowed: 50",
        ),
        (
            "a: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"b{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 40)),
            "more than 100,000 values at line 5, column 5, where each alias counts as what it names; allowed: 100,000",
        ),
        (
            "a: &a0 {x: 1}\n"
            + "".join(f"b{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 40)),
            "more than 100,000 values at line 6, column ",
        ),
        ("a:\n" + "- x\n" * 200_000, "more than 100,000 values at line 99999, column 3, where"),
        ("a: 1\n" + "b" * 1_000_000, "it goes on at line 2 after 1,000,000 characters; allowed: 1,000,000"),
        ("a: 0x" + "1" * 5000, "a number of 5,002 characters at line 1, column 4; allowed: 1,000"),
    ],
    ids=["lists", "maps", "block", "aliases in aliases", "bomb", "merge bomb", "items", "long", "number"],
)
def test_what_no_experiment_needs_is_refused_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        parse(text, "e.yaml")
    assert str(caught.value).startswith(f"e.yaml: is too large: {problem}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}"])
def test_an_alias_within_what_it_names_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^alias '\*a' stands within what it names at line 1, column \d+$"):
        parse_yaml(text)
