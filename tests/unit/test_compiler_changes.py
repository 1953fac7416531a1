# SPDX-License-Identifier: Apache-2.0
"""The writes of a commit by phase, and rejected commits that change nothing."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from netpol_ebpf.compiler import Change, Compiler, Interpreter, Limits
from netpol_ebpf.compiler.journal import Journal
from netpol_ebpf.errors import LimitError
from netpol_ebpf.policy.types import (
    TCP,
    UDP,
    Action,
    Backend,
    BackendMatch,
    Direction,
    Endpoint,
    EndpointKey,
    EndpointKind,
    Entity,
    LabelledNets,
    NamedPort,
    Outcome,
    Packet,
    Policy,
    PolicyKey,
    PolicySettings,
    PolicyTier,
    Ports,
    ProfileRules,
    Question,
    Rule,
    ServiceBackends,
    Stage,
    World,
)
from netpol_ebpf.selector import equals

HERE = "here"
INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS


def pod(name: str, address: str, *, node: str = HERE, ports: tuple[NamedPort, ...] = (), **labels: str) -> Endpoint:
    """A pod, on this node by default."""
    key = EndpointKey("Pod", "n", name)
    return Endpoint(
        key, EndpointKind.WORKLOAD, labels, (ip_address(address),), ports=ports, node=node, profiles=("kns.n",)
    )


def policy(name: str, *sources: Entity, app: str = "web", ports: Ports | None = None, **fields: Any) -> Policy:
    """An ingress policy for pods with this app. It allows TCP from these sources on these ports."""
    to = Entity(ports=ports)
    rules = tuple(
        Rule(Action.ALLOW, n, protocol=TCP, source=source, destination=to) for n, source in enumerate(sources)
    )
    base = Policy(
        PolicyKey("NetworkPolicy", "n", name), "default", 1.0, equals("app", app), frozenset({INGRESS}), rules
    )
    return replace(base, **fields)


def from_app(app: str) -> Entity:
    """The peer "pods with this app"."""
    return Entity(selector=equals("app", app))


def cluster(*objects: Any, limits: Limits | None = None) -> Compiler:
    """Two local web pods and one remote db, a namespace profile that allows all, and these objects, in force."""
    compiler = Compiler(lambda endpoint: endpoint.node == HERE, limits=limits)
    allow = (Rule(Action.ALLOW, 0),)
    for obj in (
        pod("web-1", "10.0.0.1", app="web"), pod("web-2", "10.0.0.2", app="web"), pod("db", "10.0.1.1", node="away", app="db"),
        ProfileRules("kns.n", allow, allow), PolicyTier("default", 1e6), *objects,
    ):  # fmt: skip
        compiler.upsert(obj)
    compiler.commit()
    return compiler


def commit(compiler: Compiler, *objects: Any) -> Change:
    """The change that these objects cause."""
    for obj in objects:
        compiler.upsert(obj)
    return compiler.commit()


def written(change: Change) -> dict[str, set[str]]:
    """Table names by phase."""
    return {name: set(batch) for name, batch in change.batches() if batch}


def rows(compiler: Compiler) -> list[dict[Any, Any]]:
    """A copy of all tables."""
    return [dict(table.items()) for table in compiler.tables.all()]


def outcome(compiler: Compiler, source: str, *, to: str = "web-1", port: int = 80, protocol: int = TCP) -> Outcome:
    """The verdict on a packet to a local pod."""
    key = EndpointKey("Pod", "n", to)
    packet = Packet(ip_address(source), compiler.world.endpoints[key].addresses[0], protocol, 40_000, port)
    return Interpreter(compiler.tables).decide(Question(key, INGRESS, Stage.NORMAL, packet)).outcome


# --- pods -----------------------------------------------------------------------------------------------------------


def test_nothing_new_is_no_change() -> None:
    """Equal objects, unknown removals and an empty commit write nothing."""
    compiler = cluster(policy("p", from_app("db")))
    compiler.upsert(pod("web-1", "10.0.0.1", app="web"))
    compiler.upsert(policy("p", from_app("db")))
    compiler.remove(Policy, PolicyKey("NetworkPolicy", "n", "gone"))
    compiler.remove(PolicySettings, None)
    change = compiler.commit()
    assert not change
    assert not change.revokes
    assert not compiler.commit()


def test_pod_elsewhere_with_known_labels_is_one_row() -> None:
    """The flip has one address row, and nothing else is written."""
    compiler = cluster(policy("p", from_app("db")))
    change = commit(compiler, pod("db-2", "10.0.1.2", node="away", app="db"))
    assert written(change) == {"flip": {"addresses"}}
    assert change.flip["addresses"].upserts.keys() == {ip_address("10.0.1.2")}
    assert not change.revokes
    assert outcome(compiler, "10.0.1.2") is Outcome.ALLOW


def test_pod_with_new_labels_gets_its_classes_before_its_address() -> None:
    """Identity and class rows grow, and the address row flips. Sets that do not distinguish it have no row."""
    compiler = cluster(policy("p", from_app("db"), from_app("other")))
    change = commit(compiler, pod("other", "10.0.1.2", node="away", app="other"))
    assert written(change) == {"grow": {"identities", "peer_classes", "verdicts"}, "flip": {"addresses"}}
    assert len(change.grow["peer_classes"].upserts) == 1
    assert outcome(compiler, "10.0.1.2") is Outcome.ALLOW
    change = commit(compiler, pod("plain", "10.0.1.3", node="away", app="plain"))
    assert written(change) == {"grow": {"identities"}, "flip": {"addresses"}}


def test_pod_that_goes_is_flipped_away_and_then_cleaned_up() -> None:
    """Its identity is removed with its last address. It was allowed, so open connections are judged again."""
    compiler = cluster(policy("p", from_app("db")))
    before = rows(compiler)
    commit(compiler, pod("db-2", "10.0.1.2", node="away", app="db", extra="yes"))
    compiler.remove(Endpoint, EndpointKey("Pod", "n", "db-2"))
    change = compiler.commit()
    assert written(change) == {"flip": {"addresses"}, "shrink": {"identities", "peer_classes"}}
    assert change.flip["addresses"].deletes == {ip_address("10.0.1.2")}
    assert change.revokes
    assert rows(compiler) == before


def test_new_pod_that_may_less_than_its_address_did_revokes() -> None:
    """A net allowed the address, but the pod that now has it is denied by its labels."""
    net = Entity(nets=(ip_network("10.0.0.0/16"),), not_selector=equals("app", "bad"))
    compiler = cluster(policy("p", net))
    assert not commit(compiler, pod("fine", "10.0.5.1", node="away", app="fine")).revokes
    assert commit(compiler, pod("bad", "10.0.5.2", node="away", app="bad")).revokes


def test_local_pod_with_a_known_policy_list_shares_the_sets() -> None:
    """An address row and an endpoint row are written."""
    compiler = cluster(policy("p", from_app("db")))
    change = commit(compiler, pod("web-3", "10.0.0.3", app="web"))
    assert written(change) == {"flip": {"addresses", "endpoints"}}
    sets = [compiler.tables.endpoints[EndpointKey("Pod", "n", name)].sets for name in ("web-1", "web-3")]
    assert sets[0] == sets[1]


def test_relabelled_local_pod_flips_both_rows_in_one_phase() -> None:
    """The rows for others' policy about it, and for its own policy."""
    compiler = cluster(policy("p", from_app("db")))
    change = commit(compiler, pod("web-1", "10.0.0.1", app="db"))
    assert set(change.flip) == {"addresses", "endpoints"}
    assert outcome(compiler, "192.0.2.1") is Outcome.ALLOW  # no policy selects it any more


