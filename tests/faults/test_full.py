# SPDX-License-Identifier: Apache-2.0
"""Every map of policy full: the change is refused whole and named, what was in force stays, and room that returns is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_scene import DB_POLICY, NODE, OTHER_ALLOWED, POD, Scene, scene_in, to_db

from netpol_ebpf.lab.laboratory import Lab

pytestmark = pytest.mark.netns

SIZES = {
    "np_addr4": 12, "np_addr6": 10, "np_cidr4": 4, "np_cidr6": 4, "np_peer_class": 20, "np_l4_col": 5, "np_verdict": 150,
    "np_rule": 110, "np_endpoint": 3, "np_source4": 2, "np_source6": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory, pin_root: Path) -> Iterator[Scene]:
    options = [word for name, size in SIZES.items() for word in ("--map-size", f"{name}={size}")]
    home = tmp_path_factory.mktemp("agent") / "small"
    with scene_in(lab, home, pin_root / "small", options=("--allow-source-prefixes", *options)) as one:
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
    """One of the pods may send from other addresses."""
    text = POD.format(name="late", node=NODE, last=9)
    quoted = ",".join(f'"{net}"' for net in nets)
    return text.replace(
        "labels:", f"annotations: {{cni.projectcalico.org/allowedSourcePrefixes: '[{quoted}]'}}, labels:"
    )


PEERS = "".join(
    policy(f"excess{n}", f"{{podSelector: {{matchLabels: {{app: {own}}}}}, policyTypes: [Ingress, Egress], "
    f"ingress: [{{from: [{{podSelector: {{matchLabels: {{app: {peer}}}}}}}]}}], "
    f"egress: [{{to: [{{podSelector: {{matchLabels: {{app: {peer}}}}}}}]}}]}}")
    for n, (own, peer) in enumerate((own, peer) for own in ("web", "other") for peer in ("web", "db", "other", "far"))
)  # fmt: skip


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
    """It is refused together with what came with it; status names map and object; what fits is taken, without a restart."""
    held = scene.lab.prober.hold(to_db("shop/web"))
    assert held is not None
    before = scene.state()["refused"]["changes"]
    scene.write("excess.yaml", EXCESS[name] + "---\n" + OTHER_ALLOWED)
    state = scene.await_status(lambda state: not state["in_force"], "the change is refused")
    (problem,) = state["problems"]
    assert problem["file"].endswith("excess.yaml") or problem["object"].startswith("Pod/shop/far"), problem
    assert "the state before stays in force without" in problem["message"]
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
    """An agent that starts with manifests that do not fit leaves what is in force, and says why it ends."""
    scene.write("excess.yaml", EXCESS["np_cidr4"] + "---\n" + OTHER_ALLOWED)
    scene.await_status(lambda state: not state["in_force"], "the change is refused")
    scene.kill()
    done = scene.lab.run(NODE, scene.command(), check=False)
    assert done.returncode == 5
    assert "np_cidr4" in done.stderr
    assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]


@pytest.mark.parametrize(("name", "nets"), [("np_source4", "198.51.{}.0/24"), ("np_source6", "2001:db8:{}::/48")])
def test_sources_of_one_pod_do_not_fit(scene: Scene, name: str, nets: str) -> None:
    """The pod whose prefixes have no room stays closed and is named; the others are not touched; room is used at once."""
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
    """The endpoint without room stays closed and is named; when another goes it is opened."""
    scene.write("late.yaml", POD.format(name="late", node=NODE, last=9))
    state = scene.await_status(lambda state: not state["in_force"], "the endpoint is refused")
    (problem,) = state["problems"]
    assert "np_endpoint has room for 3 rows; the change needs 4" in problem["message"]
    closed = problem["object"]
    assert {one["endpoint"] for one in state["endpoints"] if one["state"] != "enforced"} == {closed}
    cluster = (scene.manifests / "cluster.yaml").read_text()
    scene.write("cluster.yaml", cluster.replace(POD.format(name="other", node=NODE, last=3), ""))
    state = scene.await_status(lambda state: state["in_force"], "the room is used")
    assert "Pod/shop/late" in {one["endpoint"] for one in state["endpoints"] if one["state"] == "enforced"}
