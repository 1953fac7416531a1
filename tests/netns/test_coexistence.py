# SPDX-License-Identifier: Apache-2.0
"""Programs of others on the same interfaces, before ours and after it, through the whole life of an agent and its cleanup.

What another program does shows in what becomes of packets: it is switched between letting go on, letting pass, and dropping.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import CLUSTER, DB_POLICY, NODE, Scene, scene_in, to_db
from test_clsact import WITHOUT_TCX

from netpol_ebpf.lab.guard import NETNS_DIR
from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import plan_for
from netpol_ebpf.lab.topology import Host
from netpol_ebpf.resources.load import parse_documents
from netpol_loader import syscall

pytestmark = pytest.mark.netns

T = TypeVar("T")
GO_ON, PASS, DROP = -1, 0, 2
"""TCX_NEXT, TCX_PASS, TCX_DROP (linux/bpf.h)."""
DB_LINK = Host("shop/db", NODE, ()).parent_interface


@pytest.fixture(scope="module")
def pin_root() -> Path:
    return Path(f"/sys/fs/bpf/netpol-test-others-{os.getpid()}")


@pytest.fixture(scope="module")
def lab(pin_root: Path) -> Iterator[Lab]:
    with Lab(plan_for(parse_documents(CLUSTER, "cluster.yaml").check()), directories=[pin_root]) as one:
        yield one


@pytest.fixture
def scene(lab: Lab, tmp_path: Path, pin_root: Path) -> Iterator[Scene]:
    with scene_in(lab, tmp_path / "home", pin_root / "own") as one:
        yield one


def at_node(lab: Lab, work: Callable[[], T]) -> T:
    """Call something in the node's network namespace."""

    def body() -> T:
        with (NETNS_DIR / lab.namespace_of[NODE]).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        return work()

    with ThreadPoolExecutor(1) as thread:  # a thread of its own: this one stays where it is
        return thread.submit(body).result()


def program(verdict: int) -> int:
    """A program that says the same of every packet; its descriptor."""
    return syscall.prog_load(struct.pack("=BBhi", 0xB7, 0, 0, verdict) + struct.pack("=BBhi", 0x95, 0, 0, 0))


class Other:
    """Somebody else's tcx link where packets enter the database's pod."""

    def __init__(self, lab: Lab, stack: contextlib.ExitStack, flags: int = 0) -> None:
        self._programs = {verdict: program(verdict) for verdict in (GO_ON, PASS, DROP)}
        (link,) = json.loads(lab.run(NODE, ["ip", "-j", "link", "show", DB_LINK]).stdout)
        self._fd = at_node(
            lab, lambda: syscall.link_create(self._programs[GO_ON], link["ifindex"], syscall.TCX_EGRESS, flags)
        )
        for fd in (*self._programs.values(), self._fd):
            stack.callback(os.close, fd)

    def says(self, verdict: int) -> None:
        """What it says of packets from now on. The kernel has done so when this returns."""
        syscall.link_update(self._fd, self._programs[verdict])

    @property
    def ifindex(self) -> int:
        """Where it is attached; 0: nowhere."""
        return syscall.link_info(self._fd).ifindex


def test_tcx_programs_of_others_run_before_and_after_ours(scene: Scene) -> None:
    """None is removed or moved, and none that was there before lets anything past policy, whatever happens to the agent."""
    allowed, denied = to_db("shop/web"), to_db("shop/other")
    with contextlib.ExitStack() as stack:
        before = Other(scene.lab, stack)
        scene.start()
        after = Other(scene.lab, stack)
        place = before.ifindex

        def both_run() -> None:
            for other in (before, after):
                assert scene.reached(allowed, denied) == [True, False]
                other.says(DROP)
                assert scene.reached(allowed) == [False]
                other.says(PASS)
                assert scene.reached(allowed, denied) == [True, False], "policy is asked all the same"
                other.says(GO_ON)

        both_run()
        scene.kill()
        scene.start()
        both_run()
        scene.write("db.yaml", DB_POLICY.replace("app: web", "app: other"))
        scene.await_reached(denied, expected=True)
        scene.retire()
        assert (before.ifindex, after.ifindex) == (place, place)
        for other in (before, after):
            other.says(DROP)
            assert scene.reached(allowed) == [False]
            other.says(GO_ON)
        assert scene.reached(allowed, denied) == [True, True]


def test_program_that_is_put_before_ours_is_told(scene: Scene) -> None:
    """Root may do so; the status warns, naming the interface, until it is gone."""
    scene.start()
    with contextlib.ExitStack() as stack:
        Other(scene.lab, stack)
        overtaking = Other(scene.lab, stack, syscall.BPF_F_BEFORE)
        state = scene.await_status(lambda state: bool(state["problems"]), "a warning")
        assert [(one["slug"], one["severity"]) for one in state["problems"]] == [("overtaken", "error")]
        assert DB_LINK in state["problems"][0]["message"]
        assert overtaking.ifindex
    scene.await_status(lambda state: not state["problems"], "no warning any more")


@pytest.mark.parametrize("is_tcx", [True, False], ids=["tcx", "clsact"])
def test_filters_of_others_run_after_ours(lab: Lab, tmp_path: Path, pin_root: Path, *, is_tcx: bool) -> None:
    """A discipline and a filter that were there before stay, and get what policy lets pass, with our program of either kind."""

    def others_say(verdict: int) -> None:
        rule = ["prio", "50", "handle", "1", "bpf", "direct-action", "bytecode", f"1,6 0 0 {verdict}"]
        lab.run(NODE, ["tc", "filter", "replace", "dev", DB_LINK, "egress", *rule])

    lab.run(NODE, ["tc", "qdisc", "add", "dev", DB_LINK, "clsact"])
    try:
        others_say(PASS)
        entry = {} if is_tcx else {"entry": ("-c", WITHOUT_TCX)}
        with scene_in(lab, tmp_path / "home", pin_root / "filters", **entry) as scene:
            for _ in range(2):
                scene.start()
                assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
                others_say(DROP)
                assert scene.reached(to_db("shop/web")) == [False]
                others_say(PASS)
                scene.kill()
        assert scene.reached(to_db("shop/other")) == [True]
        others_say(DROP)
        assert scene.reached(to_db("shop/other")) == [False]
        assert "clsact" in lab.run(NODE, ["tc", "qdisc", "show", "dev", DB_LINK]).stdout
    finally:
        lab.run(NODE, ["tc", "qdisc", "del", "dev", DB_LINK, "clsact"])