# --- policies -------------------------------------------------------------------------------------------------------


def test_policy_flips_the_endpoints_it_selects_and_no_other() -> None:
    """There is one set for both pods. The addresses do not change."""
    compiler = cluster(policy("p", from_app("db")))
    change = commit(compiler, policy("q", from_app("web"), app="other"))
    assert not change
    change = commit(compiler, policy("p", from_app("web")))
    assert change.flip.keys() == {"endpoints"}
    assert len(change.flip["endpoints"].upserts) == 2
    assert len({row.sets[(INGRESS, Stage.NORMAL)] for row in change.flip["endpoints"].upserts.values()}) == 1
    assert change.revokes
    assert not change.prepare


def test_wider_policy_revokes_nothing() -> None:
    """One more source revokes nothing. The first policy of a pod isolates it, so it revokes."""
    compiler = cluster()
    assert commit(compiler, policy("p", from_app("db"))).revokes
    assert not commit(compiler, policy("p", from_app("db"), from_app("web"))).revokes
    assert commit(compiler, policy("p", from_app("web"))).revokes


def test_nets_are_labelled_before_the_flip_and_unlabelled_after_it() -> None:
    """At each time, the set in force finds the identities that it needs."""
    compiler = cluster(policy("p", Entity(nets=(ip_network("192.0.2.0/24"),))))
    change = commit(compiler, policy("p", Entity(nets=(ip_network("192.0.2.0/25"),))))
    assert change.grow["cidrs"].upserts.keys() == {ip_network("192.0.2.0/25")}
    assert "cidrs" not in change.flip
    assert change.shrink["cidrs"].upserts.keys() == {ip_network("192.0.2.0/25")}
    assert change.shrink["cidrs"].deletes == {ip_network("192.0.2.0/24")}
    assert [outcome(compiler, address) for address in ("192.0.2.1", "192.0.2.200")] == [Outcome.ALLOW, Outcome.DENY]


