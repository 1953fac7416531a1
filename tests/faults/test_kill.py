# SPDX-License-Identifier: Apache-2.0
"""`kill -9` of a busy agent at any moment: no verdict is wrong, no connection breaks, and the tables are correct."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from agent_scene import NODE, POD, Scene, to_db, wait_for
from readback import read_tables, rows

from netpol_ebpf.compiler import Compiler
from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.resources.load import parse_documents
from netpol_ebpf.resources.types import Resource

pytestmark = pytest.mark.netns

KILLS_SHORT, KILLS_LONG = 8, 200
LONGEST_LIFE_S = 6.0
"""Longest time in seconds until an agent is killed. It is busy after two to four seconds here; kills fall into all
phases."""
SEED = 20


@dataclass
class Probes:
    """Connection attempts without a pause, each with a known expected result."""

    scene: Scene
    wrong: list[str] = field(default_factory=list)
    tried: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def keep_trying(self, attempts: list[Attempt], *, expected: bool) -> None:
        """Repeat attempts until `done`. Allowed ones may take long on a busy machine; denied ones must always fail."""
        deadline_s, rounds = (5.0, 2) if expected else (0.1, 1)
        while not self.done.is_set():
            for result in self.scene.lab.attempt(attempts, deadline_s=deadline_s, rounds=rounds):
                self.tried += 1
                if result.reached != expected:
                    self.wrong.append(str(result))


@contextmanager
def running(*works: Callable[[], None], done: threading.Event) -> Iterator[None]:
    """Run functions in threads until the end of the block. An error in a thread is raised here."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


class Churn:
    """Changes of policies, pods and interfaces that do not concern the probes."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene, self.random = scene, random.Random(seed)
        self.namespace = f"{scene.lab.token}-kill"
        scene.lab.record(namespaces=[self.namespace])
        scene.lab.run(NODE, ["ip", "netns", "add", self.namespace])
        self.plugged: set[int] = set()

    def keep_changing(self, done: threading.Event) -> None:
        """Make a change every few milliseconds until ``done`` is set."""
        while not done.wait(self.random.uniform(0.02, 0.2)):
            self.random.choice((self.change_policy, self.change_pods, self.change_interfaces))()

    def change_policy(self) -> None:
        """Change the database's policy without allowing more, or add a policy for pods that no probe uses."""
        place = self.random.randrange(6)
        peers = self.random.sample(["web", "nobody", "none", "far"], 2)
        ports = self.random.sample(range(6000, 6030), 5)
        text = "".join(
            f"""\
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: churn{place}-{number}, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: {self.random.choice(["db", "far", "churn"])}}}}}
  policyTypes: [Ingress]
  ingress: [{{from: [{{podSelector: {{matchLabels: {{app: {peer}}}}}}}], ports: [{{port: {port}}}]}}]
"""
            for number, (peer, port) in enumerate((peer, port) for peer in peers for port in ports)
        )
        self.put(f"policy{place}.yaml", text)

    def change_pods(self) -> None:
        """Add and change pods of both nodes. Some have labels that a rule selects."""
        place = self.random.randrange(4)
        text = ""
        for number in range(place * 10, place * 10 + 10):
            pod = POD.format(name=f"churn{number}", node=self.random.choice([NODE, "node-2"]), last=100 + number)
            text += pod.replace(f"app: churn{number}", f"app: {self.random.choice(['churn', 'far', 'nobody'])}")
        self.put(f"pods{place}.yaml", text)

    def put(self, name: str, text: str) -> None:
        if self.random.random() < 0.3:
            (self.scene.manifests / name).unlink(missing_ok=True)
        else:
            self.scene.write(name, text)

    def change_interfaces(self) -> None:
        """Add or remove the interface of a pod."""
        number = self.random.randrange(100, 140)
        name = f"kill{number}"
        if number in self.plugged:
            self.plugged.discard(number)
            self.scene.lab.run(NODE, ["ip", "link", "del", name])
            return
        self.plug(number)

    def plug(self, number: int) -> None:
        """Give a pod its interface."""
        name = f"kill{number}"
        self.plugged.add(number)
        lines = (
            f"link add {name} type veth peer name {name} netns {self.namespace}", f"link set {name} up",
            f"route add 10.1.0.{number}/32 dev {name}",
        )  # fmt: skip
        for line in lines:
            self.scene.lab.run(NODE, ["ip", *line.split()])


