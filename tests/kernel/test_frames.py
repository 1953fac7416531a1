# SPDX-License-Identifier: Apache-2.0
"""Programs on real frames over a veth pair: what they see, what becomes of the frame, and the kernel engine on top."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import packets as p
import pytest
from rig import (
    ALLOW,
    DENY,
    ENDPOINT,
    MARK_SHIFT,
    PEER4,
    PEER6,
    PEER_IDENTITY,
    POD4,
    POD6,
    POD_IDENTITY,
    Rig,
    everything,
)

from netpol_ebpf.apply import kernel_engine
from netpol_ebpf.apply.kernel_engine import KernelEngine, NotJudgedError, open_runner
from netpol_ebpf.cases import runner as case_runner
from netpol_ebpf.cases.case import load_cases
from netpol_ebpf.cases.engines import Engine, open_engine
from netpol_ebpf.errors import PlatformError
from netpol_ebpf.policy.translate import derive
from netpol_ebpf.policy.types import ICMPV6, TCP, Direction, EndpointKey, Outcome, Packet, Question, Stage
from netpol_ebpf.resources.load import parse_documents
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins import frames
from netpol_loader.pins.dataplane import SKB_IFINDEX, SKB_INGRESS_IFINDEX, SKB_MARK, Dataplane, TestRun
from netpol_loader.pins.frames import FrameRunner, can_name_ingress

pytestmark = [pytest.mark.kernel, pytest.mark.netns]

REPOSITORY = Path(__file__).parent.parent.parent
DEADLINE_S = 30.0
POLL_S = 0.02
BPF_PROG_GET_FD_BY_ID = 13
IN, OUT = Hook.TC_INGRESS, Hook.TC_EGRESS
NODE, ELSEWHERE, ITSELF = "node", "elsewhere", "endpoint"

PASS, PASS_ALONE, DROP = abi.NP_PASS, abi.NP_PASS_ALONE, abi.NP_DROP
VERDICTS = {0: PASS_ALONE, 1: PASS, 2: DROP}
"""What the probe does with a frame, by the mark that it comes with."""


def probe() -> bytes:
    """A program that writes the numbers of both interfaces above the mark, and takes its verdict from the mark."""
    step = frames._step
    move, shift, add, mask = 0xBF, 0x67, 0x0F, 0x57
    return b"".join((
        step(frames.LOAD_32, 0, 1, SKB_MARK),
        step(frames.LOAD_32, 2, 1, SKB_INGRESS_IFINDEX),
        step(shift, 2, number=8),
        step(frames.LOAD_32, 3, 1, SKB_IFINDEX),
        step(shift, 3, number=16),
        step(add, 2, 3),
        step(add, 2, 0),
        step(frames.STORE_32, 1, 2, SKB_MARK),
        step(move, 1, 0),
        step(mask, 0, number=2),
        step(frames.JUMP_IF_NOT, 1, offset=1, number=1),
        step(frames.MOVE, 0, number=PASS),
        step(frames.EXIT),
    ))  # fmt: skip


@contextmanager
def probe_runner() -> Iterator[tuple[FrameRunner, int]]:
    """A runner with the probe on both hooks, and the kernel's number of the probe, which only the runner's filters keep."""
    fd = syscall.prog_load(probe())
    try:
        number = syscall.prog_info(fd).id
        one = FrameRunner({hook: fd for hook in Hook})
    finally:
        os.close(fd)
    with one:
        yield one, number


@pytest.fixture(scope="module")
def runner() -> Iterator[FrameRunner]:
    with probe_runner() as (one, _):
        yield one


def ethernet(ethertypes: str, size: int = 64) -> bytes:
    """A frame with zeros after its header."""
    return bytes.fromhex("020000000001 020000000002" + ethertypes).ljust(size, b"\0")


def exists(program: int) -> bool:
    """Whether the kernel still has a program."""
    try:
        os.close(syscall._bpf(BPF_PROG_GET_FD_BY_ID, syscall._IdAttr(id=program)))
    except FileNotFoundError:
        return False
    return True


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(POLL_S)


FRAMES = {
    "ipv4": p.frame(POD4, PEER4, p.UDP, p.udp(1, 2)),
    "ipv6": p.frame(POD6, PEER6, p.UDP, p.udp(1, 2)),
    "arp": ethernet("0806"),
    "unknown": ethernet("88b5"),
    "to all": b"\xff" * 6 + ethernet("0806")[6:],
    "tag": ethernet("8100 0007 0800"),
    "two tags": ethernet("88a8 0007 8100 0008 86dd"),
    "priority tag, then a tag": ethernet("8100 0000 8100 0008 86dd"),
    "802.2": ethernet("0032 4242"),
    "802.3": ethernet("0032 ffff"),
    "short": ethernet("88b5", 15),
    "long": ethernet("88b5", frames.MOST_FRAME_BYTES),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize(
    ("hook", "origin"), [(IN, NODE), (OUT, NODE), (OUT, ELSEWHERE), (OUT, ITSELF)],
    ids=["in", "out from the node", "out from elsewhere", "out from itself"],
)  # fmt: skip
def test_program_sees_the_interfaces_and_decides(runner: FrameRunner, hook: Hook, origin: str, frame: bytes) -> None:
    """The program sees both interfaces' numbers and the earlier mark, and its verdict decides about the frame."""
    argument = {NODE: 0, ELSEWHERE: runner.elsewhere, ITSELF: runner.ifindex}[origin]
    seen = runner.ifindex if hook is IN else argument
    assert len({0, runner.elsewhere, runner.ifindex}) == 3
    for mark, verdict in VERDICTS.items():
        run = runner.run(hook, frame, ingress_ifindex=argument, ifindex=runner.ifindex, mark=mark)
        afterwards = 0 if verdict == DROP else runner.ifindex << 16 | seen << 8 | mark
        assert (run.verdict, run.mark, run.passed) == (verdict, afterwards, verdict != DROP)


