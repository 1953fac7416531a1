# SPDX-License-Identifier: Apache-2.0
"""Checks whether this machine can run the dataplane. Each missing requirement is one PlatformError with one clear line.

A feature of the kernel is always tried, never concluded from the kernel's version. The module must not repair anything,
with one exception: if the pin directory is at /sys/fs/bpf and no BPF file system is mounted there, root mounts one.
"""

from __future__ import annotations

import ctypes
import errno
import gzip
import os
import platform
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_loader.host.barrier import BarrierTables
from netpol_loader.kernel import syscall
from netpol_loader.tables.events import LIBRARIES

FIRST_KERNEL_WITHOUT_BH_LOCK = (6, 18)
"""The first kernel with an option that lets a real-time kernel run two packets on one CPU.

A kernel does so if CONFIG_PREEMPT_RT_NEEDS_BH_LOCK is off.
"""

COMPARE_AND_SWAP = b"".join(
    struct.pack("=BBhi", opcode, registers if sys.byteorder == "little" else registers << 4 & 0xF0 | registers >> 4, at, value)
    for opcode, registers, at, value in (
        (0xB7, 0x00, 0, 0),  # r0 = 0
        (0xB7, 0x01, 0, 0),  # r1 = 0
        (0x7B, 0x1A, -8, 0),  # *(u64 *)(r10 - 8) = r1
        (0xDB, 0x1A, -8, 0xF1),  # r0 = atomic64_cmpxchg(r10 - 8, r0, r1)
        (0x95, 0x00, 0, 0),  # exit
    )
)  # fmt: skip
"""A program with the atomic operation that the connection table needs (BPF_CMPXCHG in include/uapi/linux/bpf.h)."""

BPF_FS_MAGIC = 0xCAFE4A11
BPFFS = Path("/sys/fs/bpf")
MOUNT_HINT = "On the node: mount -t bpf bpf /sys/fs/bpf. A container gets that directory from the node."
PROC = Path("/proc")
JIT_SWITCH = Path("/proc/sys/net/core/bpf_jit_enable")
"""Switch of BPF's compiler. A kernel that always compiles BPF (CONFIG_BPF_JIT_ALWAYS_ON) lacks this file."""
INITIAL_PID_NAMESPACE = 0xEFFF_FFFC
"""Inode of the PID namespace in which process 1 is the node's (PROC_PID_INIT_INO of include/linux/proc_ns.h)."""
CAP_SYS_ADMIN = 21
"""Number of the capability CAP_SYS_ADMIN, which includes CAP_BPF and CAP_PERFMON."""


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability that enforcement needs.

    ``number``: as in linux/capability.h. ``purpose``: what fails without the capability.
    """

    name: str
    number: int
    purpose: str


CAPABILITIES = (
    Capability("CAP_BPF", 39, "making maps and loading programs"),
    Capability(
        "CAP_NET_ADMIN", 12, "loading programs for packets, attaching them, and addresses in pods' network namespaces"
    ),
    Capability("CAP_PERFMON", 38, "the verifier's leave to calculate with pointers into packets"),
)
"""All capabilities that the agent needs (docs/agent.md).

tests/netns/test_privilege.py runs the agent with only these.
"""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. ``detail``: what was found, as text. ``error``: None if the check passed."""

    name: str
    detail: str
    error: PlatformError | None = None


def check_all(pin_root: Path = BPFFS) -> list[Check]:
    """Make all checks. A failed check is a result, and never an exception."""
    looks: list[tuple[str, Callable[[], str]]] = [
        ("privilege", _look_at_privilege),
        ("kernel", _look_at_kernel),
        ("btf", _look_at_btf),
        ("libbpf", _look_at_libbpf),
        ("bpffs", lambda: _look_at_bpffs(pin_root)),
        ("jit", _look_at_jit),
        ("barrier", _look_at_barrier),
    ]
    return [_check(name, look) for name, look in looks]


def try_to_load() -> Check:
    """Load the programs, then release them. This proves that an agent could load them on this machine."""
    return _check("load", _look_at_load)


def require_all(pin_root: Path = BPFFS) -> None:
    """Raise the first error of the checks. The programs are not loaded, because the caller will load them next."""
    for check in check_all(pin_root):
        if check.error is not None:
            raise check.error


