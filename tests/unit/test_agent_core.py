# SPDX-License-Identifier: Apache-2.0
"""The agent step by step, on a node in memory: what it writes, attaches, rejects and keeps."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from memory_barrier import MemoryTables
from memory_maps import MemoryMap, memory_maps

from netpol_ebpf.agent import assignments, domain_names, report
from netpol_ebpf.agent.adoption import LiveConnections
from netpol_ebpf.agent.cni import UNSEEN_TYPES, CniResult
from netpol_ebpf.agent.core import Agent
from netpol_ebpf.agent.local_interfaces import AUDIT_S as AUDIT_OF_ASSIGNMENTS_S
from netpol_ebpf.agent.local_interfaces import MISSING_S, SEARCH_S
from netpol_ebpf.agent.node import POLICY_MAPS
from netpol_ebpf.agent.rejected import RETRY_S
from netpol_ebpf.agent.repair import AUDIT_S, ROUND_S
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.agent.timeouts import STATES
from netpol_ebpf.agent.wiring import Interface, Wiring
from netpol_ebpf.apply import encode
from netpol_ebpf.apply.applier import KernelMap
from netpol_ebpf.apply.ledger import Ledger
from netpol_ebpf.errors import LimitError, MapFullError, PlatformError
from netpol_ebpf.policy.types import EndpointKey, IPAddress
from netpol_ebpf.sources.files import ManifestDirectory
from netpol_loader import abi
from netpol_loader.pins.drift import Drift
from netpol_loader.pins.others import Other, Reach

POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: x}}]}}
status: {{podIPs: [{{ip: 10.0.0.{last}}}]}}
"""
NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"
WEB, DB, FAR = (EndpointKey("Pod", "shop", name) for name in ("web", "db", "far"))
CLUSTER = NAMESPACE + "".join(
    POD.format(name=name, node=node, last=last)
    for last, (name, node) in enumerate([("web", "here"), ("db", "here"), ("far", "there")], 1)
)
POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 5432}]}]
"""
UPLINK, WEB_LINK, DB_LINK = (
    Interface(2, "eth0", "veth", (0, 2)),
    Interface(5, "cali1", "veth", (1, 2)),
    Interface(6, "cali2", "veth", (2, 2)),
)
WIRING = Wiring(
    {link.ifindex: link for link in (UPLINK, WEB_LINK, DB_LINK)},
    {ip_address("10.0.0.1"): 5, ip_address("10.0.0.2"): 6},
    frozenset({2}),
)


@dataclass
class MemoryNode:
    """A node in memory.

    ``exchanges``: how often a new set of policy maps took over. ``renewals``: how often one was made. ``sizes``: those
    requested for the next one. ``rows_when_attached``: whether an interface had its row when its programs were
    attached.
    """

    wiring: Wiring = WIRING
    news: bool = False
    programs: set[int] = field(default_factory=set)
    in_force: dict[str, MemoryMap] = field(default_factory=lambda: memory_maps([]))
    rows_when_attached: dict[int, bool] = field(default_factory=dict)
    exchanges: int = 0
    renewals: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    events: list[abi.np_event] = field(default_factory=list)
    dns_events: list[abi.np_dns_event] = field(default_factory=list)
    gone: set[int] | None = field(default_factory=set)
    born: list[Interface] = field(default_factory=list)
    prunings: int = 0
    drift: list[Drift] = field(default_factory=list)
    refuses: set[int] = field(default_factory=set)
    live: LiveConnections = field(default_factory=LiveConnections)
    behind: set[int] = field(default_factory=set)
    asked: list[set[int]] = field(default_factory=list)
    barrier: MemoryTables = field(default_factory=MemoryTables)
    routes: dict[IPAddress, int] = field(default_factory=dict)
    bound: frozenset[tuple[int, IPAddress, int]] | None = frozenset()  # None: the kernel does not list sockets

    @property
    def network(self) -> MemoryNode:
        return self

    def others(self, ifindex: int) -> list[str]:
        return ["another"] if ifindex in self.behind else []

    def other_programs(self, attached: Collection[int]) -> list[Other]:
        return [
            Other(one, "tcx ingress", 7, "", is_first=True, reach=Reach.NONE) for one in self.behind & set(attached)
        ]

    def interface_towards(self, address: IPAddress) -> int | None:
        return self.routes.get(address, min(self.wiring.uplinks, default=None))

    def bound_sockets(self) -> frozenset[tuple[int, IPAddress, int]]:
        if self.bound is None:
            raise PlatformError("the kernel does not list this node's sockets")
        return self.bound

    def live_connections(self, namespaces: Collection[int]) -> LiveConnections:
        self.asked.append(set(namespaces))
        return self.live

    @property
    def maps(self) -> Mapping[str, KernelMap]:
        return self.in_force

    def snapshot(self, bound: Collection[int] = ()) -> Wiring:  # noqa: ARG002
        return self.wiring

    def has_news(self) -> bool:
        news, self.news = self.news, False
        return news

    def take_born(self) -> list[Interface]:
        born, self.born = self.born, []
        return born

    def take_gone(self) -> set[int] | None:
        gone, self.gone = self.gone, set()
        return gone

    def prune(self) -> None:
        self.prunings += 1
        self.programs.intersection_update(self.wiring.links)

    def mend(self, ifindexes: Collection[int]) -> list[Drift]:
        missing = sorted(set(ifindexes) - self.programs)
        self.programs |= set(missing)
        found, self.drift = self.drift, []
        return [*found, *(Drift("program", f"interface {ifindex}", "missing") for ifindex in missing)]

    @contextlib.contextmanager
    def renewal(self) -> Iterator[Mapping[str, KernelMap]]:
        self.renewals += 1
        fresh, sizes = memory_maps([]), self.renewal_sizes()
        for name, one in fresh.items():
            one.max_entries = sizes[name]
        maps = {name: fresh[name] if name in POLICY_MAPS else one for name, one in self.in_force.items()}
        yield maps
        self.in_force = maps
        self.exchanges += 1

    def renewal_sizes(self) -> Mapping[str, int]:
        asked = {name: size for name, size in self.sizes.items() if name in POLICY_MAPS}
        return {**{name: one.max_entries for name, one in self.in_force.items()}, **asked}

    def former_numbers(self) -> Mapping[int, int]:
        rows = (encode.decode_endpoint(value) for value in self.in_force["np_endpoint"].rows.values())
        return {row.ifindex: row.number for row in rows}

    def drop_rows(self, gone: Collection[int]) -> None:
        for ifindex in gone:
            self.in_force["np_endpoint"].rows.pop(encode.endpoint_key(ifindex), None)

    def attached(self) -> set[int]:
        return set(self.programs)

    def attach(self, ifindex: int, *, is_newborn: bool = False) -> bool:
        assert not (is_newborn and ifindex in self.programs)
        if ifindex in self.refuses:
            return False
        self.rows_when_attached[ifindex] = self.row(ifindex) is not None
        self.programs.add(ifindex)
        return is_newborn or ifindex in self.wiring.links

    def detach(self, ifindex: int) -> None:
        self.programs.discard(ifindex)

    def read_events(self, consume: Callable[[abi.np_event], None]) -> int:
        events, self.events = self.events, []
        for event in events:
            consume(event)
        return len(events)

    def read_dns_events(self, consume: Callable[[abi.np_dns_event], None]) -> int:
        events, self.dns_events = self.dns_events, []
        for event in events:
            consume(event)
        return len(events)

    def row(self, ifindex: int) -> abi.np_endpoint | None:
        value = self.in_force["np_endpoint"].rows.get(encode.endpoint_key(ifindex))
        return None if value is None else encode.decode_endpoint(value)


@dataclass
class Bench:
    """Manifests, a state directory, a node and a clock, for successive agents."""

    home: Path
    node: MemoryNode = field(default_factory=MemoryNode)
    now_s: float = 0.0
    ledgers: list[Ledger] = field(default_factory=list)

    def agent(self, settings: AgentSettings | None = None) -> Agent:
        """A started agent, which finds what the previous one left."""
        self.close()
        self.ledgers.append(Ledger(self.home / "numbers"))
        source = ManifestDirectory(self.home / "manifests", interval_s=0.0)
        one = Agent(settings or AgentSettings("here"), self.node, source, self.ledgers[-1], lambda: self.now_s)
        one.start()
        return one

    def close(self) -> None:
        for ledger in self.ledgers:
            ledger.close()

    def write(self, name: str, text: str) -> None:
        (self.home / "manifests").mkdir(exist_ok=True)
        (self.home / "manifests" / name).write_text(text)

    def remove(self, name: str) -> None:
        (self.home / "manifests" / name).unlink()


def settle(agent: Agent) -> None:
    """Make enough steps for a change of the manifests to be applied."""
    for _ in range(3):
        agent.step()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.write("cluster.yaml", CLUSTER)
    bench.write("policy.yaml", POLICY)
    yield bench
    bench.close()


def test_start_fills_binds_and_attaches(bench: Bench) -> None:
    """Local pods and the uplink have their rows before any program is attached. Remote pods have no rows."""
    agent = bench.agent()
    assert bench.node.exchanges == 1
    assert bench.node.rows_when_attached == {2: True, 5: True, 6: True}
    assert bench.node.programs == {2, 5, 6}
    assert set(agent.enforcement.applier.bindings) == {WEB, DB}
    assert agent.problems == []


def test_only_the_first_agent_asks_for_old_connections(bench: Bench) -> None:
    """Before and after the programs are attached.

    If they exist already, or for a new interface, the agent does not ask.
    """
    bench.agent()
    assert bench.node.asked == [{1, 2}, {1, 2}]
    settle(bench.agent())
    assert len(bench.node.asked) == 2


@pytest.mark.parametrize("is_faulty", [True, False])
def test_audit_of_assignments_restores_and_reports_a_difference(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, is_faulty: bool
) -> None:
    """A difference that the handling of changes missed is found within AUDIT_S, even without a further change."""
    agent = bench.agent()
    for _ in range(3):
        bench.node.news = True
        agent.step()
    if is_faulty:
        monkeypatch.setattr(assignments, "still_settled", lambda settled, *_: dict(settled))
    moved = Interface(9, "cali9", "veth", (9, 2))
    bench.node.wiring = replace(
        WIRING, links={**WIRING.links, 9: moved}, host_routes={**WIRING.host_routes, ip_address("10.0.0.1"): 9}
    )
    bench.node.news = True
    agent.step()
    assert agent.interfaces.located[WEB] == (5 if is_faulty else 9)
    bench.now_s += AUDIT_OF_ASSIGNMENTS_S
    agent.step()
    assert agent.interfaces.located[WEB] == agent.enforcement.applier.bindings[WEB].ifindex == 9
    found = [one.message for one in agent.problems if one.slug == "interface-audit"]
    assert len(found) == is_faulty
    assert all(str(WEB) in one and one in caplog.text for one in found)
    monkeypatch.setattr(assignments.InterfaceAssignments, "unsettled", None)
    bench.now_s += AUDIT_OF_ASSIGNMENTS_S
    agent.step()  # no audit, because nothing was located since


def test_interface_of_nobody_is_closed(bench: Bench) -> None:
    """A workload's interface without a known pod has programs and no row."""
    stranger = Interface(9, "cali9", "veth", (7, 2))
    bench.node.wiring = replace(WIRING, links={**WIRING.links, 9: stranger})
    bench.agent()
    assert 9 in bench.node.programs
    assert bench.node.row(9) is None


