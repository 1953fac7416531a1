# SPDX-License-Identifier: Apache-2.0
"""Policy sets: which endpoints share one, the cost of the own side, and the life of classes."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from netpol_ebpf.compiler import Compiler, Interpreter
from netpol_ebpf.compiler.tables import SetRow
from netpol_ebpf.model import ReferenceModel
from netpol_ebpf.policy.types import (
    TCP,
    Action,
    Cause,
    CauseKind,
    ClusterNode,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    Failsafe,
    NamedPort,
    Outcome,
    Packet,
    Policy,
    PolicyKey,
    PolicySettings,
    Ports,
    Question,
    Rule,
    Stage,
    Staged,
    Verdict,
)
from netpol_ebpf.selector import EVERYTHING, equals

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS


def endpoint(name: str, *addresses: str, host: bool = False, **fields: Any) -> Endpoint:
    """A pod, or a host, with its name as a label."""
    kind = EndpointKind.HOST if host else EndpointKind.WORKLOAD
    key = EndpointKey("HostEndpoint" if host else "Pod", "" if host else "n", name)
    return Endpoint(key, kind, {"app": name}, tuple(map(ip_address, addresses)), **fields)


def policy(name: str, *rules: Rule, **fields: Any) -> Policy:
    """A global ingress policy for all endpoints."""
    rules = tuple(replace(rule, index=index) for index, rule in enumerate(rules))
    key = PolicyKey("GlobalNetworkPolicy", "", name)
    return replace(Policy(key, "default", 1.0, EVERYTHING, frozenset({INGRESS}), rules), **fields)


def allow(**fields: Any) -> Rule:
    """An Allow rule."""
    return Rule(Action.ALLOW, 0, **fields)


def compiled(*objects: Any) -> Compiler:
    """A compiler with these objects in force. All endpoints are local."""
    compiler = Compiler()
    for obj in objects:
        compiler.upsert(obj)
    compiler.commit()
    return compiler


def ingress(compiler: Compiler, name: str, *, host: bool = False, stage: Stage = Stage.NORMAL) -> SetRow:
    """The ingress set of an endpoint."""
    key = EndpointKey("HostEndpoint" if host else "Pod", "" if host else "n", name)
    return compiler.tables.endpoints[key].sets[(INGRESS, stage)]


def ask(compiler: Compiler, name: str, packet: Packet, *, host: bool = False, stage: Stage = Stage.NORMAL) -> Verdict:
    """The verdict on a packet. It must be the model's."""
    key = EndpointKey("HostEndpoint" if host else "Pod", "" if host else "n", name)
    question = Question(key, INGRESS, stage, packet)
    verdict = Interpreter(compiler.tables).decide(question)
    assert verdict == ReferenceModel(compiler.world).decide(question)
    return verdict


def tcp(source: str, destination: str, port: int = 80) -> Packet:
    """The first packet of a TCP connection."""
    return Packet(ip_address(source), ip_address(destination), TCP, 40_000, port)


def test_endpoints_with_equal_lists_share_a_set() -> None:
    """Labels and addresses do not matter."""
    compiler = compiled(
        endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2", "fd00::2"), policy("p", allow(protocol=TCP))
    )
    assert ingress(compiler, "a") == ingress(compiler, "b")
    assert len({number for number, _ in compiler.tables.peer_classes}) <= 2


def test_own_side_of_a_pod_is_folded_away() -> None:
    """A rule about the destination matches one pod and not the other. There are two sets without a dimension."""
    rule = allow(destination=Entity(selector=equals("app", "a")))
    compiler = compiled(
        endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2"), endpoint("c", "10.0.0.3"), policy("p", rule)
    )
    rows = [ingress(compiler, name) for name in "abc"]
    assert rows[0] != rows[1] == rows[2]
    assert all((row.own_set, row.own_classes) == (0, 1) for row in rows)
    assert ask(compiler, "a", tcp("192.0.2.1", "10.0.0.1")).outcome is Outcome.ALLOW
    assert ask(compiler, "b", tcp("192.0.2.1", "10.0.0.2")).outcome is Outcome.DENY