def resources(manifests: Path) -> list[Resource]:
    """All objects, as a new reader of the directory parses them."""
    return [one for path in sorted(manifests.iterdir()) for one in parse_documents(path.read_text(), path.name).check()]


def check_tables(scene: Scene, scratch: Path) -> None:
    """Check that the kernel's rows equal those that a new compiler makes of the manifests, except for the numbers."""
    (pins,) = scene.pin_root.glob("v*")
    world = derive(resources(scene.manifests))
    fresh = Compiler(lambda endpoint: endpoint.node == NODE)
    fresh.replace(world)
    fresh.commit()
    kernel = read_tables(pins, scene.state_dir / "numbers", scratch, world.nodes)
    assert len(rows(pins, "np_rule")) == len(kernel.rules)
    read = Compiler()
    read.tables = kernel
    found, expected = read.canonical(), fresh.canonical()
    for table, content in expected.items():
        assert found[table] == content, table


def numbers(scene: Scene) -> dict[str, int]:
    """The endpoint numbers of the pods that exist from the beginning."""
    return {one["endpoint"]: one["number"] for one in scene.state()["endpoints"] if "churn" not in one["endpoint"]}


def test_killed_again_and_again(scene: Scene, is_long: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """No wrong verdict, no broken connection, the same numbers after each kill, and correct tables at the end."""
    kills = KILLS_LONG if is_long else KILLS_SHORT
    moment = random.Random(SEED)
    churn, probes = Churn(scene, SEED), Probes(scene)
    before = numbers(scene)
    with ExitStack() as stack:
        held = [scene.lab.prober.hold(to_db("shop/web", version)) for version in (4, 6, 4)]
        for one in held:
            assert one is not None
            stack.callback(one.close)
        allowed = [to_db("shop/web"), to_db("shop/web", 6)]
        denied = [to_db("shop/other"), to_db("shop/other", 6)]
        works = (
            lambda: probes.keep_trying(allowed, expected=True),
            lambda: probes.keep_trying(denied, expected=False),
            lambda: churn.keep_changing(probes.done),
        )
        with running(*works, done=probes.done):
            for turn in range(kills):
                probes.done.wait(moment.uniform(0.0, LONGEST_LIFE_S))  # when it dies, not a measured time
                scene.kill()
                assert all(one.exchange(10.0) for one in held if one is not None), f"broken at kill {turn + 1}"
                if turn % 4 == 3:
                    scene.start()
                    assert numbers(scene) == before, f"other numbers after kill {turn + 1}"
                else:
                    scene.launch()
            scene.state()
            tried = probes.tried
            wait_for(lambda: probes.tried > tried + 6 or probes.wrong, "connections are tried with the last agent")
        assert probes.wrong == []
        assert all(one.exchange(10.0) for one in held if one is not None)
    settle(scene, churn)  # until then pods without an interface keep the state from being in force
    assert scene.state()["drift"]["put_back"] == {}
    check_tables(scene, tmp_path / "numbers")
    assert numbers(scene) == before
    print(f"{kills} kills, {probes.tried} connections tried, {len(probes.wrong)} wrong verdicts")


def settle(scene: Scene, churn: Churn) -> None:
    """Give all pods of the node their interfaces, and wait until these and all manifests are in force."""
    world = derive(resources(scene.manifests))
    local = {str(key) for key, one in world.endpoints.items() if one.node == NODE}
    for key in sorted(local):
        number = 100 + int(key.partition("churn")[2] or -100)
        if number and number not in churn.plugged:
            churn.plug(number)

    def look() -> bool:
        state = scene.state()
        if "waiting" in state:
            return False
        listed = {one["endpoint"]: one["state"] for one in state["endpoints"]}
        objects = (state["objects"]["policies"], state["objects"]["endpoints"])
        return (
            listed == dict.fromkeys(local, "enforced")
            and objects == (len(world.policies), len(world.endpoints))
            and state["in_force"]
        )

    wait_for(look, "everything is taken up")