def require_bpffs(pin_root: Path) -> None:
    """Require that ``pin_root`` is, or can be made, on a BPF file system, and that its pins outlive this process.

    If only the mount is missing, and this process is in the node's own mount namespace, the function mounts
    /sys/fs/bpf. Raises PrivilegeError without CAPABILITIES. Raises PlatformError if the path is not on a BPF file
    system, or if the pins would end with this process.
    """
    _look_at_privilege()
    existing = _nearest_existing(pin_root)
    if _is_bpffs(existing):
        _require_lasting(existing)
        return
    _require_mountable(pin_root)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", bytes(BPFFS), b"bpf", 0, b"mode=0700") != 0:
        raise PlatformError(
            f"{BPFFS} is not mounted and mounting it failed: {os.strerror(ctypes.get_errno())}", hint=MOUNT_HINT
        )


def _require_mountable(pin_root: Path) -> None:
    """Raise PlatformError unless this process can mount a BPF file system at /sys/fs/bpf for the node.

    Also raises it if ``pin_root`` would not be on that file system.
    """
    if not (pin_root.is_relative_to(BPFFS) and BPFFS.is_dir()):
        raise PlatformError(f"{pin_root} is not on a BPF file system", hint="Give a directory below /sys/fs/bpf.")
    apart = _apart_from_node()
    if apart:
        raise PlatformError(
            f"{BPFFS} is not mounted here, and {apart}: what is mounted and pinned here would be gone when this process ends",
            hint=MOUNT_HINT,
        )


def _require_lasting(place: Path) -> None:
    """Raise PlatformError if the node's mounts are visible, and the BPF file system at ``place`` is not among them."""
    ours, nodes = mounts_of("self"), mounts_of_node()
    if nodes is None or ours is None or ours.keys() & nodes.keys():
        return  # the node's mounts are invisible, or include this one
    status = place.stat()
    if f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}" not in nodes.values():
        raise PlatformError(
            f"the BPF file system at {place} is mounted in a mount namespace of its own and not on the node: what is pinned "
            "there would be gone when the last process of that namespace ends",
            hint=MOUNT_HINT,
        )


def _apart_from_node() -> str:
    """The reason why a mount by this process may not be a mount of the node; "": it would be one."""
    ours, nodes = mounts_of("self"), mounts_of_node()
    if nodes is None or ours is None:
        return "this process may not see what the node has mounted (it has a PID namespace of its own, or /proc hides process 1)"
    return "" if ours.keys() & nodes.keys() else "this process is in a mount namespace of its own"


def mounts_of_node() -> dict[int, str] | None:
    """The result of `mounts_of` for the node's process 1. None if that process is not visible."""
    try:
        is_seen = (PROC / "self" / "ns" / "pid").stat().st_ino == INITIAL_PID_NAMESPACE
    except OSError:
        is_seen = False
    return mounts_of("1") if is_seen else None


def mounts_of(process: str) -> dict[int, str] | None:
    """The mounts of a process, as device by mount number. None if they are not visible.

    Mount numbers are unique on the machine, so two processes with a common number share a mount namespace. (The links
    in /proc/PID/ns say the same, but not everybody may read those.)
    """
    try:
        lines = (PROC / process / "mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    fields = [line.split() for line in lines]
    return {int(one[0]): one[2] for one in fields}


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, look())
    except PlatformError as error:
        return Check(name, error.message, error)


def _nearest_existing(path: Path) -> Path:
    while not _is_visible(path):
        path = path.parent
    return path


def _is_visible(path: Path) -> bool:
    """Whether the path exists and this process can see it."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _is_bpffs(path: Path) -> bool:
    """Whether the path is on bpffs.

    On every 64-bit machine, the first word of the result of statfs is the file system's magic number.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    room = (ctypes.c_long * 64)()
    if libc.statfs(bytes(path), ctypes.byref(room)) != 0:
        raise PlatformError(f"cannot look at {path}: {os.strerror(ctypes.get_errno())}")
    return (room[0] & 0xFFFF_FFFF) == BPF_FS_MAGIC


def _look_at_privilege() -> str:
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    missing = missing_capabilities(int(match[1], 16) if match else 0)
    if missing:
        lacks = "; ".join(f"{one.name} ({one.purpose})" for one in missing)
        raise PrivilegeError(
            f"this process lacks {lacks}",
            hint=f"Run as root, or with {', '.join(one.name for one in CAPABILITIES)}; docs/agent.md says how.",
        )
    return ", ".join(one.name for one in CAPABILITIES)


def missing_capabilities(effective: int) -> list[Capability]:
    """The capabilities that a process lacks. ``effective``: the process's effective capabilities, a bit for each."""
    if effective >> CAP_SYS_ADMIN & 1:
        return [one for one in CAPABILITIES if one.name == "CAP_NET_ADMIN" and not effective >> one.number & 1]
    return [one for one in CAPABILITIES if not effective >> one.number & 1]


