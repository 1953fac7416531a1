# SPDX-License-Identifier: Apache-2.0
"""The assignment of interfaces, against root in a pod's network namespace: added addresses, forged routers, node ends.

And the allowed counterparts: a node that is a container, a pod that is created again, a plugin's result, an agent that
starts late.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, POD, Scene
from border_scene import (
    LAST,
    NARROW,
    OPEN_PORT,
    address_of,
    border,
    framed,
    ip,
    port_of,
    put,
    say,
    station,
)
from scapy.layers.inet6 import ICMPv6ND_RA, ICMPv6NDOptPrefixInfo, ICMPv6NDOptSrcLLAddr, IPv6

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import UDP

pytestmark = pytest.mark.netns

STRANGER = "stranger"
"""A pod that no manifest names."""


def owners(state: dict[str, Any]) -> dict[str, str | None]:
    """The endpoint of each interface."""
    return {one["interface"]: one["endpoint"] for one in state["interfaces"]}


def slugs(state: dict[str, Any]) -> dict[str, str]:
    """The message of each kind of problem."""
    return {one["slug"]: one["message"] for one in state["problems"]}


def plug(lab: Lab, name: str, *, address: str | None = None, master: str | None = None, end: str | None = None) -> str:
    """Create a veth pair into a new namespace. ``name``: of the node's end. ``end``: the address of the node's end."""
    namespace = f"{lab.token}-{name}"
    lab.record(namespaces=[namespace])
    ip(lab, NODE, f"netns add {namespace}", f"link add {name} type veth peer name eth0 netns {namespace}")
    if master is not None:
        ip(lab, NODE, f"link set {name} master {master}")
    if end is not None:
        ip(lab, NODE, f"address add {end} dev {name}")
    ip(lab, NODE, f"link set {name} up", f"-n {namespace} link set eth0 up")
    if address is not None:
        ip(lab, NODE, f"-n {namespace} address add {address} dev eth0")
    return namespace


def unplug(lab: Lab, name: str) -> None:
    ip(lab, NODE, f"link del {name}", f"netns del {lab.token}-{name}")


@pytest.fixture(scope="module")
def bridged_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with border(tmp_path_factory.mktemp("identity"), is_bridged=True) as one:
        yield one


@pytest.fixture
def bridged(bridged_scene: Scene) -> Scene:
    (bridged_scene.manifests / "late.yaml").unlink(missing_ok=True)
    put(bridged_scene, NARROW)
    return bridged_scene


def test_neighbour_s_address_harms_only_who_takes_it(bridged: Scene) -> None:
    """A pod that adds a neighbour's address changes neither its own identity nor the neighbour's."""
    lab = bridged.lab
    before = owners(bridged.state())
    assert before[port_of("db")] == "Pod/shop/db"
    ip(lab, "shop/web", f"address del {address_of('web')}/24 dev eth0", f"address add {address_of('db')}/24 dev eth0")
    try:
        bridged.kill()
        bridged.start()
        state = bridged.await_status(lambda one: bool(one["interfaces"]), "the next agent has looked")
        assert owners(state) == before
        assert bridged.reached(Attempt("shop/other", ip_address(address_of("db")), UDP, OPEN_PORT)) == [True]
    finally:
        ip(lab, "shop/web", f"address del {address_of('db')}/24 dev eth0",
           f"address add {address_of('web')}/24 broadcast 10.1.0.255 dev eth0")  # fmt: skip


def test_stranger_becomes_no_pod_that_is_to_come(bridged: Scene) -> None:
    """An unknown interface stays closed, whatever address replaces its first one.

    The pod that is created gets its own interface.
    """
    lab = bridged.lab
    namespace = plug(lab, STRANGER, address="10.1.0.77/24", master="br0")
    try:
        bridged.await_status(lambda one: STRANGER in owners(one), "the new interface is under policy")
        seen(bridged, STRANGER)
        ip(
            lab,
            NODE,
            f"-n {namespace} address del 10.1.0.77/24 dev eth0",
            f"-n {namespace} address add 10.1.0.9/24 dev eth0",
        )
        bridged.write("late.yaml", POD.format(name="late", node=NODE, last=9))
        state = bridged.await_status(lambda one: "not-found" in slugs(one), "the pod is missed")
        assert owners(state)[STRANGER] is None
        assert "NOT enforced" in slugs(state)["not-found"]
        assert STRANGER in slugs(state)["not-found"]
        plug(lab, "latecomer", address="10.1.0.9/24", master="br0")
        state = bridged.await_status(lambda one: owners(one).get("latecomer") == "Pod/shop/late", "the pod has its own")
        assert owners(state)[STRANGER] is None
        (row,) = (one for one in state["endpoints"] if one["endpoint"] == "Pod/shop/late")
        assert row["evidence"] == "address (weak)"
        unplug(lab, "latecomer")
        # A pod of a StatefulSet is created again with its name and address.
        plug(lab, "again", address="10.1.0.9/24", master="br0")
        bridged.await_status(
            lambda one: owners(one).get("again") == "Pod/shop/late", "the pod that came again has its own"
        )
        unplug(lab, "again")
    finally:
        unplug(lab, STRANGER)


def test_first_address_that_contradicts_makes_nobody_of_a_pod_that_is_to_come(bridged: Scene) -> None:
    """The interface first has an unknown IPv4 address, and the IPv6 address of a pod that does not exist yet."""
    lab = bridged.lab
    namespace = plug(lab, STRANGER, master="br0")
    try:
        bridged.await_status(lambda one: STRANGER in owners(one), "the new interface is under policy")
        ip(
            lab,
            NODE,
            f"-n {namespace} link set eth0 down",
            f"-n {namespace} address add 10.1.0.66/24 dev eth0",
            f"-n {namespace} address add fd00:1::9/64 dev eth0 nodad",
            f"-n {namespace} link set eth0 up",
        )
        seen(bridged, STRANGER)
        bridged.write("late.yaml", POD.format(name="late", node=NODE, last=9))
        state = bridged.await_status(lambda one: "not-found" in slugs(one), "the pod is missed")
        assert owners(state)[STRANGER] is None
    finally:
        unplug(lab, STRANGER)


def seen(scene: Scene, name: str) -> None:
    """Wait until the agent has stored the first addresses behind an interface."""

    def is_kept(_state: dict[str, Any]) -> bool:
        kept = json.loads((scene.state_dir / "interfaces").read_text())["interfaces"]
        return any(one["name"] == name and one["first"] for one in kept.values())

    scene.await_status(is_kept, f"the first address behind {name} is kept")


def test_plugin_s_result_binds_what_addresses_do_not(tmp_path: Path) -> None:
    """The plugin's result on the node counts from the start. A further interface that no program sees is reported."""
    results = tmp_path / "results"
    results.mkdir(mode=0o700)

    def write(name: str, pod: str, inside: str, plugin: str, interfaces: list[dict[str, str]], ips: list[str]) -> None:
        config = base64.b64encode(json.dumps({"plugins": [{"type": plugin}]}).encode()).decode()
        document = {
            "kind": "cniCacheV1", "config": config, "ifName": inside, "cniArgs": [["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", pod]],
            "result": {"interfaces": interfaces, "ips": [{"address": one} for one in ips]},
        }  # fmt: skip
        path = results / name
        path.write_text(json.dumps(document))
        path.chmod(0o600)

    for pod, last in LAST.items():
        write(f"net-{pod}-eth0", pod, "eth0", "bridge", [{"name": "br0"}, {"name": port_of(pod)}, {"name": "eth0", "sandbox": "x"}],
              [f"10.1.0.{last}/24"])  # fmt: skip

    def strip(lab: Lab) -> None:
        ip(lab, "shop/other", "address del 10.1.0.3/24 dev eth0")  # nothing at its other end identifies the pod
        ip(lab, "shop/other", "-6 address flush dev eth0 scope global")

    with border(tmp_path, is_bridged=True, options=("--cni-results", str(results)), prepare=strip) as scene:
        state = scene.await_status(
            lambda one: {row["evidence"] for row in one["endpoints"]} == {"cni"}, "all are known by their results"
        )
        assert owners(state)[port_of("other")] == "Pod/shop/other"
        write("net-web-net1", "web", "net1", "macvlan", [{"name": "net1", "sandbox": "x"}], ["10.9.0.1/24"])
        ip(scene.lab, NODE, "link add news0 type bridge")
        state = scene.await_status(lambda one: "further-interface" in slugs(one), "the further interface is told")
        assert "NOT enforced on its interface net1" in slugs(state)["further-interface"]
        assert not state["in_force"]


