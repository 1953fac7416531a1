# SPDX-License-Identifier: Apache-2.0
"""The agent as on kernels without tcx: filters on clsact give the same verdicts, also where packets leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import NODE, PODS, Scene, lab_for, scene_in, wait_for
from test_services import DB_INGRESS, MANIFESTS, WEB_EGRESS, WEB_TO_ALL, everyhow, to, translate

from netpol_ebpf.lab.attempt import Attempt
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import TCP, Host

pytestmark = pytest.mark.netns

WITHOUT_TCX = """\
import sys
from netpol_loader.pins import attach
attach.preferred_mechanism = lambda dataplane: attach.Mechanism.CLSACT
from netpol_ebpf.agent.main import main
sys.exit(main())
"""
HOOKS = ("ingress", "egress")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_for(PODS) as one:
        yield one


@pytest.fixture(scope="module")
def lasting_scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    home = tmp_path_factory.mktemp("clsact") / "home"
    with scene_in(lab, home, MANIFESTS, entry=("-c", WITHOUT_TCX)) as one:
        translate(lab, one.home)
        one.start()
        yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    """The services, and the initial policies."""
    scene = lasting_scene
    scene.write("web.yaml", WEB_EGRESS)
    scene.write("db.yaml", DB_INGRESS)
    wait_for(lambda: scene.reached(to("db"), to("other")) == [True, False], "the policies of the beginning")
    scene.await_status(lambda state: state["in_force"], "the manifests are in force")
    return scene


def filters(scene: Scene) -> dict[str, set[str]]:
    """The filters on the node's interfaces as `tc` lists them: {interface: {hook, ...}}."""
    found: dict[str, set[str]] = {}
    for link in json.loads(scene.lab.run(NODE, ["ip", "-j", "link"]).stdout):
        for hook in HOOKS:
            shown = scene.lab.run(NODE, ["tc", "-j", "filter", "show", "dev", link["ifname"], hook], check=False)
            if any(one["kind"] == "bpf" for one in json.loads(shown.stdout or "[]")):
                found.setdefault(link["ifname"], set()).add(hook)
    return found


def interfaces(scene: Scene) -> set[str]:
    """The interfaces of the pods of this node, and the uplink."""
    pods = scene.lab.plan.children(NODE)
    return {host.parent_interface for host in pods} | {"eth0"}


def test_verdicts_are_the_same(scene: Scene) -> None:
    """Direct connections and those through services: both nodes, TCP and UDP, both families, without any tcx link."""
    assert filters(scene) == {name: set(HOOKS) for name in interfaces(scene)}
    assert not [pin for name in ("in", "out") for pin in scene.pin_root.glob(f"v*/links/*_{name}")]
    assert scene.reached(*everyhow("db")) == [True] * 4
    assert scene.reached(*everyhow("other"), *everyhow("far")) == [False] * 8
    assert scene.reached(*everyhow("db", "shop/other")) == [False] * 4
    direct = [Attempt("shop/web", ip_address(address), TCP, 5432) for address in ("10.1.0.2", "10.1.0.3", "fd00:1::4")]
    assert scene.reached(*direct) == [True, False, False]
    scene.write("web.yaml", WEB_TO_ALL)
    scene.await_reached(to("far"), expected=True)
    assert scene.reached(*everyhow("other"), *everyhow("far")) == [True] * 8


def test_open_connection_is_cut_and_another_outlives_the_agent(scene: Scene) -> None:
    """A change of policy revokes a deferred verdict. Another one, with its connection, survives a killed agent."""
    scene.write("web.yaml", WEB_TO_ALL)
    scene.await_reached(to("far"), expected=True)
    lost, kept = (scene.lab.prober.hold(to(name)) for name in ("far", "db"))
    assert lost is not None
    assert kept is not None
    scene.write("web.yaml", WEB_EGRESS)
    wait_for(lambda: not lost.exchange(), "the connection is cut")
    scene.kill()
    assert scene.reached(to("db"), to("other"), to("far")) == [True, False, False]
    scene.start()
    assert scene.reached(to("db"), to("other"), to("far")) == [True, False, False]
    assert kept.exchange(5.0)
    assert filters(scene) == {name: set(HOOKS) for name in interfaces(scene)}
    for one in (lost, kept):
        one.close()


@pytest.mark.parametrize(
    "removal",
    [["filter", "del", "dev", "{}", "ingress"], ["qdisc", "del", "dev", "{}", "clsact"]],
    ids=["filter", "qdisc"],
)
def test_what_others_remove_is_put_back(scene: Scene, removal: list[str]) -> None:
    """A removed filter, or a removed discipline with both filters, is noticed, restored and counted."""
    place = Host("shop/web", NODE, ()).parent_interface
    before = scene.state()["drift"]["put_back"].get("program", 0)
    scene.lab.run(NODE, ["tc", *(word.format(place) for word in removal)])
    state = scene.await_status(
        lambda state: state["drift"]["put_back"].get("program", 0) > before, "the program is put back"
    )
    assert state["in_force"]
    assert state["drift"]["recent"][-1]["was"] == "missing"
    assert filters(scene) == {name: set(HOOKS) for name in interfaces(scene)}
    wait_for(lambda: scene.reached(to("db"), to("other")) == [True, False], "policy is as before")


def test_cleanup_leaves_no_filter(lasting_scene: Scene) -> None:
    """The filters and their qdiscs are gone, and nothing is enforced."""
    lasting_scene.retire()
    assert filters(lasting_scene) == {}
    assert "clsact" not in lasting_scene.lab.run(NODE, ["tc", "qdisc", "show"]).stdout
    assert lasting_scene.reached(to("db"), to("other")) == [True, True]
