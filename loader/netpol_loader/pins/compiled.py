# SPDX-License-Identifier: Apache-2.0
"""The compiled packet path as a file, and the directories of such files.

The kernel runs the content of such a file. So a file is used only if nobody but root and this process's user can have
written it: the file and its directory belong to one of them, and no other user may write there. The file has the digest
of the sources in its name and in its content. A digest of the content reveals damage. docs/compiled-program.md explains
what is trusted and why.

Invariant: a file that does not meet every condition is not used, and the reason is logged or raised.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError

log = logging.getLogger(__name__)

FORMAT = 1
PREPARED_DIR = Path("/usr/lib/netpol-ebpf")
"""The directory in which `netpolctl compile` writes a file for an image or a package. Nothing else writes there."""
CACHE_DIR = Path("/var/cache/netpol-ebpf")
"""The directory in which an agent that had to compile stores the result. `netpolctl cleanup` removes the directory."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """Compiled programs that are not loaded yet.

    ``digest``: SHA-256 of the sources and options, in hexadecimal (`netpol_loader.pins.compilation.source_digest`).
    ``machine``: the architecture, as `uname -m` prints it. ``compiler``: versions of BCC and LLVM. ``maps``: their
    names; an instruction has the index of a name in place of a map. ``programs``: by name, the instructions, which have
    8 bytes each.
    """

    digest: str
    machine: str
    compiler: str
    maps: tuple[str, ...]
    programs: Mapping[str, bytes]


def file_name(digest: str, machine: str) -> str:
    """The file name for a digest of sources and an architecture."""
    return f"packet-path-{machine}-{digest[:16]}.json"


def encode_compiled(compiled: Compiled) -> bytes:
    """Encode the programs as a JSON document with its own SHA-256."""
    content = {
        "format": FORMAT,
        "digest": compiled.digest,
        "machine": compiled.machine,
        "compiler": compiled.compiler,
        "maps": compiled.maps,
        "programs": {name: base64.b64encode(code).decode() for name, code in compiled.programs.items()},
    }
    return json.dumps({**content, "sha256": _digest_of(content)}, indent=1).encode() + b"\n"


def decode_compiled(raw: bytes, where: str) -> Compiled:
    """Decode a document. Raises PlatformError if it is damaged or has another format. ``where``: its name in errors."""
    try:
        content = json.loads(raw)
        stated = content.pop("sha256")
        if content["format"] != FORMAT:
            raise PlatformError(f"{where} is of format {content['format']}, not {FORMAT}")
        if _digest_of(content) != stated:
            raise PlatformError(f"{where} is damaged: its SHA-256 is not the one that it states")
        programs = {name: base64.b64decode(code, validate=True) for name, code in content["programs"].items()}
        return Compiled(
            content["digest"], content["machine"], content["compiler"], tuple(content["maps"]), programs
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise PlatformError(f"{where} is no compiled packet path: {error}") from error


def _digest_of(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_compiled(digest: str, machine: str, compiler: str | None, directories: Sequence[Path]) -> Compiled | None:
    """Load the compiled file for these sources. None if no directory has a file that may be used.

    ``compiler``: the versions that must have made the file; None: any, because this machine has no compiler.
    """
    for path in (directory / file_name(digest, machine) for directory in directories):
        try:
            compiled = load_compiled(path)
        except FileNotFoundError:
            continue
        except (OSError, PlatformError) as error:
            log.warning(
                "%s is not used: %s", path, error.message if isinstance(error, PlatformError) else error.strerror
            )
            continue
        if (compiled.digest, compiled.machine) != (digest, machine):
            log.warning("%s is not used: it was compiled from other sources", path)
        elif compiler is not None and compiler != compiled.compiler:
            log.info("%s is not used: %s made it, and %s is here", path, compiled.compiler, compiler)
        else:
            return compiled
    return None


def load_compiled(path: Path) -> Compiled:
    """Read a file.

    Raises FileNotFoundError or another OSError. Raises PlatformError if the file is damaged, or if other users could
    write it.
    """
    _require_ours(path.parent, path.parent.stat())
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a pipe would block
    with os.fdopen(fd, "rb") as file:
        seen = os.fstat(fd)
        _require_ours(path, seen)
        if not stat.S_ISREG(seen.st_mode):
            raise PlatformError(f"{path} is no regular file")
        return decode_compiled(file.read(), str(path))


def save_compiled(compiled: Compiled, directory: Path) -> Path:
    """Write a file, whole or not at all. Raises OSError.

    Raises PlatformError if other users can write into the directory.
    """
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    _require_ours(directory, directory.stat())
    path = directory / file_name(compiled.digest, compiled.machine)
    staged = path.with_suffix(f".{os.getpid()}.new")
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(encode_compiled(compiled))
        staged.rename(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return path


def kept_files() -> list[Path]:
    """The files that agents stored in CACHE_DIR; then CACHE_DIR itself, if it has no other files."""
    if not CACHE_DIR.is_dir():
        return []
    ours = sorted(CACHE_DIR.glob(file_name("*", "*")))
    return [*ours, CACHE_DIR] if set(CACHE_DIR.iterdir()) == set(ours) else ours


def _require_ours(path: Path, seen: os.stat_result) -> None:
    """Raise PlatformError if a user other than root and this process's user can have written to the path."""
    if seen.st_uid not in {0, os.geteuid()}:
        raise PlatformError(f"{path} belongs to user {seen.st_uid}, neither to root nor to the user of this process")
    if seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PlatformError(f"{path} can be written by its group or by everybody (mode {stat.S_IMODE(seen.st_mode):o})")