def test_new_interface_is_closed_before_it_is_opened(bench: Bench) -> None:
    """For a new interface the programs are attached first, and the row is written afterwards."""
    bench.write("more.yaml", POD.format(name="late", node="here", last=9))
    agent = bench.agent()
    bench.node.wiring = replace(
        WIRING, links={**WIRING.links, 9: Interface(9, "cali9", "veth", (7, 2))},
        host_routes={**WIRING.host_routes, ip_address("10.0.0.9"): 9},
    )  # fmt: skip
    agent.step()
    assert 9 not in bench.node.programs
    bench.node.news = True
    bench.node.rows_when_attached.clear()
    agent.step()
    assert bench.node.rows_when_attached == {9: False}
    assert bench.node.row(9) is not None


def test_newborn_interface_is_closed_before_anything_is_looked_at(bench: Bench) -> None:
    """A workload's new interface gets programs at once after its notification. Own and known interfaces do not."""
    agent = bench.agent()
    before, known = set(bench.node.programs), next(iter(bench.node.wiring.links.values()))
    bench.node.born = [Interface(77, "new77", "veth", (7, 2)), Interface(78, "plain78", "dummy"), known]
    bench.node.snapshot = pytest.fail  # a snapshot takes long
    agent.close_newborn()
    assert bench.node.programs == before | {77}
    assert bench.node.row(77) is None
    assert 77 in agent.attachments.interfaces


