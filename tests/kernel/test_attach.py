# SPDX-License-Identifier: Apache-2.0
"""Programs on real interfaces, by tcx and clsact, with real packets; and what rtnetlink reports."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import pyroute2
import pytest
from map_sizes import SIZES
from rig import ALLOW, DENY, ENDPOINT, Rig, everything

from netpol_ebpf.errors import PlatformError
from netpol_loader.host import clsact
from netpol_loader.host.follow import Follower, LinkChange
from netpol_loader.host.links import find_link, list_links
from netpol_loader.host.peers import MOST_ADDRESSES, load_peer_addresses
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins import attach, compilation
from netpol_loader.pins.attach import Mechanism
from netpol_loader.pins.dataplane import Dataplane
from netpol_loader.pins.drift import PartlyMendedError, mend_attachments
from netpol_loader.pins.others import Other, OtherPrograms, Reach

pytestmark = [pytest.mark.kernel, pytest.mark.netns]

T = TypeVar("T")
NODE4, POD4 = "10.99.0.1", "10.99.0.2"
NODE6, POD6 = "fd99::1", "fd99::2"
DEADLINE_S = 30.0
"""Limit for what takes milliseconds."""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass
class Pair:
    """A node and a pod, each a network namespace, and a veth pair between them."""

    node: str
    pod: str
    ifindex: int

    def inside(self, namespace: str, work: Callable[[], T]) -> T:
        """Call a function in a namespace."""

        def body() -> T:
            fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, 0) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(fd)
            return work()

        with ThreadPoolExecutor(1) as thread:  # a thread of its own: this one stays where it is
            return thread.submit(body).result()

    def at_node(self, work: Callable[[], T]) -> T:
        """Call a function in the node's namespace."""
        return self.inside(self.node, work)

    def comes_to_reach(self, address: str) -> bool:
        """As `arrives`, with retries: the kernel asks a silent neighbour again once a second."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := self.reaches(address)) and time.monotonic() < deadline:
            pass
        return found

    def reaches(self, address: str) -> bool:
        """Whether a datagram from the pod arrives at a socket of the node."""
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = self.at_node(lambda: socket.socket(kind, socket.SOCK_DGRAM))
        client = self.inside(self.pod, lambda: socket.socket(kind, socket.SOCK_DGRAM))
        with server, client:
            server.bind((address, 0))
            server.settimeout(0.3)
            client.sendto(b"hello", server.getsockname()[:2])
            try:
                return server.recv(100) == b"hello"
            except TimeoutError:
                return False


def await_link(namespace: str, name: str) -> dict[str, Any]:
    """An interface whose peer the kernel has noticed; it drops every earlier packet."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        (link,) = json.loads(run("ip", "-j", "-n", namespace, "link", "show", name))
        if link["operstate"] == "UP":
            return dict(link)
        time.sleep(0.02)
    raise AssertionError(f"{name} is not in operation within {DEADLINE_S:.0f} s")


@pytest.fixture
def pair() -> Iterator[Pair]:
    node, pod = f"npn{os.getpid()}", f"npp{os.getpid()}"
    try:
        for name in (node, pod):
            run("ip", "netns", "add", name)
        run("ip", "-n", node, "link", "add", "v0", "type", "veth", "peer", "name", "eth0", "netns", pod)
        for name, device, addresses in ((node, "v0", (NODE4, NODE6)), (pod, "eth0", (POD4, POD6))):
            run("ip", "-n", name, "link", "set", device, "up")
            run("ip", "-n", name, "addr", "add", f"{addresses[0]}/24", "dev", device)
            run("ip", "-n", name, "addr", "add", f"{addresses[1]}/64", "dev", device, "nodad")
        yield Pair(node, pod, await_link(node, "v0")["ifindex"])
    finally:
        for name in (node, pod):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


BOTH = pytest.mark.parametrize("mechanism", list(Mechanism))


@pytest.fixture
def node_rig(rig: Rig, pair: Pair) -> Iterator[Rig]:
    yield rig
    pair.at_node(lambda: attach.detach_all(rig.dataplane))


