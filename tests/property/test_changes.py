# SPDX-License-Identifier: Apache-2.0
"""Make before break: while a change is written, row by row, every packet gets the old verdict or the new one.

A shadow of the kernel's maps is written as the contract in `netpol_ebpf.compiler.tables.Change` says; between any two writes the
interpreter is asked.  A row that is missing when it is needed (a gap) is an error of the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from ipaddress import ip_address, ip_network
from typing import Any

import hypothesis.strategies as st
from hypothesis import given
from strategies import WORKLOADS, packets, questions_about, worlds
from test_event_order import objects_of

from netpol_ebpf.compiler import Compiler
from netpol_ebpf.compiler.compiler import PolicyObject, key_of
from netpol_ebpf.compiler.interpreter import Interpreter
from netpol_ebpf.compiler.tables import Change, CompiledTables
from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.types import (
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    Entity,
    LabelledNets,
    Outcome,
    Packet,
    Policy,
    PolicyKey,
    PolicySettings,
    Question,
    Rule,
    Verdict,
    World,
)
from netpol_ebpf.selector import EVERYTHING, equals

some_packets = st.lists(packets(), min_size=1, max_size=3)


def write(change: Change, shadow: CompiledTables) -> Iterator[str]:
    """Write a change to a shadow, one row at a time; yields the batch after each row."""
    for batch, deltas in change.batches():
        tables = [table for table in shadow.all() if table.name in deltas]
        assert {table.name for table in tables} == deltas.keys()
        for table in tables:
            for key, row in deltas[table.name].upserts.items():
                table.set(key, row)
                yield batch
        for table in reversed(tables):
            for key in deltas[table.name].deletes:
                assert key in table, "a delete of nothing"
                table.delete(key)
                yield batch


def rows_of(tables: CompiledTables) -> dict[str, dict[Any, Any]]:
    """All rows, to be compared."""
    return {table.name: dict(table.items()) for table in tables.all()}


def verdicts(world: World, questions: list[Question]) -> list[Verdict]:
    """The model's verdict."""
    model = ReferenceModel(world)
    return [model.decide(question) for question in questions]


class Transition:
    """A compiler that goes from one world to another, a shadow that follows, and questions that both worlds know."""

    def __init__(self, before: World, after: World, drawn: list[Packet]) -> None:
        compiler, self.shadow = Compiler(), CompiledTables()
        compiler.replace(before)
        for _ in write(compiler.commit(), self.shadow):
            pass
        assert rows_of(self.shadow) == rows_of(compiler.tables)
        asked_later = set(questions_about(after, drawn))
        self.questions = [
            question
            for question in dict.fromkeys(questions_about(before, drawn))
            if question in asked_later and question.endpoint in before.endpoints
        ]
        self.old, self.new = verdicts(before, self.questions), verdicts(after, self.questions)
        compiler.replace(after)
        self.change = compiler.commit()
        self.tables = compiler.tables

    def answers(self) -> list[Verdict]:
        """The shadow's present verdict."""
        interpreter = Interpreter(self.shadow)
        return [interpreter.decide(question) for question in self.questions]


@given(worlds(max_policies=3), worlds(max_policies=3), some_packets)
def test_only_the_flip_changes_verdicts(before: World, after: World, drawn: list[Packet]) -> None:
    """Any change: old verdicts until the flip, new ones after it, and the rows that the compiler has at the end."""
    transition = Transition(before, after, drawn)
    for batch in write(transition.change, transition.shadow):
        if batch in ("prepare", "grow"):
            assert transition.answers() == transition.old
        elif batch == "shrink":
            assert transition.answers() == transition.new
    assert transition.answers() == transition.new
    assert rows_of(transition.shadow) == rows_of(transition.tables)


def test_a_new_prefix_is_judged_by_what_the_old_rule_says() -> None:
    """A rule with a selector gives way to one with a net inside what the selector matches: no gap before the flip."""
    key = PolicyKey("GlobalNetworkPolicy", "", "p")
    pod = Endpoint(WORKLOADS[0], EndpointKind.WORKLOAD, {}, (ip_address("192.0.2.1"),))

    def world(source: Entity) -> World:
        rule = Rule(Action.ALLOW, 0, source=source)
        return World(
            policies={key: Policy(key, "default", 1.0, EVERYTHING, frozenset({Direction.INGRESS}), (rule,))},
            endpoints={pod.key: pod},
            network_sets={"s": LabelledNets("s", {"app": "a"}, (ip_network("10.0.0.0/8"),))},
        )

    before, after = world(Entity(selector=equals("app", "a"))), world(Entity(nets=(ip_network("10.0.0.0/24"),)))
    drawn = [Packet(ip_address(text), pod.addresses[0], 6, 1, 1) for text in ("10.0.0.1", "10.1.0.1")]
    transition = Transition(before, after, drawn)
    assert Outcome.ALLOW in {verdict.outcome for verdict in transition.old}
    for batch in write(transition.change, transition.shadow):
        if batch in ("prepare", "grow"):
            assert transition.answers() == transition.old
    assert transition.answers() == transition.new


def _with(world: World, obj: PolicyObject | None, old: PolicyObject | None) -> World:
    """A copy with one object more, less or other."""
    changed = World(**{name: copy(getattr(world, name)) for name in World.__slots__})
    if isinstance(obj or old, PolicySettings):
        changed.settings = obj if isinstance(obj, PolicySettings) else PolicySettings()
        return changed
    tables: list[dict[Any, Any]] = [
        changed.tiers, changed.policies, changed.profiles, changed.endpoints,
        changed.network_sets, changed.nodes, changed.services,
    ]  # fmt: skip
    names = ["PolicyTier", "Policy", "ProfileRules", "Endpoint", "LabelledNets", "ClusterNode", "ServiceBackends"]
    table = tables[names.index(type(obj or old).__name__)]
    if old is not None:
        table.pop(key_of(old), None)
    if obj is not None:
        table[key_of(obj)] = obj
    return changed


@given(worlds(max_policies=3), worlds(max_policies=3), some_packets, st.data())
def test_one_object_is_never_blended(world: World, other: World, drawn: list[Packet], data: st.DataObject) -> None:
    """One object comes, changes or goes: at every moment each verdict is the old one or the new one."""
    if data.draw(st.integers(0, 2)):
        after = _with(world, data.draw(st.sampled_from(objects_of(other))), None)
    else:
        after = _with(world, None, data.draw(st.sampled_from(objects_of(world))))
    transition = Transition(world, after, drawn)
    for _ in write(transition.change, transition.shadow):
        for answer, old, new in zip(transition.answers(), transition.old, transition.new, strict=True):
            assert answer in (old, new)


@given(worlds(max_policies=3), worlds(max_policies=3), some_packets)
def test_a_lost_allow_is_announced(before: World, after: World, drawn: list[Packet]) -> None:
    """A change after which anything is denied that was allowed says that it revokes."""
    transition = Transition(before, after, drawn)
    pairs = zip(transition.old, transition.new, strict=True)
    lost = any(old.outcome is Outcome.ALLOW and new.outcome is Outcome.DENY for old, new in pairs)
    assert transition.change.revokes or not lost