def test_what_a_runner_cannot_do_is_an_error(runner: FrameRunner) -> None:
    """Other interfaces and sizes are rejected, and the runner goes on."""
    frame = FRAMES["ipv4"]
    for hook, ingress_ifindex, ifindex, sent in (
        (OUT, 0, 1, frame),
        (OUT, 77, runner.ifindex, frame),
        (IN, runner.elsewhere, runner.ifindex, frame),
        (OUT, 0, runner.ifindex, bytes(frames.MOST_FRAME_BYTES + 1)),
        (OUT, 0, runner.ifindex, bytes(13)),
    ):
        with pytest.raises(ValueError, match=r"interface|bytes"):
            runner.run(hook, sent, ingress_ifindex=ingress_ifindex, ifindex=ifindex)
    assert runner.run(OUT, frame, ifindex=runner.ifindex, mark=1).verdict == PASS


def test_lost_frame_is_an_error_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy the frame's fate is unknown; the runner closes, lest a late copy pass for another frame's."""
    monkeypatch.setattr(frames, "DEADLINE_S", 1)
    monkeypatch.setattr(frames, "_gate", lambda *_: frames._end(DROP))
    with probe_runner() as (one, _):
        assert one.run(OUT, FRAMES["ipv4"], ifindex=one.ifindex, mark=1).verdict == PASS  # passes no gate
        with pytest.raises(PlatformError, match="did not arrive"):
            one.run(IN, FRAMES["ipv4"], ifindex=one.ifindex)
        with pytest.raises(OSError, match="Bad file descriptor"):
            one.run(IN, FRAMES["ipv4"], ifindex=one.ifindex)


def test_more_than_the_one_frame_is_an_error() -> None:
    """The runner rejects more frames than the one it sent, because others' could pass for its own."""
    with probe_runner() as (one, _):
        with frames._opened(
            frames._load(frames._tap(one._board, outgoing=True), frames.PROG_TYPE_SOCKET_FILTER)
        ) as tap:
            one._socket(frames.ENDPOINT, frames.ETH_P_ALL, tap)
        assert one.run(OUT, FRAMES["ipv4"], ifindex=one.ifindex, mark=2).verdict == DROP
        with pytest.raises(PlatformError, match="2 left the hook"):
            one.run(OUT, FRAMES["ipv4"], ifindex=one.ifindex, mark=1)


def test_kernel_itself_sends_nothing_on_the_interfaces(runner: FrameRunner) -> None:
    """No interface has an address, and IPv6 is off on each, so the kernel sends nothing."""

    def read() -> tuple[str, list[str], list[str]]:
        addresses = Path("/proc/thread-self/net/if_inet6").read_text(encoding="ascii")
        interfaces = Path("/proc/thread-self/net/dev_snmp6").iterdir()
        devices = Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines()[2:]
        return addresses, sorted(path.name for path in interfaces), [line.partition(":")[0].strip() for line in devices]

    addresses, ipv6, devices = runner._namespace.call(read)
    ours = {name for pair in frames.PEERS.items() for name in pair}
    assert ours <= set(devices)
    assert (addresses, ours & set(ipv6)) == ("", set())