def test_newborn_interface_that_is_the_node_s_is_opened(bench: Bench) -> None:
    """An interface that was closed when it appeared gets an uplink's row if it has an uplink's address."""
    agent = bench.agent()
    link = Interface(77, "new77", "veth", (7, 2))
    bench.node.born = [link]
    agent.close_newborn()
    wiring = bench.node.wiring
    bench.node.wiring = replace(wiring, links={**wiring.links, 77: link}, uplinks=wiring.uplinks | {77})
    bench.node.news = True
    agent.step()
    row = bench.node.row(77)
    assert row is not None
    assert row.flags & abi.NP_ENDPOINT_UPLINK


def test_search_finds_what_nobody_announces(bench: Bench) -> None:
    """A pod whose address appears inside its namespace, without a notification, is found by a later look."""
    bench.node.wiring = replace(WIRING, host_routes={ip_address("10.0.0.1"): 5})
    agent = bench.agent()
    assert bench.node.row(6) is None
    bench.node.wiring = replace(bench.node.wiring, peer_addresses={(2, 2): (ip_address("10.0.0.2"),)})
    agent.step()
    assert bench.node.row(6) is None
    bench.now_s += SEARCH_S
    agent.step()
    assert bench.node.row(6) is not None


def test_interface_that_goes_takes_its_row(bench: Bench) -> None:
    """A removed interface leaves neither a row nor other state. The next interface of its pod is used."""
    agent = bench.agent()
    bench.node.wiring = replace(WIRING, links={2: UPLINK, 6: DB_LINK}, host_routes={ip_address("10.0.0.2"): 6})
    bench.node.news = True
    agent.step()
    assert bench.node.row(5) is None
    assert set(agent.attachments.interfaces) == {2, 6}
    moved = Interface(7, "cali1", "veth", (1, 2))
    bench.node.wiring = replace(WIRING, links={**WIRING.links, 7: moved}, host_routes={ip_address("10.0.0.1"): 7})
    bench.node.news = True
    agent.step()
    assert bench.node.row(7) is not None


def test_interface_that_turns_out_to_be_the_node_s_is_opened(bench: Bench) -> None:
    """An interface that gets the default route is no longer closed as a workload's."""
    stranger = Interface(9, "wan0", "veth", (7, 2))
    bench.node.wiring = replace(WIRING, links={**WIRING.links, 9: stranger})
    agent = bench.agent()
    assert 9 in bench.node.programs
    assert bench.node.row(9) is None
    bench.node.wiring = replace(bench.node.wiring, uplinks=frozenset({2, 9}))
    bench.node.news = True
    agent.step()
    row = bench.node.row(9)
    assert row is not None
    assert row.flags & abi.NP_ENDPOINT_UPLINK


