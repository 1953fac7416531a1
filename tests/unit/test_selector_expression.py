# SPDX-License-Identifier: Apache-2.0
"""What selectors match, how they are composed, and what is known of them without labels."""

from __future__ import annotations

import pytest

from netpol_ebpf.selector import (
    EVERYTHING,
    SelectorError,
    all_of,
    any_of,
    equals,
    has,
    is_in,
    negate,
    not_equals,
    not_in,
    parse,
)
from netpol_ebpf.selector.requirements import MAX_CONJUNCTIONS, Restriction


@pytest.mark.parametrize(
    ("text", "absent", "empty", "x", "xyz"),
    [
        ("k == 'x'", False, False, True, False),
        ("k == ''", False, True, False, False),
        ("k != 'x'", True, True, False, True),
        ("k != ''", True, False, True, True),
        ("k in {'x', 'xyz'}", False, False, True, True),
        ("k in {''}", False, True, False, False),
        ("k not in {'x', 'xyz'}", True, True, False, False),
        ("k not in {''}", True, False, True, True),
        ("k in {}", False, False, False, False),
        ("k not in {}", True, True, True, True),
        ("has(k)", False, True, True, True),
        ("!has(k)", True, False, False, False),
        ("k contains 'y'", False, False, False, True),
        ("k contains ''", False, True, True, True),
        ("k starts with 'xy'", False, False, False, True),
        ("k starts with ''", False, True, True, True),
        ("k ends with 'yz'", False, False, False, True),
        ("k ends with ''", False, True, True, True),
        ("!k contains 'y'", True, True, True, False),
        ("!k starts with 'x'", True, True, False, False),
        ("!k ends with 'z'", True, True, True, False),
        ("!k == 'x'", True, True, False, True),
        ("!k != 'x'", False, False, True, False),
        ("!k in {'x'}", True, True, False, True),
        ("!k not in {'x'}", False, False, True, False),
        ("all()", True, True, True, True),
        ("!all()", False, False, False, False),
        ("global()", True, True, True, True),
        ("", True, True, True, True),
        ("!has(k) || k in {}", True, False, False, False),
        ("K == 'x'", False, False, False, False),
        ("k == 'X'", False, False, False, False),
    ],
)
def test_absent_and_present(text: str, *, absent: bool, empty: bool, x: bool, xyz: bool) -> None:
    """Each operator on an absent label, an empty value, and two others, beside unrelated labels."""
    selector = parse(text)
    for others in ({}, {"other": "x"}):
        assert selector.matches(others) is absent
        assert selector.matches({**others, "k": ""}) is empty
        assert selector.matches({**others, "k": "x"}) is x
        assert selector.matches({**others, "k": "xyz"}) is xyz


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ({"a": "z", "c": "d"}, True),
        ({"c": "d"}, True),
        ({"a": "b", "c": "d"}, False),
        ({"a": "b", "c": "d", "e": "f"}, True),
        ({"a": "z"}, False),
        ({"e": "f"}, True),
    ],
)
def test_precedence(labels: dict[str, str], *, match: bool) -> None:
    """NOT binds closer than AND, AND closer than OR."""
    assert parse("!a == 'b' && c == 'd' || e == 'f'").matches(labels) is match
    assert parse("((!(a == 'b')) && c == 'd') || e == 'f'").matches(labels) is match


def test_parentheses_override() -> None:
    """Parentheses change what NOT and AND bind to."""
    assert not parse("!(a == 'b' && c == 'd') && e == 'f'").matches({})
    assert parse("!(a == 'b' || c == 'd')").matches({})
    assert not parse("!(a == 'b' || c == 'd')").matches({"c": "d"})
    assert parse("(has(a) || has(b)) && has(c)").matches({"b": "", "c": ""})
    assert not parse("(has(a) || has(b)) && has(c)").matches({"a": ""})


def test_combinators_equal_parsed_text() -> None:
    """What combinators build is what the text would have given."""
    assert has("a") == parse("has(a)")
    assert equals("a", "x") == parse("a == 'x'")
    assert not_equals("a", "x") == parse("a != 'x'")
    assert is_in("a", ["y", "x", "y"]) == parse("a in {'x', 'y'}")
    assert not_in("a", iter(["x"])) == parse("a not in {'x'}")
    assert is_in("a", ()) == parse("a in {}")
    assert negate(has("a")) == parse("!has(a)")
    assert negate(negate(has("a"))) == has("a")
    assert all_of(has("a"), has("b")) == parse("has(a) && has(b)")
    assert any_of(has("a"), has("b")) == parse("has(a) || has(b)")
    assert parse("all()") == EVERYTHING


def test_all_of_flattens_and_keeps_all() -> None:
    """ANDs are flattened, repetitions dropped, an all() stays for a later replacement, nothing is everything."""
    pair = all_of(has("a"), has("b"))
    assert all_of() is EVERYTHING
    assert all_of(pair) == pair
    assert str(all_of(pair, has("a"), has("c"))) == "(has(a) && has(b) && has(c))"
    assert all_of(has("a"), has("a")) == has("a")
    assert str(all_of(EVERYTHING, has("a"))) == "(all() && has(a))"
    assert str(all_of(any_of(has("a"), has("b")), has("c"))) == "((has(a) || has(b)) && has(c))"