def test_own_named_port_is_folded_for_both_families_at_once() -> None:
    """The pod's own declaration is constant."""
    rule = allow(destination=Entity(ports=Ports(names=("http",))))
    pod = endpoint("a", "10.0.0.1", "fd00::1", ports=(NamedPort("http", TCP, 8080),))
    compiler = compiled(pod, policy("p", rule))
    assert ingress(compiler, "a").own_set == 0
    assert ask(compiler, "a", tcp("2001:db8::1", "fd00::1", 8080)).outcome is Outcome.ALLOW
    assert ask(compiler, "a", tcp("192.0.2.1", "10.0.0.1", 80)).outcome is Outcome.DENY


def test_own_nets_are_asked_of_the_packet_on_ingress() -> None:
    """A packet may have a multicast destination, which a rule about the pod's own address must not match."""
    rule = allow(destination=Entity(nets=(ip_network("10.0.0.1/32"),)))
    compiler = compiled(endpoint("a", "10.0.0.1", "fd00::1"), policy("p", rule))
    assert ingress(compiler, "a").own_set != 0
    assert ask(compiler, "a", tcp("192.0.2.1", "10.0.0.1")).outcome is Outcome.ALLOW
    assert ask(compiler, "a", tcp("2001:db8::1", "fd00::1")).outcome is Outcome.DENY
    assert ask(compiler, "a", tcp("192.0.2.1", "224.0.0.251")).outcome is Outcome.DENY


@pytest.mark.parametrize(
    ("pod", "address"),
    [
        (endpoint("a", "10.0.0.1", "10.0.0.2"), "10.0.0.2"),
        (endpoint("a"), "10.0.0.1"),
        (endpoint("a", "10.0.0.9", allowed_sources=(ip_network("10.0.0.0/8"),)), "10.0.0.1"),
    ],
)
def test_own_side_that_varies_is_a_dimension(pod: Endpoint, address: str) -> None:
    """The pod has two different own addresses, or none, or may borrow sources."""
    rule = allow(destination=Entity(nets=(ip_network("10.0.0.1/32"),)))
    compiler = compiled(pod, policy("p", rule))
    row = ingress(compiler, "a")
    assert row.own_set not in (0, row.number)
    assert row.own_classes > 1
    for destination in ("10.0.0.1", address):
        expected = Outcome.ALLOW if destination == "10.0.0.1" else Outcome.DENY
        assert ask(compiler, "a", tcp("192.0.2.1", destination)).outcome is expected


def test_own_side_of_a_host_is_looked_up_and_grows() -> None:
    """A forwarded packet has any addresses, known now or later."""
    rule = allow(destination=Entity(selector=equals("app", "late")))
    forward = policy("p", rule, apply_on_forward=True)
    compiler = compiled(endpoint("h", host=True), forward)
    assert ingress(compiler, "h", host=True, stage=Stage.FORWARD).own_set
    packet = tcp("192.0.2.1", "10.7.0.1")
    assert ask(compiler, "h", packet, host=True, stage=Stage.FORWARD).outcome is Outcome.DENY
    compiler.upsert(endpoint("late", "10.7.0.1"))
    compiler.commit()
    assert ask(compiler, "h", packet, host=True, stage=Stage.FORWARD).outcome is Outcome.ALLOW


def test_stage_that_says_nothing_has_no_set() -> None:
    """Packets continue without a look-up. A policy of that stage makes a set."""
    compiler = compiled(endpoint("h", "172.16.0.1", host=True))
    row = compiler.tables.endpoints[EndpointKey("HostEndpoint", "", "h")]
    assert {stage for _, stage in row.sets} == {Stage.NORMAL, Stage.UNTRACKED}  # failsafes make the untracked sets
    verdict = ask(compiler, "h", tcp("192.0.2.1", "172.16.0.1"), host=True, stage=Stage.PRE_DNAT)
    assert verdict.outcome is Outcome.CONTINUE
    compiler.upsert(policy("p", Rule(Action.DENY, 0), pre_dnat=True, apply_on_forward=True))
    compiler.commit()
    verdict = ask(compiler, "h", tcp("192.0.2.1", "172.16.0.1"), host=True, stage=Stage.PRE_DNAT)
    assert verdict.outcome is Outcome.DENY