def test_columns_of_sets_in_force_are_written_before_the_atoms() -> None:
    """A new port splits an atom. The old set's column gets the new number in the growing phase."""
    web, api = Ports(((80, 90),)), Ports(((85, 85),))
    compiler = cluster(policy("p", Entity(), ports=web))
    change = commit(compiler, policy("p", Entity(), ports=api))
    assert {"l4_atoms", "l4_columns"} <= change.grow.keys()
    assert "l4_atoms" not in change.flip
    new = change.flip["endpoints"].upserts[EndpointKey("Pod", "n", "web-1")].sets[(INGRESS, Stage.NORMAL)]
    assert change.grow["l4_columns"].upserts.keys() > {new.l4_base}


def test_net_more_or_less_is_one_row() -> None:
    """The other nets of the set keep their rows. With other labels, all rows flip."""
    nets = tuple(ip_network(f"198.18.{index}.0/24") for index in range(50))
    compiler = cluster(LabelledNets("s", {"a": "1"}, nets[:49]))
    assert commit(compiler, LabelledNets("s", {"a": "1"}, nets)).flip["cidrs"].upserts.keys() == {nets[49]}
    assert commit(compiler, LabelledNets("s", {"a": "1"}, nets[1:])).flip["cidrs"].deletes == {nets[0]}
    assert commit(compiler, LabelledNets("s", {"a": "2"}, nets[1:])).flip["cidrs"].upserts.keys() == set(nets[1:])


def test_new_meaning_of_a_named_port_flips_who_uses_it() -> None:
    """A remote pod declares the name with another port."""
    named = policy("p", types=frozenset({EGRESS}), ingress=(), egress=(
        Rule(Action.ALLOW, 0, destination=Entity(selector=equals("app", "db"), ports=Ports(names=("sql",)))),
    ))  # fmt: skip
    first = pod("db", "10.0.1.1", node="away", app="db", ports=(NamedPort("sql", TCP, 5432),))
    compiler = cluster(named, first)
    known = commit(compiler, pod("db-2", "10.0.1.2", node="away", app="db", ports=(NamedPort("sql", TCP, 5432),)))
    assert "endpoints" not in known.flip
    other = commit(compiler, pod("db-3", "10.0.1.3", node="away", app="db", ports=(NamedPort("sql", TCP, 5433),)))
    assert len(other.flip["endpoints"].upserts) == 2
    unrelated = commit(compiler, pod("x", "10.0.1.4", node="away", app="x", ports=(NamedPort("sql", TCP, 9999),)))
    assert "endpoints" not in unrelated.flip