def test_any_of_flattens() -> None:
    """ORs are flattened and repetitions dropped."""
    pair = any_of(has("a"), has("b"))
    assert any_of(pair) == pair
    assert str(any_of(has("c"), pair, has("a"))) == "(has(c) || has(a) || has(b))"
    assert any_of(has("a"), has("a")) == has("a")


@pytest.mark.parametrize("key", ["", "a b", "a=b", "caf\u00e9", "a\n", "!a"])
def test_combinators_refuse_what_is_no_label_name(key: str) -> None:
    """A key that the language cannot write is refused, not rendered."""
    for build in (has, lambda name: equals(name, "x"), lambda name: is_in(name, ["x"]), EVERYTHING.prefixed):
        with pytest.raises(SelectorError, match="label name"):
            build(key)


def test_value_with_both_quotes() -> None:
    """A value the syntax cannot write is rendered uniquely, and no parsable text reads so."""
    selector = equals("k", """a"b'c""")
    assert str(selector) == '''k == "a""b'c"'''
    assert selector.matches({"k": """a"b'c"""})
    with pytest.raises(SelectorError):
        parse(str(selector))
    # Values made to look alike stay apart.
    lookalikes = [["\"'"], ['"', "'"], ["\"', '"], ['", "', "'"], ['"\'", "\''], ["", "'", '"']]
    assert len({is_in("k", values) for values in lookalikes}) == len(lookalikes)


@pytest.mark.parametrize(
    ("text", "prefixed"),
    [
        ("a == 'x'", 'p.a == "x"'),
        ("!has(a)", "!has(p.a)"),
        ("!(has(a) || b not in {'x'})", '!(has(p.a) || p.b not in {"x"})'),
        ("a != 'a' && a in {'a'}", '(p.a != "a" && p.a in {"a"})'),
        ("a contains 'a' || a starts with 'a' || a ends with 'a'",
         '(p.a contains "a" || p.a starts with "a" || p.a ends with "a")'),
        ("all()", "all()"),
        ("global() && has(a)", "(global() && has(p.a))"),
    ],
)  # fmt: skip
def test_prefixed(text: str, prefixed: str) -> None:
    """Every label name gets the prefix, values and functions do not."""
    assert str(parse(text).prefixed("p.")) == prefixed


def test_with_all_as() -> None:
    """Each all() is replaced, under negation and inside AND and OR too, and nothing else."""
    replacement = has("ns")
    assert EVERYTHING.with_all_as(replacement) == replacement
    assert str(parse("!all()").with_all_as(replacement)) == "!has(ns)"
    assert str(parse("!all()").with_all_as(negate(replacement))) == "has(ns)"
    assert str(parse("all() && has(a) || all()").with_all_as(replacement)) == "((has(ns) && has(a)) || has(ns))"
    assert parse("global()").with_all_as(replacement) == parse("global()")
    assert str(EVERYTHING.prefixed("pcns.").with_all_as(replacement)) == "has(ns)"


@pytest.mark.parametrize(
    ("text", "is_global", "mentions"),
    [
        ("global()", True, True),
        ("(global())", True, True),
        ("!!global()", True, True),
        ("!global()", False, True),
        ("global() && has(a)", False, True),
        ("has(a) || !(has(b) && global())", False, True),
        ("has(global)", False, False),
        ("all()", False, False),
    ],
)
def test_global(text: str, *, is_global: bool, mentions: bool) -> None:
    """Exactly global() is told from a mention of it."""
    assert parse(text).is_global is is_global
    assert parse(text).mentions_global is mentions


def test_is_everything() -> None:
    """Exactly all(), in any spelling."""
    assert parse("").is_everything
    assert parse("(all( ))").is_everything
    assert not parse("all() && all()").is_everything
    assert not parse("global()").is_everything
    assert not parse("!all()").is_everything


def test_label_keys() -> None:
    """All names looked at, and no other."""
    text = "a == 'q' && !(has(b) || c not in {'q'}) && d contains 'q' && all() && a != 'r'"
    assert parse(text).label_keys() == {"a", "b", "c", "d"}
    assert EVERYTHING.label_keys() == frozenset()


def _one(key: str, *values: str) -> tuple[Restriction, ...]:
    return (Restriction(key, frozenset(values) if values else None),)