def test_constant_dimensions_cost_nothing() -> None:
    """If no rule has ports or source ports, there is one class of each, and no column."""
    compiler = compiled(endpoint("a", "10.0.0.1"), policy("p", allow(source=Entity(selector=equals("app", "x")))))
    row = ingress(compiler, "a")
    assert (row.l4_classes, row.source_classes) == (1, 1)
    assert len(compiler.tables.l4_columns) == 0


def test_source_ports_are_a_dimension_where_a_rule_has_them() -> None:
    """Only the set with such a rule has the dimension."""
    rule = allow(protocol=TCP, source=Entity(ports=Ports(((1000, 2000),))))
    compiler = compiled(endpoint("a", "10.0.0.1"), policy("p", rule))
    row = ingress(compiler, "a")
    assert row.source_classes == 2
    inside, outside = (replace(tcp("192.0.2.1", "10.0.0.1"), source_port=port) for port in (2000, 2001))
    assert ask(compiler, "a", inside).outcome is Outcome.ALLOW
    assert ask(compiler, "a", outside).outcome is Outcome.DENY


def test_most_identities_are_the_default_class() -> None:
    """A rule for all pods needs a row for the world, and not for each identity. Nothing else here is IPv6."""
    rule = allow(source=Entity(selector=EVERYTHING))
    pods = [endpoint(f"p{index}", f"10.0.0.{index}") for index in range(1, 50)]
    compiler = compiled(*pods, policy("p", rule))
    number = ingress(compiler, "p1").number
    rows = {identity for (set_, identity), _ in compiler.tables.peer_classes.items() if set_ == number}
    assert rows == {1}


def test_a_rule_on_one_family_needs_no_rows() -> None:
    """A rule on 0.0.0.0/0 makes a default class for each family, which later identities get, too."""
    pods = [endpoint(f"p{index}", f"10.0.0.{index}", f"fd00::{index}") for index in range(1, 10)]
    compiler = compiled(*pods, policy("p", allow(source=Entity(nets=(ip_network("0.0.0.0/0"),)))))
    row = ingress(compiler, "p1")
    assert row.default_class4 != row.default_class6
    compiler.upsert(endpoint("new", "10.0.9.1", "fd00:9::1"))
    compiler.commit()
    assert not [set_ for (set_, _), _ in compiler.tables.peer_classes.items() if set_ == row.number]
    assert ask(compiler, "p1", tcp("10.0.9.1", "10.0.0.1")).outcome is Outcome.ALLOW
    assert ask(compiler, "p1", tcp("fd00:9::1", "fd00::1")).outcome is Outcome.DENY


def test_class_number_is_used_again() -> None:
    """Added and removed label sets do not make a policy set grow."""
    rules = [allow(source=Entity(selector=equals("app", f"app-{index}"))) for index in range(8)]
    compiler = compiled(endpoint("a", "10.0.0.1"), policy("p", *rules))
    before = ingress(compiler, "a")
    for index in range(8):
        compiler.upsert(endpoint(f"app-{index}", "10.0.9.1"))
        compiler.commit()
        assert ask(compiler, "a", tcp("10.0.9.1", "10.0.0.1")).cause.index == index
        compiler.remove(Endpoint, EndpointKey("Pod", "n", f"app-{index}"))
        compiler.commit()
    assert ingress(compiler, "a") == before