def test_nothing_is_left_when_a_runner_is_closed() -> None:
    """The namespace, its interfaces and their programs go, also after a start that fails half-way."""
    here = Path("/proc/thread-self/ns/net").readlink()
    with probe_runner() as (_, program):
        assert exists(program)
        assert Path("/proc/thread-self/ns/net").readlink() == here
    wait_for(lambda: not exists(program), "the end of the namespace")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PlatformError):
        FrameRunner({IN: 1 << 20})
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_nothing_is_left_by_a_killed_process() -> None:
    """The namespace has no name and no pin, so it cannot outlive the process."""
    script = "import test_frames, time\nwith test_frames.probe_runner() as (_, number):\n print(number, flush=True)\n input()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        program = int(child.stdout.readline())
        assert exists(program)
        child.send_signal(signal.SIGKILL)
    wait_for(lambda: not exists(program), "the end of the namespace")


def test_kernel_is_asked_whether_a_test_run_names_the_ingress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only EINVAL for a context with an interface means no; a kernel that runs nothing at all is an error."""
    run = syscall.prog_test_run
    failures: dict[bool, int] = {}

    def refuse(fd: int, frame: bytes, context: bytes, repeat: int) -> tuple[int, int]:
        code = failures.get(any(context[SKB_INGRESS_IFINDEX : SKB_INGRESS_IFINDEX + 4]))
        if code:
            raise OSError(code, os.strerror(code))
        return run(fd, frame, bytes(len(context)), repeat)

    monkeypatch.setattr(syscall, "prog_test_run", refuse)
    ask = can_name_ingress.__wrapped__
    assert ask()
    failures[True] = errno.EINVAL
    assert not ask()
    for named, code in ((True, errno.EPERM), (False, errno.EINVAL)):
        failures.clear()
        failures[named] = code
        with pytest.raises(PlatformError):
            ask()


# --- the product's program ----------------------------------------------------------------------------------------------


def test_runner_is_chosen_by_what_the_kernel_can_do(dataplane: Dataplane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames run where a test run cannot name the interface of entry, test runs elsewhere."""
    for can, is_over_veth in ((True, False), (False, True)):
        monkeypatch.setattr(kernel_engine, "can_name_ingress", lambda can=can: can)
        with open_runner(dataplane) as one:
            assert isinstance(one, FrameRunner) == is_over_veth
        with open_runner(dataplane, over_veth=not is_over_veth) as one:
            assert isinstance(one, FrameRunner) != is_over_veth


class FrameRig(Rig):
    """The rig, with frames in place of test runs."""

    def __init__(self, rig: Rig, runner: FrameRunner) -> None:
        self.__dict__.update(rig.__dict__)
        self.runner = runner

    def over_veth(self, hook: Hook, packet: bytes, ingress_ifindex: int = 0, mark: int = 0) -> tuple[TestRun, set[str]]:
        """What became of a frame, and the reasons that the program counted."""
        before = self._counts("np_reason_count")
        run = self.runner.run(hook, packet, ingress_ifindex=ingress_ifindex, ifindex=self.runner.ifindex, mark=mark)
        return run, {abi.REASONS[number].slug for number in self._counts("np_reason_count") - before}


@pytest.fixture
def frame_rig(rig: Rig) -> Iterator[FrameRig]:
    with open_runner(rig.dataplane, over_veth=True) as one:
        assert isinstance(one, FrameRunner)
        yield FrameRig(rig, one)


@pytest.mark.parametrize(("pod", "peer"), [(POD4, PEER4), (POD6, PEER6)], ids=["ipv4", "ipv6"])
def test_origin_decides_in_the_program(frame_rig: FrameRig, pod: str, peer: str) -> None:
    """Towards a workload without access only the node's and the workload's own packets pass."""
    ifindex, elsewhere = frame_rig.runner.ifindex, frame_rig.runner.elsewhere
    frame_rig.endpoint(everything(1, DENY, 11), everything(2, ALLOW, 22), ifindex=ifindex)
    frame_rig.address(pod, POD_IDENTITY, ENDPOINT)
    frame_rig.address(peer, PEER_IDENTITY)
    for number, (origin, reason, passed) in enumerate(
        ((0, "host", True), (ifindex, "self", True), (elsewhere, "policy-deny", False))
    ):
        run, reasons = frame_rig.over_veth(OUT, p.frame(peer, pod, p.UDP, p.udp(7, number)), origin)
        assert (run.passed, reasons) == (passed, {reason})
    assert frame_rig.over_veth(IN, p.frame(pod, peer, p.UDP, p.udp(7, 9)))[1] == {"policy-allow"}
    assert not frame_rig.over_veth(IN, p.frame(peer, pod, p.UDP, p.udp(7, 9)))[0].passed


