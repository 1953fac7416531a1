# SPDX-License-Identifier: Apache-2.0
"""Programs of others on the same interfaces, before and after ours, during the life of an agent and its cleanup.

The verdict of another program can be switched between continue, pass and drop. Real packets show whether it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import DB_POLICY, NODE, Scene, scene_in, to_db
from border_scene import NARROW, OPEN_PORT, border, datagram, ear, framed, inside, put, say, station, token
from test_clsact import WITHOUT_TCX

from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.topology import Host
from netpol_loader.host.netlink import RouteChannel, attribute, nested
from netpol_loader.kernel import relocation, syscall

pytestmark = pytest.mark.netns

T = TypeVar("T")
GO_ON, PASS, DROP = -1, 0, 2
"""TCX_NEXT, TCX_PASS, TCX_DROP (linux/bpf.h)."""
DB_LINK, WEB_LINK = (Host(name, NODE, ()).parent_interface for name in ("shop/db", "shop/web"))
CLONE_REDIRECT, REDIRECT, REDIRECT_NEIGH, REDIRECT_PEER = 13, 23, 152, 155
"""Helpers (enum bpf_func_id)."""
XDP_PASS, ATTACH_XDP = 2, 37  # linux/bpf.h
SET_LINK, IFLA_XDP, IFLA_XDP_FD, IFLA_XDP_FLAGS, GENERIC = 19, 43, 1, 3, 2  # linux/rtnetlink.h, if_link.h


@pytest.fixture
def scene(lab: Lab, tmp_path: Path) -> Iterator[Scene]:
    with scene_in(lab, tmp_path / "home") as one:
        yield one


def program(verdict: int, program_type: int = syscall.PROG_TYPE_SCHED_CLS) -> int:
    """A program that calls a helper and returns the same verdict for each packet. Returns its descriptor."""
    return syscall.prog_load(COUNTS + one(0xB7, 0, verdict) + one(0x95, 0, 0), program_type)


def one(opcode: int, target: int, immediate: int) -> bytes:
    """Encode an instruction."""
    return relocation.INSTRUCTION.pack(opcode, relocation.packed(0, target), 0, immediate & 0xFFFF_FFFF)


COUNTS = one(relocation.CALL, 0, 5)  # bpf_ktime_get_ns


def redirecting(helper: int, target: int, program_type: int = syscall.PROG_TYPE_SCHED_CLS) -> int:
    """A program that redirects every packet to an interface. Returns its descriptor."""
    code = one(0xB7, 1, target) + one(0xB7, 2, 0) + one(relocation.CALL, 0, helper) + one(0x95, 0, 0)
    return syscall.prog_load(code, program_type, name="shortcut")


def number_of(lab: Lab, name: str) -> int:
    """The index of an interface."""
    (found,) = json.loads(lab.run(NODE, ["ip", "-j", "link", "show", name]).stdout)
    return int(found["ifindex"])


class Other:
    """A tcx link of another program where packets enter the database's pod."""

    def __init__(self, lab: Lab, stack: contextlib.ExitStack, flags: int = 0) -> None:
        self._programs = {verdict: program(verdict) for verdict in (GO_ON, PASS, DROP)}
        place = number_of(lab, DB_LINK)
        self._fd = inside(
            lab, NODE, lambda: syscall.link_create(self._programs[GO_ON], place, syscall.TCX_EGRESS, flags)
        )
        for fd in (*self._programs.values(), self._fd):
            stack.callback(os.close, fd)

    def says(self, verdict: int) -> None:
        """Set the verdict for the next packets. On return it is in force."""
        syscall.link_update(self._fd, self._programs[verdict])

    @property
    def ifindex(self) -> int:
        """The index of the interface to which it is attached; 0: none."""
        return syscall.link_info(self._fd).ifindex