def test_pod_that_leaves_the_manifests_is_closed(bench: Bench) -> None:
    """Without its manifest, a pod's interface keeps its programs and loses its row."""
    agent = bench.agent()
    bench.write("cluster.yaml", CLUSTER.replace("name: web", "name: gone").replace("10.0.0.1", "10.0.0.99"))
    settle(agent)
    assert bench.node.row(5) is None
    assert 5 in bench.node.programs


def test_change_is_applied_without_an_exchange(bench: Bench) -> None:
    """The removal of a policy changes the maps in force: the row flips, and the generation increases."""
    agent = bench.agent()
    before, generation = bench.node.row(6), agent.enforcement.applier.generation
    bench.remove("policy.yaml")
    settle(agent)
    after = bench.node.row(6)
    assert before is not None
    assert after is not None
    assert before.ingress.number != after.ingress.number
    assert bench.node.exchanges == 1
    assert agent.enforcement.applier.generation >= generation


def test_next_agent_keeps_every_number(bench: Bench) -> None:
    """Endpoints and rules keep their numbers over a restart, whatever was added and removed before."""
    agent = bench.agent()
    bench.write("a.yaml", POLICY.replace("name: db,", "name: a,").replace("5432", "1"))
    settle(agent)
    bench.write("more.yaml", POD.format(name="a", node="here", last=9))
    settle(agent)
    bench.remove("policy.yaml")
    settle(agent)
    rules = {cause: number for number, cause in agent.enforcement.tables.rules.items()}
    numbers = {key: agent.enforcement.tables.endpoints[key].number for key in agent.enforcement.tables.endpoints}
    heir = bench.agent()
    assert {cause: number for number, cause in heir.enforcement.tables.rules.items()} == rules
    assert {key: heir.enforcement.tables.endpoints[key].number for key in heir.enforcement.tables.endpoints} == numbers
    assert dict(heir.enforcement.tables.identities.items()) == dict(agent.enforcement.tables.identities.items())
    assert bench.node.exchanges == 2


def test_lost_ledger_is_made_up_for_from_the_rows_in_force(bench: Bench) -> None:
    """Without the ledger, an endpoint keeps the number in its interface's row, and so its connections."""
    agent = bench.agent()
    bench.write("cluster.yaml", CLUSTER.replace("name: web", "name: aaa"))
    settle(agent)
    numbers = {key: row.number for key, row in agent.enforcement.tables.endpoints.items()}
    assert sorted(numbers.values()) != [1, 2]
    bench.close()
    (bench.home / "numbers").unlink()
    assert {key: row.number for key, row in bench.agent().enforcement.tables.endpoints.items()} == numbers


@pytest.mark.parametrize("number", [2, 1 << 15, 0])
def test_number_that_the_ledger_gives_to_several_is_nobody_s(bench: Bench, number: int) -> None:
    """With a shared number, a pod could send from another pod's address.

    Each keeps its row's number; rules and identities get new ones.
    """
    agent = bench.agent()
    bench.write("cluster.yaml", CLUSTER.replace("name: web", "name: aaa"))
    settle(agent)
    numbers = {key: row.number for key, row in agent.enforcement.tables.endpoints.items()}
    assert len(set(numbers.values())) == len(numbers) > 1
    bench.close()
    ledger = bench.home / "numbers"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    ledger.write_text(
        "".join(json.dumps([*line[:2], number] if isinstance(line, list) else line) + "\n" for line in lines)
    )
    heir = bench.agent()
    assert {key: row.number for key, row in heir.enforcement.tables.endpoints.items()} == numbers
    assert [one.slug for one in bench.ledgers[-1].problems] == (["ledger"] if number else [])
    written = [json.loads(line) for line in ledger.read_text().splitlines()[1:]]
    assert len({(kind, one) for kind, _, one in written}) == len(written)


def test_number_that_the_rows_give_to_several_is_nobody_s(bench: Bench) -> None:
    """The numbers that an agent wrote from such a ledger are not kept by the next agent."""
    agent = bench.agent()
    rows = bench.node.in_force["np_endpoint"].rows
    for name, value in rows.items():
        row = encode.decode_endpoint(value)
        row.number = 77
        rows[name] = bytes(row)
    assert len(rows) > 1
    assert set(bench.node.former_numbers().values()) == {77}
    bench.close()
    (bench.home / "numbers").unlink()
    agent = bench.agent()
    numbers = [row.number for _, row in agent.enforcement.tables.endpoints.items()]
    assert len(set(numbers)) == len(numbers)
    assert 77 not in numbers, "whose it was, nobody knows"


