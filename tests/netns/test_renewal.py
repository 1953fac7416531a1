# SPDX-License-Identifier: Apache-2.0
"""The exchange of a set of maps and programs by both mechanisms, also if it is killed half-way; and removal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pytest

from netpol_ebpf.errors import LoadError
from netpol_loader import abi
from netpol_loader.host import clsact
from netpol_loader.host.links import list_links
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins import attach
from netpol_loader.pins.attach import Mechanism
from netpol_loader.pins.dataplane import Dataplane
from netpol_loader.pins.programs import CURRENT, NEW, OLD
from netpol_loader.pins.removal import find_leftovers
from netpol_loader.pins.renewal import Renewal
from netpol_loader.pins.upgrade import open_dataplane

pytestmark = pytest.mark.netns

T = TypeVar("T")
FRESH = ("np_addr4", "np_verdict")
SIZES = {
    **{name: 64 for name in ("np_conn4", "np_conn6", "np_frag4", "np_frag6")},
    "np_addr4": 100, "np_verdict": 100,
}  # fmt: skip
KEY, OLD_ROW, NEW_ROW = bytes([1, 2, 3, 4]), bytes([1] * 8), bytes([2] * 8)


@dataclass
class Node:
    """A network namespace with an interface for each mechanism, and a thread in it."""

    thread: ThreadPoolExecutor
    ifindexes: dict[Mechanism, int]
    root: Path

    def do(self, work: Callable[[], T]) -> T:
        """Call a function in the namespace."""
        return self.thread.submit(work).result()

    @contextlib.contextmanager
    def renewal(self, dataplane: Dataplane, sizes: dict[str, int] | None = None) -> Iterator[Renewal]:
        """A renewal that begins and ends in the namespace."""
        one = self.do(Renewal(dataplane, FRESH, sizes).__enter__)
        try:
            yield one
        finally:
            self.do(one.__exit__)

    def attach(self, dataplane: Dataplane) -> None:
        """Attach programs to each interface, by its mechanism."""

        def work() -> None:
            for mechanism, ifindex in self.ifindexes.items():
                attach.attach(ifindex, dataplane, mechanism)

        self.do(work)

    def programs(self) -> set[tuple[Hook, Mechanism, int]]:
        """The programs on the interfaces by the kernel's report: tcx by pinned links, clsact by filter names."""
        ifindex = self.ifindexes[Mechanism.CLSACT]
        found = {(one.hook, Mechanism.CLSACT, one.prog_id) for one in self.do(lambda: clsact.our_filters(ifindex))}
        for pin in self.root.glob("v*/links/*_in"), self.root.glob("v*/links/*_out"):
            for path in pin:
                fd = syscall.obj_get(path)
                info = syscall.link_info(fd)
                os.close(fd)
                hook = Hook.TC_INGRESS if info.attach_type == syscall.TCX_INGRESS else Hook.TC_EGRESS
                found.add((hook, Mechanism.TCX, info.prog_id))
        return found


def enter(name: str) -> None:
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(fd)


@pytest.fixture
def node() -> Iterator[Node]:
    name = f"npr{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1"], check=True)
        with ThreadPoolExecutor(1) as thread:
            thread.submit(enter, name).result()
            links = {link.name: link.ifindex for link in thread.submit(list_links).result()}
            ifindexes = {Mechanism.TCX: links["v0"], Mechanism.CLSACT: links["v1"]}
            one = Node(thread, ifindexes, Path(f"/sys/fs/bpf/netpol-test-{name}"))
            yield one
            for leftover in one.do(lambda: find_leftovers(one.root)):  # left by a failed test
                one.do(leftover.remove)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def dataplane(node: Node) -> Iterator[Dataplane]:
    one = node.do(lambda: Dataplane.open(node.root, sizes=SIZES))
    one.maps["np_addr4"].put(KEY, OLD_ROW)
    one.maps["np_conn4"].put(bytes(20), bytes(24))
    yield one
    node.do(one.remove)
    assert not node.root.exists()


def ids(dataplane: Dataplane) -> set[int]:
    return {syscall.prog_info(dataplane.program_fd(hook)).id for hook in Hook}