def test_tcx_programs_of_others_run_before_and_after_ours(scene: Scene) -> None:
    """None is removed or moved, and an earlier one lets no packet bypass policy, whatever happens to the agent."""
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
    """Root may do so. Status warns and names the interface until the program is gone."""
    scene.start()
    with contextlib.ExitStack() as stack:
        Other(scene.lab, stack)
        overtaking = Other(scene.lab, stack, syscall.BPF_F_BEFORE)
        state = scene.await_status(lambda state: bool(state["problems"]), "a warning")
        assert [(one["slug"], one["severity"]) for one in state["problems"]] == [("overtaken", "error")]
        assert DB_LINK in state["problems"][0]["message"]
        assert overtaking.ifindex
    scene.await_status(lambda state: not state["problems"], "no warning any more")


def told(state: dict[str, Any]) -> set[tuple[str, str]]:
    """(kind, severity) of each problem."""
    return {(one["slug"], one["severity"]) for one in state["problems"]}


@pytest.mark.parametrize("mechanism", ["tcx", "clsact"])
@pytest.mark.parametrize("name", [WEB_LINK, "eth0"])
def test_program_behind_ours_that_redirects_is_told(scene: Scene, name: str, mechanism: str) -> None:
    """A redirect into a pod bypasses the pod's program.

    Status names interface and program, and fails until it is gone.
    """
    lab = scene.lab
    scene.start()
    fd, place = redirecting(REDIRECT_PEER, number_of(lab, DB_LINK)), number_of(lab, name)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        if mechanism == "tcx":
            attached = inside(lab, NODE, lambda: syscall.link_create(fd, place, syscall.TCX_INGRESS))
            stack.callback(os.close, attached)
        else:
            pin = lab.directories[0] / "shortcut"
            syscall.obj_pin(fd, pin)
            stack.callback(pin.unlink)
            lab.run(NODE, ["tc", "qdisc", "add", "dev", name, "clsact"])
            stack.callback(lab.run, NODE, ["tc", "qdisc", "del", "dev", name, "clsact"])
            lab.run(NODE, ["tc", "filter", "add", "dev", name, "ingress", "bpf", "da", "pinned", str(pin)])
        state = scene.await_status(lambda state: bool(state["problems"]), "a problem")
        assert told(state) == {("redirect", "error")}
        message = state["problems"][0]["message"]
        assert f"{name} {mechanism} ingress program {syscall.prog_info(fd).id} (shortcut)" in message
        assert scene.ctl("status", "--state-dir", str(scene.state_dir)).returncode == 1
    scene.await_status(lambda state: not state["problems"], "no problem any more")


def test_what_is_redirected_to_a_device_meets_policy_there(tmp_path: Path) -> None:
    """Of all redirects from TC, only the one into a pod bypasses the program there, so only that one is reported."""
    only_ingress = NARROW.replace("policyTypes: [Ingress, Egress]", "policyTypes: [Ingress]").partition("  egress:")[0]
    with border(tmp_path) as scene:
        lab = scene.lab
        put(scene, only_ingress)
        web, db, place = station(lab, "web"), station(lab, "db"), number_of(lab, DB_LINK)
        zeros = {number: one(0xB7, number, 0) for number in (2, 3, 4)}
        target, by_context = one(0xB7, 1, place), one(0xB7, 2, place)
        ways = {
            REDIRECT: target + zeros[2],
            CLONE_REDIRECT: by_context + zeros[3],
            REDIRECT_NEIGH: target + zeros[2] + zeros[3] + zeros[4],
            REDIRECT_PEER: target + zeros[2],
        }
        for helper, arguments in ways.items():
            result = one(0xB7, 0, DROP) if helper == CLONE_REDIRECT else b""
            with contextlib.ExitStack() as stack:
                fd = syscall.prog_load(arguments + one(relocation.CALL, 0, helper) + result + one(0x95, 0, 0))
                stack.callback(os.close, fd)
                at = number_of(lab, WEB_LINK)
                stack.callback(
                    os.close, inside(lab, NODE, lambda fd=fd, at=at: syscall.link_create(fd, at, syscall.TCX_INGRESS))
                )  # type: ignore[misc]
                denied, allowed = token(), token()
                listening = stack.enter_context(ear(lab, db.host))
                for port, mark in ((9999, denied), (OPEN_PORT, allowed)):
                    say(lab, web.host, framed(datagram(web.address[4], db.address[4], port, mark), web.mac, db.mac))
                is_past = helper == REDIRECT_PEER
                assert listening.heard([denied], allowed) == ({denied} if is_past else set()), helper
                if is_past:
                    state = scene.await_status(lambda state: bool(state["problems"]), "it is told")
                    assert told(state) == {("redirect", "error")}
        scene.await_status(lambda state: not state["problems"], "no problem any more")


