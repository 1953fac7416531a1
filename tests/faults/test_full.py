# SPDX-License-Identifier: Apache-2.0
"""If a map of policy is full, the change is rejected and named, the previous policy stays, and freed room is used.

If a table that packets fill is full, no packet passes that policy denies, and none is lost that policy allows, except
later fragments.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import frames
import pytest
from agent_scene import DB_POLICY, NODE, OTHER_ALLOWED, POD, Scene, scene_in, to_db, wait_for
from readback import rows

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import PARENT_MAC, TCP, IPAddress

pytestmark = pytest.mark.netns

SIZES = {
    "np_addr4": 12, "np_addr6": 10, "np_cidr4": 4, "np_cidr6": 4, "np_peer_class": 20, "np_l4_col": 5, "np_verdict": 150,
    "np_rule": 110, "np_endpoint": 4, "np_source4": 2, "np_source6": 2,
    "np_conn4": 32, "np_conn6": 32, "np_frag4": 16, "np_frag6": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    options = [word for name, size in SIZES.items() for word in ("--map-size", f"{name}={size}")]
    home = tmp_path_factory.mktemp("agent") / "small"
    with scene_in(lab, home, options=("--allow-source-prefixes", *options)) as one:
        yield one


@pytest.fixture
def scene(small_scene: Scene) -> Scene:
    small_scene.reset()
    return small_scene


def policy(name: str, spec: str) -> str:
    return f"""\
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name}, namespace: shop}}
spec: {spec}
"""


def pods(ips: list[str]) -> str:
    far = [POD.format(name=f"far{n}", node="node-2", last=0) for n in range(len(ips))]
    return "".join(
        text.replace('[{ip: 10.1.0.0}, {ip: "fd00:1::0"}]', f'[{{ip: "{ip}"}}]')
        for text, ip in zip(far, ips, strict=True)
    )


def blocks(*nets: str) -> str:
    peers = ", ".join(f'{{ipBlock: {{cidr: "{net}"}}}}' for net in nets)
    return policy("excess", f"{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{from: [{peers}]}}]}}")


def borrowing(*nets: str) -> str:
    """A policy by which one of the pods may send from other addresses."""
    text = POD.format(name="late", node=NODE, last=9)
    quoted = ",".join(f'"{net}"' for net in nets)
    return text.replace(
        "labels:", f"annotations: {{cni.projectcalico.org/allowedSourcePrefixes: '[{quoted}]'}}, labels:"
    )


def peers(own: str, number: int, ingress: str, egress: str) -> str:
    """Peers that differ in each direction, because sets that distinguish the same peers would share their classes."""
    ways = (
        f"{way}: [{{{side}: [{{podSelector: {{matchExpressions: [{{key: app, operator: In, values: [{names}]}}]}}}}]}}]"
        for way, side, names in (("ingress", "from", ingress), ("egress", "to", egress))
    )
    return policy(
        f"excess{number}",
        f"{{podSelector: {{matchLabels: {{app: {own}}}}}, policyTypes: [Ingress, Egress], {', '.join(ways)}}}",
    )


PEERS = "".join(
    peers(own, 4 * which + number, ingress, egress)
    for which, own in enumerate(("web", "other"))
    for number, (ingress, egress) in enumerate(
        (("web", "web, db"), ("db", "db, other"), ("other", "web, other"), ("far", "far"))[which:]
    )
)


def rules(*texts: str) -> str:
    return policy("excess", f"{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{', '.join(texts)}]}}")


PORTS = rules(*(f"{{ports: [{{port: {port}}}]}}" for port in range(1000, 1090)))
VERDICTS = rules(*(
    f"{{from: [{{podSelector: {{matchLabels: {{app: {('web', 'db', 'other', 'far')[port % 4]}}}}}}}], ports: [{{port: {port}}}]}}"
    for port in range(100, 150)
))  # fmt: skip
RULES = rules(*["{ports: [{port: 80}]}"] * 120)
EXCESS = {
    "np_addr4": pods([f"10.2.0.{n}" for n in range(1, 10)]),
    "np_addr6": pods([f"fd00:2::{n}" for n in range(1, 10)]),
    "np_cidr4": blocks(*(f"198.51.{n}.0/24" for n in range(5))),
    "np_cidr6": blocks(*(f"2001:db8:{n}::/48" for n in range(5))),
    "np_peer_class": PEERS,
    "np_l4_col": PORTS,
    "np_verdict": VERDICTS,
    "np_rule": RULES,
}


@pytest.mark.parametrize("name", EXCESS)
def test_change_that_does_not_fit(scene: Scene, name: str) -> None:
    """The change is rejected as a whole.

    Status names map and object. A change that fits is applied without a restart.
    """
    held = scene.lab.prober.hold(to_db("shop/web"))
    assert held is not None
    before = scene.state()["refused"]["changes"]
    scene.write("excess.yaml", EXCESS[name] + "---\n" + OTHER_ALLOWED)
    state = scene.await_status(lambda state: not state["in_force"], "the change is refused")
    (problem,) = state["problems"]
    assert problem["file"].endswith("excess.yaml") or problem["object"].startswith("Pod/shop/far"), problem
    assert "the previous policy stays in force without" in problem["message"]
    assert state["refused"]["changes"] > before
    assert any(name in full for full in state["refused"]["by_map"]), state["refused"]
    assert any("excess" in one or "far" in one for one in state["refused"]["waiting"])
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    scene.write("excess.yaml", OTHER_ALLOWED)
    scene.await_status(lambda state: state["in_force"], "what fits is in force")
    scene.await_reached(to_db("shop/other"), expected=True)
    assert held.exchange(5.0)
    held.close()


def test_refusal_outlives_the_agent(scene: Scene) -> None:
    """An agent that starts with manifests that do not fit keeps the policy in force, and its error says why it ends."""
    scene.write("excess.yaml", EXCESS["np_cidr4"] + "---\n" + OTHER_ALLOWED)
    scene.await_status(lambda state: not state["in_force"], "the change is refused")
    scene.kill()
    done = scene.lab.run(NODE, scene.command(), check=False)
    assert done.returncode == 5
    assert "np_cidr4" in done.stderr
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]


@pytest.mark.parametrize(("name", "nets"), [("np_source4", "198.51.{}.0/24"), ("np_source6", "2001:db8:{}::/48")])
def test_sources_of_one_pod_do_not_fit(scene: Scene, name: str, nets: str) -> None:
    """The pod whose prefixes do not fit stays closed and is named.

    The other pods do not change. Freed room is used at once.
    """
    scene.write("db.yaml", DB_POLICY)
    scene.write("late.yaml", borrowing(*(nets.format(n) for n in range(3))))
    state = scene.await_status(lambda state: not state["in_force"], "the pod is refused")
    (problem,) = state["problems"]
    assert problem["object"] == "Pod/shop/late"
    assert name in problem["message"]
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    (scene.manifests / "late.yaml").unlink()
    scene.await_status(lambda state: state["in_force"], "without it all is well")


def test_one_endpoint_too_many(scene: Scene) -> None:
    """The endpoint that does not fit stays closed and is named. It opens when another endpoint is removed."""
    scene.write("late.yaml", POD.format(name="late", node=NODE, last=9))
    state = scene.await_status(lambda state: not state["in_force"], "the endpoint is refused")
    (problem,) = state["problems"]
    assert "np_endpoint has room for 4 rows; the change needs 5" in problem["message"]
    closed = problem["object"]
    assert {one["endpoint"] for one in state["endpoints"] if one["state"] != "enforced"} == {closed}
    cluster = (scene.manifests / "cluster.yaml").read_text()
    scene.write("cluster.yaml", cluster.replace(POD.format(name="other", node=NODE, last=3), ""))
    state = scene.await_status(lambda state: state["in_force"], "the room is used")
    assert "Pod/shop/late" in {one["endpoint"] for one in state["endpoints"] if one["state"] == "enforced"}


HELD = 60
"""Number of connections. Each has two rows, one for each pod."""
DB_BOTH = DB_POLICY.replace("policyTypes: [Ingress]", "policyTypes: [Ingress, Egress]")
"""A policy for both directions, because a connection without a row is judged again in the direction of its next
packet."""


def entries(scene: Scene, name: str) -> int:
    """The number of rows of a pinned map."""
    (pins,) = scene.pin_root.glob("v*")
    return len(rows(pins, name))


@pytest.mark.parametrize("version", [4, 6])
def test_more_open_connections_than_their_table_holds(scene: Scene, version: int) -> None:
    """None breaks while policy allows it, denied ones stay denied, and a change of policy cuts every one."""
    scene.write("db.yaml", DB_BOTH)
    wait_for(
        lambda: scene.reached(to_db("shop/web"), Attempt("shop/db", pod_address("web", 4), TCP, 5432)) == [True, False],
        "the database is isolated for both directions",
    )
    with ExitStack() as stack:
        held = []
        for _ in range(HELD):
            one = scene.lab.prober.hold(to_db("shop/web", version), 5.0)
            assert one is not None
            stack.callback(one.close)
            held.append(one)
        assert all(one.exchange(5.0) for one in held)
        places = 2 * SIZES["np_conn4"]
        assert places // 4 <= entries(scene, f"np_conn{version}") <= places
        assert scene.reached(to_db("shop/web", version), to_db("shop/other", version)) == [True, False]
        assert scene.state()["in_force"]

        scene.write("db.yaml", DB_BOTH.replace("app: web", "app: other"))
        scene.await_reached(to_db("shop/other", version), expected=True)
        wait_for(lambda: not held[0].exchange(), "the connection is cut")
        exchanged = scene.lab.attempt([to_db("shop/web", version)])[0].reached, [one.exchange(0.05) for one in held]
        assert exchanged == (False, [False] * HELD)


DATAGRAMS = 200
PLACE = {"web": 1, "db": 2, "other": 3}


def pod_address(name: str, version: int) -> IPAddress:
    return ip_address(f"10.1.0.{PLACE[name]}" if version == 4 else f"fd00:1::{PLACE[name]}")


def receiver(lab: Lab, name: str, version: int) -> socket.socket:
    """A socket of a pod for datagrams."""
    sock = lab.prober.open_socket(
        f"shop/{name}", socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM
    )
    sock.bind(("" if version == 4 else "::", 5353))
    sock.settimeout(0.5)
    return sock


def fragmented(lab: Lab, version: int, receiver_name: str, first_id: int, count: int) -> None:
    """Send from a pod the first fragments of many datagrams, then the rest of each."""
    ends = pod_address("web", version), pod_address(receiver_name, version)
    parts = [frames.fragments(*ends, (4000, 5353), bytes(24), first_id + number) for number in range(count)]
    with lab.prober.open_socket("shop/web", socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind(("eth0", 0))
        for which in (0, 1):
            for part in parts:
                wire.send(frames.frame_of(part[which], frames.mac("02:00:00:00:00:01"), frames.mac(PARENT_MAC)))


def count_received(sock: socket.socket) -> int:
    """The number of datagrams that arrive until none arrives for a while."""
    found = 0
    try:
        while sock.recv(2048):
            found += 1
    except TimeoutError:
        return found
    raise AssertionError("an empty datagram, which nobody sends")


@pytest.mark.parametrize("version", [4, 6])
def test_more_fragments_than_their_table_holds(scene: Scene, version: int) -> None:
    """The rest of a datagram whose first fragment was evicted is dropped and counted. No denied datagram passes."""
    lab = scene.lab

    def packets(reason: str) -> int:
        return int(scene.state()["packets"].get(reason, 0))

    with receiver(lab, "other", version) as allowed, receiver(lab, "db", version) as denied:
        assert all(scene.reached(Attempt(NODE, pod_address(name, version), TCP, 5432)) for name in ("other", "db"))
        # Which datagrams the table keeps depends on the processors. The pod's own table must also keep the early ones.
        if version == 4:
            lab.prober.write_settings("shop/other", [("ipv4/ipfrag_max_dist", "0")])
        before = packets("fragment")
        arrived = 0

        def accounted_for() -> bool:
            nonlocal arrived
            arrived += count_received(allowed)
            return arrived + packets("fragment") - before == DATAGRAMS

        fragmented(lab, version, "other", 1000, DATAGRAMS)
        wait_for(accounted_for, "each datagram has arrived or was dropped and counted")
        assert arrived <= SIZES["np_frag4"]
        assert entries(scene, f"np_frag{version}") <= SIZES["np_frag4"]

        dropped, refused = packets("fragment"), packets("policy-deny") + packets("fragment-full")
        fragmented(lab, version, "db", 5000, DATAGRAMS)
        wait_for(lambda: packets("fragment") - dropped == DATAGRAMS, "the rest of each is dropped and counted")
        assert count_received(denied) == 0
        assert packets("policy-deny") + packets("fragment-full") - refused == DATAGRAMS

        tries = itertools.count(9000)

        def passes() -> bool:
            fragmented(lab, version, "other", next(tries), 1)
            return count_received(allowed) == 1

        wait_for(passes, "a datagram passes")
        print(f"IPv{version}: {next(tries) - 9000} datagrams until one passed; {arrived} of {DATAGRAMS} at once")
