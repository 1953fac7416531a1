# SPDX-License-Identifier: Apache-2.0
"""From the C sources to pinned maps and programs, in a child process that exits afterwards.

BCC never gives back the memory of its compiler, so the process that enforces policy never compiles.  The child creates the
maps that are missing (np_maps.h declares the paths), loads the two programs and pins them; the parent only reads its exit
code and its last lines.  No kernel headers: the shim directory beside the sources is all BCC gets.

Maps that are there already are put in the place of small ones that BCC makes for the purpose, before the kernel sees the
program.  Letting BCC open them was rejected: it does so by their numbers, for which the kernel asks for CAP_SYS_ADMIN.

Invariants: this is the one module that imports bcc.  It writes into the directory it is given and, for as long as it runs,
into one named new-<pid> beside it (which whoever builds next removes).  Must not know what is in the maps, nor attach anything.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import netpol_ebpf.errors
from netpol_ebpf.errors import LoadError, PlatformError
from netpol_loader import abi, syscall
from netpol_loader.buckets import MORE_NAMES, buckets_for
from netpol_loader.connections import TAG_NAMES
from netpol_loader.hook import Hook
from netpol_loader.maps import possible_cpus

ENTRY = "netpol.c"
NEW_SUFFIX = "_new"
"""Programs are pinned under this suffix; the caller renames them when it is satisfied."""

BUILD_TIMEOUT_S = 120.0
"""Compile and load take half a second here; arbitrary beyond that."""

ERROR_LINES = 25
"""How much of clang's or the verifier's output an error carries; the end says what failed."""

PROGRAMS = tuple(hook.value for hook in Hook)

DECLARED_MAP = re.compile(r'^NP_MAP(?:_RINGBUF\(|\("\w+", )(\w+)', re.MULTILINE)
INCLUDE = re.compile(r'#include "(\w+\.h)"$')


def source_dir() -> Path:
    """The C sources: inside the installed package, else in the repository."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "bpf", package.parent.parent / "bpf"):
        if (candidate / ENTRY).is_file():
            return candidate
    raise PlatformError(
        f"the C sources of the packet path are neither in {package / 'bpf'} nor in {package.parent.parent / 'bpf'}",
        hint="The installation is incomplete; install netpol-ebpf again.",
    )


def merged_source(directory: Path, entry: Path | None = None) -> str:
    """One text of the entry file (default: netpol.c) and its headers, each once, with line directives.

    BCC rewrites map accesses in the main file only, so the headers have to become part of it.
    """
    seen: set[str] = set()

    def merge(path: Path) -> list[str]:
        seen.add(path.name)
        lines = [f'#line 1 "{path.name}"']
        for number, line in enumerate(path.read_text().splitlines(), 1):
            include = INCLUDE.match(line)
            if include and include[1] not in seen:
                lines += [*merge(directory / include[1]), f'#line {number + 1} "{path.name}"']
            else:
                lines.append("" if include or line == "#pragma once" else line)
        return lines

    return "\n".join(merge(entry or directory / ENTRY)) + "\n"


def source_digest(directory: Path) -> bytes:
    """SHA-256 of everything that makes the program, but for the maps' sizes, which are fixed when they are created."""
    digest = hashlib.sha256(merged_source(directory).encode())
    for path in sorted((directory / "shim").rglob("*.h")):
        digest.update(path.read_bytes())
    return digest.digest()


def build(
    pin_dir: Path, sizes: Mapping[str, int], *, entry: Path | None = None, programs: Sequence[str] = PROGRAMS
) -> None:
    """Make the maps that are missing in ``pin_dir`` and pin the programs there, with NEW_SUFFIX.

    ``sizes``: max_entries by map name, for maps that are created and for those whose size the program knows; of a table
    that is kept in buckets its rows.
    ``entry``, ``programs``: another C file over the same headers and its functions, for measurements.
    Raises LoadError with the last lines of what clang or the verifier said, PlatformError when BCC is missing.
    """
    unknown = sizes.keys() - abi.MAP_SPECS.keys()
    if unknown:
        raise PlatformError(f"no such map: {', '.join(sorted(unknown))}", hint="See netpol_loader.abi.MAP_SPECS.")
    command = [sys.executable, "-m", __name__, str(pin_dir), "--sources", str(source_dir()), "--program", *programs]
    command += ["--entry", str(entry)] if entry else []
    command += ["--size", *(f"{name}={size}" for name, size in sizes.items())] if sizes else []
    environment = dict(os.environ)
    roots = [str(Path(module).resolve().parent.parent) for module in (__file__, netpol_ebpf.errors.__file__)]
    environment["PYTHONPATH"] = os.pathsep.join([*roots, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", check=False,
            timeout=BUILD_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"compiling and loading took longer than {BUILD_TIMEOUT_S:.0f} s") from error
    if done.returncode == PlatformError.exit_code:
        raise PlatformError(done.stderr.strip().splitlines()[-1])
    if done.returncode != 0:
        tail = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-ERROR_LINES:])
        raise LoadError(f"the packet path does not compile or load (exit code {done.returncode}):\n  {tail}")


