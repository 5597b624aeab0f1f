from __future__ import annotations

import hashlib
import json
import tracemalloc
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from codistill.config.experiment import parse
from codistill.config.fingerprint import difference, extends, identity, identity_sha256
from protos.config.support import changed, document, experiment

OPERATIONAL: dict[str, Any] = {
    "data.root": "/elsewhere",
    "data.download": True,
    "data.memory_limit_gib": 0.5,
    "data.loader_workers": 0,
    "training.device": "cpu",
    "training.checkpoint_every": 1,
    "exchange.connect_timeout": 1,
    "exchange.give_up_after": 10,
    "exchange.waiting_notice": 1,
    "exchange.journal": {"keep": "all", "durability": "power"},
    "students.0.training": {"device": "cuda:1"},
}
DECISIVE: dict[str, tuple[Any, str]] = {
    "name": ("other", 'name: the run has "tiny", this worker has "other"'),
    "seed": (1, "seed: the run has 0, this worker has 1"),
    "data.split_seed": (1, "data.split_seed: the run has 0, this worker has 1"),
    "data.augment": ({"flip": True}, "data.augment.flip: the run has false, this worker has true"),
    "data.normalize": (
        {"mean": [0.5], "std": [1]},
        "data.normalize: the run has null, this worker has nothing",
    ),
    "training.epochs": (3, "training.epochs: the run has 2, this worker has 3"),
    "training.threads": (2, "training.threads: the run has 1, this worker has 2"),
    "training.optimizer": ({"lr": 1}, "training.optimizer.lr: the run has 0.1, this worker has 1.0"),
    "training.precision": ("bfloat16", 'training.precision: the run has "float32", this worker has "bfloat16"'),
    "distillation": (
        {"method": "kdcl", "weight": 2},
        "distillation.weight: the run has 1.0, this worker has 2.0",
    ),
    "exchange.dtype": ("float16", 'exchange.dtype: the run has "float32", this worker has "float16"'),
    "students.1.name": ("cat", 'students.1.name: the run has "bee", this worker has "cat"'),
    "students.1.model": ("mlp", 'students.1.model: the run has "cnn", this worker has "mlp"'),
    "students.1.model_args": ({"w": 2}, "students.1.model_args: the run has {}, this worker has nothing"),
    "students.0.training": (
        {"threads": 2},
        "students.0.training.threads: the run has null, this worker has 2",
    ),
}


