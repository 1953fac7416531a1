# SPDX-License-Identifier: Apache-2.0
"""The pinned maps and programs of one node as a whole: creation, adoption, replacement, removal.

All state is in bpffs (where names may have no dots). A process that holds a `Dataplane` is disposable.

Invariants: the pin directory appears as a whole, by one rename. A pinned program is replaced only by one that the
kernel has loaded. Maps are kept when the program changes. A directory of another schema is never touched
(`netpol_loader.pins.upgrade` takes over an older one). The module must not know the meaning of maps, apart from
configuration and schema.

    PIN_ROOT/v1/np_<map>             maps
    PIN_ROOT/v1/np_layout            their layouts (netpol_loader.pins.layouts)
    PIN_ROOT/v1/programs/            the program set (netpol_loader.pins.programs)
    PIN_ROOT/v1/links/<ifindex>_in   tcx links (netpol_loader.pins.attach)
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import shutil
import struct
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError
from netpol_loader import abi
from netpol_loader.kernel import clock, syscall
from netpol_loader.kernel.grace import order_stores
from netpol_loader.kernel.hook import Hook
from netpol_loader.kernel.maps import Map
from netpol_loader.pins import attach, build, compilation, doctor
from netpol_loader.pins.attach import LINKS
from netpol_loader.pins.layouts import save_layouts
from netpol_loader.pins.lock import locked
from netpol_loader.pins.programs import CURRENT, DAMAGED_HINT, OLD, ProgramSet, begin_exchange, finish_exchange, recover
from netpol_loader.pins.staging import Staging, remove_unfinished
from netpol_loader.tables.buckets import bucketed
from netpol_loader.tables.connections import choose_secret, viewed
from netpol_loader.tables.events import EventReader, EventRecord, parse_dns_record, parse_record

log = logging.getLogger(__name__)

DEFAULT_PIN_ROOT = Path("/sys/fs/bpf/netpol")

FIRST = 1
"""The first generation and the first epoch. A row that was never written has 0."""
TIMEOUTS_S: Mapping[int, float] = types.MappingProxyType(
    {
        abi.NP_CONN_TCP_NEW: 20,
        abi.NP_CONN_TCP_OPEN: 8100,
        abi.NP_CONN_TCP_CLOSING: 30,
        abi.NP_CONN_TCP_RESET: 40,
        abi.NP_CONN_UDP: 60,
        abi.NP_CONN_ICMP: 5,
        abi.NP_CONN_OTHER: 600,
        abi.NP_CONN_FRAGMENT: 30,
    }
)
"""Default time-outs in seconds, by enum np_conn_state. All but two are those of Calico's BPF dataplane.

