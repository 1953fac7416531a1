# SPDX-License-Identifier: Apache-2.0
"""Whether this machine can run the dataplane; each thing that is missing is one PlatformError with one clear line.

Must not repair anything, with one exception: root asking for a pin directory on an unmounted bpffs gets it mounted.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError, PrivilegeError
from netpol_loader import syscall
from netpol_loader.events import LIBRARIES

MINIMUM_KERNEL = (5, 15)
"""The oldest kernel with everything the program uses (bpf_jiffies64, ring buffer, batches on LPM tries, link updates)."""

BPF_FS_MAGIC = 0xCAFE4A11
BPFFS = Path("/sys/fs/bpf")
CAP_SYS_ADMIN = 21
"""Stands for CAP_BPF and CAP_PERFMON, which were made out of it."""


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability that enforcing needs. ``number`` is the kernel's (linux/capability.h); ``purpose``: what fails without it."""

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
"""All that the agent needs; docs/agent.md says more, and tests/netns/test_privilege.py runs it with these alone."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. ``error`` None: it is fine; ``detail`` says what was seen."""

    name: str
    detail: str
    error: PlatformError | None = None


def check_all(pin_root: Path = BPFFS) -> list[Check]:
    """Look at everything; never raises for what it finds."""
    looks: list[tuple[str, Callable[[], str]]] = [
        ("privilege", _look_at_privilege),
        ("kernel", _look_at_kernel),
        ("btf", _look_at_btf),
        ("bcc", _look_at_bcc),
        ("libbpf", _look_at_libbpf),
        ("bpffs", lambda: _look_at_bpffs(pin_root)),
        ("jit", _look_at_jit),
    ]
    return [_check(name, look) for name, look in looks]


def require_all(pin_root: Path = BPFFS) -> None:
    """Raise the first thing that is missing."""
    for check in check_all(pin_root):
        if check.error is not None:
            raise check.error


def require_bpffs(pin_root: Path) -> None:
    """Make sure that ``pin_root`` is, or can be made, on a BPF file system. Mounts /sys/fs/bpf when that is all it needs.

    Raises PrivilegeError without CAPABILITIES, PlatformError when the path is elsewhere.
    """
    _look_at_privilege()
    existing = _nearest_existing(pin_root)
    if _is_bpffs(existing):
        return
    if pin_root.is_relative_to(BPFFS) and BPFFS.is_dir():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"bpf", bytes(BPFFS), b"bpf", 0, b"mode=0700") == 0:
            return
        raise PlatformError(
            f"{BPFFS} is not mounted and mounting it failed: {os.strerror(ctypes.get_errno())}",
            hint="mount -t bpf bpf /sys/fs/bpf",
        )
    raise PlatformError(f"{pin_root} is not on a BPF file system", hint="Give a directory below /sys/fs/bpf.")


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
    """Whether the path exists, as far as this process may know."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _is_bpffs(path: Path) -> bool:
    """Whether the path is on bpffs: the file system's magic number is the first word of statfs on every 64-bit machine."""
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
    """What a process with these effective capabilities (a bit each) lacks."""
    if effective >> CAP_SYS_ADMIN & 1:
        return [one for one in CAPABILITIES if one.name == "CAP_NET_ADMIN" and not effective >> one.number & 1]
    return [one for one in CAPABILITIES if not effective >> one.number & 1]


def _look_at_kernel() -> str:
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    if not match or (int(match[1]), int(match[2])) < MINIMUM_KERNEL:
        wanted = ".".join(map(str, MINIMUM_KERNEL))
        raise PlatformError(f"kernel {release} is too old: {wanted} or newer is needed", hint="Use a newer kernel.")
    return release


def _look_at_btf() -> str:
    if not Path("/sys/kernel/btf/vmlinux").exists():
        raise PlatformError(
            "the kernel has no BTF (/sys/kernel/btf/vmlinux is missing): map dumps would not be readable",
            hint="Use a kernel with CONFIG_DEBUG_INFO_BTF; every distribution's is.",
        )
    return "/sys/kernel/btf/vmlinux"


def _look_at_bcc() -> str:
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.submodule_search_locations is None:
        raise PlatformError(
            "Python's bcc module is missing",
            hint="apt install python3-bpfcc, and make the virtual environment with /usr/bin/python3 -m venv "
            "--system-site-packages. PyPI's bcc is an unrelated package.",
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "libbcc.py").exists():
        raise PlatformError(
            f"the bcc module in {folder} is not the BPF Compiler Collection",
            hint="pip uninstall bcc; then install the distribution's python3-bpfcc.",
        )
    return str(folder)


def _look_at_libbpf() -> str:
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    raise PlatformError(f"none of {', '.join(LIBRARIES)} can be loaded", hint="apt install libbpf1")


def _look_at_bpffs(pin_root: Path) -> str:
    if _is_bpffs(_nearest_existing(pin_root)):
        return str(pin_root)
    if pin_root.is_relative_to(BPFFS):
        return f"{BPFFS} is not mounted; it will be"
    raise PlatformError(f"{pin_root} is not on a BPF file system", hint="Give a directory below /sys/fs/bpf.")


def _look_at_jit() -> str:
    switch = Path("/proc/sys/net/core/bpf_jit_enable")
    if switch.exists() and switch.read_text().strip() == "0":
        raise PlatformError("the BPF JIT is switched off", hint="sysctl -w net.core.bpf_jit_enable=1")
    return f"bpf(2) is number {syscall.SYSCALL_NUMBERS.get(platform.machine(), 'unknown')} on {platform.machine()}"