def test_numbers_are_in_the_ledger_before_the_kernel_sees_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an agent dies while it writes a change, the ledger already has every number of the change."""
    agent = bench.agent()
    bench.write("more.yaml", POD.format(name="late", node="here", last=9))
    agent.step()
    monkeypatch.setattr(agent.enforcement.applier, "apply", lambda _change: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        settle(agent)
    late = EndpointKey("Pod", "shop", "late")
    number = agent.enforcement.tables.endpoints[late].number
    assert bench.agent().enforcement.tables.endpoints[late].number == number


def test_numbers_of_what_went_are_given_away_again_only_after_a_restart(bench: Bench) -> None:
    """The ledger forgets removed pods and rules, so that it does not grow forever."""
    agent = bench.agent()
    bench.remove("policy.yaml")
    bench.write("cluster.yaml", NAMESPACE + POD.format(name="web", node="here", last=1))
    settle(agent)
    bench.agent()
    text = (bench.home / "numbers").read_text()
    assert '"web"' in text
    assert '"db"' not in text
    assert "KubernetesNetworkPolicy" not in text


def test_counters_are_kept_with_their_rule_and_zeroed_for_another(bench: Bench) -> None:
    """A rule's counter outlives the agent. A number that is reused for another rule begins at zero."""
    agent = bench.agent()
    counters = bench.node.in_force["np_rule_count"]
    others = [number for number, cause in agent.enforcement.tables.rules.items() if not cause.policy]
    for number in range(1, 100):
        counters.rows[number.to_bytes(4, "little")] = bytes([1] * counters.cell_bytes)
    bench.remove("policy.yaml")
    settle(agent)
    heir = bench.agent()
    bench.write("another.yaml", POLICY.replace("name: db,", "name: another,"))
    settle(heir)
    new = [number for number, cause in heir.enforcement.tables.rules.items() if cause.policy]
    assert {counters.rows[number.to_bytes(4, "little")] for number in new} == {bytes(counters.cell_bytes)}
    kept = [number for number in others if number in dict(heir.enforcement.tables.rules.items())]
    assert kept
    assert {counters.rows[number.to_bytes(4, "little")][0] for number in kept} == {1}


def test_new_generation_after_a_take_over(bench: Bench) -> None:
    """Connections that an earlier agent's policy allowed are judged again."""
    first = bench.agent().enforcement.applier.generation
    assert bench.agent().enforcement.applier.generation != first


def test_limit_refuses_the_change_and_the_next_one_is_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that the compiler rejects is a problem until a later change fits, which then applies everything."""
    agent = bench.agent()
    compiler = agent.enforcement._compiler
    commit = compiler.commit

    def refuse() -> None:
        compiler._staged.clear()
        raise LimitError("too many rules")

    monkeypatch.setattr(compiler, "commit", refuse)
    bench.remove("policy.yaml")
    settle(agent)
    (problem,) = agent.problems
    assert (problem.slug, "too many rules; the previous policy stays in force" in problem.message) == ("limit", True)
    monkeypatch.setattr(compiler, "commit", commit)
    bench.write("more.yaml", POD.format(name="late", node="here", last=9))
    settle(agent)
    assert agent.problems == []
    assert not any(cause.policy for _, cause in agent.enforcement.tables.rules.items())
    assert EndpointKey("Pod", "shop", "late") in agent.enforcement.tables.endpoints


def test_full_map_refuses_the_change_and_the_next_one_starts_over(bench: Bench) -> None:
    """A change without room in the kernel leaves the maps unchanged. The next change is written to new maps."""
    agent = bench.agent()
    bench.node.in_force["np_addr4"].hard_limit = len(bench.node.in_force["np_addr4"].rows)
    before = {name: dict(one.rows) for name, one in bench.node.in_force.items() if name in POLICY_MAPS}
    bench.write("more.yaml", POD.format(name="late", node="here", last=9))
    settle(agent)
    assert [problem.slug for problem in agent.problems] == [MapFullError.slug]
    assert {name: dict(one.rows) for name, one in bench.node.in_force.items() if name in POLICY_MAPS} == before
    bench.write("more.yaml", POD.format(name="later", node="here", last=9))
    settle(agent)
    assert agent.problems == []
    assert bench.node.exchanges == 2
    assert EndpointKey("Pod", "shop", "later") in agent.enforcement.tables.endpoints


def test_broken_manifest_is_a_problem_and_changes_nothing(bench: Bench) -> None:
    """The problem of a file is reported in the parser's words."""
    agent = bench.agent()
    bench.write("policy.yaml", "kind: [")
    settle(agent)
    (problem,) = agent.problems
    assert problem.location.file.endswith("policy.yaml")
    assert agent.enforcement.changes_applied == 1


def test_ambiguous_interface_is_a_problem(bench: Bench) -> None:
    """A pod with several possible interfaces gets none, and a problem."""
    bench.node.wiring = replace(WIRING, host_routes={ip_address("10.0.0.1"): 6, ip_address("10.0.0.2"): 6})
    agent = bench.agent()
    assert bench.node.row(6) is None
    assert {problem.obj for problem in agent.problems} == {"Pod/shop/web", "Pod/shop/db"}


def test_without_a_node_every_workload_is_local(bench: Bench) -> None:
    """An agent without a node's name compiles for all pods, and binds those on its node."""
    agent = bench.agent(AgentSettings(None))
    assert set(agent.enforcement.tables.endpoints) == {WEB, DB, FAR}
    assert set(agent.enforcement.applier.bindings) == {WEB, DB}


def test_interface_that_moves_to_another_namespace_goes_without_the_programs(bench: Bench) -> None:
    """The kernel leaves the programs on it. They are removed, even if an earlier agent did not do so."""
    agent = bench.agent()
    moving = Interface(9, "dev0", "veth", (7, 2))
    bench.node.born.append(moving)
    agent.step()
    assert 9 in bench.node.programs
    bench.node.news, bench.node.gone = True, {9}
    agent.step()
    assert bench.node.programs == {2, 5, 6}
    bench.node.programs.add(9)
    bench.agent()
    assert bench.node.programs == {2, 5, 6}


