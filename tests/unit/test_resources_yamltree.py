# SPDX-License-Identifier: Apache-2.0
"""YAML and JSON to values with positions: scalars, anchors, limits, and what is said of broken text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from netpol_ebpf.errors import Problem
from netpol_ebpf.resources import yamltree
from netpol_ebpf.resources.yamltree import Document, read_documents


def _read(text: str) -> tuple[list[Document], list[Problem]]:
    problems: list[Problem] = []
    return list(read_documents(text, "f.yaml", problems)), problems


def _value(text: str) -> Any:
    documents, problems = _read(text)
    assert problems == []
    assert len(documents) == 1
    return documents[0].value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("80", 80),
        ("-1", -1),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 15),
        ("0b11", 3),
        ("0B_11", 3),
        ("-0o7", -7),
        ("0b12", "0b12"),
        ("0o8", "0o8"),
        ("0x1p-2", "0x1p-2"),
        ("08", 8),
        ("0_8", 8),
        ("-_5", -5),
        ("1_", 1),
        ("00", 0),
        ("1.5", 1.5),
        ("1e3", 1000),
        ("80.0", 80),
        ("1.", 1),
        (".1e3", 100),
        ("-0.0", 0),
        ("1e20", 10**20),
        ("1e21", 1e21),
        ("1e400", "1e400"),
        ("1e-400", 0),
        ("+.5", 0.5),
        (".5_0", 0.5),
        ("._5", "._5"),
        ("1_000.5", 1000.5),
        ("1e1_0", 10**10),
        ("true", True),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("8000:8080", "8000:8080"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("10.0.0.1", "10.0.0.1"),
        ("1_000", 1000),
        ("089", 89),
        ("007.5", 7.5),
        ('"80"', "80"),
        ("'true'", "true"),
        ("!!str 80", "80"),
        ("! 80", "80"),
        ("!!int 80", 80),
        ("n", False),
        ("Y", True),
        ("tRue", "tRue"),
        ("=", "="),
        ("9" * 50, int("9" * 50)),
        ("9" * 401, "9" * 401),
    ],
)
def test_scalars_are_read_as_kubectl_reads_them(text: str, value: object) -> None:
    """Words and numbers of YAML 1.1, without timestamps and base-60 numbers, as kubectl 1.32 prints them."""
    seen = _value(f"a: {text}\n")["a"]
    assert seen == value
    assert type(seen) is type(value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("y", "true"), ("off", "false"), ("010", "8"), ("0x10", "16"), ("1_0", "10"), ("80", "80"), ("1.5", "1.5"),
        ("1.10", "1.1"), ("08", "8"), ("1e10", "1e+10"), ("0.5e1", "5"), ("123456789.5", "1.2345679e+08"),
        ("100000.0", "100000"), ("1000000.0", "1e+06"), ("0.00001", "1e-05"), ("0.0001", "0.0001"), ("1e-50", "0"),
        ("1e40", ".inf"), ("-.Inf", "-.inf"), (".NaN", ".nan"), ("-16777217.0", "-1.6777216e+07"),
    ],
)  # fmt: skip
def test_keys_are_read_as_kubectl_reads_them(text: str, key: str) -> None:
    """A word or a number is a key by its value; that it differs from what was written is said."""
    documents, problems = _read(f"a: {{{text}: 1}}\n")
    assert documents[0].value == {"a": {key: 1}}
    assert [(problem.severity, problem.slug) for problem in problems] == [("warning", "yaml-key")] * (text != key)
    assert all(f'put it in quotes: "{text}"' in problem.message for problem in problems)
    assert _value(f'a: {{"{text}": 1}}\n') == {"a": {text: 1}}


@pytest.mark.parametrize("text", ["~", "null", "Null"])
def test_a_key_that_is_nothing_is_refused(text: str) -> None:
    """As kubectl refuses it: there is no such key in JSON."""
    _, problems = _read(f"a: {{{text}: 1}}\n")
    assert [(problem.severity, problem.location.column) for problem in problems] == [("error", 5)]


def test_the_text_of_a_scalar_is_kept_where_its_value_does_not_tell_it() -> None:
    """For messages; also of an alias, of what a merge key brings, and of a tagged scalar."""
    text = "a: {b: &x 0755, c: [yes, 80, true, null, ~, 'no', 1.10], d: *x}\ne: {<<: {f: 1e3}}\ng: !!int 0x1F\nh:\n"
    documents, _ = _read(text)
    written = documents[0].positions.written
    assert [written(("a", "b")), written(("a", "d")), written(("e", "f")), written(("g",))] == [
        "0755", "0755", "1e3", "0x1F",
    ]  # fmt: skip
    assert [written(("a", "c", index)) for index in range(7)] == ["yes", None, None, None, "~", None, "1.10"]
    assert [written(path) for path in (("a",), ("h",), ("absent", "x"), ("a", "b", "below"))] == [None] * 4
    assert documents[0].positions.location(("a", "b")).column == 5


def test_documents_and_empty_ones() -> None:
    """Runs of separators, comments and null documents yield nothing."""
    documents, problems = _read("---\n---\n# nothing\n---\na: 1\n---\nnull\n---\nb: 2\n...\n")
    assert [document.value for document in documents] == [{"a": 1}, {"b": 2}]
    assert problems == []


def test_positions_of_keys_items_and_missing_fields() -> None:
    """A field stands where its key does, an item where it begins, a missing one where its parent does."""
    text = "kind: X\nspec:\n  rules:\n  - name: a\n  - name: b\n    ports: [1,\n      2]\n"
    documents, _ = _read("# first\n---\n" + text)
    positions = documents[0].positions

    def at(*path: str | int) -> tuple[int, int]:
        location = positions.location(path)
        return location.line, location.column

    assert at() == (3, 1)
    assert at("spec", "rules") == (5, 3)
    assert at("spec", "rules", 1) == (7, 5)
    assert at("spec", "rules", 1, "ports", 1) == (9, 7)
    assert at("spec", "rules", 1, "absent", "deeper") == (7, 5)
    assert at("spec", "rules", 7) == (5, 3)
    child = positions.child(("spec", "rules", 0))
    assert child.location(("name",)).line == 6
    assert str(child.location()) == "f.yaml:6"


def test_anchors_aliases_and_merge_keys() -> None:
    """Aliases repeat values; merge keys give defaults that the mapping itself overrides."""
    text = "base: &b {x: 1, w: [1, 2]}\nname: &n web\none: *b\ntwo:\n  <<: *b\n  x: 3\nthree: {<<: [*b, {z: 4}]}\nfour: {*n : 5}\n"
    value = _value(text)
    assert value["one"] == {"x": 1, "w": [1, 2]}
    assert value["two"] == {"x": 3, "w": [1, 2]}
    assert value["three"] == {"x": 1, "w": [1, 2], "z": 4}
    assert value["four"] == {"web": 5}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", 4, "the key `c` is given twice (first in line 3)"),
        ("a: *nope\n", 1, "refers to no anchor"),
        ("a: &x [*x]\n", 1, "refers to no anchor"),
        ("? [1]\n: 2\n", 1, "a key must be a plain word"),
        ("? {a: 1}\n: 2\n", 1, "a key must be a plain word"),
        ("a: !!binary aGk=\n", 1, "the tag tag:yaml.org,2002:binary is not supported"),
        ("a: !!int abc\n", 1, "is not a value of the type its tag names"),
        ("a: !mine {b: 1}\n", 1, "the tag !mine is not supported"),
        ("<<: 3\n", 1, "`<<` takes a mapping"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a:\n\tb: 1\n", 2, "indent with spaces"),
        ("a: b: c\n", 1, "quote text that contains `: `"),
        ("a: 'x\n", 2, "not valid YAML"),
        ("a: {{ .Values.x }}\n", 1, "render it first"),
        ("a: 1\nb: \x07\n", 2, "not valid YAML"),
        ("a: 1\nb: \ud800\n", 2, "not valid YAML"),
        ("a: " + "[" * 101 + "]" * 101, 1, "nested deeper than 100 levels"),
    ],
)
def test_broken_text_is_a_problem_with_its_line(text: str, line: int, words: str) -> None:
    """Whatever is wrong with the text is said with file and line."""
    _, problems = _read(text)
    assert len(problems) == 1
    assert problems[0].location.line == line
    assert words in problems[0].message
    assert problems[0].severity == "error"


def test_reading_goes_on_after_a_broken_document() -> None:
    """A syntax error costs its own document; those before and after are read, with their true lines."""
    documents, problems = _read("a: 1\n---\nb: [\n---\nc: 3\n---\nd: }\n---\ne: 5\n")
    assert [document.value for document in documents] == [{"a": 1}, {"c": 3}, {"e": 5}]
    assert [problem.location.line for problem in problems] == [4, 7]
    assert documents[-1].positions.location(("e",)).line == 9


def test_alias_expansion_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text with aliases that multiply beyond all bounds is rejected."""
    monkeypatch.setattr(yamltree, "MAX_ALIAS_NODES", 1000)
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 9):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    _, problems = _read(text)
    assert [problem.location.line for problem in problems] == [3]
    assert "expand to more than 1000 values" in problems[0].message