class TestIdentity:
    def test_its_digest_is_that_of_its_text(self) -> None:
        text = identity(experiment())
        assert identity_sha256(experiment()) == hashlib.sha256(text.encode("utf-8")).digest()
        assert text.isascii()
        assert identity_sha256(parse(yaml.safe_dump(changed({"seed": 1})))) != identity_sha256(experiment())
        resumed = parse(yaml.safe_dump(changed({"exchange.connect_timeout": 1})))
        assert identity_sha256(resumed) == identity_sha256(experiment()), "operational fields are left out"

    @pytest.mark.parametrize("path", OPERATIONAL)
    def test_what_is_operational_may_differ(self, path: str) -> None:
        other = parse(yaml.safe_dump(changed({path: OPERATIONAL[path]})))
        assert other != experiment()
        assert identity(other) == identity(experiment())
        assert difference(identity(experiment()), identity(other)) is None

    @pytest.mark.parametrize("path", DECISIVE)
    def test_anything_else_may_not_and_both_values_are_named(self, path: str) -> None:
        value, expected = DECISIVE[path]
        other = parse(yaml.safe_dump(changed({path: value})))
        assert difference(identity(experiment()), identity(other)) == f"experiment field {expected}"

    def test_the_order_of_keys_and_what_is_left_out_do_not_matter(self) -> None:
        reordered = dict(reversed(document().items()))
        explicit = parse(yaml.safe_dump({**reordered, "seed": 0, "distillation": {"method": "kdcl", "temperature": 2}}))
        assert identity(explicit) == identity(experiment())

    def test_the_order_of_students_matters(self) -> None:
        swapped = experiment(students=list(reversed(document()["students"])))
        assert difference(identity(experiment()), identity(swapped)) == (
            'experiment field students.0.model: the run has "mlp", this worker has "cnn"'
        )

    @pytest.mark.parametrize("section", ["students", "teachers"])
    @pytest.mark.parametrize(
        ("had", "has", "expected"),
        [
            ("abcd", "abc", 'the run has "d", this worker has not'),
            ("abcd", "bd", 'the run has "a", "c", this worker has not'),
            ("ab", "acb", 'this worker has "c", the run has not'),
            ("", "a", 'this worker has "a", the run has not'),
        ],
    )
    def test_removed_and_added_participants_are_named(self, section: str, had: str, has: str, expected: str) -> None:
        ours, theirs = (
            json.dumps({section: [{"name": name, "model": f"m{name}"} for name in names], "training": names})
            for names in (had, has)
        )
        assert difference(ours, theirs) == f"experiment {section}: {expected}"

    def test_it_is_canonical_json(self) -> None:
        text = identity(experiment())
        assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text

    def test_another_writing_of_the_same_is_told_apart(self) -> None:
        text = identity(experiment())
        assert difference(text, text + " ") == "experiment: written differently"

    @pytest.mark.parametrize(
        ("ours", "theirs"), [("1", "1.0"), ("1.0", "1"), ("0.001", "1e-3"), ("0", "-0.0"), ("1e3", "1000")]
    )
    def test_a_number_is_the_same_however_it_is_written(self, ours: str, theirs: str) -> None:
        """JSON has one kind of number, and other languages write it in their own way."""
        for text in ('{{"a": {}}}', '{{"a": {{"b": [2, {}]}}}}'):
            assert difference(text.format(ours), text.format(theirs)) == "experiment: written differently"
            both = text.replace('"a"', '"b": {}, "a"')
            assert difference(both.format(5, ours), both.format(6, theirs)) == (
                "experiment field b: the run has 5, this worker has 6"
            ), "what differs is found behind it"

    @pytest.mark.parametrize(
        "garbage",
        ["", "null", "[]", "{}", "7", '"text"', "{", "[" * 100_000, "\x00", "9" * 5000, '{"a": ' * 3000, "NaN"],
        ids=repr,
    )
    def test_garbage_is_refused_in_one_line(self, garbage: str) -> None:
        text = identity(experiment())
        assert difference(text, garbage) == "experiment: what was sent is not the JSON of an experiment"
        assert difference(garbage, text) == "experiment: what was sent is not the JSON of an experiment"

    @pytest.mark.parametrize(
        ("ours", "theirs", "expected"),
        [
            ('{"a": {"b": 1}}', '{"a": 1}', "a: the run has nothing, this worker has 1"),
            ('{"a": {"b": 1}}', '{"c": 1}', "a.b: the run has 1, this worker has nothing"),
            ('{"a": 1}', '{"a": true}', "a: the run has 1, this worker has true"),
            ('{"a": 0.0}', '{"a": false}', "a: the run has 0.0, this worker has false"),
            ('{"a": 1}', '{"a": "1"}', 'a: the run has 1, this worker has "1"'),
            ('{"a": 1}', '{"a": 1.5}', "a: the run has 1, this worker has 1.5"),
            (f'{{"a": {2**53}}}', f'{{"a": {2**53 + 1}}}', f"a: the run has {2**53}, this worker has {2**53 + 1}"),
            ('{"a": []}', '{"a": [1]}', "a: the run has [], this worker has nothing"),
            ('{"a": [1, 2]}', '{"a": [1]}', "a.1: the run has 2, this worker has nothing"),
            (
                '{"students": [{"name": 1}]}',
                '{"students": [{"name": 2}]}',
                "students.0.name: the run has 1, this worker has 2",
            ),
            ('{"students": "abc"}', '{"students": {"0": 1}}', 'students: the run has "abc", this worker has nothing'),
        ],
    )
    def test_sections_and_values_are_told_apart(self, ours: str, theirs: str, expected: str) -> None:
        assert difference(ours, theirs) == f"experiment field {expected}"

    def test_a_hostile_document_costs_memory_like_its_size(self) -> None:
        """Writing out the path of each value would take a long key times the number of values under it."""
        sent = json.dumps({"k" * 30_000: [0] * 15_000})
        tracemalloc.start()
        try:
            line = difference(identity(experiment()), sent)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert line is not None
        assert peak < 20e6

    def test_names_from_outside_are_cut_and_printable(self) -> None:
        sent = json.dumps({**json.loads(identity(experiment())), "students": [{"name": "\n\x1b" * 9000}]})
        added = json.loads(sent)
        added["students"] += json.loads(identity(experiment()))["students"]
        line = difference(identity(experiment()), json.dumps(added))
        assert line is not None
        assert line.startswith("experiment students: this worker has ")
        assert line.isprintable()
        assert len(line) < 400

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=200), inner, max_size=3),
            max_leaves=8,
        )
    )
    def test_any_json_gives_one_short_printable_line(self, sent: Any) -> None:
        line = difference(identity(experiment()), json.dumps(sent))
        assert line is not None
        assert line.isprintable()
        assert line.startswith("experiment")
        assert len(line) < 400


class TestExtends:
    def of(self, *names: str, **changes: Any) -> str:
        students = [{"name": name, "model": "mlp"} for name in names]
        return identity(experiment(students=students, **changes))

    def test_students_added_at_the_end(self) -> None:
        assert extends(self.of("a", "b"), self.of("a", "b", "c"))
        assert extends(self.of("a", "b"), self.of("a", "b", "c", "d"))

    def test_anything_else_is_another_experiment(self) -> None:
        ours = self.of("a", "b")
        for theirs in (
            ours,
            self.of("b", "a"),
            self.of("c", "a", "b"),
            self.of("a", "c", "b"),
            self.of("a", "b", "c", seed=3),
        ):
            assert not extends(ours, theirs)

    @pytest.mark.parametrize("text", ["", "3", "[]", "{}", '{"students": 3}', "nothing"])
    def test_texts_that_are_no_identities(self, text: str) -> None:
        assert not extends(text, self.of("a", "b"))
        assert not extends(self.of("a", "b"), text)
