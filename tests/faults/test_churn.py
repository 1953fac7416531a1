# SPDX-License-Identifier: Apache-2.0
"""Interfaces, pods and labels that are added, removed, changed and confused with each other leave nothing behind."""

from __future__ import annotations

import ctypes
import select
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from agent_scene import DB_POLICY, DEADLINE_S, NODE, POD, Scene, to_db, wait_for

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.topology import TCP
from netpol_loader.host.follow import Follower

pytestmark = pytest.mark.netns

GATEWAY = "ee:ee:ee:ee:ee:ee"


@dataclass(frozen=True)
class Footprint:
    """The size of the agent's state, without the parts that grow and shrink by themselves."""

    descriptors: int
    pins: frozenset[str]
    rows: dict[str, int]
    interfaces: frozenset[str]


def footprint(scene: Scene) -> Footprint:
    """The footprint between two requests: the descriptor of the request is closed by then."""
    state = scene.state()
    descriptors = list(Path(f"/proc/{state['pid']}/fd").iterdir())
    (pins,) = scene.pin_root.glob("v*")
    return Footprint(
        len(descriptors),
        frozenset(str(path.relative_to(pins)) for path in pins.rglob("*")),
        {name: one["entries"] for name, one in state["maps"].items() if one["entries"]},
        frozenset(one["interface"] for one in state["interfaces"]),
    )


def settled(scene: Scene, wanted: Footprint) -> None:
    """Wait until the footprint is as wanted. If it is not in time, fail with the difference."""
    last = footprint(scene)

    def look() -> bool:
        nonlocal last
        last = footprint(scene)
        return last == wanted

    try:
        wait_for(look, "the footprint of the beginning")
    except AssertionError as error:
        raise AssertionError(f"left over:\n{last}\nat first:\n{wanted}") from error


def resident_bytes(scene: Scene) -> int:
    pages = int(Path(f"/proc/{scene.state()['pid']}/statm").read_text().split()[1])
    return pages * 4096


class Plug:
    """Interfaces of pods that are not in the plan. Their other ends are in one namespace."""

    def __init__(self, scene: Scene, name: str) -> None:
        self.scene = scene
        self.namespace = f"{scene.lab.token}-{name}"
        scene.lab.record(namespaces=[self.namespace])
        self.node("ip", "netns", "add", self.namespace)
        self.inside("link set lo up")

    def node(self, *arguments: str) -> str:
        return self.scene.lab.run(NODE, arguments).stdout

    def inside(self, *lines: str) -> None:
        for line in lines:
            self.node("nsenter", f"--net=/run/netns/{self.namespace}", "ip", *line.split())

    def batch(self, *lines: str) -> None:
        script = self.scene.home / "lines"
        script.write_text("\n".join(lines) + "\n")
        self.node("ip", "-batch", str(script))

    def add(self, *numbers: int) -> None:
        """Add the interfaces churnN, each with a host route to 10.1.1.N."""
        self.batch(*(f"link add churn{n} type veth peer name eth{n} netns {self.namespace}" for n in numbers))
        self.batch(*(f"link set churn{n} up" for n in numbers))
        self.batch(*(f"route add 10.1.1.{n}/32 dev churn{n}" for n in numbers))

    def remove(self, *numbers: int) -> None:
        self.batch(*(f"link del churn{n}" for n in numbers))


def pod(name: str, address: str, app: str | None = None) -> str:
    text = POD.format(name=name, node=NODE, last=0).replace(
        '[{ip: 10.1.0.0}, {ip: "fd00:1::0"}]', f"[{{ip: {address}}}]"
    )
    return text.replace(f"app: {name}", f"app: {app}") if app else text


def states(scene: Scene) -> dict[str, tuple[str, str | None]]:
    return {one["endpoint"]: (one["state"], one["interface"]) for one in scene.state()["endpoints"]}