def test_json_is_read_like_yaml() -> None:
    """JSON with tabs, escapes and long lines gives the values that a JSON parser gives, with positions."""
    value = {"a": [1, 2.5, None, True, "x\ty/"], "b": {"c": "ü"}, "": ""}
    documents, problems = _read(json.dumps(value, indent="\t"))
    assert problems == []
    assert documents[0].value == value
    assert documents[0].positions.location(("b", "c")).line == 10


def test_json_that_yaml_cannot_read() -> None:
    """Surrogate pairs in escapes are legal JSON; the values are read, duplicates in them are still found."""
    documents, problems = _read('{"a": "\\ud83d\\ude00", "b": 1, "b": 2}')
    assert documents[0].value == {"a": "\U0001f600", "b": 2}
    assert [problem.message for problem in problems] == ["the key `b` is given twice; keep one of them"]


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_json_strings_keep_characters_that_yaml_takes_for_line_breaks(character: str) -> None:
    """A name is the same whichever parser a document would go through."""
    assert _value(json.dumps({"a": f"x{character}y"}, ensure_ascii=False)) == {"a": f"x{character}y"}


def test_compact_json_and_long_keys() -> None:
    """No spaces after colons, and keys beyond YAML's limit for simple keys."""
    value = {"a": 1, "b": "c", "k" * 2000: [{}]}
    assert _value(json.dumps(value, separators=(",", ":"))) == value