def test_router_that_a_pod_plays_takes_no_program_off(tmp_path: Path) -> None:
    """On a node that accepts router advertisements, a pod's default route or address makes its interface no uplink."""

    def accept(lab: Lab) -> None:
        for name in (port_of("web"), "all"):
            lab.prober.write_settings(NODE, [(f"ipv6/conf/{name}/accept_ra", "2"), (f"ipv6/conf/{name}/autoconf", "1")])

    with border(tmp_path, prepare=accept) as scene:
        lab, web = scene.lab, station(scene.lab, "web")
        before = owners(scene.state())
        announcement = (
            IPv6(src=web.link_local, dst="ff02::1", hlim=255)
            / ICMPv6ND_RA(routerlifetime=1800)
            / ICMPv6NDOptPrefixInfo(prefix="2001:db8:77::", prefixlen=64, validlifetime=3600, preferredlifetime=3600)
            / ICMPv6NDOptSrcLLAddr(lladdr=web.mac)
        )
        say(lab, web.host, framed(announcement, web.mac, "33:33:00:00:00:01"))
        # The program drops the advertisement. These commands do what an accepted one would do.
        ip(lab, NODE, f"-6 route add default via {web.link_local} dev {port_of('web')} proto ra metric 9999",
           f"address add 2001:db8:77::1/64 dev {port_of('web')} nodad valid_lft 3600 preferred_lft 3600")  # fmt: skip
        scene.write("marker.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: marker}\n")
        state = scene.await_status(lambda one: one["changes_applied"] > 0, "the agent has looked")
        assert owners(state) == before
        scene.kill()
        scene.start()
        assert owners(scene.state()) == before
        assert {"ingress", "egress"} == scene.attached()[port_of("web")]


