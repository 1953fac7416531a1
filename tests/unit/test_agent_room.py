# SPDX-License-Identifier: Apache-2.0
"""A change that does not fit is rejected before anything is made or written, for every table, on a node in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from test_agent_core import CLUSTER, POD, POLICY, WIRING, Bench, settle

from netpol_ebpf.agent.core import Agent
from netpol_ebpf.agent.dns_servers import parse_dns_server
from netpol_ebpf.agent.node import POLICY_MAPS
from netpol_ebpf.agent.rejected import MAPS_BY_LIMIT, RETRY_S
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.agent.wiring import Interface
from netpol_ebpf.apply.applier import ARRAYS
from netpol_ebpf.apply.encode import LocalFlag, Meaning
from netpol_ebpf.errors import LimitError, MapFullError
from netpol_loader.tables.buckets import SIZED

FILLED = sorted(POLICY_MAPS.intersection(SIZED) - {"np_ep_cache"})
"""All but what the program writes itself, and what has a row for every hash."""
PREFIXES = """'["198.51.100.0/24", "2001:db8::/64"]'"""
SENDER = (
    POD.format(name="late", node="here", last=9)
    .replace("name: late,", f"name: late, annotations: {{cni.projectcalico.org/allowedSourcePrefixes: {PREFIXES}}},", 1)
    .replace("{ip: 10.0.0.9}", '{ip: 10.0.0.9}, {ip: "fd00::9"}')
)
BLOCKS = POLICY.replace("name: db,", "name: blocks,").replace(
    "{podSelector: {matchLabels: {app: web}}}", '{ipBlock: {cidr: 192.0.2.0/24}}, {ipBlock: {cidr: "2001:db8:1::/48"}}'
)
HOST = "apiVersion: projectcalico.org/v3\nkind: HostEndpoint\nmetadata: {name: h}\nspec: {node: here, interfaceName: eth0}\n"
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: s, namespace: shop}
spec: {clusterIPs: [10.96.0.1, "fd00:96::1"], ports: [{port: 80}]}
"""
NAMES = """\
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: names, namespace: shop}
spec:
  selector: all()
  types: [Egress]
  egress: [{action: Allow, protocol: TCP, destination: {domains: ["*.example.com", www.example.net], ports: [443]}}]
"""
SETTINGS = AgentSettings(
    "here", borrow_sources=True, dns_servers=tuple(map(parse_dns_server, ("192.0.2.53", "2001:db8::53")))
)
ADDRESSES = {ip_address("192.0.2.1"): 2, ip_address("2001:db8::1"): 2}
MEANINGS = {address: Meaning(LocalFlag.OWN, ifindex) for address, ifindex in ADDRESSES.items()}
NETS = frozenset({ip_network("198.18.0.0/24"), ip_network("2001:db8:18::/48")})
VXLAN = Interface(8, "vxlan0", "vxlan", takes=((17, 4789),))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    bench.write("cluster.yaml", CLUSTER)
    bench.write("policy.yaml", POLICY)
    bench.node.wiring = replace(
        WIRING, addresses=ADDRESSES, meanings=MEANINGS, local_nets=NETS,
        host_routes={**WIRING.host_routes, ip_address("10.0.0.9"): 7},
        links={**WIRING.links, 8: VXLAN, 7: replace(WIRING.links[6], ifindex=7, name="cali3", peer=(3, 2))},
    )  # fmt: skip
    yield bench
    bench.close()


def content(bench: Bench) -> Mapping[str, Mapping[bytes, bytes]]:
    """The content of all maps."""
    return {name: dict(one.rows) for name, one in bench.node.in_force.items()}


def needed(bench: Bench, name: str) -> int:
    """The smallest sufficient size of a map for what is in force."""
    rows = bench.node.in_force[name].rows
    return max(int.from_bytes(key, "little") for key in rows) + 1 if name in ARRAYS else len(rows)


@pytest.mark.parametrize("name", FILLED)
def test_new_set_of_maps_is_not_made_in_vain(bench: Bench, name: str) -> None:
    """With room for all rows but one in any of its tables the agent refuses by name; with room for all it starts."""
    for file, text in {"sender": SENDER, "blocks": BLOCKS, "host": HOST, "service": SERVICE, "names": NAMES}.items():
        bench.write(f"{file}.yaml", text)
    assert bench.agent(SETTINGS).problems == []
    need, before, node = needed(bench, name), content(bench), bench.node
    assert need
    node.sizes = {name: need - 1}
    with pytest.raises((MapFullError, LimitError)) as caught:
        bench.agent(SETTINGS)
    error = caught.value
    assert name in (error.map_name if isinstance(error, MapFullError) else MAPS_BY_LIMIT[error.limit])
    assert node.renewals == 1
    assert content(bench) == before
    node.sizes = {name: need * 2 if name == "np_verdict" else need}  # verdicts are in ranges that may still grow
    assert bench.agent(SETTINGS).problems == []
    assert needed(bench, name) == need


def refused(bench: Bench, agent: Agent, full: str) -> None:
    """Check that the agent reports the full map, changed nothing, and changes nothing at the next step."""
    for retry in range(3):
        assert [(one.slug, full in one.message) for one in agent.problems] == [("map-full", True)], retry
        assert agent.rejected.by_map == {full: retry + 1}
        assert bench.node.renewals == 1
        bench.now_s = agent.rejected.retry_at_s or 0
        agent.step()


@pytest.mark.parametrize(
    ("full", "size", "text"),
    [
        ("np_host", 0, HOST),
        ("np_vip4", 0, SERVICE),
        ("np_vip6", 0, SERVICE),
    ],
)
def test_change_of_the_node_s_own_interfaces_is_refused_whole(bench: Bench, full: str, size: int, text: str) -> None:
    """No row, program or flag, and no new set of maps, at once or later.

    Other parts of the change are not applied either.
    """
    agent = bench.agent()
    before, programs = content(bench), set(bench.node.programs)
    bench.node.in_force[full].max_entries = size
    bench.write("excess.yaml", text + "---\n" + BLOCKS)
    settle(agent)
    refused(bench, agent, full)
    assert content(bench) == before
    assert bench.node.programs == programs
    bench.write("excess.yaml", BLOCKS)
    settle(agent)
    assert agent.problems == []
    assert any("blocks" in str(cause) for _, cause in agent.enforcement.tables.rules.items())


def test_endpoint_that_does_not_fit_is_found_before_maps_are_made(bench: Bench) -> None:
    """New rows of a workload count if maps must be made for another reason."""
    agent = bench.agent(SETTINGS)
    bench.node.in_force["np_addr4"].hard_limit = len(bench.node.in_force["np_addr4"].rows)
    bench.node.sizes = {"np_source4": 0}
    bench.write("sender.yaml", SENDER)
    settle(agent)
    assert agent.rejected.full == "np_addr4"
    bench.now_s += RETRY_S
    agent.step()
    assert agent.rejected.full == "np_source4"
    assert bench.node.renewals == 1


def test_larger_map_that_the_next_agent_asks_for_is_room(bench: Bench) -> None:
    """The requested size counts, and not the size of an earlier agent's map."""
    bench.node.in_force["np_addr4"].max_entries = 3
    agent = bench.agent()
    bench.write("sender.yaml", SENDER)
    settle(agent)
    assert agent.rejected.full == "np_addr4"
    with pytest.raises(MapFullError, match="np_addr4 has room for 3 rows; the change needs 4"):
        bench.agent()
    bench.node.sizes = {"np_addr4": 4}
    assert bench.agent().problems == []
    assert bench.node.in_force["np_addr4"].max_entries == 4