def test_byte_order_mark_is_ignored() -> None:
    """Editors of some systems write one."""
    assert _value("\ufeffa: 1\n") == {"a": 1}


LONE = {
    "name": (r'{"kind": "Pod", "metadata": {"name": "p\udfff"}}', r"p\udfff"),
    "key of a mapping": (r'{"labels": {"a\uD800": "b"}}', r"a\ud800"),
    "deep in a list": (r'{"a": [{"b": ["c", "\ud83dx"]}]}', r"\ud83dx"),
    "the halves the wrong way round": (r'{"a": "\ude00\ud83d"}', r"\ude00\ud83d"),
    "beside a whole pair": (r'{"a": "\ud83d\ude00\udfff"}', r"\udfff"),
}


@pytest.mark.parametrize(("text", "told"), LONE.values(), ids=LONE)
def test_half_of_a_surrogate_pair_is_no_text(text: str, told: str) -> None:
    """A text that UTF-8 cannot hold reaches nobody: its document is refused with its line, the others are read."""
    documents, problems = _read(f'{{"first": 1}}\n{text}\n---\nlast: 1\n')
    assert [document.value for document in documents] == [{"first": 1}, {"last": 1}]
    assert [(problem.severity, problem.location.line) for problem in problems] == [("error", 2)]
    assert told in problems[0].message
    problems[0].message.encode()


def test_half_of_a_surrogate_pair_in_yaml_is_refused_by_every_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser in Python, used where there is none in C, takes such escapes; they are refused all the same."""
    for loader in (yamltree._LOADER, yaml.SafeLoader):
        monkeypatch.setattr(yamltree, "_LOADER", loader)
        documents, problems = _read(r'name: "p\udfff"')
        assert documents == []
        assert [problem.severity for problem in problems] == ["error"]


@pytest.mark.parametrize(
    "text", [r'{"a": "\ud83d\ude00"}', '{"a": "\U0001f600"}', "a: \U0001f600\n", r'a: "\U0001F600"']
)
def test_whole_surrogate_pairs_and_their_characters_are_text(text: str) -> None:
    """A pair of escapes is the character it stands for, as in JSON of the API server."""
    assert _value(text) == {"a": "\U0001f600"}


def test_json_is_not_nested_deeper_for_a_text_that_yaml_reads_otherwise() -> None:
    """The limit of nesting holds whichever parser reads a JSON value in the end."""
    for inner in (r'"\ud83d\ude00"', '"\u2028"'):
        documents, problems = _read('{"a":' * 900 + inner + "}" * 900)
        assert documents == []
        assert "nested deeper than" in problems[0].message
