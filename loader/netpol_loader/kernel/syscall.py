# SPDX-License-Identifier: Apache-2.0
"""bpf(2): the commands that the loader needs, each as one function over file descriptors and bytes.

The module needs no library but libc, so it works on any distribution.

Invariant: a function succeeds, or raises OSError with the kernel's errno. It retries nothing and interprets nothing.
The module must not know which maps or programs exist.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "armv7l": 386, "s390x": 351, "ppc64le": 361}

# enum bpf_cmd
MAP_CREATE = 0
MAP_LOOKUP_ELEM = 1
MAP_UPDATE_ELEM = 2
MAP_DELETE_ELEM = 3
MAP_GET_NEXT_KEY = 4
PROG_LOAD = 5
OBJ_PIN = 6
OBJ_GET = 7
PROG_TEST_RUN = 10
PROG_GET_FD_BY_ID = 13
MAP_GET_FD_BY_ID = 14
OBJ_GET_INFO_BY_FD = 15
PROG_QUERY = 16
BTF_LOAD = 18
BTF_GET_FD_BY_ID = 19
MAP_LOOKUP_BATCH = 24
MAP_UPDATE_BATCH = 26
MAP_DELETE_BATCH = 27
LINK_CREATE = 28
LINK_UPDATE = 29
LINK_DETACH = 34

ATTR_BYTES = 152
"""Size of our union bpf_attr: larger than in any known kernel. The bytes beyond the kernel's own union must be zero."""

MAP_KINDS = {
    1: "hash", 2: "array", 3: "prog_array", 5: "percpu_hash", 6: "percpu_array", 9: "lru_hash", 11: "lpm_trie",
    12: "array_of_maps", 14: "devmap", 16: "cpumap", 17: "xskmap", 25: "devmap_hash", 27: "ringbuf",
}  # fmt: skip
PER_CPU_KINDS = frozenset({"percpu_hash", "percpu_array"})

MAP_FLAGS = {"BPF_F_NO_PREALLOC": 1 << 0, "BPF_F_MMAPABLE": 1 << 10}

BPF_F_RDONLY = 1 << 3
BPF_F_BEFORE = 1 << 3
MOST_PROGRAMS = 64
"""Largest number of programs on one hook of an interface (BPF_MPROG_MAX)."""
PROG_TYPE_SCHED_CLS = 3
PROG_TYPE_XDP = 6
NAME_BYTES = 15
"""Longest name of a map or program in bytes, without the terminating zero."""
LOG_BYTES = (1 << 24) - 1
"""Largest size of a verifier log that kernels before 6.4 accept."""
LOG_PATHS, LOG_COUNTS = 1, 4
"""Log levels of the verifier: all paths (BPF_LOG_LEVEL1), or only statistics (BPF_LOG_STATS)."""
TCX_INGRESS = 46
TCX_EGRESS = 47


class _Attr(ctypes.Structure):
    """Base class of the commands' attributes."""


class _ElementAttr(_Attr):
    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _BatchAttr(_Attr):
    _fields_ = (
        ("in_batch", ctypes.c_uint64),
        ("out_batch", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("map_fd", ctypes.c_uint32),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _ObjAttr(_Attr):
    _fields_ = (
        ("pathname", ctypes.c_uint64),
        ("bpf_fd", ctypes.c_uint32),
        ("file_flags", ctypes.c_uint32),
    )


class _InfoAttr(_Attr):
    _fields_ = (
        ("bpf_fd", ctypes.c_uint32),
        ("info_len", ctypes.c_uint32),
        ("info", ctypes.c_uint64),
    )


class _ProgLoadAttr(_Attr):
    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_name", ctypes.c_char * 16),
    )


class _MapCreateAttr(_Attr):
    _fields_ = (
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("map_name", ctypes.c_char * 16),
        ("map_ifindex", ctypes.c_uint32),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
    )


class _BtfLoadAttr(_Attr):
    _fields_ = (
        ("btf", ctypes.c_uint64),
        ("btf_log_buf", ctypes.c_uint64),
        ("btf_size", ctypes.c_uint32),
        ("btf_log_size", ctypes.c_uint32),
        ("btf_log_level", ctypes.c_uint32),
    )


class _TestRunAttr(_Attr):
    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("data_in", ctypes.c_uint64),
        ("data_out", ctypes.c_uint64),
        ("repeat", ctypes.c_uint32),
        ("duration", ctypes.c_uint32),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_uint64),
        ("ctx_out", ctypes.c_uint64),
    )