@pytest.mark.parametrize(
    ("text", "required"),
    [
        ("a == 'x'", _one("a", "x")),
        ("a in {'x', 'y'}", _one("a", "x", "y")),
        ("has(a)", _one("a")),
        ("a contains 'x'", _one("a")),
        ("a starts with ''", _one("a")),
        ("a ends with 'x'", _one("a")),
        ("a != 'x'", None),
        ("a not in {'x'}", None),
        ("!has(a)", None),
        ("all()", None),
        ("global()", None),
        ("!a != 'x'", _one("a", "x")),
        ("!a not in {'x'}", _one("a", "x")),
        ("a in {}", ()),
        ("has(a) && b in {'x','y'} && c == 'z'", _one("c", "z")),
        ("has(a) && b != 'x'", _one("a")),
        ("a in {'x','y'} && a in {'y','z'}", _one("a", "y")),
        ("a in {'x','y'} && has(a)", _one("a", "x", "y")),
        ("a == 'x' && a == 'y'", ()),
        ("a == 'x' || a in {'y','z'}", _one("a", "x", "y", "z")),
        ("a == 'x' || has(a)", _one("a")),
        ("a == 'x' || b == 'y'", (*_one("a", "x"), *_one("b", "y"))),
        ("a == 'x' || b != 'y'", None),
        ("a == 'x' || a in {}", _one("a", "x")),
        ("(a == 'x' && has(n)) || (b == 'y' && has(n))", (*_one("a", "x"), *_one("b", "y"))),
        ("!(a != 'x' || b != 'y')", _one("a", "x")),
        ("!(a != 'x' && a != 'y')", _one("a", "x", "y")),
        ("!(has(a) || has(b))", None),
        ("!(!has(a) || b == 'x')", _one("a")),
    ],
)
def test_required(text: str, required: tuple[Restriction, ...] | None) -> None:
    """The restriction used for indexing: the best arm of an AND, the union of an OR, nothing from negative terms."""
    assert parse(text).required() == required


def test_requirements_offer_a_shared_key() -> None:
    """Where all arms of an OR restrict one key, that is a cover of its own."""
    selector = parse("(a == 'x' && n in {'1','2'}) || (b == 'y' && n in {'2','3'})")
    assert _one("n", "1", "2", "3") in selector.requirements()


def test_restriction_on_a_value() -> None:
    """Absent never satisfies; no values given is any."""
    assert Restriction("a").matches_value("")
    assert not Restriction("a").matches_value(None)
    assert Restriction("a", frozenset("x")).matches_value("x")
    assert not Restriction("a", frozenset("x")).matches_value("y")
    assert not Restriction("a", frozenset("x")).matches_value(None)


@pytest.mark.parametrize(
    ("text", "contradiction"),
    [
        ("a == 'x' && a == 'y'", True),
        ("a == 'x' && a != 'x'", True),
        ("a in {}", True),
        ("!a not in {}", True),
        ("has(a) && !has(a)", True),
        ("a == 'x' && !has(a)", True),
        ("a in {'x','y'} && a not in {'x','y','z'}", True),
        ("a in {'x','y'} && a not in {'x'}", False),
        ("a in {'x','y'} && a in {'y','z'}", False),
        ("a == 'x' && a contains 'y'", True),
        ("a in {'xy','xz'} && a ends with 'z' && !a starts with 'x'", True),
        ("a starts with 'x' && a starts with 'y'", True),
        ("a starts with 'x' && a starts with 'xy'", False),
        ("a ends with 'x' && a ends with 'y'", True),
        ("a ends with 'x' && a ends with 'yx'", False),
        ("a starts with 'xy' && !a starts with 'x'", True),
        ("a starts with 'x' && !a starts with 'xy'", False),
        ("a starts with 'xy' && !a contains 'y'", True),
        ("a contains 'xy' && !a contains 'y'", True),
        ("a contains 'xy' && !a starts with 'x'", False),
        ("has(a) && !a contains ''", True),
        ("has(a) && !a starts with ''", True),
        ("has(a) && a != 'x' && a not in {'y'}", False),
        ("a != 'x' && a == 'x' || has(b)", False),
        ("(a == 'x' || a == 'y') && a == 'z'", True),
        ("(a == 'x' || b == 'y') && a == 'z'", False),
        ("(a == 'x' || b == 'y') && a == 'z' && !has(b)", True),
        ("!(has(a) || !has(a))", True),
        ("!(has(a) && !has(a))", False),
        ("!all()", True),
        ("!global()", True),
        ("!(all() && has(a)) && has(a)", True),
        ("all()", False),
        ("a == 'x' && b == 'y'", False),
        ("a == '' && a contains 'x'", True),
    ],
)
def test_unsatisfiable(text: str, *, contradiction: bool) -> None:
    """Contradictions on one label are found through AND, OR and NOT; what can match never counts as one."""
    assert parse(text).is_unsatisfiable() is contradiction


def test_unsatisfiable_gives_up_in_bounded_time() -> None:
    """A form too large to expand is not called a contradiction, and asking is quick."""
    pairs = [f"(a{number} == 'x' || b{number} == 'y')" for number in range(60)]
    assert not parse(" && ".join([*pairs, "c == 'x'", "c == 'y'"])).is_unsatisfiable()
    few = (MAX_CONJUNCTIONS - 1).bit_length() - 1
    assert parse(" && ".join([*pairs[:few], "c == 'x'", "c == 'y'"])).is_unsatisfiable()