def allow(rig: Rig, ifindex: int, action: int) -> None:
    rig.endpoint(everything(1, action, 11), everything(2, action, 12), ifindex=ifindex)
    for address in (POD4, POD6):
        rig.address(address, 100, ENDPOINT)
    rig.dataplane.bump_generation()


@BOTH
def test_enforcement(node_rig: Rig, pair: Pair, mechanism: Mechanism) -> None:
    """An interface is closed until it has a row, then follows policy, and is open when detached; for both families."""
    dataplane = node_rig.dataplane
    assert pair.reaches(NODE4)
    pair.at_node(lambda: attach.attach(pair.ifindex, dataplane, mechanism))
    for action, expected in ((None, False), (ALLOW, True), (DENY, False)):
        if action is not None:
            allow(node_rig, pair.ifindex, action)
        look = pair.comes_to_reach if expected else pair.reaches
        assert [look(address) for address in (NODE4, NODE6)] == [expected, expected], action
    assert pair.at_node(lambda: attach.detach(pair.ifindex, dataplane))
    assert pair.reaches(NODE4)
    assert pair.reaches(NODE6)


@BOTH
def test_attaching_twice_is_attaching_once(node_rig: Rig, pair: Pair, mechanism: Mechanism) -> None:
    """A second detachment reports that there was nothing to detach."""
    dataplane = node_rig.dataplane
    for _ in range(2):
        pair.at_node(lambda: attach.attach(pair.ifindex, dataplane, mechanism))
    found = pair.at_node(lambda: attach.attached(pair.ifindex, dataplane))
    assert {one.hook for one in found} == set(Hook)
    assert len(found) == 2
    for one in found:
        assert one.mechanism is mechanism
        assert one.prog_id == syscall.prog_info(dataplane.program_fd(one.hook)).id
    assert pair.at_node(lambda: attach.attachments(dataplane)) == found
    assert pair.at_node(lambda: attach.detach(pair.ifindex, dataplane))
    assert not pair.at_node(lambda: attach.detach(pair.ifindex, dataplane))
    assert pair.at_node(lambda: attach.attachments(dataplane)) == ()
    assert list((dataplane.pin_dir / "links").iterdir()) == []
    assert "clsact" not in run("tc", "-n", pair.node, "qdisc", "show", "dev", "v0")


def test_existing_attachment_keeps_its_mechanism(node_rig: Rig, pair: Pair) -> None:
    """Another preferred mechanism neither doubles nor moves an attachment."""
    dataplane = node_rig.dataplane
    pair.at_node(lambda: attach.attach(pair.ifindex, dataplane, Mechanism.CLSACT))
    pair.at_node(lambda: attach.attach(pair.ifindex, dataplane))
    assert {one.mechanism for one in pair.at_node(lambda: attach.attached(pair.ifindex, dataplane))} == {
        Mechanism.CLSACT
    }


def test_preferred_mechanism(node_rig: Rig, pair: Pair) -> None:
    """Tcx is preferred if the kernel has it (6.6 and newer); the question attaches nothing."""
    release = tuple(map(int, os.uname().release.split(".")[:2]))
    expected = Mechanism.TCX if release >= (6, 6) else Mechanism.CLSACT
    assert pair.at_node(lambda: attach.preferred_mechanism(node_rig.dataplane)) is expected
    assert pair.at_node(lambda: attach.attachments(node_rig.dataplane)) == ()