class _LinkCreateAttr(_Attr):
    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("target_ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class _ProgQueryAttr(_Attr):
    _fields_ = (
        ("target_ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("query_flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("prog_ids", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("prog_attach_flags", ctypes.c_uint64),
        ("link_ids", ctypes.c_uint64),
        ("link_attach_flags", ctypes.c_uint64),
        ("revision", ctypes.c_uint64),
    )


class _LinkUpdateAttr(_Attr):
    _fields_ = (
        ("link_fd", ctypes.c_uint32),
        ("new_prog_fd", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class _LinkDetachAttr(_Attr):
    _fields_ = (("link_fd", ctypes.c_uint32),)


class _RawMapInfo(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class _IdAttr(_Attr):
    _fields_ = (("id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32))


class _BtfInfo(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_uint64),
        ("name_len", ctypes.c_uint32),
        ("kernel_btf", ctypes.c_uint32),
    )


class _RawProgInfo(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_len", ctypes.c_uint32),
        ("xlated_len", ctypes.c_uint32),
        ("jited_insns", ctypes.c_uint64),
        ("xlated_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
        ("middle", ctypes.c_uint32 * 34),  # from ifindex to recursion_misses
        ("verified_insns", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class _RawLinkInfo(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 4),
    )


@dataclass(frozen=True, slots=True)
class MapInfo:
    """The kernel's description of a map.

    Sizes are in bytes. ``kind``: the type as in MAP_KINDS; for a type that MAP_KINDS lacks, the number as text.
    """

    id: int
    name: str
    kind: str
    key_size: int
    value_size: int
    max_entries: int
    has_btf: bool
    btf_id: int = 0
    btf_key_type: int = 0
    btf_value_type: int = 0


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """The kernel's description of a program. Sizes are in bytes.

    ``tag``: digest of the instructions, in hexadecimal. ``verified``: number of instructions that the verifier
    processed; 0 before Linux 5.16, which does not report the number.
    """

    id: int
    name: str
    tag: str
    xlated_bytes: int
    jited_bytes: int
    verified: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """The kernel's description of a tcx link. ``ifindex`` 0: the interface no longer exists."""

    id: int
    prog_id: int
    ifindex: int
    attach_type: int


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def _syscall_number() -> int:
    machine = platform.machine()
    if machine not in SYSCALL_NUMBERS:
        raise OSError(0, f"the number of bpf(2) on {machine} is not known here")
    return SYSCALL_NUMBERS[machine]


def _bpf(command: int, attr: _Attr) -> int:
    """Call bpf(2). At the return, ``attr`` has the kernel's output. Raises OSError."""
    room = ctypes.create_string_buffer(ATTR_BYTES)
    size = ctypes.sizeof(attr)
    ctypes.memmove(room, ctypes.byref(attr), size)
    result: int = _libc().syscall(_syscall_number(), command, room, ATTR_BYTES)
    error = ctypes.get_errno()
    ctypes.memmove(ctypes.byref(attr), room, size)
    if result < 0:
        raise OSError(error, os.strerror(error))
    return result


Buffer = ctypes.Array[ctypes.c_char]


def buffer(content: bytes) -> Buffer:
    """A buffer with these bytes for the kernel to read."""
    return (ctypes.c_char * max(len(content), 1)).from_buffer_copy(content or b"\0")


def empty(size: int) -> Buffer:
    """A zeroed buffer of ``size`` bytes for the kernel to write."""
    return ctypes.create_string_buffer(max(size, 1))


def _element(map_fd: int, key: Buffer | None, value: Buffer | None, flags: int = 0) -> _ElementAttr:
    return _ElementAttr(
        map_fd=map_fd,
        key=ctypes.addressof(key) if key is not None else 0,
        value=ctypes.addressof(value) if value is not None else 0,
        flags=flags,
    )


def map_lookup(map_fd: int, key: Buffer, value: Buffer) -> None:
    """Read one element into ``value``."""
    _bpf(MAP_LOOKUP_ELEM, _element(map_fd, key, value))


def map_update(map_fd: int, key: Buffer, value: Buffer) -> None:
    """Insert or replace one element."""
    _bpf(MAP_UPDATE_ELEM, _element(map_fd, key, value))


def map_delete(map_fd: int, key: Buffer) -> None:
    """Remove one element."""
    _bpf(MAP_DELETE_ELEM, _element(map_fd, key, None))


def map_next_key(map_fd: int, key: Buffer | None, following: Buffer) -> None:
    """Write the key that follows ``key`` into ``following``. ``key`` None: write the first key.

    ENOENT after the last key.
    """
    _bpf(MAP_GET_NEXT_KEY, _element(map_fd, key, following))


def map_batch(
    command: int, map_fd: int, keys: Buffer, values: Buffer | None, count: int,
    *, start: Buffer | None = None, position: Buffer | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Run one batch command. Returns (elements done, errno or 0). A partial result does not raise an exception."""
    attr = _BatchAttr(
        in_batch=ctypes.addressof(start) if start is not None else 0,
        out_batch=ctypes.addressof(position) if position is not None else 0,
        keys=ctypes.addressof(keys),
        values=ctypes.addressof(values) if values is not None else 0,
        count=count,
        map_fd=map_fd,
    )
    try:
        _bpf(command, attr)
    except OSError as error:
        return attr.count, error.errno or 0
    return attr.count, 0


def obj_pin(fd: int, path: Path) -> None:
    """Pin an object in bpffs."""
    name = buffer(bytes(path) + b"\0")
    _bpf(OBJ_PIN, _ObjAttr(pathname=ctypes.addressof(name), bpf_fd=fd))


def obj_get(path: Path, flags: int = 0) -> int:
    """Open a pinned object. Returns a new descriptor. ``flags``: BPF_F_RDONLY if the process may only read the map."""
    name = buffer(bytes(path) + b"\0")
    return _bpf(OBJ_GET, _ObjAttr(pathname=ctypes.addressof(name), file_flags=flags))


def _info(fd: int, info: ctypes.Structure) -> None:
    _bpf(OBJ_GET_INFO_BY_FD, _InfoAttr(bpf_fd=fd, info_len=ctypes.sizeof(info), info=ctypes.addressof(info)))


def map_info(fd: int) -> MapInfo:
    """The kernel's description of a map."""
    info = _RawMapInfo()
    _info(fd, info)
    kind = MAP_KINDS.get(info.kind, str(info.kind))
    name = info.name.decode("ascii")
    return MapInfo(
        info.id, name, kind, info.key_size, info.value_size, info.max_entries, bool(info.btf_id),
        info.btf_id, info.btf_key_type_id, info.btf_value_type_id,
    )  # fmt: skip


def btf(number: int) -> bytes:
    """The BTF blob whose id in the kernel is ``number``."""
    fd = _bpf(BTF_GET_FD_BY_ID, _IdAttr(id=number))
    try:
        info = _BtfInfo()
        _info(fd, info)
        room = empty(info.size)
        info = _BtfInfo(at=ctypes.addressof(room), size=info.size)
        _info(fd, info)
        return room.raw[: info.size]
    finally:
        os.close(fd)


def prog_info(fd: int) -> ProgInfo:
    """The kernel's description of a program."""
    info = _RawProgInfo()
    _info(fd, info)
    return ProgInfo(
        info.id, info.name.decode("ascii"), bytes(info.tag).hex(), info.xlated_len, info.jited_len, info.verified_insns
    )


def prog_fd(number: int) -> int:
    """Open the program whose id in the kernel is ``number``. Returns a descriptor. EPERM without CAP_SYS_ADMIN."""
    return _bpf(PROG_GET_FD_BY_ID, _IdAttr(id=number))


def map_fd(number: int) -> int:
    """Open the map whose id in the kernel is ``number``. Returns a descriptor. EPERM without CAP_SYS_ADMIN."""
    return _bpf(MAP_GET_FD_BY_ID, _IdAttr(id=number))


def prog_code(fd: int) -> bytes:
    """The instructions of a program after verification. Empty if the kernel does not show them to this process."""
    info = _RawProgInfo()
    _info(fd, info)
    size = info.xlated_len
    room = empty(size)
    info = _RawProgInfo(xlated_len=size, xlated_insns=ctypes.addressof(room))
    _info(fd, info)
    return room.raw[: min(size, info.xlated_len)] if info.xlated_insns else b""


def prog_maps(fd: int) -> list[int]:
    """The ids in the kernel of the maps that a program uses."""
    info = _RawProgInfo()
    _info(fd, info)
    numbers = (ctypes.c_uint32 * max(info.nr_map_ids, 1))()
    info = _RawProgInfo(nr_map_ids=info.nr_map_ids, map_ids=ctypes.addressof(numbers))
    _info(fd, info)
    return list(numbers[: info.nr_map_ids])


def link_info(fd: int) -> LinkInfo:
    """The kernel's description of a tcx link."""
    info = _RawLinkInfo()
    _info(fd, info)
    return LinkInfo(info.id, info.prog_id, info.ifindex, info.attach_type)


def map_create(
    kind: str, name: str, key_size: int, value_size: int, max_entries: int, flags: int = 0,
    *, btf_fd: int = 0, btf_key_type: int = 0, btf_value_type: int = 0, inner_map_fd: int = 0,
) -> int:  # fmt: skip
    """Create a map. Returns its descriptor.

    ``kind``: as in MAP_KINDS. ``btf_*_type``: BTF type ids of key and value. ``inner_map_fd``: for a map of maps, a map
    like those that will be its elements.
    """
    number = next(number for number, one in MAP_KINDS.items() if one == kind)
    return _bpf(
        MAP_CREATE,
        _MapCreateAttr(
            map_type=number, key_size=key_size, value_size=value_size, max_entries=max_entries, map_flags=flags,
            map_name=name.encode()[:NAME_BYTES], btf_fd=btf_fd, btf_key_type_id=btf_key_type,
            btf_value_type_id=btf_value_type, inner_map_fd=inner_map_fd,
        ),
    )  # fmt: skip


def btf_load(blob: bytes) -> int:
    """Load a BTF blob into the kernel. Returns a descriptor."""
    content = buffer(blob)
    return _bpf(BTF_LOAD, _BtfLoadAttr(btf=ctypes.addressof(content), btf_size=len(blob)))


def prog_load(
    instructions: bytes, program_type: int = PROG_TYPE_SCHED_CLS, *, name: str = "", log: Buffer | None = None,
    log_level: int = LOG_PATHS,
) -> int:  # fmt: skip
    """Load a program of raw instructions, which have 8 bytes each. Returns the program's descriptor.

    ``log``: memory for the verifier's log.
    """
    code, license_text = buffer(instructions), buffer(b"Dual BSD/GPL\0")
    return _bpf(
        PROG_LOAD,
        _ProgLoadAttr(
            prog_type=program_type,
            insn_cnt=len(instructions) // 8,
            insns=ctypes.addressof(code),
            license=ctypes.addressof(license_text),
            log_level=log_level if log is not None else 0,
            log_size=len(log) if log is not None else 0,
            log_buf=ctypes.addressof(log) if log is not None else 0,
            prog_name=name.encode()[:NAME_BYTES],
        ),
    )


def prog_test_run(prog_fd: int, frame: bytes, context: bytes | bytearray, repeat: int) -> tuple[int, int]:
    """Run a program on a frame. Returns (verdict as a signed number, mean duration in ns).

    ``context``: a ``struct __sk_buff``. If it is a bytearray, the program's changes are stored in it.
    """
    data, ctx = buffer(frame), buffer(bytes(context))
    has_output = isinstance(context, bytearray)
    attr = _TestRunAttr(
        prog_fd=prog_fd,
        data_size_in=len(frame),
        data_in=ctypes.addressof(data),
        repeat=repeat,
        ctx_size_in=len(context),
        ctx_in=ctypes.addressof(ctx) if context else 0,
        ctx_size_out=len(context) if has_output else 0,
        ctx_out=ctypes.addressof(ctx) if has_output else 0,
    )
    _bpf(PROG_TEST_RUN, attr)
    if isinstance(context, bytearray):
        context[:] = ctx.raw[: len(context)]
    return ctypes.c_int32(attr.retval).value, attr.duration


def link_create(prog_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
    """Attach a program to an interface as a tcx link. Returns the link's descriptor.

    The link lasts as long as the descriptor or a pin of the link. The program runs after all programs that are attached
    already; with BPF_F_BEFORE in ``flags``, before them.
    """
    return _bpf(
        LINK_CREATE, _LinkCreateAttr(prog_fd=prog_fd, target_ifindex=ifindex, attach_type=attach_type, flags=flags)
    )


def prog_query(ifindex: int, attach_type: int) -> list[int]:
    """The ids of the tcx programs on a hook of an interface, in the order in which they run. Needs Linux 6.6."""
    numbers = (ctypes.c_uint32 * MOST_PROGRAMS)()
    attr = _ProgQueryAttr(
        target_ifindex=ifindex, attach_type=attach_type, prog_ids=ctypes.addressof(numbers), count=MOST_PROGRAMS
    )
    _bpf(PROG_QUERY, attr)
    return list(numbers[: attr.count])


def link_update(link_fd: int, prog_fd: int) -> None:
    """Replace a link's program atomically: each packet meets either the old program or the new one."""
    _bpf(LINK_UPDATE, _LinkUpdateAttr(link_fd=link_fd, new_prog_fd=prog_fd))


def link_detach(link_fd: int) -> None:
    """Detach a link from its interface at once, even if descriptors or pins of the link remain."""
    _bpf(LINK_DETACH, _LinkDetachAttr(link_fd=link_fd))