@pytest.mark.parametrize("plugin", sorted(UNSEEN_TYPES))
def test_pod_of_a_plugin_without_an_interface_on_the_node_is_named(bench: Bench, plugin: str) -> None:
    """Nothing binds the pod, even if a route leads to a workload's interface.

    The error names what is missing and why.
    """
    result = CniResult(DB, frozenset(), frozenset({ip_address("10.0.0.2")}), "eth0", plugin)
    bench.node.wiring = replace(WIRING, results=(result,))
    agent = bench.agent()
    assert set(agent.enforcement.applier.bindings) == {WEB}
    bench.now_s += MISSING_S
    said = {one.slug: one for one in agent.problems if one.obj == str(DB)}
    assert said.keys() == {"not-found", "further-interface"}
    assert all(one.severity == "error" and "NOT enforced" in one.message for one in said.values())


def test_patterns_choose_the_interfaces(bench: Bench) -> None:
    """With patterns, only matching interfaces and those of known pods are closed. All others are the node's own."""
    stranger = Interface(9, "vnet9", "veth", (7, 2))
    bench.node.wiring = replace(WIRING, links={**WIRING.links, 9: stranger})
    bench.agent(AgentSettings("here", interfaces=("nothing*",)))
    rows = {ifindex: bench.node.row(ifindex) for ifindex in bench.node.programs}
    assert {ifindex for ifindex, row in rows.items() if row and row.flags & abi.NP_ENDPOINT_UPLINK} == {2, 9}


def test_flow_names_endpoint_and_rule_even_after_they_went(bench: Bench) -> None:
    """An event that was in the ring while its rule was removed is still reported with the rule."""
    agent = bench.agent()
    rule = next(number for number, cause in agent.enforcement.tables.rules.items() if cause.policy and cause.index < 0)
    event = abi.np_event(
        kind=abi.NP_EVENT_DENY, reason=abi.NP_REASON_POLICY_DENY, endpoint=agent.enforcement.tables.endpoints[DB].number,
        rule=rule, staged_rule=rule, action=abi.NP_ACTION_DENY, staged_action=abi.NP_ACTION_DENY, ip_version=4,
    )  # fmt: skip
    event.source[0:4] = list(ip_address("10.0.0.3").packed)
    event.destination[0:4] = list(ip_address("10.0.0.2").packed)
    bench.remove("policy.yaml")
    agent.step()
    bench.node.events.append(event)
    (flow,) = agent.step()
    assert (flow.endpoint, flow.cause is not None) == (DB, True)
    plain = report.flow(agent, flow)
    assert (plain["source_name"], plain["destination_name"]) == ("Pod/shop/far", "Pod/shop/db")
    assert plain["decided_by"]["policy"] == "KubernetesNetworkPolicy/shop/db"


def learned(number: int) -> abi.np_dns_event:
    """A report that the endpoint with this number learned 203.0.113.5 for api.example.com."""
    event = abi.np_dns_event(endpoint=number, ttl_s=3600, ip_version=4)
    labels = b"\3com\7example\3api\0"
    event.labels[0 : len(labels)] = list(labels)
    event.address[0:4] = list(ip_address("203.0.113.5").packed)
    event.server[0:4] = list(ip_address("10.96.0.10").packed)
    return event


@pytest.mark.parametrize("is_restart", [True, False])
def test_a_name_that_a_gone_pod_learned_is_not_given_to_the_pod_with_its_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, is_restart: bool
) -> None:
    """Reports may wait in the ring while new maps, or a new agent, give the number away again."""
    monkeypatch.setattr(domain_names, "read_jiffies", lambda: 0)
    monkeypatch.setattr(domain_names.DomainNames, "_hertz", lambda _: 250)
    links = {**WIRING.links, 9: Interface(9, "cali9", "veth", (7, 2))}
    bench.node.wiring = replace(WIRING, links=links, host_routes={**WIRING.host_routes, ip_address("10.0.0.9"): 9})
    bench.write("gone.yaml", POD.format(name="gone", node="here", last=8))
    gone, late = (EndpointKey("Pod", "shop", name) for name in ("gone", "late"))
    agent = bench.agent()
    numbers = {key: row.number for key, row in agent.enforcement.tables.endpoints.items()}
    bench.remove("gone.yaml")
    settle(agent)
    bench.write("late.yaml", POD.format(name="late", node="here", last=9))
    reports = [learned(numbers[gone]), learned(numbers[WEB])]
    if is_restart:
        bench.node.dns_events += reports
        agent = bench.agent()
        agent.step()
    else:
        agent.enforcement._is_ahead = True  # as after a change for which the maps had no room
        while late not in agent.enforcement.tables.endpoints:
            bench.node.dns_events += reports
            agent.step()
    assert agent.enforcement.tables.endpoints[late].number == numbers[gone]
    assert late in agent.enforcement.applier.bindings
    assert [key.endpoint for key, _ in agent.domain_names.learned] == [WEB]