def test_unknown_pod_s_router_opens_nothing(routed: Scene) -> None:
    """An unknown interface stays closed, even if its pod announced a default route and a prefix."""
    lab = routed.lab
    plug(lab, "router0", address="10.1.9.9/24")
    try:
        routed.await_status(lambda one: "router0" in owners(one), "the new interface is under policy")
        ip(lab, NODE, "-6 route add default via fe80::99 dev router0 proto ra metric 9999",
           "address add 2001:db8:78::1/64 dev router0 nodad valid_lft 3600 preferred_lft 3600")  # fmt: skip
        plug(lab, "after")
        state = routed.await_status(lambda one: "after" in owners(one), "the agent has looked again")
        assert {one["interface"]: one["state"] for one in state["interfaces"]}["router0"] == "closed"
        unplug(lab, "after")
    finally:
        unplug(lab, "router0")


@pytest.mark.parametrize("end", ["10.1.7.1/24", "10.1.7.8/31"])
def test_node_s_end_with_a_prefix_leaves_no_pod_open(routed: Scene, end: str) -> None:
    """A node's end has an address with the pod's prefix.

    The pod behind it is enforced; before it is known, it is closed and reported.
    """
    lab = routed.lab
    own = "10.1.7.9"
    plug(lab, "wide", address=f"{own}/{end.partition('/')[2]}", end=end)
    try:
        state = routed.await_status(lambda one: "wide" in owners(one), "the new interface is under policy")
        assert owners(state)["wide"] is None
        state = routed.await_status(lambda one: "interface-doubt" in slugs(one), "the doubt is told")
        assert "wide" in slugs(state)["interface-doubt"]
        assert {one["interface"]: one["state"] for one in state["interfaces"]}["wide"] == "closed"
        routed.write("late.yaml", POD.format(name="late", node=NODE, last=9).replace("10.1.0.9", own))
        state = routed.await_status(lambda one: owners(one).get("wide") == "Pod/shop/late", "the pod is known")
        assert "interface-doubt" not in slugs(state)
    finally:
        (routed.manifests / "late.yaml").unlink(missing_ok=True)
        unplug(lab, "wide")