def test_log_rules_are_listed_and_named_once() -> None:
    """A rule with several entries is one item of the list. The list is removed with the policy."""
    log = Rule(Action.LOG, 0, protocol=TCP, destination=Entity(ports=Ports(((80, 80),), ("http",))))
    pod = endpoint("a", "10.0.0.1", ports=(NamedPort("http", TCP, 80),))
    compiler = compiled(pod, policy("p", log, allow()))
    cause = Cause(CauseKind.RULE, INGRESS, "default", policy("p").key, index=0, action=Action.LOG)
    assert ask(compiler, "a", tcp("192.0.2.1", "10.0.0.1")).logs == (cause,)
    assert len(compiler.tables.log_lists) == 1
    compiler.upsert(policy("p", allow()))
    compiler.commit()
    assert len(compiler.tables.log_lists) == 0


def test_lists_of_classes_that_are_gone_are_forgotten() -> None:
    """A long-lived policy set does not collect the Log lists of removed label sets."""
    logs = [Rule(Action.LOG, 0, source=Entity(selector=equals(f"l{bit}", "1"))) for bit in range(10)]
    compiler = compiled(endpoint("a", "10.0.0.1"), policy("p", *logs, allow()))
    most = 0
    for number in range(1, 1024, 2):
        visitor = endpoint("visitor", "10.0.9.1")
        labels = {f"l{bit}": "1" for bit in range(10) if number >> bit & 1}
        compiler.upsert(replace(visitor, labels=labels))
        compiler.commit()
        most = max(most, len(compiler.tables.log_lists))
    verdict = ask(compiler, "a", tcp("10.0.9.1", "10.0.0.1"))
    assert [cause.index for cause in verdict.logs] == list(range(10))
    assert most < 300  # of 512 that there were


def test_staged_policy_shares_the_cell_and_changes_only_the_pending_half() -> None:
    """The staged policy replaces its enforced twin there. The enforced half is as without it."""
    enforced = policy("p", allow())
    key = PolicyKey("StagedGlobalNetworkPolicy", "", "p")
    staged = replace(policy("p", Rule(Action.DENY, 0)), key=key, staged=Staged.SET, replaces=enforced.key)
    compiler = compiled(endpoint("a", "10.0.0.1"), enforced, staged)
    verdict = ask(compiler, "a", tcp("192.0.2.1", "10.0.0.1"))
    assert (verdict.outcome, verdict.staged_outcome) == (Outcome.ALLOW, Outcome.DENY)
    assert verdict.staged_cause.policy == key


# --- the interpreter and the canonical form ---------------------------------------------------------------------------


def test_interpreter_says_nothing_of_what_it_does_not_know() -> None:
    """An unknown endpoint is denied without a cause."""
    question = Question(EndpointKey("Pod", "n", "gone"), INGRESS, Stage.NORMAL, tcp("192.0.2.1", "10.0.0.1"))
    verdict = Interpreter(compiled().tables).decide(question)
    assert (verdict.outcome, verdict.cause.kind) == (Outcome.DENY, CauseKind.NO_MATCH)


@pytest.mark.parametrize("table", ["verdicts", "l4_columns", "rules"])
def test_missing_row_is_an_error_not_a_guess(table: str) -> None:
    """The interpreter never invents an answer."""
    tables = compiled(endpoint("a", "10.0.0.1"), policy("p", allow(protocol=TCP))).tables
    question = Question(EndpointKey("Pod", "n", "a"), INGRESS, Stage.NORMAL, tcp("192.0.2.1", "10.0.0.1"))
    for key in list(getattr(tables, table)):
        getattr(tables, table).delete(key)
    with pytest.raises(KeyError):
        Interpreter(tables).decide(question)


def test_interpreter_sees_changes_of_the_tables() -> None:
    """Prefixes that are added later count."""
    compiler = compiled(
        endpoint("a", "10.0.0.1"), policy("p", allow(source=Entity(nets=(ip_network("192.0.2.0/24"),))))
    )
    interpreter = Interpreter(compiler.tables)
    question = Question(EndpointKey("Pod", "n", "a"), INGRESS, Stage.NORMAL, tcp("198.51.100.1", "10.0.0.1"))
    assert interpreter.decide(question).outcome is Outcome.DENY
    compiler.upsert(policy("p", allow(source=Entity(nets=(ip_network("198.51.100.0/24"),)))))
    compiler.commit()
    assert interpreter.decide(question).outcome is Outcome.ALLOW


