# SPDX-License-Identifier: Apache-2.0
"""Runs the programs on real frames over veth pairs, on kernels whose test runs cannot name the ingress interface.

The program at TC_EGRESS reads `ingress_ifindex`: 0 means that the node itself sent the packet.  The context of a test
run sets that field, but some kernels reject such a context (Linux 5.15 does, 6.1 does not).  On a veth pair the field
has its true value:

    elsewhere-peer ==> elsewhere --redirect--> endpoint, TC_EGRESS     a packet from elsewhere
     endpoint-peer ==> endpoint  --redirect--> endpoint, TC_EGRESS     a packet from the endpoint to itself
                            packet socket ---> endpoint, TC_EGRESS     a packet that the node sends
     endpoint-peer ==> endpoint, TC_INGRESS                            a packet that the endpoint sends

`==>` is a veth pair.  The four interfaces are in a network namespace that has no name and no process.  Only the
descriptors of a `FrameRunner` keep the namespace alive, so it ends with the runner or with the process, however the
process ends.

Invariants: no verdict depends on a time-out. A copy of each frame follows the frame in the same queue. A packet socket
or filter counts the frame if it passes the hook. If the copy has arrived and the frame was not counted, the program has
dropped the frame. No other frame is on the interfaces: they have no address, and their MTU is too small for IPv6.

The module must not know what the programs do.  Rejected as evidence: the counters of the programs, because the programs
are under test.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_loader import abi
from netpol_loader.host import clsact
from netpol_loader.host.links import list_links
from netpol_loader.kernel import syscall
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins.dataplane import SKB_BYTES, SKB_IFINDEX, SKB_INGRESS_IFINDEX, SKB_MARK, TestRun

T = TypeVar("T")

ENDPOINT, ELSEWHERE = "endpoint", "elsewhere"
PEERS: Mapping[str, str] = {name: f"{name}-peer" for name in (ENDPOINT, ELSEWHERE)}

MTU_BYTES = 1279
"""One less than the least MTU of IPv6 (RFC 8200, section 5).

The kernel's IPv6 then sends nothing on these interfaces.
"""
ETHERNET_BYTES = 14
MOST_FRAME_BYTES = ETHERNET_BYTES + MTU_BYTES

DEADLINE_S = 30
"""Time limit of a frame, in seconds. A frame takes microseconds, or milliseconds on an emulated machine."""
POLL_S = 0.001

GATE, PROGRAM, BEHIND = 1, 2, 3
"""Priorities of the filters on a hook. The kernel runs the filter of the lowest priority first."""

CLONE_NEWNET = 0x4000_0000  # linux/sched.h; os.unshare and os.setns come with Python 3.12
SO_ATTACH_BPF = 50  # asm-generic/socket.h
ETH_P_802_3, ETH_P_ALL, ETH_P_802_2 = 0x0001, 0x0003, 0x0004  # linux/if_ether.h
LEAST_ETHERTYPE = 0x0600  # a lower number is a length (IEEE 802.3)
VLAN_ETHERTYPES = frozenset({0x8100, 0x88A8})

KEY, BOARD = struct.Struct("=I"), struct.Struct("=IIII")
AT_REDIRECTS, AT_BEHIND, AT_PASSED, AT_MARK = 0, 4, 8, 12
"""The row of the map: its format, and the offsets of its numbers. The runner writes the row before each frame.