def _compile_and_pin(
    directory: Path, pin_dir: Path, sizes: Mapping[str, int], entry: Path | None, programs: Sequence[str]
) -> None:
    """The child's work. bcc prints what clang and the verifier say to stderr by itself."""
    os.environ["BCC_KERNEL_SOURCE"] = str(directory / "shim")
    try:
        from bcc import BPF
    except ImportError as error:
        raise PlatformError(
            f"Python's bcc module is missing ({error}): install the distribution's python3-bpfcc, and make the "
            "virtual environment with --system-site-packages (PyPI's bcc is an unrelated package)"
        ) from error
    text = merged_source(directory, entry)
    declared = set(
        DECLARED_MAP.findall(text)
    )  # another entry may use few maps of the product, and have some of its own
    present = [name for name in abi.MAP_SPECS if name in declared and (pin_dir / name).exists()]
    scratch = pin_dir.with_name(f"new-{os.getpid()}") if present else pin_dir
    if present:
        scratch.mkdir()
    try:
        flags = [f'-DNP_PIN_DIR="{scratch}"', f"-DNP_CPUS={possible_cpus()}"]
        flags += ["-Wno-unknown-pragmas", "-Wno-pass-failed"]
        wanted = {**kernel_sizes(sizes), **_placeholder_sizes(text, present)}
        flags += [_size_flag(name, size) for name, size in wanted.items()]
        module = BPF(text=text, cflags=flags)
        if present:
            _exchange_maps(module, scratch, pin_dir, present)
        for program in programs:
            function = module.load_func(program, BPF.SCHED_CLS)
            syscall.obj_pin(function.fd, pin_dir / (program + NEW_SUFFIX))
    finally:
        if present:
            shutil.rmtree(scratch)


def kernel_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """The same as the program needs them.

    Tables that are kept in buckets: so many of those as their rows need, and room for all rows elsewhere.  What is shared out
    over the processors: at least a slot for each.  What is chosen by a mask: the next power of two.
    """
    result = dict(sizes)
    for name in ("np_recent4", "np_recent6"):
        if name in sizes:
            result[name] = max(sizes[name], possible_cpus())
    if "np_near" in sizes:
        result["np_near"] = 1 << (sizes["np_near"] - 1).bit_length()
    for name, tags in TAG_NAMES.items():
        if name in sizes:
            buckets = buckets_for(name, sizes[name])
            result |= {name: buckets * abi.NP_CONN_WAYS, tags: buckets}
    for name, more in MORE_NAMES.items():
        if name in sizes:
            result |= {name: buckets_for(name, sizes[name]), more: sizes[name]}
    return result


def _size_macro(name: str) -> str:
    return f"NP_MAX_{name.removeprefix('np_').upper()}"


def _size_flag(name: str, size: int) -> str:
    return f"-D{_size_macro(name)}={size}"


def _placeholder_sizes(text: str, present: Sequence[str]) -> dict[str, int]:
    """How small maps may be that are only to be exchanged; those whose size the program's own code knows keep it.

    A ring buffer has a page at least.
    """
    code = "\n".join(line for line in text.splitlines() if not line.startswith(("#", "NP_MAP")))
    return {
        name: mmap.PAGESIZE if abi.MAP_SPECS[name].kind == "ringbuf" else 1
        for name in present
        if not re.search(rf"\b{_size_macro(name)}\b", code)
    }


def _exchange_maps(module: Any, scratch: Path, pin_dir: Path, present: Sequence[str]) -> None:
    """Put the maps that are there in the place of those that BCC made, and the new ones where they belong.

    The program that is not loaded yet names maps by descriptors of this process; what those are is exchanged.
    """
    from bcc.libbcc import lib

    for path in list(scratch.iterdir()):
        if path.name not in present:
            path.rename(pin_dir / path.name)
    for name in present:
        fd = syscall.obj_get(pin_dir / name)
        os.dup2(fd, lib.bpf_table_fd(module.module, name.encode()), inheritable=False)
        os.close(fd)


def main(argv: list[str] | None = None) -> int:
    """Entry of the child."""
    parser = argparse.ArgumentParser(prog="netpol_loader.build", description="Compile, load and pin the packet path.")
    parser.add_argument("pin_dir", type=Path)
    parser.add_argument("--sources", type=Path, required=True, help="the directory bpf/")
    parser.add_argument("--program", nargs="+", default=PROGRAMS, help="functions to load")
    parser.add_argument("--entry", type=Path, help="C file instead of netpol.c")
    parser.add_argument("--size", nargs="*", default=[], metavar="MAP=SIZE")
    arguments = parser.parse_args(argv)
    sizes = {name: int(size) for name, _, size in (text.partition("=") for text in arguments.size)}
    try:
        _compile_and_pin(arguments.sources, arguments.pin_dir, sizes, arguments.entry, arguments.program)
    except PlatformError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