def test_deferred_verdict_travels_in_the_mark_or_ends_the_chain(frame_rig: FrameRig) -> None:
    """The mark has the sender tag; if the tag is in tc_index, no program behind this one sees the packet."""
    ifindex = frame_rig.runner.ifindex
    frame_rig.endpoint(everything(1, ALLOW, 11), everything(2, DENY, 22), ifindex=ifindex)
    frame_rig.address(POD4, POD_IDENTITY, ENDPOINT)
    frame_rig.vip("10.96.0.1", p.TCP, 80)
    frame_rig.defer()
    to_service = p.frame(POD4, "10.96.0.1", p.TCP, p.tcp(40000, 80))
    run, reasons = frame_rig.over_veth(IN, to_service, mark=0x4001)
    assert (run.verdict, run.mark, reasons) == (PASS, ENDPOINT << MARK_SHIFT | 0x4001, {"deferred"})
    behind_service = p.frame(PEER4, POD4, p.TCP, p.tcp(40000, 8080))
    run, reasons = frame_rig.over_veth(OUT, behind_service, frame_rig.runner.elsewhere, mark=ENDPOINT << MARK_SHIFT)
    assert (run.passed, reasons) == (False, {"policy-deny"})
    assert frame_rig.over_veth(OUT, behind_service, frame_rig.runner.elsewhere)[1] == {"policy-allow"}
    config = frame_rig.dataplane.config()
    config.mark_shift = 0
    frame_rig.dataplane.set_config(config)
    assert frame_rig.over_veth(IN, p.frame(POD4, "10.96.0.1", p.TCP, p.tcp(40001, 80)))[0].verdict == PASS_ALONE


@pytest.fixture(scope="module")
def engine() -> Iterator[KernelEngine]:
    with KernelEngine(over_veth=True) as one:
        yield one


def test_case_files_go_the_same_way_over_veth(engine: KernelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a sample of the case files the program, run on frames, agrees with the model on every verdict and rule."""
    count = 0
    run = FrameRunner.run

    def counted(*arguments: Any, **options: Any) -> TestRun:
        nonlocal count
        count += 1
        return run(*arguments, **options)

    @contextmanager
    def open_over_veth(name: str) -> Iterator[Engine]:
        if name == "kernel":
            yield engine
        else:
            with open_engine(name) as one:
                yield one

    monkeypatch.setattr(FrameRunner, "run", counted)
    monkeypatch.setattr(case_runner, "open_engine", open_over_veth)
    paths = [REPOSITORY / "examples" / "cases", REPOSITORY / "tests" / "cases" / "decisions"]  # pods, hosts, services
    report = case_runner.run_cases(load_cases(paths), "all")
    assert [(failure.case, failure.got, failure.rule) for failure in report.failed] == []
    assert (report.invalid, report.probes > 200, count > 400) == ([], True, True)


POD = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec: {nodeName: 'n', containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
"""


def test_engine_tells_passed_from_dropped_without_an_event(engine: KernelEngine) -> None:
    """On frames too, neighbour discovery passes and a borrowed source is dropped, and neither is policy's verdict."""
    engine.load(derive(parse_documents(POD, "pod.yaml").check()))
    solicitation = Packet(ip_address("fd00::1"), ip_address("ff02::1:ff00:2"), ICMPV6, icmp_type=135)
    borrowed = Packet(ip_address("10.0.0.2"), ip_address("192.0.2.1"), TCP, 1, 2)
    for packet, passed in ((solicitation, True), (borrowed, False)):
        with pytest.raises(NotJudgedError) as caught:
            engine.decide(Question(EndpointKey("Pod", "shop", "web"), Direction.EGRESS, Stage.NORMAL, packet))
        assert caught.value.passed == passed


HOSTS = 70
"""More than np_host has rows."""
HOST_POLICY = """\
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: hosts}
spec: {selector: "all()", ingress: [{action: Allow}]}
"""
HOST = """\
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: h%d}
spec: {node: 'n', interfaceName: eth%d, expectedIPs: [10.2.0.%d]}
"""


def test_host_endpoints_asked_about_before_need_no_room(engine: KernelEngine) -> None:
    """The engine keeps one host endpoint's row at a time, so any number of host endpoints can be asked about."""
    text = HOST_POLICY + "".join(HOST % (number, number, number) for number in range(1, HOSTS + 1))
    engine.load(derive(parse_documents(text, "hosts.yaml").check()))
    rows = engine._dataplane.maps["np_host"]
    assert rows.max_entries < HOSTS
    for number in range(1, HOSTS + 1):
        packet = Packet(ip_address("192.0.2.1"), ip_address(f"10.2.0.{number}"), TCP, 1, 80)
        asked = Question(EndpointKey("HostEndpoint", "", f"h{number}"), Direction.INGRESS, Stage.NORMAL, packet)
        assert engine.decide(asked).outcome is Outcome.ALLOW
        assert len(list(rows.items())) == 1