After the frame, the runner reads the row. ``redirects``: whether the gate (the first filter on TC_INGRESS) sends the
frame to the endpoint's TC_EGRESS.
``behind``: number of frames that the filter after the program saw. ``passed``: number of frames that left the hook.
``mark``: the mark of the last one.
"""


class FrameRunner:
    """Runs programs on frames as `Dataplane.test_run` does, but over veth pairs. The class is a context manager.

    ``programs``: descriptors by hook, which the caller continues to own. The runner attaches these programs once. If
    they are replaced, a new runner is needed. Raises PrivilegeError without CAP_SYS_ADMIN, CAP_NET_ADMIN or
    CAP_NET_RAW. Raises PlatformError if the kernel has no veth, no clsact or no packet sockets.
    """

    ifindex: int
    """The interface to which the programs are attached."""
    elsewhere: int
    """The interface by which a packet from elsewhere enters the node."""

    def __init__(self, programs: Mapping[Hook, int]) -> None:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._marks: dict[socket.socket, int] = {}
            self._tapped: set[int] = set()
            self._namespace = stack.enter_context(contextlib.closing(_FrameNamespace()))
            self._board = stack.enter_context(_opened(_create_board()))
            self._tap = stack.enter_context(_opened(_load(_tap(self._board), PROG_TYPE_SOCKET_FILTER)))
            indices = self._namespace.call(_create_interfaces)
            self.ifindex, self.elsewhere = indices[ENDPOINT], indices[ELSEWHERE]
            self._from_endpoint = self._socket(PEERS[ENDPOINT])
            self._from_elsewhere = self._socket(PEERS[ELSEWHERE], ETH_P_ALL)  # receives the copies of all frames, too
            self._from_elsewhere.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", DEADLINE_S, 0))
            self._from_node = self._socket(ENDPOINT)
            with _opened(_load(_tap(self._board, outgoing=True), PROG_TYPE_SOCKET_FILTER)) as tap:
                self._socket(ENDPOINT, ETH_P_ALL, tap)
            self._namespace.call(lambda: self._attach(programs, copies_to=indices[PEERS[ELSEWHERE]]))
            self._stack = stack.pop_all()

    def run(self, hook: Hook, frame: bytes, *, ingress_ifindex: int = 0, ifindex: int, mark: int = 0) -> TestRun:
        """Run a hook's program on a frame that starts with its Ethernet header.

        The maps change as they do for any packet. ``ifindex``: must be the runner's `ifindex`. ``ingress_ifindex``: at
        TC_EGRESS 0 for a packet that the node sends, or `elsewhere`, or ``ifindex``; at TC_INGRESS 0. ``mark``: the
        packet's mark before the program runs. The result has no duration, and no mark if the program drops the frame.
        Unlike in a test run, the kernel removes one VLAN tag from a frame that arrives. Raises ValueError for other
        interfaces, and for frames longer than MOST_FRAME_BYTES. Raises PlatformError if the kernel loses the frame.
        Takes some 50 microseconds.
        """
        if not ETHERNET_BYTES <= len(frame) <= MOST_FRAME_BYTES:
            raise ValueError(f"a frame has {ETHERNET_BYTES} to {MOST_FRAME_BYTES} bytes, this one {len(frame)}")
        sender, redirects = self._route_of(hook, ingress_ifindex, ifindex)
        if hook is Hook.TC_INGRESS:
            self._tap_arrivals(_ethertypes(frame))
        if self._marks.get(sender, 0) != mark:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            self._marks[sender] = mark
        syscall.map_update(self._board, syscall.buffer(KEY.pack(0)), syscall.buffer(BOARD.pack(redirects, 0, 0, 0)))
        self._send(sender, frame)
        row = syscall.empty(BOARD.size)
        syscall.map_lookup(self._board, syscall.buffer(KEY.pack(0)), row)
        _, behind, passed, seen = BOARD.unpack(row.raw[: BOARD.size])
        if passed > 1 or behind > passed:
            raise PlatformError(
                f"one frame was sent to {hook.value}; the filter behind it saw {behind} frames, and {passed} left the hook"
            )
        return TestRun((abi.NP_PASS if behind else abi.NP_PASS_ALONE) if passed else abi.NP_DROP, 0, seen)

    def close(self) -> None:
        """Close all descriptors. The kernel removes the namespace and its interfaces soon after."""
        self._stack.close()

    def __enter__(self) -> FrameRunner:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _route_of(self, hook: Hook, ingress_ifindex: int, ifindex: int) -> tuple[socket.socket, bool]:
        """The socket that must send the frame, and whether the first filter must redirect the frame."""
        if ifindex != self.ifindex:
            raise ValueError(f"the programs are on interface {self.ifindex}, not on {ifindex}")
        routes = {
            (Hook.TC_INGRESS, 0): (self._from_endpoint, False),
            (Hook.TC_EGRESS, 0): (self._from_node, False),
            (Hook.TC_EGRESS, self.elsewhere): (self._from_elsewhere, True),
            (Hook.TC_EGRESS, self.ifindex): (self._from_endpoint, True),
        }
        if (hook, ingress_ifindex) not in routes:
            raise ValueError(f"no frame can come to {hook.value} from interface {ingress_ifindex}")
        return routes[hook, ingress_ifindex]

    def _send(self, sender: socket.socket, frame: bytes) -> None:
        """Send a frame and wait until the program has run on it."""
        try:
            sender.send(frame)
        except OSError as error:
            # A packet socket reports a drop at TC_EGRESS as ENOBUFS.
            if error.errno == errno.ENOBUFS and sender is self._from_node:
                return
            raise PlatformError(f"cannot send a frame of {len(frame)} bytes: {error.strerror}") from error
        if sender is self._from_node:
            return  # the kernel runs the hook within send(2)
        try:
            self._from_elsewhere.recv(MOST_FRAME_BYTES)
        except BlockingIOError as error:
            self.close()  # otherwise a late copy would count as that of the next frame
            raise PlatformError(f"a frame of {len(frame)} bytes did not arrive within {DEADLINE_S} s") from error

    def _tap_arrivals(self, ethertypes: set[int]) -> None:
        """Count the frames of these ethertypes that pass TC_INGRESS.

        A socket for ETH_P_ALL would count them before the hook.
        """
        for ethertype in ethertypes - self._tapped:
            self._socket(ENDPOINT, ethertype, self._tap)
            self._tapped.add(ethertype)

    def _socket(self, interface: str, ethertype: int = 0, filter_fd: int | None = None) -> socket.socket:
        """A packet socket on an interface.

        ``ethertype``: the socket receives frames of this ethertype; 0: it receives none. ``filter_fd``: the program
        that filters frames.
        """
        try:
            one = self._namespace.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
            self._stack.enter_context(one)
            if filter_fd is not None:
                one.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, filter_fd)
            one.bind((interface, ethertype))
        except OSError as error:
            raise _refused(error, "open a packet socket") from error
        return one

    def _attach(self, programs: Mapping[Hook, int], *, copies_to: int) -> None:
        with (
            _opened(_load(_gate(self._board, self.ifindex, copies_to))) as gate,
            _opened(_load(_behind(self._board))) as behind,
            _route() as route,
        ):
            filters = [
                (self.elsewhere, Hook.TC_INGRESS, GATE, gate),
                (self.ifindex, Hook.TC_INGRESS, GATE, gate),
                *((self.ifindex, hook, PROGRAM, fd) for hook, fd in programs.items()),
                *((self.ifindex, hook, BEHIND, behind) for hook in Hook),
            ]
            for ifindex in (self.elsewhere, self.ifindex):
                clsact.add(ifindex)
            for ifindex, hook, priority, fd in filters:
                route.tc(
                    "add-filter", "bpf", index=ifindex, parent=clsact.PARENTS[hook], prio=priority, fd=fd,
                    name=f"frames{priority}", direct_action=True,
                )  # fmt: skip


@functools.cache
def can_name_ingress() -> bool:
    """Whether a test run can set the interface by which the packet entered the node. This is tried once.

    Rejected: a comparison of kernel versions, because distributions add such changes to older kernels.
    """
    with _opened(_load(_end(abi.NP_DROP))) as fd:
        for ingress_ifindex in (0, 1):
            context = bytearray(SKB_BYTES)
            struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, ingress_ifindex)
            struct.pack_into("=I", context, SKB_IFINDEX, 1)
            try:
                syscall.prog_test_run(fd, bytes(64), bytes(context), 1)
            except OSError as error:
                if ingress_ifindex and error.errno == errno.EINVAL:
                    return False
                raise PlatformError(f"cannot run a program of two instructions: {error.strerror}") from error
    return True


# --- the namespace ------------------------------------------------------------------------------------------------------


class _FrameNamespace:
    """A network namespace without a name. Only threads of this class enter it; the calling thread stays outside."""

    def __init__(self) -> None:
        self._fd = _in_thread(self._create)

    def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` on a new thread that has entered the namespace. Returns the result of ``work``."""

        def enter() -> T:
            _check(_libc().setns(self._fd, CLONE_NEWNET), "enter")
            return work()

        return _in_thread(enter)

    def close(self) -> None:
        """Close the descriptor. Open sockets can still keep the namespace alive."""
        os.close(self._fd)

    @staticmethod
    def _create() -> int:
        _check(_libc().unshare(CLONE_NEWNET), "make")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, verb: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise _refused(OSError(code, os.strerror(code)), f"{verb} a network namespace")


