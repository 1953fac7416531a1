# SPDX-License-Identifier: Apache-2.0
"""From the C sources to a compiled file, by BCC, in a child process that exits afterwards.

BCC never frees its compiler's memory, so the process that enforces policy never compiles. BCC only compiles. The
sources declare no map in BCC's dialect, so BCC creates no map and needs no privilege. In the compiled instructions,
maps and masks are numbers (bpf/np_lang.h) that `netpol_loader.kernel.relocation` replaces. BCC gets no kernel headers,
only the shim directory beside the sources.

Invariant: only this module imports bcc. The module must not know the meaning of maps, and must not call bpf(2).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import netpol_ebpf
import netpol_loader
from netpol_ebpf.errors import LoadError, PlatformError
from netpol_loader import abi
from netpol_loader.kernel.grace import is_strongly_ordered
from netpol_loader.kernel.hook import Hook
from netpol_loader.pins.compiled import Compiled, decode_compiled, encode_compiled

ENTRY = "netpol.c"

COMPILE_TIMEOUT_S = 600.0
"""Time limit of a compilation, in seconds. It takes some seconds, or some minutes on an emulated CPU.

The value is arbitrary.
"""

ERROR_LINES = 25
"""Number of last lines of clang's output that an error includes. The end of the output has the cause."""

PROGRAMS = (*(hook.value for hook in Hook), *abi.CALLS.values())
"""The functions of netpol.c that are programs."""

FLAGS = ("-Wno-unknown-pragmas", "-Wno-pass-failed", "-Xclang", "-disable-llvm-passes")
"""Options of clang.

With the last one, clang does not run LLVM's passes: BCC runs them itself, and a second run would double the time.
"""

DECLARED_MAP = re.compile(r'^NP_MAP(?:_RINGBUF\(|\("\w+", )(\w+)', re.MULTILINE)


def source_dir() -> Path:
    """The directory of the C sources: in the installed package, or else in the repository."""
    package = Path(netpol_loader.__file__).resolve().parent
    for candidate in (package / "bpf", package.parent.parent / "bpf"):
        if (candidate / ENTRY).is_file():
            return candidate
    raise PlatformError(
        f"the C sources of the packet path are neither in {package / 'bpf'} nor in {package.parent.parent / 'bpf'}",
        hint="The installation is incomplete; install netpol-ebpf again.",
    )


def source_digest(directory: Path, entry: Path | None = None, machine: str | None = None) -> bytes:
    """The SHA-256 of all input of a compilation except the compiler: sources, shim, options and machine."""
    machine = machine or platform.machine()
    digest = hashlib.sha256(repr((machine, _flags(machine), PROGRAMS)).encode())
    for path in [
        *sorted(directory.glob("*.[ch]")),
        *sorted((directory / "shim").rglob("*.h")),
        *([entry] if entry else []),
    ]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.digest()


def declared_maps(directory: Path, entry: Path | None = None) -> tuple[str, ...]:
    """The names of all maps, in the order of declaration: those of the headers, then those of the entry file.

    The compiled instructions have the index of a name in place of a map.
    """
    text = (directory / "np_maps.h").read_text() + (entry.read_text() if entry else "")
    return tuple(DECLARED_MAP.findall(text))


@functools.cache
def compiler_name() -> str | None:
    """The versions of BCC and LLVM. None if BCC is missing. The libraries are not loaded, because that takes 60 MB."""
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.submodule_search_locations is None:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "libbcc.py").exists():  # PyPI's bcc is an unrelated package
        return None
    version = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return f"BCC {version[1] if version else 'of unknown version'}, LLVM {_llvm_version()}"


def _llvm_version() -> str:
    """The version of the LLVM library that BCC's library is linked to."""
    for pattern in ("lib*/*/libbcc.so.0", "lib*/libbcc.so.0"):
        for path in sorted(Path("/usr").glob(pattern)):
            needed = re.search(rb"libLLVM(?:-|\.so\.)([0-9.]+)", path.read_bytes())
            if needed:
                return needed[1].decode().rstrip(".")
    return "of unknown version"


def compile_program(
    *, entry: Path | None = None, programs: Sequence[str] = PROGRAMS, machine: str | None = None
) -> Compiled:
    """Compile in a child process. This takes some seconds, and 200 MB until the child exits.

    ``entry``: another C file over the same headers, for measurements; ``programs``: the functions in it that are
    programs. ``machine``: the target, in the form of platform.machine(); None: this machine. Raises LoadError with the
    last lines of clang's output. Raises PlatformError if BCC is missing.
    """
    if compiler_name() is None:
        raise PlatformError(
            "the packet path is not compiled for this version, and BCC, which could compile it, is missing",
            hint="Install the distribution's python3-bpfcc (PyPI's bcc is an unrelated package) and make the virtual "
            "environment with --system-site-packages, or bring the file that `netpolctl compile` makes elsewhere.",
        )
    machine = machine or platform.machine()
    command = [sys.executable, "-m", __name__, "--sources", str(source_dir()), "--machine", machine]
    command += ["--program", *programs, *(["--entry", str(entry)] if entry else [])]
    environment = dict(os.environ)
    roots = [str(Path(module).resolve().parent.parent) for module in (netpol_loader.__file__, netpol_ebpf.__file__)]
    environment["PYTHONPATH"] = os.pathsep.join([*roots, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"compiling took longer than {COMPILE_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        tail = "\n  ".join(done.stderr.decode(errors="replace").strip().splitlines()[-ERROR_LINES:])
        raise LoadError(f"the packet path does not compile (exit code {done.returncode}):\n  {tail}")
    return decode_compiled(done.stdout, "the compiler's output")


def _flags(machine: str) -> tuple[str, ...]:
    return FLAGS if is_strongly_ordered(machine) else (*FLAGS, "-DNP_WEAK_ORDER")


def _compile(directory: Path, entry: Path | None, programs: Sequence[str], machine: str) -> Compiled:
    """Compile in this process. BCC itself prints clang's output to standard error."""
    os.environ["BCC_KERNEL_SOURCE"] = str(directory / "shim")
    from bcc import BPF

    path = entry or directory / ENTRY  # as text: BCC searches only the main file for programs
    text = f'#line 1 "{path.name}"\n{path.read_text()}'
    module = BPF(text=text, cflags=[f"-I{directory}", *_flags(machine)])
    return Compiled(
        digest=source_digest(directory, entry, machine).hex(),
        machine=machine,
        compiler=compiler_name() or "",
        maps=declared_maps(directory, entry),
        programs={name: bytes(module.dump_func(name)) for name in programs},
    )


def main(argv: list[str] | None = None) -> int:
    """The child process: write the compiled file to standard output."""
    parser = argparse.ArgumentParser(prog="netpol_loader.pins.compilation", description="Compile the packet path.")
    parser.add_argument("--sources", type=Path, required=True, help="the directory bpf/")
    parser.add_argument("--machine", required=True, help="as `uname -m` says")
    parser.add_argument("--program", nargs="+", default=PROGRAMS, help="functions that are programs")
    parser.add_argument("--entry", type=Path, help="C file instead of netpol.c")
    arguments = parser.parse_args(argv)
    compiled = _compile(arguments.sources, arguments.entry, arguments.program, arguments.machine)
    sys.stdout.buffer.write(encode_compiled(compiled))
    return 0


if __name__ == "__main__":
    sys.exit(main())