def test_report_holds_all_of_it(bench: Bench) -> None:
    """Status, rules and identities are plain values of what is in force."""
    agent = bench.agent()
    state = report.status(agent, bench.node.maps, {"manifests": "m", "pin_dir": "p"})
    assert state["in_force"]
    assert [(one["endpoint"], one["interface"], one["state"]) for one in state["endpoints"]] == [
        ("Pod/shop/db", "cali2", "enforced"), ("Pod/shop/web", "cali1", "enforced"),
    ]  # fmt: skip
    assert [(one["interface"], one["endpoint"]) for one in state["interfaces"]] == [
        ("eth0", None), ("cali1", "Pod/shop/web"), ("cali2", "Pod/shop/db"),
    ]  # fmt: skip
    assert set(state["timeouts"]) == set(STATES)
    assert state["maps"]["np_endpoint"] == {"entries": 2, "size": abi.MAP_SPECS["np_endpoint"].max_entries}
    assert any("KubernetesNetworkPolicy/shop/db" in one["rule"] for one in report.rules(agent, bench.node.maps))
    members = [member for one in report.identities(agent) for member in one["members"]]
    assert {"10.0.0.1", "10.0.0.2", "10.0.0.3"} <= set(members)


def test_report_counts_what_is_skipped(bench: Bench) -> None:
    """A policy beside a Deployment is in force. The Deployment is no endpoint, because its pods come from elsewhere."""
    bench.write(
        "more.yaml",
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n---\n" + POLICY.replace("name: db", "name: more"),
    )
    agent = bench.agent()
    objects = report.status(agent, bench.node.maps, {})["objects"]
    assert (objects["skipped"], objects["policies"]) == ({"apps/v1 Deployment": 1}, 2)
    assert objects["endpoints"] == len(agent.objects.derivation.world.endpoints)
    assert not any(key.name == "d" for key in agent.objects.derivation.world.endpoints)


def test_report_of_connections_says_who_opened_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is the sender of the first packet, whichever side the workload is.

    Left out connections are counted.
    """
    agent = bench.agent()
    number = agent.enforcement.tables.endpoints[DB].number
    rule = next(iter(agent.enforcement.tables.rules))
    key = abi.np_conn4_key(endpoint=number, local_port=5432, remote_port=40000, protocol=6)
    key.local[:], key.remote[:] = (10, 0, 0, 2), (10, 0, 0, 3)
    inwards = abi.np_conn(direction=abi.NP_DIRECTION_INGRESS, state=abi.NP_CONN_TCP_OPEN, rule=rule)
    outwards = abi.np_conn(direction=abi.NP_DIRECTION_EGRESS, state=abi.NP_CONN_TCP_NEW)
    bench.node.maps["np_conn4"].rows[bytes(key)] = bytes(inwards)
    bench.node.maps["np_unreplied4"].rows[bytes(key)] = bytes(outwards)
    found = report.connections(agent, bench.node.maps)
    first, second = found["connections"]
    assert (first["endpoint"], first["source"], first["source_port"]) == (str(DB), "10.0.0.3", 40000)
    assert (first["form"], first["state"], first["rule"]) == (
        "established",
        "tcp-open",
        str(agent.enforcement.tables.rules[rule]),
    )
    assert (second["source"], second["destination_port"]) == ("10.0.0.2", 40000)
    assert (second["form"], second["rule"], found["more"]) == ("unreplied", None, 0)
    monkeypatch.setattr(report, "CONNECTIONS", 1)
    assert report.connections(agent, bench.node.maps) == {"connections": [first], "more": 1}


# --- addresses claimed twice, interfaces reborn, drift, refusals ----------------------------------------------------

TWIN = POD.format(name="twin", node="here", last=2)
TWIN_KEY = EndpointKey("Pod", "shop", "twin")


def _with_twin_link(bench: Bench) -> None:
    """A third interface, to which the database's address now leads."""
    bench.node.wiring = replace(
        WIRING, links={**WIRING.links, 9: Interface(9, "cali9", "veth", (7, 2))},
        host_routes={**WIRING.host_routes, ip_address("10.0.0.2"): 9},
    )  # fmt: skip
    bench.node.news = True


def test_two_pods_with_one_address_are_named_and_the_newer_is_closed(bench: Bench) -> None:
    """A warning names both.

    The older pod keeps its interface. The interface to which the address now leads gets no pod.
    """
    agent = bench.agent()
    bench.write("twin.yaml", TWIN)
    settle(agent)
    (problem,) = agent.problems
    assert problem.severity == "error"
    assert "Pod/shop/db and Pod/shop/twin both claim 10.0.0.2" in problem.message
    assert agent.enforcement.applier.bindings[DB].ifindex == 6
    _with_twin_link(bench)
    agent.step()
    assert agent.enforcement.applier.bindings[DB].ifindex == 6
    assert bench.node.row(9) is None
    assert 9 in bench.node.programs
    bench.node.wiring = replace(bench.node.wiring, links={2: UPLINK, 5: WEB_LINK, 9: bench.node.wiring.links[9]})
    bench.node.news, bench.node.gone = True, {6}
    agent.step()
    assert set(agent.enforcement.applier.bindings) == {WEB}
    bench.remove("cluster.yaml")
    bench.write("cluster.yaml", CLUSTER.replace(POD.format(name="db", node="here", last=2), ""))
    settle(agent)
    assert agent.enforcement.applier.bindings[TWIN_KEY].ifindex == 9
    assert agent.problems == []


def test_dispute_outlives_the_agent(bench: Bench) -> None:
    """The next agent decides the same, and does not give the new interface to the older pod."""
    agent = bench.agent()
    bench.write("a-twin.yaml", TWIN)
    settle(agent)
    _with_twin_link(bench)
    agent = bench.agent()
    assert agent.enforcement.applier.bindings[DB].ifindex == 6
    assert any("Pod/shop/db had it first" in problem.message for problem in agent.problems)