def test_clsact_of_others_stays(node_rig: Rig, pair: Pair) -> None:
    """An existing clsact discipline and another party's filter stay."""
    dataplane = node_rig.dataplane
    run("tc", "-n", pair.node, "qdisc", "add", "dev", "v0", "clsact")

    def put_another() -> None:
        with pyroute2.IPRoute() as route:
            route.tc(
                "add-filter", "bpf", index=pair.ifindex, parent=clsact.PARENTS[Hook.TC_INGRESS], prio=50,
                fd=dataplane.program_fd(Hook.TC_EGRESS), name="somebody", direct_action=True,
            )  # fmt: skip

    pair.at_node(put_another)
    pair.at_node(lambda: attach.attach(pair.ifindex, dataplane, Mechanism.CLSACT))
    pair.at_node(lambda: attach.detach(pair.ifindex, dataplane))
    assert "somebody" in run("tc", "-n", pair.node, "filter", "show", "dev", "v0", "ingress")
    run("tc", "-n", pair.node, "filter", "del", "dev", "v0", "ingress")
    pair.at_node(lambda: attach.attach(pair.ifindex, dataplane, Mechanism.CLSACT))
    pair.at_node(lambda: attach.detach(pair.ifindex, dataplane))
    assert "clsact" in run("tc", "-n", pair.node, "qdisc", "show", "dev", "v0"), "not ours to remove"


def test_ingress_discipline_of_others_is_no_clsact(node_rig: Rig, pair: Pair) -> None:
    """If an interface has the ingress discipline, which would run both programs at ingress, attaching is an error."""
    run("tc", "-n", pair.node, "qdisc", "add", "dev", "v0", "ingress")
    with pytest.raises(PlatformError, match="has an ingress queueing discipline of somebody else"):
        pair.at_node(lambda: attach.attach(pair.ifindex, node_rig.dataplane, Mechanism.CLSACT))
    assert run("tc", "-n", pair.node, "filter", "show", "dev", "v0", "ingress") == ""
    assert pair.reaches(NODE4)