def test_backend_that_comes_is_an_address_and_a_port_is_a_policy() -> None:
    """A new member flips address rows. A port that no backend had before flips the endpoints."""

    def service(*backends: tuple[str, int]) -> ServiceBackends:
        return ServiceBackends(
            "n", "s", frozenset(Backend(ip_address(address), TCP, port) for address, port in backends)
        )

    match = Entity(service=BackendMatch("n", "s", match_ports=True))
    uses = policy("p", types=frozenset({EGRESS}), ingress=(), egress=(Rule(Action.ALLOW, 0, destination=match),))
    compiler = cluster(uses, service(("172.16.0.1", 443)))
    change = commit(compiler, service(("172.16.0.1", 443), ("172.16.0.2", 443)))
    assert change.flip.keys() == {"addresses"}
    change = commit(compiler, service(("172.16.0.1", 443), ("172.16.0.2", 8443)))
    assert change.flip.keys() == {"addresses", "endpoints"}


def test_tier_change_concerns_endpoints_with_policies_in_it() -> None:
    """The tier's default action is a part of their sets."""
    compiler = cluster(policy("p", from_app("db")))
    assert outcome(compiler, "192.0.2.1") is Outcome.DENY
    change = commit(compiler, PolicyTier("default", 1e6, Action.PASS))
    assert len(change.flip["endpoints"].upserts) == 2
    assert not change.revokes
    assert outcome(compiler, "192.0.2.1") is Outcome.ALLOW
    assert not commit(compiler, PolicyTier("unused", 5.0))


def test_what_no_packet_reaches_is_no_part_of_a_set() -> None:
    """After a tier that always ends in deny, neither profiles nor later tiers change the set."""
    compiler = cluster(policy("p", from_app("db")), PolicyTier("late", 2e6))
    assert not commit(compiler, policy("late", Entity(), tier="late"))
    rule = Rule(Action.DENY, 0)
    change = commit(compiler, ProfileRules("kns.n", (rule,), (rule,)))
    assert {direction for row in change.flip["endpoints"].upserts.values() for direction, _ in row.sets} == set(
        Direction
    )
    assert outcome(compiler, "10.0.1.1") is Outcome.ALLOW


# --- growth ---------------------------------------------------------------------------------------------------------


def test_set_that_outgrows_its_range_moves_before_anything_else() -> None:
    """There are more classes than room. The set's copy and the endpoint rows are written in the preparing phase."""
    sources = [from_app(f"app-{index}") for index in range(40)]
    compiler = cluster(policy("p", *sources))
    row = compiler.tables.endpoints[EndpointKey("Pod", "n", "web-1")].sets[(INGRESS, Stage.NORMAL)]
    moved = []
    for index in range(40):
        change = commit(compiler, pod(f"new-{index}", f"10.0.2.{index}", node="away", app=f"app-{index}"))
        assert "endpoints" not in change.flip
        if change.prepare:
            assert change.prepare.keys() == {"verdicts", "endpoints"}
            assert change.shrink["verdicts"].deletes
            moved.append(index)
        assert outcome(compiler, f"10.0.2.{index}") is Outcome.ALLOW
    after = compiler.tables.endpoints[EndpointKey("Pod", "n", "web-1")].sets[(INGRESS, Stage.NORMAL)]
    assert 1 < len(moved) < 20
    assert after.number == row.number
    assert after.verdict_base != row.verdict_base
    assert [outcome(compiler, f"10.0.2.{index}") for index in range(40)] == [Outcome.ALLOW] * 40