def _look_at_kernel() -> str:
    release = platform.release()
    try:
        fd = syscall.prog_load(COMPARE_AND_SWAP, name="np_try")
    except OSError as error:
        if error.errno == errno.EPERM:
            raise PrivilegeError(f"what kernel {release} can do cannot be tried without privileges") from error
        raise PlatformError(
            f"kernel {release} has no 64-bit compare-and-swap for BPF programs ({error.strerror})",
            hint="Use Linux 5.15 or newer (arm64: 5.18 or newer).",
        ) from error
    is_jited = syscall.prog_info(fd).jited_bytes > 0
    os.close(fd)
    if not is_jited and _is_jit_on():
        raise PlatformError(
            f"the BPF JIT of kernel {release} has no 64-bit compare-and-swap, so the programs would be interpreted",
            hint="Use a newer kernel (arm64: 5.18 or newer).",
        )
    if "PREEMPT_RT" in platform.version():
        _require_bh_lock(release)
    return release


def _require_bh_lock(release: str) -> None:
    """Raise PlatformError if one packet can interrupt another on its CPU, in a real-time kernel.

    Both packets would use the same working memory.
    """
    option, config = "CONFIG_PREEMPT_RT_NEEDS_BH_LOCK", kernel_config(release)
    if config is not None:
        is_locked = f"{option}=y" in config or option not in config  # a kernel without the option always locks
    else:
        match = re.match(r"(\d+)\.(\d+)", release)
        is_locked = bool(match) and (int(match[1]), int(match[2])) < FIRST_KERNEL_WITHOUT_BH_LOCK  # type: ignore[index]
    if not is_locked:
        seen = "is not set" if config is not None else "cannot be looked up: neither /proc/config.gz nor /boot has it"
        raise PlatformError(
            f"kernel {release} is a real-time kernel whose bottom halves are not locked ({option} {seen}): two packets on one "
            "processor would share their working memory",
            hint=f"Use a kernel with {option}=y, or one that is not real-time.",
        )


def kernel_config(release: str) -> str | None:
    """The build configuration of the running kernel. None if the machine does not have it."""
    for path in (Path("/proc/config.gz"), Path(f"/boot/config-{release}"), Path(f"/lib/modules/{release}/config")):
        try:
            raw = path.read_bytes()
        except OSError:
            continue
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode(errors="replace")
    return None


def _look_at_btf() -> str:
    if not Path("/sys/kernel/btf/vmlinux").exists():
        raise PlatformError(
            "the kernel has no BTF (/sys/kernel/btf/vmlinux is missing): map dumps would not be readable",
            hint="Use a kernel with CONFIG_DEBUG_INFO_BTF; every distribution's is.",
        )
    return "/sys/kernel/btf/vmlinux"


def _look_at_load() -> str:
    from netpol_loader.pins import build

    loaded = build.try_load()
    told = [f"{one.name} {one.verified}" for one in loaded if one.verified]
    return f"{len(loaded)} programs" + (f"; instructions verified: {', '.join(told)}" if told else "")


def _look_at_libbpf() -> str:
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    raise PlatformError(f"none of {', '.join(LIBRARIES)} can be loaded", hint="apt install libbpf1")


def _look_at_bpffs(pin_root: Path) -> str:
    existing = _nearest_existing(pin_root)
    if _is_bpffs(existing):
        _require_lasting(existing)
        return str(pin_root)
    _require_mountable(pin_root)
    return f"{BPFFS} is not mounted; it will be"


def _look_at_jit() -> str:
    if not _is_jit_on():
        raise PlatformError("the BPF JIT is switched off", hint="sysctl -w net.core.bpf_jit_enable=1")
    if not JIT_SWITCH.exists():
        return "on, and cannot be switched off"
    return f"on (net.core.bpf_jit_enable is {JIT_SWITCH.read_text().strip()})"


def _look_at_barrier() -> str:
    """The features that the kernel has for the second barrier. Enforcement works without them."""
    tables = BarrierTables("")
    try:
        tables.open()
    except PlatformError as error:
        return f"none, packets that skip a workload's program pass: {error.message}"
    else:
        owner = "nobody else can change them" if tables.is_held else "others can flush them (before Linux 6.9)"
        return f"nf_tables {' and '.join(tables.families)}; {owner}"
    finally:
        tables.close()


def _is_jit_on() -> bool:
    return not JIT_SWITCH.exists() or JIT_SWITCH.read_text().strip() != "0"