def test_mending_goes_on_after_an_interface_that_cannot_be_mended(
    node_rig: Rig, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error reports the failed interface together with the repairs of the others."""
    dataplane, real = node_rig.dataplane, attach.attach

    def refuse_lo(ifindex: int, dataplane: Dataplane) -> None:
        if ifindex == 1:
            raise PlatformError("not this one")
        real(ifindex, dataplane)

    monkeypatch.setattr(attach, "attach", refuse_lo)
    with pytest.raises(PartlyMendedError, match="not this one") as caught:
        pair.at_node(lambda: mend_attachments(dataplane, [1, pair.ifindex, 9999]))
    assert [one.where for one in caught.value.found] == [f"{hook.value} of interface {pair.ifindex}" for hook in Hook]
    assert not pair.reaches(NODE4)


def test_links_that_cannot_be_pinned_are_a_clear_error(node_rig: Rig, pair: Pair) -> None:
    """If a file is in place of the directory of links, the error names its path and the interface stays as it was."""
    links = node_rig.dataplane.pin_dir / "links"
    shutil.rmtree(links)
    os.link(node_rig.dataplane.pin_dir / "np_rule", links)
    try:
        with pytest.raises(
            PlatformError, match="cannot record in .*/links that np_tc_ingress is attached to interface"
        ):
            pair.at_node(lambda: attach.attach(pair.ifindex, node_rig.dataplane))
    finally:
        links.unlink()
        links.mkdir()
    assert pair.reaches(NODE4)


@BOTH
def test_interface_that_goes_while_it_is_detached_is_no_error(
    node_rig: Rig, pair: Pair, mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the interface went, so did its programs; if it is still there, the error reports the failure."""
    dataplane = node_rig.dataplane
    pair.at_node(lambda: attach.attach(pair.ifindex, dataplane, mechanism))
    real_detach = attach._detach

    def refuse(_one: attach.Attachment, _dataplane: Dataplane) -> None:
        raise OSError(16, "Device or resource busy")

    def lose_first(one: attach.Attachment, dataplane: Dataplane) -> None:
        subprocess.run(["ip", "link", "del", "v0"], check=False, capture_output=True)
        real_detach(one, dataplane)

    monkeypatch.setattr(attach, "_detach", refuse)
    with pytest.raises(
        PlatformError, match=f"from interface {pair.ifindex}, where it goes on enforcing: Device or resource busy"
    ):
        pair.at_node(lambda: attach.detach(pair.ifindex, dataplane))
    assert not pair.reaches(NODE4)
    monkeypatch.setattr(attach, "_detach", lose_first)
    assert pair.at_node(lambda: attach.detach(pair.ifindex, dataplane))
    assert pair.at_node(lambda: attach.attachments(dataplane)) == ()


def test_interface_that_went_is_forgotten(node_rig: Rig, pair: Pair) -> None:
    """A link's pin without its interface is no attachment, and prune removes it."""
    dataplane = node_rig.dataplane
    pair.at_node(lambda: attach.attach(pair.ifindex, dataplane, Mechanism.TCX))
    run("ip", "-n", pair.node, "link", "del", "v0")
    assert pair.at_node(lambda: attach.attachments(dataplane)) == ()
    assert list((dataplane.pin_dir / "links").iterdir()) != []
    pair.at_node(lambda: attach.prune(dataplane))
    assert list((dataplane.pin_dir / "links").iterdir()) == []


@BOTH
def test_missing_interface(node_rig: Rig, pair: Pair, mechanism: Mechanism) -> None:
    """Attaching to a missing interface is a clear error."""
    with pytest.raises(PlatformError, match="interface 9999"):
        pair.at_node(lambda: attach.attach(9999, node_rig.dataplane, mechanism))


@BOTH
def test_program_is_exchanged_where_it_is_attached(
    pair: Pair, mechanism: Mechanism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new build replaces the old one on every interface; rows stay, so enforcement continues."""
    root = Path(f"/sys/fs/bpf/netpol-own-{os.getpid()}")
    sources = tmp_path / "bpf"
    shutil.copytree(compilation.source_dir(), sources)
    try:
        with Dataplane.open(root, sizes=SIZES) as before:
            pair.at_node(lambda: attach.attach(pair.ifindex, before, mechanism))
            old = {one.prog_id for one in pair.at_node(lambda: attach.attached(pair.ifindex, before))}
        header = sources / "np_endpoint.h"
        header.write_text(header.read_text().replace("NP_ENDPOINT_TRIES 4", "NP_ENDPOINT_TRIES 3"))
        monkeypatch.setattr(compilation, "source_dir", lambda: sources)
        with pair.at_node(lambda: Dataplane.open(root)) as after:
            found = pair.at_node(lambda: attach.attached(pair.ifindex, after))
            assert {one.mechanism for one in found} == {mechanism}
            assert {one.prog_id for one in found} == {syscall.prog_info(after.program_fd(hook)).id for hook in Hook}
            assert not {one.prog_id for one in found} & old
            assert not pair.reaches(NODE4), "still closed"
            pair.at_node(after.remove)
        assert pair.comes_to_reach(NODE4)
        assert not root.exists()
    finally:
        shutil.rmtree(root, ignore_errors=True)


# --- rtnetlink --------------------------------------------------------------------------------------------------------


def test_links_addresses_routes(pair: Pair) -> None:
    """The lists have interfaces, addresses and single-address routes as the kernel has them."""
    run("ip", "-n", pair.node, "route", "add", "10.98.0.7/32", "dev", "v0")
    run("ip", "-n", pair.node, "route", "add", "fd98::7/128", "dev", "v0")
    link = pair.at_node(lambda: find_link("v0"))
    assert link is not None
    assert (link.ifindex, link.kind, link.is_up) == (pair.ifindex, "veth", True)
    assert pair.at_node(lambda: find_link(pair.ifindex)) == link
    assert link in pair.at_node(list_links)
    for nothing in ("nothing", "a name that is too long", 99_999):
        assert pair.at_node(lambda one=nothing: find_link(one)) is None  # type: ignore[misc]
    with pair.at_node(Follower) as follower:
        addresses, routes = follower.addresses, follower.host_routes
    assert addresses[ip_address(NODE4)] == addresses[ip_address(NODE6)] == pair.ifindex
    assert routes[ip_address("10.98.0.7")] == routes[ip_address("fd98::7")] == pair.ifindex
    assert ip_address(NODE4) not in routes


def test_addresses_behind_a_veth(pair: Pair) -> None:
    """The node reads the addresses of the pod's end of the pair without entering the pod's namespace."""
    link = pair.at_node(lambda: find_link("v0"))
    assert link is not None
    assert link.peer_nsid is not None
    peer = (link.peer_nsid, link.peer_ifindex)
    found = pair.at_node(lambda: load_peer_addresses([peer]))
    assert found.keys() == {peer}, "not those of the loopback there"
    assert {ip_address(POD4), ip_address(POD6)} <= set(found[peer])
    nowhere = [(4242, link.peer_ifindex), (link.peer_nsid, 4242)]
    assert pair.at_node(lambda: load_peer_addresses(nowhere)) == {}, "no such namespace, no such interface"


def test_addresses_behind_a_veth_are_read_to_a_bound(pair: Pair) -> None:
    """Of too many IPv4 addresses the oldest are read; of IPv6, which the kernel lists from the newest on, none."""
    link = pair.at_node(lambda: find_link("v0"))
    assert link is not None
    assert link.peer_nsid is not None
    peer = (link.peer_nsid, link.peer_ifindex)
    first = pair.at_node(lambda: load_peer_addresses([peer]))[peer]
    few, many = range(10), range(10, 2 * MOST_ADDRESSES)

    def add(numbers: range) -> None:
        lines = [
            f"address add 10.97.{one >> 8}.{one & 255}/32 dev eth0\naddress add fd97::{one:x}/128 dev eth0"
            for one in numbers
        ]
        subprocess.run(["ip", "-n", pair.pod, "-batch", "-"], input="\n".join(lines), text=True, check=True)

    add(few)
    assert len(pair.at_node(lambda: load_peer_addresses([peer]))[peer]) == len(first) + 2 * len(few), "all of a few"
    add(many)
    found = pair.at_node(lambda: load_peer_addresses([peer]))[peer]
    assert len(found) == MOST_ADDRESSES
    assert {one.version for one in found} == {4}
    assert found[0] == ip_address(POD4)


def test_interface_s_name_may_be_any_bytes(pair: Pair) -> None:
    """An interface's name that is not text has a readable form, in the list and in notifications alike."""
    wild = b"v\xff\xfe"

    def rename() -> list[LinkChange] | None:
        with Follower() as follower:
            subprocess.run([b"ip", b"link", b"set", b"v0", b"name", wild], check=True)
            return follower.poll()

    news = pair.at_node(rename)
    assert news
    assert {one.link.name for one in news} == {"v\\xff\\xfe"}
    link = pair.at_node(lambda: find_link(pair.ifindex))
    assert link is not None
    assert link.name == "v\\xff\\xfe"


@pytest.mark.parametrize(("priority", "is_first"), [("50", False), ("1", True)])
def test_filter_of_others_beside_ours_is_told_with_its_place(
    pair: Pair, dataplane: Dataplane, priority: str, *, is_first: bool
) -> None:
    """A later clsact filter of equal priority runs first and is reported so; it is forgotten with its interface."""
    pair.at_node(lambda: attach.attach(pair.ifindex, dataplane, Mechanism.CLSACT))
    fd = syscall.prog_load(struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0), name="another")
    pin = dataplane.pin_dir / "another"
    syscall.obj_pin(fd, pin)
    others = OtherPrograms()

    def look() -> list[Other]:
        return pair.at_node(lambda: others.look([pair.ifindex], [pair.ifindex], dataplane))

    try:
        assert look() == [], "ours are none of others"
        rule = ["pref", priority, "protocol", "all", "bpf", "direct-action", "pinned", str(pin)]
        run("nsenter", f"--net=/run/netns/{pair.node}", "tc", "filter", "add", "dev", "v0", "ingress", *rule)
        number = syscall.prog_info(fd).id
        expected = Other(pair.ifindex, "clsact ingress", number, "another", is_first, Reach.NONE)
        assert look() == look() == [expected]
        run("ip", "-n", pair.node, "link", "del", "v0")
        assert look() == []
    finally:
        pin.unlink()
        os.close(fd)
