# SPDX-License-Identifier: Apache-2.0
"""The plan of a laboratory: what is refused, and what the rendered lines say."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from netpol_ebpf.errors import PlatformError, PrivilegeError, UsageError
from netpol_ebpf.lab import laboratory
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import Host, Plan

ROOT = Host("internet", None, (ip_address("192.0.2.1"),))
NODE = Host("node", "internet", (ip_address("172.30.0.10"), ip_address("fd00::10")), interface="up0")
POD = Host("shop/front-end", "node", (ip_address("10.244.1.10"), ip_address("fd00:10::a")))


def lines_of(plan: Plan, host: str) -> list[str]:
    batches = plan.render_batches({name: f"t-{name}" for name in plan.hosts})
    return [line for batch in batches if batch.host == host for line in batch.lines]


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ([ROOT, ROOT], "given twice"),
        ([ROOT, NODE, Host("other", "internet", NODE.addresses)], "172.30.0.10 is given to node and to other"),
        ([NODE], "exactly one root"),
        ([ROOT, Host("second", None, ())], "has 2: internet, second"),
        ([ROOT, POD], "hangs off node, which is not in the plan"),
        ([ROOT, Host("a", "b", ()), Host("b", "a", ())], "in a circle: a, b"),
    ],
)
def test_a_plan_that_is_no_tree_is_refused(hosts: list[Host], message: str) -> None:
    """The error message names the hosts."""
    with pytest.raises(UsageError, match=message):
        Plan(hosts)


def test_interface_name_is_the_one_calico_would_give() -> None:
    """``cali`` and the first eleven hexadecimal digits of SHA-1 of namespace.pod."""
    assert POD.parent_interface == "calie5796fb08ef"
    assert NODE.parent_interface == "up0"


def test_a_pod_hears_of_the_world_through_its_gateway_only() -> None:
    """A pod has its own addresses as /32 and /128 and one default route per family."""
    assert lines_of(Plan([ROOT, NODE, POD]), "shop/front-end") == [
        "link set lo up",
        "link set eth0 up",
        "address add 10.244.1.10/32 dev eth0",
        "address add fd00:10::a/128 dev eth0 nodad",
        "-4 route add default via 169.254.1.1 dev eth0 onlink src 10.244.1.10",
        "-6 route add default via fe80::1 dev eth0 onlink src fd00:10::a",
    ]


def test_routes_to_what_lies_behind_a_child_go_through_the_child() -> None:
    """The root reaches a pod by way of the node, and the node reaches it on the link."""
    plan = Plan([ROOT, NODE, POD])
    assert "-4 route add 10.244.1.10/32 via 172.30.0.10 onlink dev up0 src 192.0.2.1" in lines_of(plan, "internet")
    assert f"-4 route add 10.244.1.10/32 dev {POD.parent_interface} src 172.30.0.10" in lines_of(plan, "node")


def test_every_interface_is_born_inside_a_namespace_of_the_plan() -> None:
    """A veth pair is made in the parent's namespace with its other end in the child's."""
    plan = Plan([ROOT, NODE, POD])
    links = [line for name in plan.hosts for line in lines_of(plan, name) if line.startswith("link add")]
    assert len(links) == 2
    assert all(
        f" peer name eth0 netns t-{child}" in line for line, child in zip(links, ["node", POD.name], strict=True)
    )


def test_owner_finds_the_host_of_an_address() -> None:
    """An address of the plan leads to its host, any other to None."""
    plan = Plan([ROOT, NODE, POD])
    assert plan.owner(ip_address("fd00:10::a")) == "shop/front-end"
    assert plan.owner(ip_address("10.9.9.9")) is None


def test_without_root_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear error, before any process is started."""
    monkeypatch.setattr(laboratory.os, "geteuid", lambda: 1000)
    with pytest.raises(PrivilegeError, match="needs root"):
        Lab([ROOT]).build()


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint says what to install."""
    monkeypatch.setattr(laboratory.os, "geteuid", lambda: 0)
    monkeypatch.setattr(laboratory.shutil, "which", lambda _: None)
    with pytest.raises(PlatformError, match="ip is not installed") as caught:
        Lab([ROOT]).build()
    assert "iproute2" in caught.value.hint


def test_a_laboratory_that_does_not_run_says_so() -> None:
    """Attempts before building are an error, not a row of denials."""
    with pytest.raises(PlatformError, match="not running"):
        Lab([ROOT]).attempt([])


def test_the_interfaces_of_a_host_are_its_own_and_one_for_each_child() -> None:
    """The loopback and whatever else the kernel puts into a namespace are not among them."""
    plan = Plan([ROOT, NODE, POD])
    assert plan.interfaces("internet") == {"up0"}
    assert plan.interfaces("node") == {"eth0", POD.parent_interface}
    assert plan.interfaces("shop/front-end") == {"eth0"}