def test_columns_that_get_too_short_move_before_anything_else() -> None:
    """Another policy has many ports. The set that does not use them keeps its meaning and its other numbers."""
    compiler = cluster(policy("p", Entity(), ports=Ports(((80, 80),))), pod("api", "10.0.0.9", app="api"))
    row = compiler.tables.endpoints[EndpointKey("Pod", "n", "web-1")].sets[(INGRESS, Stage.NORMAL)]
    many = tuple(
        Rule(Action.ALLOW, index, protocol=UDP, destination=Entity(ports=Ports(((index * 2, index * 2),))))
        for index in range(1, 200)
    )
    change = commit(compiler, policy("q", app="api", ingress=many))
    assert change.prepare.keys() == {"l4_columns", "endpoints"}
    after = compiler.tables.endpoints[EndpointKey("Pod", "n", "web-1")].sets[(INGRESS, Stage.NORMAL)]
    assert replace(after, l4_base=row.l4_base) == row
    assert after.l4_base != row.l4_base
    assert [outcome(compiler, "192.0.2.1", port=port) for port in (80, 81)] == [Outcome.ALLOW, Outcome.DENY]
    assert outcome(compiler, "192.0.2.1", to="api", port=100, protocol=UDP) is Outcome.ALLOW


def test_everything_is_given_back() -> None:
    """After the removal of the last object, no table has a row."""
    compiler = cluster(
        policy("p", from_app("db"), Entity(nets=(ip_network("192.0.2.0/24"),))),
        LabelledNets("s", {}, (ip_network("::/0"),)),
    )
    compiler.replace(World())
    change = compiler.commit()
    assert all(len(table) == 0 for table in compiler.tables.all())
    assert change.flip["endpoints"].deletes == {EndpointKey("Pod", "n", "web-1"), EndpointKey("Pod", "n", "web-2")}
    assert change.revokes


def test_replace_makes_the_world_what_is_given() -> None:
    """Uncommitted changes are dropped. An equal object is no change."""
    compiler = cluster(policy("p", from_app("db")))
    world = compiler.world
    copy = World(
        dict(world.tiers), dict(world.policies), dict(world.profiles), dict(world.endpoints),
        dict(world.network_sets), dict(world.nodes), dict(world.services), world.settings,
    )  # fmt: skip
    compiler.upsert(policy("p", from_app("web")))
    compiler.replace(copy)
    assert not compiler.commit()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "objects", "message"),
    [
        (Limits(rules_per_policy=2), (policy("p", *[from_app("db")] * 3),), r"^NetworkPolicy/n/p: rules per policy: needs 3, the limit is 2$"),
        (Limits(entries_per_set=3), (policy("p", *[from_app("db")] * 3),), r"^Pod/n/web-\d, ingress: entries per set: needs 4, the limit is 3$"),
        (Limits(classes_per_set=2), (policy("p", from_app("db"), from_app("web")),), r"^Pod/n/web-\d, ingress: classes per set: needs 3"),
        (Limits(verdicts_per_set=7), (policy("p", from_app("db"), ports=Ports(((1, 1), (3, 3)))),), r"^Pod/n/web-\d, ingress: verdicts per set: needs 8, the limit is 7$"),
        (Limits(verdicts=9), (policy("p", from_app("db")),), r"verdicts: needs \d+, the limit is 9$"),
        (Limits(column_blocks=1), (policy("p", from_app("db")), policy("q", Entity(), app="db"), pod("db", "10.0.1.1", app="db")), "column blocks: needs 2"),
        (Limits(rules=5), (policy("p", *[from_app("db")] * 3),), r"rules: needs 6, the limit is 5$"),
        (Limits(identities=2), (pod("x", "10.0.3.1", app="x"),), r"identities: needs 3, the limit is 2$"),
        (Limits(addresses=3), (pod("x", "10.0.3.1", app="db"),), r"^Pod/n/x: addresses: needs 4, the limit is 3$"),
        (Limits(cidrs=1), (LabelledNets("s", {}, (ip_network("10.0.0.0/8"), ip_network("11.0.0.0/8"))),), r"^s: cidrs: needs 2, the limit is 1$"),
        (Limits(peer_classes=0), (policy("p", from_app("db")),), r"^NetworkPolicy/n/p: peer classes: needs 1, the limit is 0$"),
        (Limits(endpoints=2), (pod("x", "10.0.3.1", app="db"),), r"^Pod/n/x: endpoints: needs 3, the limit is 2$"),
    ],
)  # fmt: skip
def test_limit_is_named_and_nothing_changes(limits: Limits, objects: tuple[Any, ...], message: str) -> None:
    """The error has object, limit and number. The tables stay as before and can be changed again."""
    compiler = cluster(limits=limits)
    before, world = rows(compiler), compiler.canonical()
    with pytest.raises(LimitError, match=message):
        commit(compiler, *objects)
    assert rows(compiler) == before
    assert not compiler.commit()
    change = commit(compiler, pod("web-2", "10.0.0.2", app="db"))
    assert change.flip.keys() >= {"addresses"}
    commit(compiler, pod("web-2", "10.0.0.2", app="web"))
    assert compiler.canonical() == world