TCP_OPEN is longer than Linux's keep-alive (7200 s, then nine probes 75 s apart). FRAGMENT is Linux's own time-out.
"""

SKB_BYTES = 192
SKB_MARK = 8
SKB_INGRESS_IFINDEX = 36
SKB_IFINDEX = 40
"""Size of struct __sk_buff, and offsets in the struct, which is a kernel interface and never changes."""


@dataclass(frozen=True, slots=True)
class TestRun:
    """The result of a program's run on a frame.

    ``verdict``: NP_PASS, NP_PASS_ALONE or NP_DROP. ``duration_ns``: the mean over all runs. ``mark``: the packet's mark
    after the run.
    """

    __test__ = False

    verdict: int
    duration_ns: int
    mark: int = 0

    @property
    def passed(self) -> bool:
        """Whether the program lets the packet pass."""
        return self.verdict in (abi.NP_PASS, abi.NP_PASS_ALONE)


class Dataplane:
    """The open descriptors of all maps and programs that are pinned in one directory. The class is a context manager.

    `open` returns a dataplane.
    """

    def __init__(
        self, pin_root: Path, maps: Mapping[str, Map], programs: ProgramSet, pin_dir: Path | None = None
    ) -> None:
        """``pin_dir``: the directory of the pins; None: the directory of this schema."""
        self.pin_root = pin_root
        self.pin_dir = pin_dir or schema_dir(pin_root)
        self.maps = maps
        self.programs = programs

    @classmethod
    def open(
        cls, pin_root: Path = DEFAULT_PIN_ROOT, *, sizes: Mapping[str, int] | None = None, beside_older: bool = False
    ) -> Dataplane:
        """Open the dataplane under ``pin_root``, with the maps and programs that exist.

        Make a new one if there is none.

        ``sizes``: max_entries by map name, for new maps only; of the ring buffer, bytes. Existing maps keep their
        sizes, and a warning is logged if ``sizes`` differs. ``beside_older``: do not raise if a directory of an older
        schema exists. Raises PlatformError (no bpffs, another schema, no BCC), PrivilegeError and LoadError.
        """
        doctor.require_bpffs(pin_root)
        pin_root.mkdir(parents=True, exist_ok=True)
        with locked(pin_root):
            older = find_older(pin_root)
            if older and not beside_older:
                raise PlatformError(
                    f"{pin_root} holds maps of an older schema ({', '.join(path.name for path in older)}); "
                    f"this version speaks schema {abi.SCHEMA_VERSION}",
                    hint="netpol-agent of this version takes them over; `netpolctl cleanup` removes them and ends enforcement.",
                )
            remove_unfinished(pin_root)
            if schema_dir(pin_root).exists():
                return cls._adopt(pin_root, sizes or {})
            return cls._create(pin_root, sizes or {})

    @classmethod
    def _create(cls, pin_root: Path, sizes: Mapping[str, int]) -> Dataplane:
        try:
            with Staging(pin_root) as staging:
                fill(staging, sizes, default_config(clock.measure_jiffies_per_second()))
                staging.directory.rename(schema_dir(pin_root))
                dataplane = cls(pin_root, *staging.taken())
        except BaseException:
            with contextlib.suppress(OSError):
                pin_root.rmdir()
            raise
        log.info("created %s", schema_dir(pin_root))
        return dataplane

    @classmethod
    def _adopt(cls, pin_root: Path, sizes: Mapping[str, int]) -> Dataplane:
        pin_dir = schema_dir(pin_root)
        recover(pin_dir)
        maps = open_maps(pin_dir)
        for name, size in sizes.items():
            if name in maps and maps[name].max_entries != size:
                log.warning(
                    "map %s keeps its size of %d until it is made anew; %d was asked for",
                    name,
                    maps[name].max_entries,
                    size,
                )
        schema = abi.np_schema.from_buffer_copy(maps["np_schema"].get(_index(0)) or b"")
        if schema.version != abi.SCHEMA_VERSION:
            raise PlatformError(f"{pin_dir} holds schema {schema.version}, not {abi.SCHEMA_VERSION}")
        save_layouts(pin_dir)  # an older version may have made the directory without layouts
        dataplane = cls(pin_root, maps, ProgramSet.open(pin_dir / CURRENT))
        if (pin_dir / OLD).exists():
            dataplane.finish_exchange()
            for one in maps.values():
                one.close()
            dataplane.maps = open_maps(pin_dir)
        if bytes(schema.source_digest) != compilation.source_digest(compilation.source_dir()):
            dataplane.replace_programs(schema.jiffies_per_second)
        return dataplane

    def replace_programs(self, jiffies_per_second: int) -> None:
        """Load the programs of these sources. If they differ from the pinned ones, replace those on every interface."""
        with Staging(self.pin_root) as staging:
            staging.programs = ProgramSet.load(build.compiled_program(), self.pinned)
            if staging.programs.tags() == self.programs.tags():
                log.info("the pinned programs are those of these sources already")
            else:
                staging.programs.pin(staging.directory)
                self.exchange(staging)
                log.info("replaced the programs of %s; all maps are kept", self.pin_dir)
        _write_schema(self.maps["np_schema"], jiffies_per_second)

    def exchange(self, staging: Staging) -> None:
        """Replace the program set in force by the staged one on every interface.

        The maps that are staged with the set replace those in force. If the process is killed meanwhile, the next
        `open` finishes the exchange. The replaced descriptors are closed.
        """
        maps, programs = staging.taken()
        begin_exchange(self.pin_dir, staging.directory)
        previous, self.programs = self.programs, programs
        for name in maps:
            self.maps[name].close()
        self.maps = {**self.maps, **maps}
        self.finish_exchange()
        previous.close()

    def finish_exchange(self) -> None:
        """Finish an exchange that has begun. Does nothing if none has begun."""
        finish_exchange(self.pin_dir, lambda old: attach.replace(self, old))

    @property
    def pinned(self) -> dict[str, Map]:
        """The pinned maps by name. These are all maps except the views of unreplied connections."""
        return {name: self.maps[name] for name in abi.MAP_SPECS}

    def program_fd(self, hook: Hook) -> int:
        """The descriptor of a hook's program. The dataplane continues to own the descriptor."""
        return self.programs.hooks[hook]

    def program_tag(self, hook: Hook) -> str:
        """The digest of the instructions of a hook's program, as bpftool prints it."""
        return syscall.prog_info(self.programs.hooks[hook]).tag

    def test_run(
        self,
        hook: Hook,
        frame: bytes,
        *,
        ingress_ifindex: int = 0,
        ifindex: int = 1,
        repeat: int = 1,
        mark: int = 0,
    ) -> TestRun:
        """Run a hook's program on a frame that starts with its Ethernet header.

        ``ifindex``: the interface whose hook the packet passes. It must exist (1: lo). ``ingress_ifindex``: the
        interface by which the packet entered the node; at TC_EGRESS, 0 means that the node itself sent the packet.
        ``repeat``: number of runs. ``mark``: the packet's mark before the run. The maps change as they do for a real
        packet.
        """
        context = bytearray(SKB_BYTES)
        struct.pack_into("=I", context, SKB_MARK, mark)
        struct.pack_into("=I", context, SKB_INGRESS_IFINDEX, ingress_ifindex)
        struct.pack_into("=I", context, SKB_IFINDEX, ifindex)
        try:
            verdict, duration_ns = syscall.prog_test_run(self.programs.hooks[hook], frame, context, repeat)
        except OSError as error:
            raise PlatformError(
                f"cannot run {hook.value} on a frame of {len(frame)} bytes at interface {ifindex}: {error.strerror}"
            ) from error
        return TestRun(verdict, duration_ns, struct.unpack_from("=I", context, SKB_MARK)[0])

    def events(self, callback: Callable[[EventRecord], None]) -> EventReader[EventRecord]:
        """A reader of the event ring. Only one reader may exist at a time."""
        return EventReader(self.maps["np_event"].fd, callback, parse_record)

    def dns_events(self, callback: Callable[[abi.np_dns_event], None]) -> EventReader[abi.np_dns_event]:
        """A reader of the ring of learned addresses. Only one reader may exist at a time."""
        return EventReader(self.maps["np_dns_event"].fd, callback, parse_dns_record)

    def config(self) -> abi.np_config:
        """Read the configuration."""
        return abi.np_config.from_buffer_copy(self.maps["np_config"].get(_index(0)) or b"")

    def set_config(self, config: abi.np_config) -> None:
        """Write the configuration. Each word changes atomically, but the row as a whole may not."""
        order_stores()
        self.maps["np_config"].put(_index(0), bytes(config))

    def bump_generation(self) -> int:
        """Raise the generation, so that policy evaluates every open connection again. Returns the new generation.

        This also raises the epoch, because the endpoint cache has copies of rows and addresses that may have changed.
        """
        config = self.config()
        config.epoch = following(config.epoch)
        self.set_config(config)  # a separate update, for the reason in Applier.bump_generation
        config.generation = following(config.generation)
        self.set_config(config)
        return int(config.generation)

    def remove(self) -> None:
        """Detach our programs from every interface, and remove the directory with the pins.

        The parent directory is also removed, if it is then empty.
        """
        attach.detach_all(self)
        self.close()
        shutil.rmtree(self.pin_dir)
        with contextlib.suppress(OSError):  # another schema's directory may be there
            self.pin_root.rmdir()

    def close(self) -> None:
        """Close all descriptors. The programs continue to enforce policy."""
        for one in self.maps.values():
            one.close()
        self.programs.close()

    def __enter__(self) -> Dataplane:  # noqa: PYI034  # typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def schema_dir(pin_root: Path) -> Path:
    """The directory of this schema's pins."""
    return pin_root / f"v{abi.SCHEMA_VERSION}"


