# SPDX-License-Identifier: Apache-2.0
"""The selector language line by line: tokens, grammar, errors, canonical text."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from netpol_ebpf.selector import EVERYTHING, Selector, SelectorError, parse
from netpol_ebpf.selector.lexer import MAX_LABEL_CHARS
from netpol_ebpf.selector.parser import MAX_DEPTH

VECTORS: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[1] / "data" / "selectors.yaml").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: repr(vector["selector"]))
def test_published_vector(vector: dict[str, Any]) -> None:
    """Each published expectation (validity, match or canonical text) holds."""
    text = vector["selector"]
    assert vector.keys() & {"valid", "match", "canonical"}
    if vector.get("valid") is False:
        with pytest.raises(SelectorError):
            parse(text)
        return
    selector = parse(text)
    if "match" in vector:
        assert selector.matches(vector["labels"]) is vector["match"]
    if "canonical" in vector:
        assert str(selector) == vector["canonical"]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", "all()"),
        (" \t ", "all()"),
        ("all( )", "all()"),
        ("global(\t)", "global()"),
        ("has( a )", "has(a)"),
        ("a=='b'", 'a == "b"'),
        ("a\t==\t'b'", 'a == "b"'),
        ("a == ''", 'a == ""'),
        ('a == "it\'s"', 'a == "it\'s"'),
        ("a!='b'", 'a != "b"'),
        ("a in{'x'}", 'a in {"x"}'),
        ("a in {'y','x','y'}", 'a in {"x", "y"}'),
        ("a in {}", "a in {}"),
        ("a in { }", "a in {}"),
        ("a in {'x',}", 'a in {"x"}'),
        ("a notin {'x'}", 'a not in {"x"}'),
        ("a not \t in {'x'}", 'a not in {"x"}'),
        ("a not in{}", "a not in {}"),
        ("a contains 'x'", 'a contains "x"'),
        ("a contains'x'", 'a contains "x"'),
        ("a startswith 'x'", 'a starts with "x"'),
        ("a starts  with 'x'", 'a starts with "x"'),
        ("a endswith 'x'", 'a ends with "x"'),
        ("a ends with 'x'", 'a ends with "x"'),
        ("!has(a)", "!has(a)"),
        ("! ! has(a)", "has(a)"),
        ("!!!has(a)", "!has(a)"),
        ("!(!has(a))", "has(a)"),
        ("!(!(!has(a)))", "!has(a)"),
        ("!a == 'b'", '!a == "b"'),
        ("((has(a)))", "has(a)"),
        ("has(a)&&has(b)", "(has(a) && has(b))"),
        ("has(a) && has(b) && has(c)", "(has(a) && has(b) && has(c))"),
        ("(has(a) && has(b)) && has(c)", "((has(a) && has(b)) && has(c))"),
        ("has(a) || has(b)", "(has(a) || has(b))"),
        ("has(a) || has(b) && has(c)", "(has(a) || (has(b) && has(c)))"),
        ("(has(a) || has(b)) && has(c)", "((has(a) || has(b)) && has(c))"),
        ("!(has(a) || has(b))", "!(has(a) || has(b))"),
        ("!a == 'b' && c == 'd' || e == 'f'", '((!a == "b" && c == "d") || e == "f")'),
        ("projectcalico.org/name == 'x'", 'projectcalico.org/name == "x"'),
        ("A-Z_0.9/x == 'x'", 'A-Z_0.9/x == "x"'),
        ("- == 'x'", '- == "x"'),
        # operator and function words as labels
        ("in == 'x'", 'in == "x"'),
        ("in in {'x'}", 'in in {"x"}'),
        ("not not in {'x'}", 'not not in {"x"}'),
        ("notin notin {'x'}", 'notin not in {"x"}'),
        ("contains contains 'x'", 'contains contains "x"'),
        ("starts starts with 'x'", 'starts starts with "x"'),
        ("endswith endswith 'x'", 'endswith ends with "x"'),
        ("has == 'x'", 'has == "x"'),
        ("all in {'x'}", 'all in {"x"}'),
        ("global != 'x'", 'global != "x"'),
        ("has(has)", "has(has)"),
        ("has(all)", "has(all)"),
        ("has(in)", "has(in)"),
        ("a == '\u00fc \u4f60'", 'a == "\u00fc \u4f60"'),
        ("a == 'a && b'", 'a == "a && b"'),
    ],
)
def test_canonical(text: str, canonical: str) -> None:
    """A selector's text is its normal form, which parses back to an equal selector."""
    selector = parse(text)
    assert str(selector) == canonical
    assert parse(canonical) == selector
    assert hash(parse(canonical)) == hash(selector)


