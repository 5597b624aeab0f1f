"""YAML as an experiment file has it: a key stands once, 1e-3 is a number, and a date is text; of a bounded size.

YAML reads some plain words as other things: `no` as false, 031 as 25. They are kept beside the values, so that errors can
name what stands in the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

__all__ = ["LONGEST", "Document", "DocumentTooLargeError", "Word", "dump_yaml", "parse_yaml"]

LONGEST = 1_000_000
"""Characters that a document may have."""

_DEEPEST = 50
_MOST_VALUES = 100_000
_LONGEST_NUMBER = 1000
_TAG = "tag:yaml.org,2002:"
_WORD_TAGS = frozenset(_TAG + name for name in ("bool", "int", "float", "null"))
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


@dataclass(frozen=True)
class Word:
    """A plain word that YAML does not read as text.

    Attributes:
        text: as it stands in the document.
        value: what YAML makes of it.
    """

    text: str
    value: Any

    @property
    def meaning(self) -> str:
        """The thing that YAML reads, as a word of an error line."""
        if self.value is None or isinstance(self.value, bool):
            return {None: "null", True: "true", False: "false"}[self.value]
        return f"the number {self.value}"

    @property
    def is_plain(self) -> bool:
        """Whether it reads as what is written: 7, 0.5, .inf, true and null do, and 1e3, 1_000, no and ~ do not."""
        if isinstance(self.value, float) and not math.isfinite(self.value):
            return True
        return self.text.lower() == self.meaning or self.text == str(self.value)

    @property
    def advice(self) -> str | None:
        """The word to write for a number that means another than it seems to; None for all other words."""
        if isinstance(self.value, bool | None):
            return None
        if _OCTAL.fullmatch(self.text) and isinstance(self.value, int):
            sign, digits = self.text[:1].strip("+0123456789"), self.text.lstrip("+-0_").replace("_", "") or "0"
            return f"{sign}{digits} without the zero in front"
        return f"{self.value}" if ":" in self.text else None


@dataclass(frozen=True)
class Document:
    """The content of a document.

    Attributes:
        value: its plain values.
        words: the words in it that are no text, by their path; each part of a path is text.
        keys: the same for keys.
    """

    value: Any
    words: Mapping[tuple[str, ...], Word] = field(default_factory=dict[tuple[str, ...], Word])
    keys: Mapping[tuple[str, ...], Word] = field(default_factory=dict[tuple[str, ...], Word])

    def within(self, *path: str) -> Document:
        """Return the words below a path, by their paths from there; the value is left out."""
        below = [
            {parts[len(path) :]: word for parts, word in found.items() if parts[: len(path)] == path}
            for found in (self.words, self.keys)
        ]
        return Document(None, *below)


class DocumentTooLargeError(ValueError):
    """A document is longer, deeper or larger than any experiment; the message says where and what is allowed."""


def parse_yaml(text: str) -> Document:
    """Read a YAML document.

    Raises:
        DocumentTooLargeError: it is longer, nested deeper, or holds more values than any experiment.
        ValueError: the text is not YAML, or gives a key twice; the message says what and where.
    """
    if len(text) > LONGEST:
        line = text.count("\n", 0, LONGEST) + 1
        raise DocumentTooLargeError(f"it goes on at line {line} after {LONGEST:,} characters; allowed: {LONGEST:,}")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Document(None)
            words: dict[tuple[str, ...], Word] = {}
            keys: dict[tuple[str, ...], Word] = {}
            loader.find_words(node, (), words, keys)
            return Document(loader.construct_document(node), words, keys)
        finally:
            loader.dispose()
    except DocumentTooLargeError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 0b and 0x_ have the form of numbers and are none
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"{problem}{place}") from error


def dump_yaml(value: Any) -> str:
    """Return plain values as a document that :func:`parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._composed = 0
        self._extents: dict[int, tuple[int, int]] = {}  # of each node: its values, aliases followed, and its levels

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        mark = event.start_mark
        self._depth += 1
        self._composed += 1
        _require_depth(self._depth, mark)
        _require_values(self._composed, mark)  # at once: to read on takes seconds
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) not in self._extents:
            if isinstance(event, yaml.AliasEvent):
                raise yaml.MarkedYAMLError(None, None, f"alias '*{event.anchor}' stands within what it names", mark)
            self._extents[id(node)] = self._measure(node)
        values, levels = self._extents[id(node)]
        _require_depth(levels, mark)
        _require_values(values, mark)
        return node

    def _measure(self, node: Any) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            if node.tag == f"{_TAG}int" and len(node.value) > _LONGEST_NUMBER:
                raise DocumentTooLargeError(
                    f"a number of {len(node.value):,} characters at {_place(node.start_mark)}; "
                    f"allowed: {_LONGEST_NUMBER:,}"
                )
            return 1, 1
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        extents = [self._extents[id(part)] for part in inner]
        return 1 + sum(values for values, _ in extents), 1 + max((levels for _, levels in extents), default=0)

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Checked here, as later the keys of a merge (<<) stand among a mapping's own and may repeat them.
        node: Any = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if not key.value.strip():
                    raise yaml.MarkedYAMLError(None, None, "a key is empty, and needs a name", key.start_mark)
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def find_words(
        self, node: Any, path: tuple[str, ...], words: dict[tuple[str, ...], Word], keys: dict[tuple[str, ...], Word]
    ) -> None:
        """Add the plain words that are no text, and the keys that are such words."""
        if isinstance(node, yaml.MappingNode):
            for name, (key, value) in {_name(key): (key, value) for key, value in _pairs(node)}.items():
                word = self._word(key)
                part = name if word is None else str(word.value)
                if word is not None:
                    keys[(*path, part)] = word
                self.find_words(value, (*path, part), words, keys)
        elif isinstance(node, yaml.SequenceNode):
            for position, item in enumerate(cast("list[Any]", node.value)):
                self.find_words(item, (*path, str(position)), words, keys)
        else:
            word = self._word(node)
            if word is not None:
                words[path] = word

    def _word(self, node: Any) -> Word | None:
        if isinstance(node, yaml.ScalarNode) and node.style is None and node.tag in _WORD_TAGS:
            return Word(node.value, self.construct_object(node))  # pyright: ignore[reportUnknownMemberType]
        return None


def _pairs(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a mapping's keys and values with those of its merges (<<) before its own, which replace them."""
    for key, value in node.value:
        if key.tag == f"{_TAG}merge":
            merged = [value] if isinstance(value, yaml.MappingNode) else reversed(value.value)
            for other in merged:
                if isinstance(other, yaml.MappingNode):
                    yield from _pairs(other)
    yield from ((key, value) for key, value in node.value if key.tag != f"{_TAG}merge")


def _name(key: Any) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else f"line {key.start_mark.line + 1}"


def _require_depth(levels: int, mark: Any) -> None:
    if levels > _DEEPEST:
        raise DocumentTooLargeError(f"more than {_DEEPEST} levels at {_place(mark)}; allowed: {_DEEPEST}")


def _require_values(values: int, mark: Any) -> None:
    if values > _MOST_VALUES:
        raise DocumentTooLargeError(
            f"more than {_MOST_VALUES:,} values at {_place(mark)}, where each alias counts as what it names; "
            f"allowed: {_MOST_VALUES:,}"
        )


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


class _Dumper(yaml.SafeDumper):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _resolving in (_Loader, _Dumper):
    _resolving.add_implicit_resolver(  # YAML 1.1 requires a dot in a number with an exponent, which nobody expects
        f"{_TAG}float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
_Loader.add_constructor(f"{_TAG}merge", yaml.SafeLoader.construct_yaml_str)  # << where no merge can stand