def test_exchange_gives_every_interface_the_new_programs_and_keeps_what_is_shared(
    node: Node, dataplane: Dataplane
) -> None:
    """The new maps are in force and pinned, the connections are the same map, and the old programs are gone."""
    node.attach(dataplane)
    before, connections = ids(dataplane), syscall.map_info(dataplane.maps["np_conn4"].fd).id
    with node.renewal(dataplane, {"np_addr4": 7, "np_conn4": 9}) as renewal:
        assert dict(renewal.maps["np_addr4"].items()) == {}
        renewal.maps["np_addr4"].put(KEY, NEW_ROW)
        assert dict(dataplane.maps["np_addr4"].items()) == {KEY: OLD_ROW}
        assert {one[2] for one in node.programs()} == before
        node.do(renewal.take_over)
    assert {one[2] for one in node.programs()} == ids(dataplane)
    assert not before & ids(dataplane)
    assert {one[:2] for one in node.programs()} == {(hook, mechanism) for hook in Hook for mechanism in Mechanism}
    again = node.do(lambda: Dataplane.open(node.root))
    for one in (dataplane, again):
        assert dict(one.maps["np_addr4"].items()) == {KEY: NEW_ROW}
        assert (one.maps["np_addr4"].max_entries, one.maps["np_conn4"].max_entries) == (7, 64)
        assert syscall.map_info(one.maps["np_conn4"].fd).id == connections
    again.close()
    assert [path.name for path in node.root.iterdir()] == [f"v{abi.SCHEMA_VERSION}"]
    assert [path.name for path in dataplane.pin_dir.glob("programs*")] == [CURRENT]
    assert not {path.name for path in (dataplane.pin_dir / CURRENT).iterdir()} & abi.MAP_SPECS.keys()


def test_renewal_that_is_not_taken_over_changes_nothing(node: Node, dataplane: Dataplane) -> None:
    """A renewal that does not take over, or cannot be built, leaves the set in force and nothing else."""
    node.attach(dataplane)
    before = (node.programs(), sorted(node.root.rglob("*")))
    with node.renewal(dataplane) as renewal:
        renewal.maps["np_addr4"].put(KEY, NEW_ROW)
    assert (node.programs(), sorted(node.root.rglob("*"))) == before
    with pytest.raises(LoadError), node.renewal(dataplane, {"np_addr4": 1 << 31}):
        pass
    assert (node.programs(), sorted(node.root.rglob("*"))) == before
    assert dict(dataplane.maps["np_addr4"].items()) == {KEY: OLD_ROW}


def test_exchange_that_was_killed_is_finished_by_the_next(
    node: Node, dataplane: Dataplane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process dies after the programs are pinned and before any interface has them.

    The next process finishes the exchange.
    """
    node.attach(dataplane)
    before = ids(dataplane)
    renewal = node.do(Renewal(dataplane, FRESH).__enter__)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attach, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            node.do(renewal.take_over)
    assert {one[2] for one in node.programs()} == before
    heir = node.do(lambda: Dataplane.open(node.root))
    with node.renewal(heir) as second:
        assert {one[2] for one in node.programs()} == ids(heir)
        node.do(second.take_over)
    assert {one[2] for one in node.programs()} == ids(heir)
    assert not before & ids(heir)
    heir.close()
    again = node.do(lambda: Dataplane.open(node.root))
    assert {one[2] for one in node.programs()} == ids(again)
    again.close()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_exchange_that_was_killed_between_two_renames_is_forgotten_or_finished(
    node: Node, dataplane: Dataplane, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Whichever rename was the last, the next process finds one whole set in force, with the maps of its programs."""
    node.attach(dataplane)
    before, rename = ids(dataplane), Path.rename

    def rename_some(path: Path, target: Path) -> Path:
        nonlocal steps
        if path.name == CURRENT or target.name in (NEW, CURRENT):
            if steps == 0:
                raise KeyboardInterrupt
            steps -= 1
        return rename(path, target)

    is_begun = steps == 2
    renewal = node.do(Renewal(dataplane, FRESH).__enter__)
    renewal.maps["np_addr4"].put(KEY, NEW_ROW)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_some)
        with pytest.raises(KeyboardInterrupt):
            node.do(renewal.take_over)
    heir = node.do(lambda: Dataplane.open(node.root))
    assert {one[2] for one in node.programs()} == ids(heir)
    assert (ids(heir) == before) is not is_begun
    assert dict(heir.maps["np_addr4"].items()) == {KEY: NEW_ROW if is_begun else OLD_ROW}
    assert [path.name for path in heir.pin_dir.glob("programs*")] == [CURRENT]
    heir.close()