@pytest.mark.parametrize(
    ("text", "offset"),
    [
        ("a", 1),
        ("a ==", 4),
        ("a == b", 5),
        ("a = 'x'", 2),
        ("a === 'x'", 4),
        ("a ! = 'x'", 2),
        ("a & b", 2),
        ("has(a) & has(b)", 7),
        ("has(a) | has(b)", 7),
        ('foo == "bar" |', 13),
        ("has(foo) &&", 11),
        ("&& has(foo)", 0),
        ("|| has(foo)", 0),
        ("has(a) || && has(b)", 10),
        ("'b1' == b", 0),
        ("\"FOO'", 0),
        ("a == 'x", 5),
        ("a == 'it''s'", 9),
        ("()", 1),
        ("(has(a)", 7),
        ("has(a))", 6),
        ("has(a) has(b)", 7),
        ("has(a) b == 'c'", 7),
        ("a == 'x' 'y'", 9),
        ("has (a)", 4),
        ("all ()", 4),
        ("global ()", 7),
        ("has()", 4),
        ("has('a')", 4),
        ("has(a", 5),
        ("has(a b)", 6),
        ("has(a == 'b')", 6),
        ("has(all())", 4),
        ("has(!a)", 4),
        ("all(a)", 4),
        ("global(a)", 7),
        ("all", 3),
        ("has", 3),
        ("a in 'x'", 5),
        ("a in ('x')", 5),
        ("a in {'x' 'y'}", 10),
        ("a in {,}", 6),
        ("a in {'x',,}", 10),
        ("a in {x}", 6),
        ("a in {'x'", 9),
        ("a in", 4),
        ("a inside {'x'}", 2),
        ("a in2 {'x'}", 2),
        ("a not {'x'}", 2),
        ("a not == 'x'", 2),
        ("a containsx 'x'", 2),
        ("a starts 'x'", 2),
        ("a ends-with 'x'", 2),
        ("a matches 'x'", 2),
        ("a b", 2),
        ("a == 'x' AND b == 'y'", 9),
        ("a > '1'", 2),
        ("a == 'x' &", 9),
        ("has(a) &&\nhas(b)", 9),
        ("a == 'x\ny'", 7),
        ("has(a)\r\n", 6),
        ("\n", 0),
        ("has(a) &&\u00a0has(b)", 9),
        ("a == 'x'\x0b", 8),
        ("!", 1),
        ("!!", 2),
        ("!= 'x'", 0),
        ("a$b == 'x'", 1),
        ("$a == 'x'", 0),
        ("\u00e4 == 'x'", 0),
        ("{}", 0),
        (",", 0),
    ],
)
def test_error_offset(text: str, offset: int) -> None:
    """Text outside the grammar is rejected at the character that does not fit."""
    with pytest.raises(SelectorError) as caught:
        parse(text)
    assert caught.value.offset == offset
    assert caught.value.text == text


def test_error_shows_a_caret() -> None:
    """The message has the text and, below, a caret under the offending character, tabs notwithstanding."""
    with pytest.raises(SelectorError) as caught:
        parse("has(a)\t&& b = 'x'")
    reason, text, caret = str(caught.value).split("\n")
    assert "==" in reason
    assert text == "  has(a) && b = 'x'"
    assert text[caret.index("^")] == "="


def test_longest_label_name() -> None:
    """A label name may have the maximum length, in comparisons and under has, and no more."""
    name = "x" * MAX_LABEL_CHARS
    assert parse(f"has({name})").matches({name: ""})
    assert parse(f"{name} == 'a'").matches({name: "a"})
    for text in (f"has({name}x)", f"{name}x == 'a'"):
        with pytest.raises(SelectorError, match="at most 512"):
            parse(text)


def test_deepest_nesting() -> None:
    """Parentheses nest to the stated depth; one more is refused, and a thousand are no crash."""
    text = "(" * MAX_DEPTH + "has(a)" + ")" * MAX_DEPTH
    assert str(parse(text)) == "has(a)"
    with pytest.raises(SelectorError, match="deeper") as caught:
        parse(f"({text})")
    assert caught.value.offset == MAX_DEPTH
    with pytest.raises(SelectorError, match="deeper"):
        parse("(" * 1000 + "has(a)" + ")" * 1000)


def test_depth_counts_open_parentheses_only() -> None:
    """Parentheses side by side are no nesting."""
    text = " && ".join(["(has(a))"] * (MAX_DEPTH + 1))
    assert parse(text).matches({"a": ""})


def test_equality_is_by_canonical_text() -> None:
    """Spellings of one expression are one selector; a selector equals nothing of another type."""
    assert len({parse("a in {'y','x'}"), parse('a in {"x", "y", "x"}'), parse("(a in {'x','y'})")}) == 1
    assert parse("") == EVERYTHING
    assert parse("a == 'x'") != parse("a in {'x'}")
    assert parse("a == 'x'") != 'a == "x"'


def test_selector_is_immutable() -> None:
    """No attribute can be set or deleted."""
    selector = parse("has(a)")
    with pytest.raises(AttributeError):
        selector._root = EVERYTHING.root
    with pytest.raises(AttributeError):
        del selector._text
    assert str(selector) == "has(a)"


@pytest.mark.parametrize("text", ["", "a in {'x','y'} && !(has(b) || c ends with 'z')", "global()"])
def test_copies_and_pickles(text: str) -> None:
    """A selector survives copying and pickling."""
    selector = parse(text)
    for twin in (copy.copy(selector), copy.deepcopy(selector), pickle.loads(pickle.dumps(selector))):  # noqa: S301
        assert isinstance(twin, Selector)
        assert twin == selector
        assert twin.matches({"a": "x"}) is selector.matches({"a": "x"})
    assert repr(selector) == f"<Selector {selector}>"