def default_config(jiffies_per_second: int) -> abi.np_config:
    """The configuration of a new dataplane: the first generation and epoch, no flags, the time-outs TIMEOUTS_S."""
    config = abi.np_config(generation=FIRST, epoch=FIRST, jiffies_per_second=jiffies_per_second)
    for state, seconds in TIMEOUTS_S.items():
        config.timeout_jiffies[state] = int(seconds * jiffies_per_second)
    return config


def following(number: int) -> int:
    """The generation or epoch that follows ``number``; never 0."""
    return number % 0xFFFF_FFFF + 1


def _index(number: int) -> bytes:
    return struct.pack("=I", number)


def _write_schema(schema_map: Map, jiffies_per_second: int) -> None:
    digest = compilation.source_digest(compilation.source_dir())
    row = abi.np_schema(version=abi.SCHEMA_VERSION, jiffies_per_second=jiffies_per_second)
    ctypes.memmove(row.source_digest, digest, len(digest))
    schema_map.put(_index(0), bytes(row))


def open_maps(pin_dir: Path) -> dict[str, Map]:
    """Open every map of MAP_SPECS by its pin. Raises PlatformError if a map's layout is not the declared one."""
    maps = {}
    for spec in abi.MAP_SPECS.values():
        try:
            one = Map(syscall.obj_get(pin_dir / spec.name))
        except OSError as error:
            raise PlatformError(
                f"{pin_dir / spec.name} cannot be opened: {error.strerror}",
                hint=DAMAGED_HINT,
            ) from error
        maps[spec.name] = one
        seen = (one.type, one.key_size, one.value_size)
        wanted = (spec.kind, spec.key_size, spec.value_size)
        if seen != wanted:
            raise PlatformError(f"map {spec.name} in {pin_dir} is (type, key, value) {seen}; this build needs {wanted}")
    return viewed(bucketed(maps))