def test_canonical_form_ignores_numbers_and_history() -> None:
    """The same objects in another order are equal. One more rule is not."""
    objects: list[Any] = [
        endpoint("a", "10.0.0.1"), endpoint("b", "10.0.0.2", "fd00::2"), endpoint("h", "172.16.0.1", host=True),
        policy("p", allow(protocol=TCP, source=Entity(selector=equals("app", "a")), destination=Entity(ports=Ports(((80, 90),))))),
        policy("q", Rule(Action.LOG, 0, source=Entity(nets=(ip_network("10.0.0.0/8"),)))),
    ]  # fmt: skip
    forward = compiled(*objects)
    backward = Compiler()
    for obj in (policy("detour", allow(protocol=17)), *reversed(objects)):
        backward.upsert(obj)
        backward.commit()
    backward.remove(Policy, policy("detour").key)
    backward.commit()
    assert forward.canonical() == backward.canonical()
    numbers = [compiler.tables.endpoints[EndpointKey("Pod", "n", "a")].number for compiler in (forward, backward)]
    assert numbers[0] != numbers[1]
    forward.upsert(policy("q", Rule(Action.LOG, 0, source=Entity(nets=(ip_network("10.0.0.0/9"),)))))
    forward.commit()
    assert forward.canonical() != backward.canonical()


def test_hosts_with_the_same_exceptions_share_their_sets() -> None:
    """Equal lists of failsafe ports are shared, whatever their origin. Different lists make sets of their own."""
    hosts = [endpoint(name, f"172.16.0.{last}", host=True, node=name) for last, name in enumerate("abc", 1)]
    compiler = compiled(*hosts)
    assert len({ingress(compiler, name, host=True) for name in "abc"}) == 1
    own = (Failsafe(TCP, 80, ip_network("192.0.2.0/24")),)
    lists = {("a", Direction.INGRESS): own, ("b", Direction.INGRESS): own}
    compiler.upsert(PolicySettings(node_failsafes=lists))
    compiler.commit()
    rows = [ingress(compiler, name, host=True) for name in "abc"]
    assert rows[0] == rows[1] != rows[2]
    web, far = tcp("192.0.2.1", "172.16.0.1"), tcp("192.0.3.1", "172.16.0.1")
    assert [ask(compiler, "a", one, host=True).outcome for one in (web, far)] == [Outcome.ALLOW, Outcome.DENY]
    assert ask(compiler, "c", web, host=True).outcome is Outcome.DENY


def test_exceptions_that_went_leave_nothing() -> None:
    """After any number of changes, the tables are those of a new compiler."""
    host = endpoint("a", "172.16.0.1", host=True, node="a")
    compiler = compiled(host)
    form = compiler.canonical()
    for port in range(1, 50):
        compiler.upsert(
            PolicySettings(failsafe_inbound=(Failsafe(TCP, port),), failsafe_outbound=(), tunnels=frozenset())
        )
        compiler.commit()
    compiler.upsert(PolicySettings())
    compiler.commit()
    assert compiler.canonical() == form
    assert len(compiler.tables.rules) == len(compiled(host).tables.rules)


def test_failsafe_ports_and_tunnels_are_marked_in_their_rows() -> None:
    """The mark keeps untracked and pre-DNAT policy from dropping these packets. No other row has it."""
    node = ClusterNode("n", {}, (ip_address("172.16.0.9"),))
    compiler = compiled(endpoint("a", "172.16.0.1", host=True), node, policy("p", allow()))
    marked = {compiler.tables.rules[row.rule].kind for _, row in compiler.tables.verdicts.items() if row.failsafe}
    plain = {compiler.tables.rules[row.rule].kind for _, row in compiler.tables.verdicts.items() if not row.failsafe}
    assert marked == {CauseKind.FAILSAFE, CauseKind.TUNNEL}
    assert not marked & plain
