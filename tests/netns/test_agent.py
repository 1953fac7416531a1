# SPDX-License-Identifier: Apache-2.0
"""The agent on a node of a laboratory, with real pods and connections, through everything that may happen to it."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import frames
from agent_scene import DB_POLICY, LATE, NODE, OTHER_ALLOWED, POD, Scene, lab_for, to_db, wait_for

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import PARENT_MAC, TCP

pytestmark = pytest.mark.netns

UPLINK = "eth0"
ACK = 16


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_for(outside=[LATE]) as one:
        yield one


def test_policy_holds_for_both_families_and_the_node(scene: Scene) -> None:
    """The allowed pod and the node reach the database, another pod does not.

    A pod of another node is judged likewise.
    """
    sources = ("shop/web", "shop/other", NODE, "shop/far")
    attempts = [to_db(source, version) for source in sources[:2] for version in (4, 6)] + [
        to_db(NODE),
        to_db("shop/far"),
    ]
    assert scene.reached(*attempts) == [True, True, False, False, True, False]
    state = scene.state()
    assert state["in_force"]
    assert {one["endpoint"]: one["state"] for one in state["endpoints"]} == {
        "Pod/shop/db": "enforced", "Pod/shop/other": "enforced", "Pod/shop/web": "enforced",
    }  # fmt: skip


def test_interfaces_that_bear_the_programs(scene: Scene) -> None:
    """Every pod's interface, known or not, and the uplink have both programs; the loopback interface has none."""
    children = {child.parent_interface for child in scene.lab.plan.children(NODE)}
    assert scene.attached() == {name: {"ingress", "egress"} for name in {*children, UPLINK}}


def test_unknown_pod_is_closed_until_it_is_known(scene: Scene) -> None:
    """An interface without a known pod passes nothing. The manifest of its pod opens it."""
    attempt = Attempt(LATE.name, ip_address("10.1.0.3"), TCP, 5432)
    assert {one["interface"] for one in scene.state()["interfaces"] if one["endpoint"] is None} > {UPLINK}
    assert scene.reached(attempt) == [False]
    scene.write("late.yaml", POD.format(name="late", node=NODE, last=9))
    scene.await_reached(attempt, expected=True)
    (scene.manifests / "late.yaml").unlink()
    scene.await_reached(attempt, expected=False)


def test_interface_that_appears_is_closed_then_opened(scene: Scene) -> None:
    """A pod that is added while the agent runs is closed at once. It opens when its address is known to be its own."""
    lab = scene.lab
    scene.write("late.yaml", POD.format(name="late", node=NODE, last=9))
    scene.write("new.yaml", POD.format(name="new", node=NODE, last=8))
    namespace = f"{lab.token}-new"
    lab.record(namespaces=[namespace])
    for arguments in (
        ["ip", "netns", "add", namespace],
        ["ip", "link", "add", "newpod", "type", "veth", "peer", "name", "eth0", "netns", namespace],
        ["ip", "link", "set", "newpod", "up"],
    ):
        lab.run(NODE, arguments)
    closed = scene.await_status(
        lambda state: {"interface": "newpod", "endpoint": None}.items()
        <= next((one for one in state["interfaces"] if one["interface"] == "newpod"), {}).items(),
        "the new interface is under policy",
    )
    assert "Pod/shop/new" not in {one["endpoint"] for one in closed["interfaces"]}
    # No route leads to the pod, so the agent must look at the other end of the pair.
    lab.run(NODE, ["ip", "-n", namespace, "address", "add", "10.1.0.8/32", "dev", "eth0"])
    scene.await_status(
        lambda state: ("newpod", "Pod/shop/new")
        in {(one["interface"], one["endpoint"]) for one in state["interfaces"]},
        "the new interface is its pod's",
    )
    lab.run(NODE, ["ip", "link", "del", "newpod"])
    scene.await_status(
        lambda state: "newpod" not in {one["interface"] for one in state["interfaces"]}, "the interface is forgotten"
    )