def test_interfaces_and_pods_by_the_hundred_leave_nothing(scene: Scene, is_long: bool) -> None:  # noqa: FBT001
    """Ten pods at a time are added with their interfaces and removed, in either order. Then everything is as before."""
    plug, numbers = Plug(scene, "plug"), range(1, 11)
    held = scene.lab.prober.hold(to_db("shop/web"))
    assert held is not None
    wanted, sizes = footprint(scene), []
    for turn in range(120 if is_long else 4):
        text = "".join(pod(f"churn{n}", f"10.1.1.{n}", "web" if n % 2 else None) for n in numbers)
        if turn % 2:
            scene.write("churn.yaml", text)
            plug.add(*numbers)
        else:
            plug.add(*numbers)
            scene.write("churn.yaml", text)
        wait_for(
            lambda: all(states(scene).get(f"Pod/shop/churn{n}") == ("enforced", f"churn{n}") for n in numbers),
            "all pods are enforced",
        )
        if turn % 3:
            (scene.manifests / "churn.yaml").unlink()
            plug.remove(*numbers)
        else:
            plug.remove(*numbers)
            (scene.manifests / "churn.yaml").unlink()
        settled(scene, wanted)
        sizes.append(resident_bytes(scene))
        assert held.exchange(5.0)
    held.close()
    print(f"{10 * len(sizes)} pods came and went: {wanted.descriptors} descriptors, {len(wanted.pins)} pins, ", end="")
    print(
        f"{sum(wanted.rows.values())} rows, {len(wanted.interfaces)} interfaces with programs, before and after; ",
        end="",
    )
    print(f"resident KiB at first {sizes[0] >> 10}, ", end="")
    print(f"after half of them {sizes[len(sizes) // 2] >> 10}, after all {sizes[-1] >> 10}")
    # Some values are kept up to a bound (flows, names of former numbers), which is reached in the first half of the
    # turns.
    assert sizes[-1] - sizes[len(sizes) // 2] < 2 << 20, sizes
    assert scene.state()["drift"]["put_back"] == {}


def test_address_that_another_pod_has_at_once(scene: Scene) -> None:
    """The address of an allowed pod moves to a stranger and back.

    At no time does the stranger have the rights of the pod.
    """
    own = Attempt("shop/late", ip_address("10.1.0.2"), TCP, 5432)
    address = "10.1.0.9"
    for _ in range(5):
        scene.write("late.yaml", pod("allowed", address, "web"))
        scene.await_reached(own, expected=True)
        scene.write("late.yaml", pod("stranger", address))
        scene.await_status(
            lambda state: "Pod/shop/stranger" in {one["endpoint"] for one in state["endpoints"]}, "it is known"
        )
        assert scene.reached(own) == [False]
    (scene.manifests / "late.yaml").unlink()
    scene.await_status(
        lambda state: "Pod/shop/stranger" not in {one["endpoint"] for one in state["endpoints"]}, "it is gone"
    )


def test_two_pods_that_claim_one_address(scene: Scene) -> None:
    """A problem names both pods that have the address. Neither of them gains a right by it."""
    scene.write("late.yaml", pod("twin", "10.1.0.3", "web"))
    state = scene.await_status(lambda state: bool(state["problems"]), "a problem")
    (problem,) = state["problems"]
    assert (problem["severity"], problem["slug"], state["in_force"]) == ("error", "address-claimed", False)
    assert "Pod/shop/other and Pod/shop/twin both claim 10.1.0.3" in problem["message"]
    assert scene.reached(to_db("shop/other"), to_db("shop/web")) == [False, True]
    assert states(scene)["Pod/shop/other"][0] == "enforced"
    assert states(scene)["Pod/shop/twin"] == ("waiting", None)
    scene.kill()
    state = scene.start()
    assert "Pod/shop/other had it first" in state["problems"][0]["message"]
    (scene.manifests / "late.yaml").unlink()
    scene.await_status(lambda state: not state["problems"], "the dispute is over")


def test_labels_of_a_pod_and_of_its_namespace(scene: Scene) -> None:
    """A pod's rights follow its labels and those of its namespace, also for open connections."""
    cluster = (scene.manifests / "cluster.yaml").read_text()
    relabelled = cluster.replace(
        "name: web, namespace: shop, labels: {app: web}", "name: web, namespace: shop, labels: {app: x}"
    )
    assert relabelled != cluster
    for _ in range(3):
        held = scene.lab.prober.hold(to_db("shop/web"))
        assert held is not None
        scene.write("cluster.yaml", relabelled)
        scene.await_reached(to_db("shop/web"), expected=False)
        assert not held.exchange()
        held.close()
        scene.write("cluster.yaml", cluster)
        scene.await_reached(to_db("shop/web"), expected=True)
    scene.write(
        "db.yaml",
        DB_POLICY.replace("podSelector: {matchLabels: {app: web}}", "namespaceSelector: {matchLabels: {team: a}}"),
    )
    scene.await_reached(to_db("shop/web"), expected=False)
    scene.write("cluster.yaml", cluster.replace("metadata: {name: shop}", "metadata: {name: shop, labels: {team: a}}"))
    scene.await_reached(to_db("shop/other"), expected=True)
    scene.write("cluster.yaml", cluster)
    scene.await_reached(to_db("shop/other"), expected=False)


def test_interface_renamed_and_moved_away(scene: Scene) -> None:
    """A renamed interface only changes its name.

    An interface that leaves the node is forgotten, and closed on its return.
    """
    plug = Plug(scene, "moved")
    wanted = footprint(scene)
    scene.write("late.yaml", pod("churn1", "10.1.1.1"))
    plug.add(1)
    wait_for(lambda: states(scene).get("Pod/shop/churn1") == ("enforced", "churn1"), "the pod is enforced")
    plug.batch(
        "link set churn1 down",
        "link set churn1 name renamed1",
        "link set renamed1 up",
        "route add 10.1.1.1/32 dev renamed1",
    )
    wait_for(lambda: states(scene).get("Pod/shop/churn1") == ("enforced", "renamed1"), "the new name is known")
    assert scene.attached()["renamed1"] == {"ingress", "egress"}
    for _ in range(3):
        plug.batch(f"link set renamed1 netns {plug.namespace}")
        wait_for(lambda: states(scene).get("Pod/shop/churn1") == ("waiting", None), "it has left")
        return_interface(plug)
        wait_for(lambda: scene.attached().get("renamed1") == {"ingress", "egress"}, "programs are on it again")
        assert states(scene)["Pod/shop/churn1"][0] == "waiting"
        plug.batch("link set renamed1 up", "route add 10.1.1.1/32 dev renamed1")
        wait_for(lambda: states(scene).get("Pod/shop/churn1") == ("enforced", "renamed1"), "it is the pod's again")
    plug.batch("link del renamed1")
    (scene.manifests / "late.yaml").unlink()
    settled(scene, wanted)


def return_interface(plug: Plug) -> None:
    """Move the interface back to the node."""
    node = plug.scene.lab.namespace_of[NODE]
    plug.node("nsenter", f"--net=/run/netns/{plug.namespace}", "ip", "link", "set", "renamed1", "netns", node)


def enter(namespace: str) -> None:
    """Move the calling thread into the namespace."""
    with Path(f"/run/netns/{namespace}").open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def open_ms(follower: Follower, name: str, pins: Path) -> float:
    """The milliseconds from the kernel's first notification of an interface to the pin of the second program on it."""
    deadline_s = time.monotonic() + DEADLINE_S
    news: list[int] = []
    while not news and time.monotonic() < deadline_s:
        select.select([follower], [], [], 1.0)
        news = [one.link.ifindex for one in follower.poll() or () if one.link.name == name]
    born_s = time.monotonic()
    pin = pins / "links" / f"{news[0]}_out"
    while not pin.exists():
        assert time.monotonic() < deadline_s, "no programs"
        time.sleep(0.0005)
    return (time.monotonic() - born_s) * 1000


def test_how_long_a_new_interface_is_open(scene: Scene, record_property: pytest.FixtureRequest) -> None:
    """Measure the time from the creation of an interface to its programs. The test only asserts that it ends."""
    plug = Plug(scene, "born")
    (pins,) = scene.pin_root.glob("v*")
    taken = []
    with ThreadPoolExecutor(1) as thread:
        thread.submit(enter, scene.lab.namespace_of[NODE]).result()
        with thread.submit(Follower).result() as follower:
            for number in range(1, 11):
                follower.poll()
                line = f"link add churn{number} type veth peer name eth{number} netns {plug.namespace}"
                done = thread.submit(plug.batch, line)
                taken.append(open_ms(follower, f"churn{number}", pins))
                done.result()
                plug.remove(number)
    record_property("open_ms", taken)  # type: ignore[operator]
    print(f"a new interface is open for {statistics.median(taken):.0f} ms (median), {max(taken):.0f} ms (most)")