def _refused(error: OSError, what: str) -> PlatformError:
    kind = PrivilegeError if error.errno == errno.EPERM else PlatformError
    return kind(f"frames cannot run over a veth pair: the kernel does not {what}: {error.strerror}")


def _in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` on a new thread, wait until it ends, and return its result."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


@contextlib.contextmanager
def _route() -> Iterator[Any]:
    """An rtnetlink socket of the calling thread's namespace. Its errors are raised as PlatformError."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        raise PlatformError(f"cannot set up a veth pair for frames: {os.strerror(error.code)}") from error


def _create_interfaces() -> dict[str, int]:
    """Make both veth pairs, and set them up. Returns the interface indices by name."""
    with _route() as route:
        for name, peer in PEERS.items():
            route.link("add", ifname=name, kind="veth", mtu=MTU_BYTES, peer={"ifname": peer, "mtu": MTU_BYTES})
        indices = {one.name: one.ifindex for one in list_links() if one.kind == "veth"}
        for index in indices.values():
            route.link("set", index=index, state="up")
        deadline = time.monotonic() + DEADLINE_S
        while any(message.get_attr("IFLA_OPERSTATE") != "UP" for message in route.get_links(*indices.values())):
            # The kernel drops what an interface sends until it has noticed that the peer is up.
            if time.monotonic() > deadline:
                raise PlatformError(f"the veth pairs for frames are not up within {DEADLINE_S} s")
            time.sleep(POLL_S)
    return indices


def _ethertypes(frame: bytes) -> set[int]:
    """All ethertypes under which the kernel may deliver the frame.

    There are several, because VLAN tags may be removed.
    """
    found: set[int] = set()
    at = 12
    while True:
        kind = int.from_bytes(frame[at : at + 2], "big")
        found |= {kind} if kind >= LEAST_ETHERTYPE else {ETH_P_802_3, ETH_P_802_2}
        if kind not in VLAN_ETHERTYPES:
            return found
        at += 4


# --- programs -----------------------------------------------------------------------------------------------------------

PROG_TYPE_SOCKET_FILTER = 1
MAP_VALUE = 2
"""Source register of a load that loads the address of a map's first row: BPF_PSEUDO_MAP_VALUE (Linux 5.2)."""
CALL_CLONE_REDIRECT, CALL_REDIRECT = 13, 23
TO_INGRESS = 1
"""Flag of bpf_redirect: send the packet to the ingress hook of the target (BPF_F_INGRESS)."""
SKB_PACKET_TYPE = 4
"""Offset of pkt_type in struct __sk_buff."""
PACKET_OUTGOING = 4  # linux/if_packet.h

LOAD_64, LOAD_32, STORE_32, ADD_32, MOVE, MOVE_REGISTER = 0x18, 0x61, 0x63, 0xC3, 0xB7, 0xBF
JUMP_IF, JUMP_IF_NOT, CALL, EXIT = 0x15, 0x55, 0x85, 0x95
"""Opcodes (linux/bpf.h)."""


def _step(code: int, to: int = 0, by: int = 0, offset: int = 0, number: int = 0) -> bytes:
    """Encode one instruction from its opcode, its registers, its offset and its immediate."""
    return struct.pack("=BBhi", code, to | by << 4, offset, number)


def _row_of(board: int, register: int) -> bytes:
    """The instructions that load the address of the map's row into a register."""
    return _step(LOAD_64, register, MAP_VALUE, number=board) + bytes(8)


def _end(verdict: int) -> bytes:
    return _step(MOVE, 0, number=verdict) + _step(EXIT)


def _gate(board: int, endpoint: int, copies_to: int) -> bytes:
    """The program of the first filter for an arriving frame.

    It queues a copy of the frame, then lets the frame go to its hook.
    """
    return b"".join((
        _step(MOVE_REGISTER, 6, 1),
        _step(MOVE, 2, number=copies_to),
        _step(MOVE, 3, number=TO_INGRESS),
        _step(CALL, number=CALL_CLONE_REDIRECT),
        _step(JUMP_IF, 0, offset=2),
        _end(abi.NP_DROP),
        _row_of(board, 1),
        _step(LOAD_32, 1, 1, AT_REDIRECTS),
        _step(JUMP_IF_NOT, 1, offset=2),
        _end(abi.NP_PASS),
        _step(MOVE, 1, number=endpoint),
        _step(MOVE, 2),
        _step(CALL, number=CALL_REDIRECT),
        _step(EXIT),
    ))  # fmt: skip


def _behind(board: int) -> bytes:
    """The program of the last filter on a hook. It counts the frames that reach this filter.

    These are the frames that the program under test passes to later filters.
    """
    return _row_of(board, 1) + _step(MOVE, 2, number=1) + _step(ADD_32, 1, 2, AT_BEHIND) + _end(abi.NP_PASS)


def _tap(board: int, *, outgoing: bool = False) -> bytes:
    """The program of a packet socket's filter. It counts frames, and accepts none.

    ``outgoing``: it counts only sent frames.
    """
    steps = (
        _step(LOAD_32, 2, 1, SKB_MARK),
        _row_of(board, 3),
        _step(STORE_32, 3, 2, AT_MARK),
        _step(MOVE, 2, number=1),
        _step(ADD_32, 3, 2, AT_PASSED),
    )
    skip = (_step(LOAD_32, 2, 1, SKB_PACKET_TYPE), _step(JUMP_IF_NOT, 2, offset=6, number=PACKET_OUTGOING))
    return b"".join((*(skip if outgoing else ()), *steps)) + _end(0)


def _load(instructions: bytes, program_type: int = syscall.PROG_TYPE_SCHED_CLS) -> int:
    """Load one of this module's programs. Returns the program's descriptor."""
    try:
        return syscall.prog_load(instructions, program_type)
    except OSError as error:
        raise _refused(error, "load a program of the veth pair") from error


def _create_board() -> int:
    """Make the map with one row of the format `BOARD`. Returns the map's descriptor."""
    try:
        return syscall.map_create("array", "frames_board", KEY.size, BOARD.size, 1)
    except OSError as error:
        raise _refused(error, "make a map of one row") from error


@contextlib.contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