def fill(staging: Staging, sizes: Mapping[str, int], config: abi.np_config) -> None:
    """Fill a staging directory: make the missing maps, the programs, and the directory of links."""
    directory = staging.directory
    (directory / LINKS).mkdir()
    made = build.make_maps(directory, sizes)
    try:
        staging.programs = ProgramSet.load(build.compiled_program(), made)
        staging.programs.pin(directory / CURRENT)
        choose_secret(directory)
        save_layouts(directory)
    finally:
        for one in made.values():
            one.close()
    staging.maps = open_maps(directory)
    staging.maps["np_config"].put(_index(0), bytes(config))
    _write_schema(staging.maps["np_schema"], config.jiffies_per_second)


def find_older(pin_root: Path) -> list[Path]:
    """The directories of older schemas, the oldest first. Raises PlatformError if there is one of a newer schema."""
    found = {int(path.name[1:]): path for path in pin_root.glob("v*") if path.name[1:].isdecimal()}
    newer = [number for number in sorted(found) if number > abi.SCHEMA_VERSION]
    if newer:
        raise PlatformError(
            f"{found[newer[-1]]} holds maps of schema {newer[-1]}, made by a newer version; this version speaks schema "
            f"{abi.SCHEMA_VERSION} and has changed nothing: what the newer one enforces stays in force",
            hint="Start netpol-agent of the newer version, or end enforcement with `netpolctl cleanup` and start this one.",
        )
    return [found[number] for number in sorted(found) if number < abi.SCHEMA_VERSION]
