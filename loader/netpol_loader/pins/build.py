# SPDX-License-Identifier: Apache-2.0
"""Build the content of a pin directory: the missing maps, and a program set that uses all maps.

Invariants: an existing map is used, whatever its size. This process compiles nothing (`netpol_loader.pins.compilation`
does). The module must not know what the maps contain, and must not attach anything.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from netpol_ebpf.errors import LoadError, PlatformError
from netpol_loader import abi
from netpol_loader.kernel import syscall
from netpol_loader.kernel.btf import Writer
from netpol_loader.kernel.facts import kernel_facts
from netpol_loader.kernel.maps import Map, possible_cpus
from netpol_loader.kernel.relocation import PER_CPU_RANGES, link, load_program
from netpol_loader.pins import compilation
from netpol_loader.pins.compiled import CACHE_DIR, PREPARED_DIR, Compiled, find_compiled, save_compiled
from netpol_loader.pins.programs import ProgramSet
from netpol_loader.tables.buckets import buckets_for

log = logging.getLogger(__name__)

DIRECTORIES = (PREPARED_DIR, CACHE_DIR)
"""The directories that are searched for compiled files. New files are stored in the last one."""


def compiled_program(*, keep: bool = True) -> Compiled:
    """The product's programs: from a compiled file, or else compiled now and stored for the next start.

    ``keep`` False: do not store them. Raises LoadError if they do not compile. Raises PlatformError if there is neither
    a file nor a compiler.
    """
    digest, machine = compilation.source_digest(compilation.source_dir()).hex(), platform.machine()
    found = find_compiled(digest, machine, compilation.compiler_name(), DIRECTORIES)
    if found is not None:
        return found
    log.info("compiling the packet path%s", ", which is kept for the next start" if keep else "")
    compiled = compilation.compile_program()
    if not keep:
        return compiled
    try:
        save_compiled(compiled, DIRECTORIES[-1])
    except (OSError, PlatformError) as error:
        reason = error.message if isinstance(error, PlatformError) else f"{DIRECTORIES[-1]}: {error.strerror}"
        log.warning("the compiled packet path is not kept, so the next start compiles again: %s", reason)
    return compiled


def make_maps(
    directory: Path, sizes: Mapping[str, int], specs: Mapping[str, abi.MapSpec] = abi.MAP_SPECS
) -> dict[str, Map]:
    """Make and pin those maps of ``specs`` that a directory lacks. Returns all maps of ``specs``, open.

    ``sizes``: max_entries of new maps, by name; of a bucketed table, its rows. Raises LoadError if the kernel rejects a
    map. Raises PlatformError if ``sizes`` has an unknown name.
    """
    unknown = sizes.keys() - specs.keys()
    if unknown:
        raise PlatformError(f"no such map: {', '.join(sorted(unknown))}", hint="See netpol_loader.abi.MAP_SPECS.")
    wanted = {**{name: spec.max_entries for name, spec in specs.items()}, **kernel_sizes(sizes)}
    missing = [spec for spec in specs.values() if not (directory / spec.name).exists()]
    for name, fd in _create_maps(missing, wanted):
        try:
            syscall.obj_pin(fd, directory / name)
        finally:
            os.close(fd)
    return {name: Map(syscall.obj_get(directory / name)) for name in specs}


def try_load() -> list[syscall.ProgInfo]:
    """Load the product's programs with minimal maps, then release them.

    Returns the kernel's description of each program.

    Nothing is pinned, attached or stored. Raises the errors of `compiled_program` and of `ProgramSet.load`.
    """
    compiled = compiled_program(keep=False)
    smallest = {
        name: mmap.PAGESIZE if spec.kind == "ringbuf" else 1
        for name, spec in abi.MAP_SPECS.items()
    }  # fmt: skip
    maps = {name: Map(fd) for name, fd in _create_maps(list(abi.MAP_SPECS.values()), kernel_sizes(smallest))}
    try:
        programs = ProgramSet.load(compiled, maps)
        try:
            return [syscall.prog_info(fd) for _, fd in programs.programs()]
        finally:
            programs.close()
    finally:
        for one in maps.values():
            one.close()


def load_entry(
    directory: Path, entry: Path, programs: tuple[str, ...], specs: Mapping[str, abi.MapSpec]
) -> dict[str, int]:
    """Compile and load another C file over the same headers, for measurements. Returns descriptors by program name.

    ``specs``: the maps that the file declares besides the product's. All maps are made and pinned in ``directory``.
    """
    compiled = compilation.compile_program(entry=entry, programs=programs)
    every = {**abi.MAP_SPECS, **specs}
    maps = make_maps(directory, {}, {name: every[name] for name in compiled.maps if name in every})
    try:
        fds = {name: one.fd for name, one in maps.items()}
        return {
            name: load_program(name, link(code, compiled.maps, fds, kernel_facts()))
            for name, code in compiled.programs.items()
        }
    finally:
        for one in maps.values():
            one.close()


def kernel_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Convert sizes in rows to max_entries of the kernel's maps, by name.

    A bucketed table gets the buckets that its rows need, and its overflow map gets room for all rows. A map with the
    trait "ranged" gets at least one slot for each CPU. A map with the trait "masked" gets the next power of two.
    """
    result = dict(sizes)
    for name in PER_CPU_RANGES & sizes.keys():
        result[name] = max(sizes[name], possible_cpus())
    for name in abi.maps_with(abi.MapTrait.MASKED):
        if name not in sizes:
            continue
        result[name] = 1 << (sizes[name] - 1).bit_length()
    for name, tags in abi.TAG_MAPS.items():
        if name in sizes:
            buckets = buckets_for(name, sizes[name])
            result |= {name: buckets * abi.NP_CONN_WAYS, tags: buckets}
    for name, more in abi.OVERFLOW_MAPS.items():
        if name in sizes:
            result |= {name: buckets_for(name, sizes[name]), more: sizes[name]}
    return result


def _create_maps(specs: Sequence[abi.MapSpec], sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Make maps with BTF. Yields each as (name, descriptor); the caller must close the descriptor. Raises LoadError."""
    types = Writer()
    numbers = {spec.name: _types_of(spec, types) for spec in specs}
    btf_fd = syscall.btf_load(types.blob()) if any(number for _, number in numbers.values()) else -1
    try:
        for spec in specs:
            key_type, value_type = numbers[spec.name]
            try:
                fd = syscall.map_create(
                    spec.kind, spec.name, spec.key_size, spec.value_size, sizes[spec.name],
                    sum(syscall.MAP_FLAGS[flag] for flag in spec.flags),
                    btf_fd=btf_fd if value_type else 0, btf_key_type=key_type, btf_value_type=value_type,
                )  # fmt: skip
            except OSError as error:
                raise LoadError(
                    f"the kernel refuses map {spec.name} with {sizes[spec.name]} entries: {error.strerror}"
                ) from error
            yield spec.name, fd
    finally:
        if btf_fd >= 0:
            os.close(btf_fd)


def _types_of(spec: abi.MapSpec, types: Writer) -> tuple[int, int]:
    """The BTF type ids of a map's key and value. (0, 0) if the map has no BTF."""
    if spec.value is None:
        return 0, 0
    return types.number_of(spec.key or ctypes.c_uint32), types.number_of(spec.value)