def test_first_commit_that_is_refused_leaves_an_empty_compiler() -> None:
    """The compiler can be used as if no object had been given."""
    with pytest.raises(LimitError, match="addresses"):
        cluster(limits=Limits(addresses=2))
    compiler = Compiler(limits=Limits(addresses=2))
    for index in range(3):
        compiler.upsert(pod(f"p{index}", f"10.0.0.{index}"))
    with pytest.raises(LimitError, match="addresses: needs 3, the limit is 2"):
        compiler.commit()
    assert not compiler.world.endpoints
    assert all(len(table) == 0 for table in compiler.tables.all())
    assert commit(compiler, pod("p0", "10.0.0.0")).flip["endpoints"].upserts


def test_accident_anywhere_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step of a commit fails, everything is as before, and a second try succeeds."""
    before = (
        policy("p", from_app("db"), Entity(nets=(ip_network("192.0.2.0/24"),))),
        LabelledNets("s", {"a": "1"}, (ip_network("10.0.0.0/8"),)),
    )
    after = (
        policy("p", from_app("other"), Entity(nets=(ip_network("192.0.2.0/25"),)), ports=Ports(((1, 9),), ("sql",))),
        policy("q", Entity(not_selector=equals("a", "1"))),
        LabelledNets("s", {"a": "2"}, (ip_network("10.0.0.0/16"),)),
        pod("db", "10.0.1.1", node="away", app="other", ports=(NamedPort("sql", TCP, 5432),)),
        pod("web-2", "10.0.0.7", app="web"), pod("web-3", "10.0.0.3", app="web", ports=(NamedPort("sql", TCP, 1),)),
        PolicyTier("default", 5.0, Action.PASS),
    )  # fmt: skip
    wanted = cluster(*before)
    commit(wanted, *after)
    compiler = cluster(*before)
    tables, form = rows(compiler), compiler.canonical()
    steps = {"left": 0}

    class AccidentError(Exception):
        """An exception that is none of the project's errors."""

    original = Journal.assign

    def assign(journal: Journal, thing: object, name: str, value: object) -> None:
        steps["left"] -= 1
        if steps["left"] == 0:
            raise AccidentError
        original(journal, thing, name, value)

    monkeypatch.setattr(Journal, "assign", assign)
    failures = 0
    while True:
        steps["left"] = failures + 1
        try:
            commit(compiler, *after)
        except AccidentError:
            failures += 1
            assert rows(compiler) == tables
        else:
            break
        if failures % 20 == 0:
            steps["left"] = 0
            assert not compiler.commit()
            assert compiler.canonical() == form
    assert failures > 100
    assert compiler.canonical() == wanted.canonical()