def late_pod(name: str, last: int) -> str:
    """A pod behind a node's end with the prefix 10.1.7.0/24."""
    return POD.format(name=name, node=NODE, last=last).replace(f"10.1.0.{last}", f"10.1.7.{last}")


def test_later_address_in_the_node_s_prefix_makes_nobody_of_a_pod_that_is_to_come(routed: Scene) -> None:
    """An address that a stranger takes in place of its first one does not count.

    The pod gets its own pair by its first address.
    """
    lab = routed.lab
    namespace = plug(lab, STRANGER, address="10.1.7.77/24", end="10.1.7.1/24")
    try:
        routed.await_status(lambda one: STRANGER in owners(one), "the new interface is under policy")
        seen(routed, STRANGER)
        ip(
            lab,
            NODE,
            f"-n {namespace} address del 10.1.7.77/24 dev eth0",
            f"-n {namespace} address add 10.1.7.9/24 dev eth0",
        )
        routed.write("late.yaml", late_pod("late", 9))
        state = routed.await_status(lambda one: "not-found" in slugs(one), "the pod is missed")
        assert owners(state)[STRANGER] is None
        plug(lab, "latecomer", address="10.1.7.9/24", end="10.1.7.1/24")
        state = routed.await_status(lambda one: owners(one).get("latecomer") == "Pod/shop/late", "the pod has its own")
        assert owners(state)[STRANGER] is None
        (row,) = (one for one in state["endpoints"] if one["endpoint"] == "Pod/shop/late")
        assert row["evidence"] == "address (weak)"
        unplug(lab, "latecomer")
    finally:
        unplug(lab, STRANGER)


def test_bound_pod_closes_no_pod_that_is_to_come(routed: Scene) -> None:
    """A pod that takes the address of a future pod keeps its identity, and the future pod gets its own interface."""
    lab = routed.lab
    routed.write("late.yaml", late_pod("late", 9))
    namespace = plug(lab, "wide", address="10.1.7.9/24", end="10.1.7.1/24")
    try:
        routed.await_status(lambda one: owners(one).get("wide") == "Pod/shop/late", "the pod is known")
        ip(
            lab,
            NODE,
            f"-n {namespace} address del 10.1.7.9/24 dev eth0",
            f"-n {namespace} address add 10.1.7.10/24 dev eth0",
            f"-n {namespace} link set eth0 down",
            f"-n {namespace} link set eth0 up",
        )
        routed.write("late.yaml", late_pod("late", 9) + late_pod("vic", 10))
        plug(lab, "vic0", address="10.1.7.10/24")
        state = routed.await_status(lambda one: owners(one).get("vic0") == "Pod/shop/vic", "the other pod has its own")
        assert owners(state)["wide"] == "Pod/shop/late"
        unplug(lab, "vic0")
    finally:
        unplug(lab, "wide")


@pytest.fixture(scope="module")
def routed_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with border(tmp_path_factory.mktemp("routed")) as one:
        yield one


@pytest.fixture
def routed(routed_scene: Scene) -> Scene:
    (routed_scene.manifests / "late.yaml").unlink(missing_ok=True)
    put(routed_scene, NARROW)
    return routed_scene


def test_status_tells_own_interfaces_from_closed_ones(routed: Scene) -> None:
    """An uplink with programs does not count as closed. Each pod lists the policies that isolate it."""
    state = routed.state()
    assert {one["interface"]: one["state"] for one in state["interfaces"]} == {
        **{port_of(name): "enforced" for name in LAST}, "eth0": "own",
    }  # fmt: skip
    (web,) = (one for one in state["endpoints"] if one["endpoint"] == "Pod/shop/web")
    policy = "KubernetesNetworkPolicy/shop/narrow"
    assert web["isolated_by"] == {"ingress": [policy], "egress": [policy]}
    assert web["evidence"] == "name"
    text = routed.ctl("status", "--state-dir", str(routed.state_dir)).stdout
    before, header, table = text.partition("INTERFACE")
    assert header, before
    assert "the node's own" in table
    assert "closed" not in table
