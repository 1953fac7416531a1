# SPDX-License-Identifier: Apache-2.0
"""Rules with domain names: the compiled tables give the reference model's verdicts, whatever else the rules match."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given, settings
from strategies import packets, questions_about, worlds

from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.domains import most_specific
from netpol_ebpf.compiler.interpreter import Interpreter
from netpol_ebpf.compiler.tables import NO_RANK, DomainRow
from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.types import Action, Packet, Policy, Question, Rule, World

PATTERNS = ("a.com", "*.a.com", "b.a.com", "*.com", "*.b.a.com", "x.*.com", "b.*.a.com")
NAMES = ("a.com", "b.a.com", "c.b.a.com", "x.a.com", "x.b.a.com", "other.com", "b.c.a.com", "b.c.d.a.com", "org")

patterns = st.frozensets(st.sampled_from(PATTERNS), min_size=1, max_size=3)
no_patterns: frozenset[str] = frozenset()
some_packets = st.lists(packets(), min_size=1, max_size=6)


def _with_names(draw: st.DrawFn, rule: Rule) -> Rule:
    if rule.action is not Action.ALLOW or not draw(st.booleans()):
        return rule
    selectors = st.sampled_from((None, rule.destination.selector))
    return replace(rule, destination=replace(rule.destination, selector=draw(selectors), domains=draw(patterns)))


@st.composite
def named_worlds(draw: st.DrawFn, *, max_policies: int = 4) -> World:
    """A world in which Allow rules of egress and network sets may have domain names."""
    world = draw(worlds(max_policies=max_policies))

    def named(policy: Policy) -> Policy:
        return replace(policy, egress=tuple(_with_names(draw, rule) for rule in policy.egress))

    return replace(
        world,
        policies={key: named(policy) for key, policy in world.policies.items()},
        profiles={
            key: replace(profile, egress=tuple(_with_names(draw, rule) for rule in profile.egress))
            for key, profile in world.profiles.items()
        },
        network_sets={
            key: replace(held, domains=draw(patterns | st.just(no_patterns)))
            for key, held in world.network_sets.items()
        },
    )


names = st.frozensets(st.sampled_from(NAMES), max_size=3)


def assert_agreement(compiler: Compiler, world: World, questions: list[Question]) -> None:
    """Both engines say the same of each question."""
    model, tables = ReferenceModel(world), Interpreter(compiler.tables)
    for question in questions:
        assert tables.decide(question) == model.decide(question), question


def asked(world: World, drawn: list[Packet], known: frozenset[str]) -> list[Question]:
    """All questions about the packets, without names and with them."""
    questions = questions_about(world, drawn)
    return [*questions, *(replace(question, names=known) for question in questions)]


def commit(compiler: Compiler, world: World) -> None:
    """Commit a world; the compiler knows that somebody asked for every name."""
    compiler.replace(world)
    compiler.see_names(NAMES)
    compiler.commit()


@settings(max_examples=2 * settings().max_examples)
@given(named_worlds(), some_packets, names)
def test_tables_agree_with_the_model(world: World, drawn: list[Packet], known: frozenset[str]) -> None:
    """A world compiled at once."""
    compiler = Compiler()
    commit(compiler, world)
    assert_agreement(compiler, world, asked(world, drawn, known))


@given(st.lists(named_worlds(max_policies=3), min_size=2, max_size=4), some_packets, names)
def test_tables_agree_after_each_change(steps: list[World], drawn: list[Packet], known: frozenset[str]) -> None:
    """Worlds one after the other in one compiler, each as a change to the one before."""
    compiler = Compiler()
    for world in steps:
        commit(compiler, world)
        assert_agreement(compiler, world, asked(world, drawn, known))


@given(st.lists(named_worlds(max_policies=3), min_size=2, max_size=4))
def test_changes_lead_to_the_tables_of_a_fresh_compiler(steps: list[World]) -> None:
    """The tables depend on the last world alone, once the classes that nobody learned are forgotten."""
    compiler = Compiler()
    for world in steps:
        commit(compiler, world)
        compiler.forget_name_classes(compiler.unused_name_classes())
    compiler.commit()
    fresh = Compiler()
    commit(fresh, steps[-1])
    assert compiler.canonical() == fresh.canonical()


@given(st.lists(named_worlds(max_policies=3), min_size=2, max_size=3), some_packets, names)
def test_a_change_that_takes_an_allowed_name_away_revokes(
    steps: list[World], drawn: list[Packet], known: frozenset[str]
) -> None:
    """If a packet with names was allowed and no longer is, the change says so."""
    compiler = Compiler()
    commit(compiler, steps[0])
    for before, after in pairwise(steps):
        compiler.replace(after)
        compiler.see_names(NAMES)
        revokes = compiler.commit().revokes
        old, new = ReferenceModel(before), ReferenceModel(after)
        questions = [question for question in asked(before, drawn, known) if question.endpoint in after.endpoints]
        if any(_loses(old, new, question) for question in questions):
            assert revokes


def _loses(old: ReferenceModel, new: ReferenceModel, question: Question) -> bool:
    strict = {"allow": 0, "continue": 1, "deny": 2}
    return strict[new.decide(question).outcome.value] > strict[old.decide(question).outcome.value]


@given(named_worlds(), named_worlds())
def test_name_classes_keep_their_numbers(first: World, second: World) -> None:
    """A class that an endpoint learned still has its number and its content after any change, until it is forgotten."""
    compiler = Compiler()
    commit(compiler, first)
    learned = dict(compiler.tables.name_classes.items())
    commit(compiler, second)
    after = dict(compiler.tables.name_classes.items())
    assert learned.items() <= after.items()


@given(named_worlds(max_policies=3), named_worlds(max_policies=3))
def test_learned_classes_never_match_more_than_their_names(first: World, second: World) -> None:
    """After a change, a class that was learned before gives no rule that a new look at the name would not give first."""
    compiler = Compiler()
    commit(compiler, first)
    learned = {name: most_specific(name, compiler.tables.names) for name in NAMES}
    commit(compiler, second)
    tables = compiler.tables
    none = DomainRow(NO_RANK, NO_RANK, 0, 0)
    for number in tables.domain_lists:
        for name, class_ in learned.items():
            old = tables.domains.get((number, class_)) or none
            new = tables.domains.get((number, most_specific(name, tables.names))) or none
            assert old.rank >= new.rank
            assert old.staged_rank >= new.staged_rank