def test_change_takes_effect_live_and_cuts_what_it_revokes(scene: Scene) -> None:
    """An added policy allows, and a removed one denies, also on the connection that was opened meanwhile."""
    scene.write("other.yaml", OTHER_ALLOWED)
    scene.await_reached(to_db("shop/other"), expected=True)
    revoked, kept = scene.lab.prober.hold(to_db("shop/other")), scene.lab.prober.hold(to_db("shop/web"))
    assert revoked is not None
    assert kept is not None
    assert revoked.exchange(5.0)
    (scene.manifests / "other.yaml").unlink()
    scene.await_reached(to_db("shop/other"), expected=False)
    assert not revoked.exchange()
    assert kept.exchange(5.0)
    for one in (revoked, kept):
        one.close()


def test_server_does_not_reopen_what_was_revoked(scene: Scene) -> None:
    """A server that sends after the cut, to a client that it might open a connection to, revives nothing.

    What is allowed again continues.
    """
    lab = scene.lab
    scene.write("other.yaml", OTHER_ALLOWED)
    scene.await_reached(to_db("shop/other"), expected=True)
    revoked = lab.prober.hold(to_db("shop/other"))
    assert revoked is not None
    port = revoked.source_port
    (scene.manifests / "other.yaml").unlink()
    scene.await_reached(to_db("shop/other"), expected=False)
    # The node does not verify the checksum.
    segment = struct.pack("!HHIIBBHHH", 5432, port, 1, 1, 5 << 4, ACK, 1024, 0, 0)
    packet = frames.ip(ip_address("10.1.0.2"), ip_address("10.1.0.3"), TCP, segment)
    denied = scene.state()["packets"].get("revoked", 0)
    with lab.prober.open_socket("shop/db", socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((UPLINK, 0))
        wire.send(frames.frame_of(packet, frames.mac("02:00:00:00:00:01"), frames.mac(PARENT_MAC)))
    wait_for(lambda: scene.state()["packets"].get("revoked", 0) > denied, "the server's packet is dropped")
    assert not revoked.exchange()
    scene.write("other.yaml", OTHER_ALLOWED)
    scene.await_reached(to_db("shop/other"), expected=True)
    assert revoked.exchange(5.0)
    revoked.close()


def test_broken_file_keeps_the_last_good_state_even_over_a_restart(scene: Scene) -> None:
    """The last good state of a policy file that no longer parses stays in force, also with the next agent.

    The file is reported.
    """
    scene.write("db.yaml", DB_POLICY.replace("podSelector:", "podSelektor:", 1))
    state = scene.await_status(lambda state: not state["in_force"], "the problem is reported")
    (problem,) = state["problems"]
    assert problem["file"].endswith("db.yaml")
    assert problem["line"] > 0
    assert scene.reached(to_db("shop/other"), to_db("shop/web")) == [False, True]
    scene.kill()
    state = scene.start()
    assert not state["in_force"]
    assert scene.reached(to_db("shop/other"), to_db("shop/web")) == [False, True]
    done = scene.ctl("status", "--state-dir", str(scene.state_dir))
    assert (done.returncode, "db.yaml" in done.stdout) == (1, True)
    scene.write("db.yaml", DB_POLICY)
    scene.await_status(lambda state: state["in_force"], "the file is mended")


def test_killed_agent_is_followed_by_one_that_takes_over_unnoticed(scene: Scene) -> None:
    """Enforcement continues without an agent.

    The next one gives no wrong verdict at any time, and connections survive.
    """
    before = scene.state()
    held = scene.lab.prober.hold(to_db("shop/web"))
    assert held is not None
    scene.kill()
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    assert held.exchange(5.0)

    wrong: list[str] = []
    tried = 0
    done = threading.Event()

    def keep_trying() -> None:
        nonlocal tried
        while not done.is_set():
            # An allowed attempt may take long on a busy machine; a denied one must always fail.
            (allowed,) = scene.lab.attempt([to_db("shop/web")], deadline_s=5.0)
            (denied,) = scene.lab.attempt([to_db("shop/other")], deadline_s=0.1, rounds=1)
            tried += 1
            if not allowed.reached or denied.reached:
                wrong.append(f"{allowed}, {denied}")

    thread = threading.Thread(target=keep_trying)
    thread.start()
    try:
        after = scene.start()
        seen = tried
        wait_for(lambda: tried > seen + 2 or wrong, "connections are tried after the take-over")
    finally:
        done.set()
        thread.join()
    assert wrong == []
    assert held.exchange(5.0)
    held.close()
    numbers = [{one["endpoint"]: one["number"] for one in state["endpoints"]} for state in (before, after)]
    assert numbers[0] == numbers[1]


def test_change_while_nobody_looks_is_taken_up_by_the_next_agent(scene: Scene) -> None:
    """The starting agent cuts connections that policy no longer allows, and no others."""
    scene.write("other.yaml", OTHER_ALLOWED)
    scene.await_reached(to_db("shop/other"), expected=True)
    revoked, kept = scene.lab.prober.hold(to_db("shop/other")), scene.lab.prober.hold(to_db("shop/web"))
    assert revoked is not None
    assert kept is not None
    scene.kill()
    (scene.manifests / "other.yaml").unlink()
    assert revoked.exchange(5.0)
    scene.start()
    assert not revoked.exchange()
    assert kept.exchange(5.0)
    assert scene.reached(to_db("shop/other"), to_db("shop/web")) == [False, True]
    for one in (revoked, kept):
        one.close()


def test_time_outs_are_those_that_the_present_agent_was_asked_for(own_scene: Scene) -> None:
    """The options of the present agent apply to new maps and to those of an earlier agent with other options."""
    scene = own_scene
    for options, expected in (
        (("--timeout", "udp=180", "--timeout", "tcp-open=7200"), (180, 7200, 5)),
        (("--timeout", "icmp=9"), (60, 8100, 9)),
        ((), (60, 8100, 5)),
    ):
        scene.options = options
        found = scene.start()["timeouts"]
        assert (found["udp"], found["tcp-open"], found["icmp"]) == expected
        scene.kill()


def test_agent_can_be_killed_at_any_time_of_its_start(scene: Scene) -> None:
    """An agent that is killed while it takes over leaves whole enforcement, and the next one succeeds."""
    scene.kill()
    for delay_s in (0.3, 1.0, 1.6, 2.2, 2.8, 3.4):
        scene.launch()
        # The delay determines where the process dies. It measures nothing, so every value is a valid case.
        threading.Event().wait(delay_s)
        scene.kill()
        assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    scene.start()
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    assert set(map(len, scene.attached().values())) == {2}


def test_denied_flow_is_told_with_its_rule(scene: Scene) -> None:
    """The denial is reported with both names, and with file and line of the policy. Counters have it, too."""
    assert scene.reached(to_db("shop/other")) == [False]
    flows = wait_for(lambda: scene.ctl("flows", "--state-dir", str(scene.state_dir)).stdout, "the denial is reported")
    assert "deny  ingress TCP shop/other 10.1.0.3:" in flows
    assert "-> shop/db 10.1.0.2:5432" in flows
    assert f"({scene.manifests}/db.yaml:1)" in flows
    listed = scene.ctl("get", "rules", "--state-dir", str(scene.state_dir)).stdout
    counted = next(line.split() for line in listed.splitlines() if "end of tier|ingress" in line)
    assert int(counted[1]) > 0
    explained = scene.ctl(
        "explain", "--state-dir", str(scene.state_dir), "--from", "shop/other", "--to", "shop/db", "--port", "5432"
    )
    assert explained.returncode == 1
    assert f"{scene.manifests}/db.yaml:1" in explained.stdout


def test_end_of_the_agent_says_that_enforcement_stays(scene: Scene) -> None:
    """SIGTERM ends the agent cleanly; it reports what stays in force. Then status reports that no agent answers."""
    assert "enforcement stays as it is, `netpolctl cleanup` ends it" in scene.stop()
    assert scene.reached(to_db("shop/other")) == [False]
    done = scene.ctl("status", "--state-dir", str(scene.state_dir))
    assert (done.returncode, "no agent answers" in done.stderr) == (4, True)


def test_cleanup_leaves_nothing(own_scene: Scene) -> None:
    """A dry run lists everything and changes nothing. Cleanup fails while an agent runs; then it removes everything."""
    scene = own_scene
    scene.start()
    refused = scene.cleanup()
    assert (refused.returncode, "another netpol-agent" in refused.stderr) == (5, True)
    scene.stop()
    named = scene.cleanup("--dry-run").stdout.replace("would remove", "removed")
    assert scene.reached(to_db("shop/other")) == [False]
    done = scene.cleanup()
    assert (done.returncode, done.stdout) == (0, named)
    assert scene.attached() == {}
    assert not scene.pin_root.exists()
    assert not scene.state_dir.exists()
    assert scene.reached(to_db("shop/other")) == [True]
    assert scene.cleanup().stdout == "nothing to remove\n"


def test_once_puts_in_force_and_goes(own_scene: Scene) -> None:
    """--once enforces and exits with 0, or with 3 if a file is broken. The valid files are in force in both cases."""
    scene = own_scene
    assert scene.reached(to_db("shop/other")) == [True]
    assert scene.lab.run(NODE, scene.command("--once")).returncode == 0
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    scene.write("other.yaml", OTHER_ALLOWED)
    scene.write("broken.yaml", "kind: [")
    done = scene.lab.run(NODE, scene.command("--once"), check=False)
    assert done.returncode == 3
    assert "broken.yaml:" in done.stderr
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, True]