def test_everything_found_is_removed_by_name(node: Node) -> None:
    """Removal names the link or filter of each hook, maps, programs and directories, and restores the interface."""
    dataplane = node.do(lambda: Dataplane.open(node.root, sizes=SIZES))
    node.attach(dataplane)
    (dataplane.pin_dir / OLD).mkdir()
    os.link(dataplane.pin_dir / CURRENT / Hook.TC_INGRESS.value, dataplane.pin_dir / OLD / Hook.TC_INGRESS.value)
    (node.root / "new-1").mkdir()
    dataplane.close()
    found = node.do(lambda: find_leftovers(node.root))
    kinds = [one.kind for one in found]
    assert (kinds.count("link"), kinds.count("filter"), kinds.count("qdisc")) == (2, 2, 1)
    assert kinds.count("program") == len(Hook) + len(abi.CALLS) + 1
    assert kinds.count("map") == len(abi.MAP_SPECS) + 2, "np_call is in the program set, np_layout has no declaration"
    assert all("v0" in one.name for one in found if one.kind == "link")
    assert all("v1" in one.name for one in found if one.kind in ("filter", "qdisc"))
    for one in found:
        node.do(one.remove)
    assert node.programs() == set()
    assert not node.do(lambda: clsact.is_on(node.ifindexes[Mechanism.CLSACT]))
    assert not node.root.exists()
    assert node.do(lambda: find_leftovers(node.root)) == []


def test_what_is_not_ours_stays(node: Node) -> None:
    """Directories of others below the root, and then the root itself, stay."""
    dataplane = node.do(lambda: Dataplane.open(node.root, sizes=SIZES))
    dataplane.close()
    (node.root / "others").mkdir()
    for one in node.do(lambda: find_leftovers(node.root)):
        node.do(one.remove)
    assert [path.name for path in node.root.iterdir()] == ["others"]
    (node.root / "others").rmdir()
    node.root.rmdir()


@pytest.mark.parametrize("dies_in", [(attach, "take_links"), (attach, "replace"), (shutil, "rmtree"), None])
def test_older_schema_killed_in_the_exchange_is_finished_by_the_next(
    node: Node, monkeypatch: pytest.MonkeyPatch, dies_in: tuple[ModuleType, str] | None
) -> None:
    """Both mechanisms change from an older schema to this one, in one step or in two. Connections are the same map."""
    with monkeypatch.context() as patch:
        patch.setattr(abi, "SCHEMA_VERSION", abi.SCHEMA_VERSION - 1)
        older = node.do(lambda: Dataplane.open(node.root, sizes=SIZES))
        for hook in Hook:  # the path of schema 5
            (older.pin_dir / CURRENT / hook.value).rename(older.pin_dir / hook.value)
        older.set_config(abi.np_config(generation=77, flags=abi.NP_CONFIG_KEEP_REVOKED, wildcard=5))
        node.attach(older)
        connections, before = syscall.map_info(older.maps["np_conn4"].fd).id, ids(older)
        older.close()
    dataplane, upgrade = node.do(lambda: open_dataplane(node.root, SIZES))
    assert upgrade is not None
    assert {one[2] for one in node.programs()} == before, "nothing is exchanged yet"
    assert node.do(upgrade.attached) == set(node.ifindexes.values())

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    if dies_in is None:
        node.do(upgrade.take_over)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(*dies_in, die)
            with pytest.raises(KeyboardInterrupt):
                node.do(upgrade.take_over)
        assert {one[:2] for one in node.programs()} == {(hook, mechanism) for hook in Hook for mechanism in Mechanism}
        dataplane.close()
        dataplane, again = node.do(lambda: open_dataplane(node.root))
        assert again is None
    assert {one[2] for one in node.programs()} == ids(dataplane)
    assert not before & ids(dataplane)
    assert syscall.map_info(dataplane.maps["np_conn4"].fd).id == connections
    config = dataplane.config()
    assert (config.generation, config.flags, config.wildcard) == (77, abi.NP_CONFIG_KEEP_REVOKED, 5)
    assert config.timeout_jiffies[abi.NP_CONN_UDP] > 0, "its own, not those of the older one"
    assert [path.name for path in node.root.iterdir()] == [f"v{abi.SCHEMA_VERSION}"]
    node.do(dataplane.remove)
    assert not node.do(lambda: clsact.is_on(node.ifindexes[Mechanism.CLSACT])), "whose it was is still known"
    assert not node.root.exists()


def test_older_schema_is_untouched_by_an_upgrade_that_does_not_happen(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade that is prepared and given up leaves the older pins, and nothing else."""
    with monkeypatch.context() as patch:
        patch.setattr(abi, "SCHEMA_VERSION", abi.SCHEMA_VERSION - 1)
        older = node.do(lambda: Dataplane.open(node.root, sizes=SIZES))
        node.attach(older)
        older.close()
    before = (node.programs(), sorted(node.root.rglob("*")))
    dataplane, upgrade = node.do(lambda: open_dataplane(node.root, SIZES))
    assert upgrade is not None
    dataplane.close()
    node.do(upgrade.discard)
    assert (node.programs(), sorted(node.root.rglob("*"))) == before