def test_interface_reborn_under_its_number_is_a_stranger(bench: Bench) -> None:
    """An interface that was removed and created again between two looks gets programs, without the former pod's row."""
    agent = bench.agent()
    bench.node.wiring = replace(
        WIRING, links={**WIRING.links, 6: Interface(6, "other", "veth", (8, 2))},
        host_routes={ip_address("10.0.0.1"): 5},
    )  # fmt: skip
    bench.node.news, bench.node.gone = True, {6}
    bench.node.programs.discard(6)
    bench.node.rows_when_attached.clear()
    agent.step()
    assert bench.node.rows_when_attached == {6: False}
    assert 6 in bench.node.programs
    assert bench.node.row(6) is None
    assert bench.node.prunings == 1


def test_lost_news_are_made_up_for(bench: Bench) -> None:
    """If it is unknown what was removed, interfaces without our programs count as new."""
    agent = bench.agent()
    bench.node.news, bench.node.gone = True, None
    bench.node.programs.discard(6)
    agent.step()
    assert bench.node.programs == {2, 5, 6}
    assert bench.node.row(6) is not None


def test_row_that_something_else_changed_is_put_back(bench: Bench) -> None:
    """Missing, changed and foreign rows are corrected in one round and counted. Open connections are judged again."""
    agent = bench.agent()
    before = {name: dict(one.rows) for name, one in bench.node.in_force.items() if name in POLICY_MAPS}
    generation = agent.enforcement.applier.generation
    maps = bench.node.in_force
    del maps["np_addr4"].rows[ip_address("10.0.0.1").packed]
    maps["np_addr4"].rows[ip_address("10.0.0.77").packed] = bytes(8)
    (verdict, *_) = [key for key, value in maps["np_verdict"].rows.items() if any(value)]
    maps["np_verdict"].rows[verdict] = bytes(len(maps["np_verdict"].rows[verdict]))
    del maps["np_endpoint"].rows[encode.endpoint_key(5)]
    bench.now_s += ROUND_S
    agent.step()
    after = {name: dict(one.rows) for name, one in bench.node.in_force.items() if name in POLICY_MAPS}
    assert after == before
    assert agent.repair.drift.counts == {"row": 4}
    assert {drift.was for _, drift in agent.repair.drift.recent} == {"missing", "foreign"}
    assert agent.enforcement.applier.generation > generation


@pytest.mark.parametrize("compared", range(1, 12))
def test_endpoint_that_is_bound_during_a_round_keeps_its_rows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, compared: int
) -> None:
    """This holds whenever it is bound, without a second encoding of the other rows."""
    agent = bench.agent()
    audit, applier = agent.enforcement.audit, agent.enforcement.applier
    assert audit is not None
    encoded: list[EndpointKey] = []
    elements = applier.endpoint_elements
    monkeypatch.setattr(applier, "endpoint_elements", lambda key: [encoded.append(key), elements(key)][1])
    audit.step(compared)
    binding = replace(applier.bindings[WEB], ifindex=9)
    applier.bind(WEB, binding)
    while not audit.is_between_rounds:
        assert audit.step(1) == []
    assert bench.node.row(9) is not None
    assert encoded.count(DB) == 1


def test_configuration_that_something_else_changed_is_put_back(bench: Bench) -> None:
    """After a foreign change of the generation, it is one above the former one."""
    agent = bench.agent()
    generation = agent.enforcement.applier.generation
    bench.node.in_force["np_config"].rows[bytes(4)] = bytes(abi.np_config(generation=99))
    bench.now_s += ROUND_S
    agent.step()
    assert agent.enforcement.applier.generation == generation + 1
    assert agent.repair.drift.counts == {"configuration": 1}


def test_programs_that_something_else_removed_are_put_back(bench: Bench) -> None:
    """A missing program is restored at the next audit, and reported in the status."""
    agent = bench.agent()
    bench.node.programs.discard(5)
    bench.now_s += AUDIT_S
    agent.step()
    assert bench.node.programs == {2, 5, 6}
    assert report.status(agent, bench.node.maps, {})["drift"] == {
        "put_back": {"program": 1},
        "rounds": 0,
        "recent": [{"kind": "program", "where": "interface 5", "was": "missing"}],
    }


def test_refused_change_is_tried_again_when_memory_may_be_back(bench: Bench) -> None:
    """A change without kernel memory is named with its map, and applied later without a request."""
    agent = bench.agent()
    peers = bench.node.in_force["np_addr4"]
    peers.hard_limit = len(peers.rows)
    bench.write("late.yaml", POD.format(name="late", node="there", last=9))
    settle(agent)
    (problem,) = agent.problems
    assert "np_addr4" in problem.message
    assert problem.obj == "Pod/shop/late"
    refused = report.status(agent, bench.node.maps, {})["refused"]
    assert refused == {
        "changes": 1, "by_map": {"np_addr4": 1}, "map": "np_addr4", "waiting": ["Pod/shop/late"],
    }  # fmt: skip
    agent.step()
    assert bench.node.exchanges == 1
    bench.now_s += RETRY_S
    agent.step()
    assert agent.problems == []
    assert ip_address("10.0.0.9").packed in bench.node.in_force["np_addr4"].rows
