# SPDX-License-Identifier: Apache-2.0
"""Grace periods: `wait_for_readers` waits for all packets being judged; `order_stores` costs x86-64 nothing."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_loader.kernel import grace, syscall

DEADLINE_S = 60.0
ROUNDS = 40_000
"""Calls of a helper in each program of a chain: enough that a run takes some time, and few enough for the verifier."""
CHAIN = 34
"""Number of programs in a chain of tail calls: the kernel allows 33 calls."""


def _raw(code: int, dst: int = 0, src: int = 0, offset: int = 0, imm: int = 0) -> bytes:
    return struct.pack("=BBhi", code, src << 4 | dst, offset, imm)


def _map(kind: int, name: str, value_size: int, flags: int) -> int:
    """Make a map without the loader, which is under test."""
    room = struct.pack("=6I", kind, 4, value_size, 1, flags, 0) + bytes(4) + name.encode().ljust(16, b"\0")
    attr = syscall.buffer(room.ljust(syscall.ATTR_BYTES, b"\0"))
    fd: int = syscall._libc().syscall(syscall._syscall_number(), 0, attr, syscall.ATTR_BYTES)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


class LongRun:
    """A program that records its begin and its end, with some ten milliseconds between them."""

    def __init__(self) -> None:
        self.words = _map(2, "np_test_words", 8, 1 << 10)  # an array, BPF_F_MMAPABLE
        self.calls = _map(3, "np_test_calls", 4, 0)  # a program array
        self.memory = mmap.mmap(self.words, mmap.PAGESIZE)
        self.program = syscall.prog_load(
            b"".join(
                [
                    _raw(0xBF, dst=6, src=1),  # r6 = context
                    _raw(0x18, dst=7, src=2, imm=self.words), _raw(0),  # r7 = the words' address
                    _raw(0x62, dst=7, offset=0, imm=1),  # begun
                    _raw(0xB7, dst=8, imm=0),
                    _raw(0x85, imm=5),  # bpf_ktime_get_ns
                    _raw(0x07, dst=8, imm=1),
                    _raw(0xA5, dst=8, offset=-3, imm=ROUNDS),
                    _raw(0xBF, dst=1, src=6),
                    _raw(0x18, dst=2, src=1, imm=self.calls), _raw(0),
                    _raw(0xB7, dst=3, imm=0),
                    _raw(0x85, imm=12),  # bpf_tail_call: itself, until no call is left
                    _raw(0x62, dst=7, offset=4, imm=1),  # ended
                    _raw(0xB7, dst=0, imm=0),
                    _raw(0x95),
                ]
            )
        )  # fmt: skip
        syscall.map_update(self.calls, syscall.buffer(bytes(4)), syscall.buffer(struct.pack("=I", self.program)))

    def has_begun(self) -> bool:
        return bool(struct.unpack_from("=I", self.memory, 0)[0])

    def has_ended(self) -> bool:
        return bool(struct.unpack_from("=I", self.memory, 4)[0])

    def forget(self) -> None:
        self.memory[:8] = bytes(8)

    def run(self) -> None:
        syscall.prog_test_run(self.program, bytes(64), b"", 1)

    def close(self) -> None:
        self.memory.close()
        for fd in (self.program, self.calls, self.words):
            os.close(fd)


@pytest.fixture
def long_run() -> Iterator[LongRun]:
    one = LongRun()
    yield one
    one.close()


@pytest.fixture
def apart() -> Iterator[int]:
    """Pin this thread to one CPU. Yields the number of another CPU for work at the same time.

    A run is not interrupted, so a thread that is woken on the same CPU would continue only after the run.
    """
    cpus = os.sched_getaffinity(0)
    own, *others = sorted(cpus)
    if not others:
        pytest.skip("two things that run at the same time need two CPUs")
    os.sched_setaffinity(0, {own})
    yield others[0]
    os.sched_setaffinity(0, cpus)


@pytest.mark.kernel
def test_wait_outlasts_a_packet_that_is_being_judged(long_run: LongRun, apart: int) -> None:
    """A run that had begun before the wait, and not ended, has ended when the wait ends."""
    deadline = time.monotonic() + DEADLINE_S
    while not waited_for_a_run(long_run, apart):
        assert time.monotonic() < deadline, "this process was never scheduled while the program ran"


def waited_for_a_run(long_run: LongRun, cpu: int) -> bool:
    """Whether the wait began within a run on a CPU.

    A run may be over before it is seen to have begun, as CPUs are shared.
    """

    def run() -> None:
        os.sched_setaffinity(0, {cpu})  # only for this thread
        long_run.run()

    long_run.forget()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not long_run.has_begun():
            assert thread.is_alive() or long_run.has_begun(), "the program did not run"
        was_running = not long_run.has_ended()
        grace.wait_for_readers()
        assert long_run.has_ended()
    finally:
        thread.join()
    return was_running


@pytest.mark.kernel
def test_wait_makes_its_maps_once() -> None:
    """A process waits any number of times with two descriptors."""
    grace.wait_for_readers()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        grace.wait_for_readers()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that rejects bpf(2) with an errno."""

    def refuse(_command: int, _attr: object) -> int:
        raise OSError(request.param, os.strerror(request.param))

    grace._maps.cache_clear()
    monkeypatch.setattr(syscall, "_bpf", refuse)
    yield
    grace._maps.cache_clear()


class Membarrier:
    """A libc with a membarrier(2) that returns a given answer. The calls are recorded."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.calls: list[tuple[int, ...]] = []

    def syscall(self, *arguments: int) -> int:
        self.calls.append(arguments)
        return self.answer


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("refused", [errno.EPERM], indirect=True)
def test_who_may_make_no_maps_waits_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may not make maps waits by membarrier(2), which also waits for a grace period of the kernel."""
    libc = Membarrier(0)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    grace.wait_for_readers()
    grace.wait_for_readers()
    assert libc.calls == [(grace._MEMBARRIER[platform.machine()], 1, 0, 0)] * 2


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("refused", "raised"), [(errno.EPERM, PrivilegeError), (errno.ENOMEM, PlatformError)], indirect=["refused"]
)
def test_refused_wait_is_an_error(monkeypatch: pytest.MonkeyPatch, raised: type[PlatformError]) -> None:
    """The caller gets an error, and does not continue without a grace period."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Membarrier(-1))
    with pytest.raises(PlatformError, match="cannot wait for a grace period|that grace periods need") as found:
        grace.wait_for_readers()
    assert found.type is raised


@pytest.mark.parametrize("is_strong", [True, False])
def test_order_costs_a_grace_period_on_weakly_ordered_machines_only(
    monkeypatch: pytest.MonkeyPatch, *, is_strong: bool
) -> None:
    """x86-64 does not wait."""
    waits: list[None] = []
    monkeypatch.setattr(grace, "IS_STRONGLY_ORDERED", is_strong)
    monkeypatch.setattr(grace, "wait_for_readers", lambda: waits.append(None))
    grace.order_stores()
    assert len(waits) == (0 if is_strong else 1)