@pytest.mark.parametrize("is_link", [True, False], ids=["link", "netlink"])
def test_xdp_programs_of_others_are_told(scene: Scene, *, is_link: bool) -> None:
    """An XDP program that redirects is an error. One that passes or drops is a warning, because it bypasses nothing."""
    lab = scene.lab
    scene.start()
    place = number_of(lab, WEB_LINK)

    def set_xdp(fd: int) -> None:
        options = attribute(IFLA_XDP_FD, struct.pack("=i", fd)) + attribute(IFLA_XDP_FLAGS, struct.pack("=I", GENERIC))
        with RouteChannel() as channel:
            channel.ask(SET_LINK, struct.pack("=BxHiII", 0, 0, place, 0, 0) + nested(IFLA_XDP, options))

    cases = {
        ("overtaken", "error"): redirecting(REDIRECT, number_of(lab, DB_LINK), syscall.PROG_TYPE_XDP),
        ("overtaken", "warning"): program(XDP_PASS, syscall.PROG_TYPE_XDP),
    }
    for expected, fd in cases.items():
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, fd)
            if is_link:
                stack.callback(
                    os.close, inside(lab, NODE, lambda fd=fd: syscall.link_create(fd, place, ATTACH_XDP, GENERIC))
                )  # type: ignore[misc]
            else:
                inside(lab, NODE, lambda fd=fd: set_xdp(fd))  # type: ignore[misc]
                stack.callback(inside, lab, NODE, lambda: set_xdp(-1))
            state = scene.await_status(lambda state: bool(state["problems"]), "it is told")
            assert told(state) == {expected}
            assert f"{WEB_LINK} XDP program {syscall.prog_info(fd).id}" in state["problems"][0]["message"]
            assert state["in_force"] == (expected[1] == "warning")
        scene.await_status(lambda state: not state["problems"], "no problem any more")


def test_program_of_others_that_only_counts_is_no_problem(scene: Scene) -> None:
    """It runs after ours, on either hook. Problems that are reported then are not about it."""
    lab = scene.lab
    scene.start()
    with contextlib.ExitStack() as stack:
        counting = program(GO_ON)
        stack.callback(os.close, counting)
        for name in (WEB_LINK, "eth0"):
            place = number_of(lab, name)
            for hook in (syscall.TCX_INGRESS, syscall.TCX_EGRESS):
                fd = inside(lab, NODE, lambda hook=hook, place=place: syscall.link_create(counting, place, hook))  # type: ignore[misc]
                stack.callback(os.close, fd)
        Other(lab, stack)
        Other(lab, stack, syscall.BPF_F_BEFORE)
        state = scene.await_status(lambda state: bool(state["problems"]), "a problem")
        assert told(state) == {("overtaken", "error")}
        (found,) = state["problems"]
        assert found["message"].count(" program ") == 1, "that before ours alone"


@pytest.mark.parametrize("is_tcx", [True, False], ids=["tcx", "clsact"])
def test_filters_of_others_run_after_ours(lab: Lab, tmp_path: Path, *, is_tcx: bool) -> None:
    """An earlier discipline and filter stay, and get the packets that policy allows, by either mechanism of ours."""

    def others_say(verdict: int) -> None:
        rule = ["prio", "50", "handle", "1", "bpf", "direct-action", "bytecode", f"1,6 0 0 {verdict}"]
        lab.run(NODE, ["tc", "filter", "replace", "dev", DB_LINK, "egress", *rule])

    lab.run(NODE, ["tc", "qdisc", "add", "dev", DB_LINK, "clsact"])
    try:
        others_say(PASS)
        entry = {} if is_tcx else {"entry": ("-c", WITHOUT_TCX)}
        with scene_in(lab, tmp_path / "home", **entry) as scene:
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