def test_without_a_node_name_everything_found_is_local(own_scene: Scene) -> None:
    """An agent without a node name enforces for every pod that it finds on its node."""
    own_scene.node = None
    found = {one["endpoint"]: one["state"] for one in own_scene.start()["endpoints"]}
    assert (found["Pod/shop/db"], found["Pod/shop/far"]) == ("enforced", "waiting")
    assert own_scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]


def test_too_small_a_map_refuses_the_change_and_keeps_the_old(own_scene: Scene) -> None:
    """A change that does not fit is rejected and reported.

    The previous policy stays, and a smaller change is applied.
    """
    scene = own_scene
    scene.options = ("--map-size", "np_cidr4=4", "--map-size", "np_cidr6=4")
    scene.start()
    nets = ", ".join(f"{{ipBlock: {{cidr: 192.0.{place}.0/24}}}}" for place in range(7))
    scene.write("db.yaml", DB_POLICY.replace("{podSelector: {matchLabels: {app: web}}}", nets))
    state = scene.await_status(lambda state: not state["in_force"], "the change is refused")
    assert "np_cidr4 has room for 4 rows; the change needs 7" in state["problems"][0]["message"]
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    scene.write("db.yaml", OTHER_ALLOWED)
    scene.await_status(lambda state: state["in_force"], "a change that fits is taken up")
    scene.await_reached(to_db("shop/other"), expected=True)
    assert scene.reached(to_db("shop/web")) == [False]
    scene.stop()
    scene.options = ("--map-size", "np_cidr4=8", "--map-size", "np_cidr6=8")
    scene.write("db.yaml", DB_POLICY.replace("{podSelector: {matchLabels: {app: web}}}", nets))
    state = scene.start()
    assert (state["in_force"], state["maps"]["np_cidr4"]) == (True, {"entries": 7, "size": 8})
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [False, False]
