# SPDX-License-Identifier: Apache-2.0
"""Provides kernels to boot: a name such as 6.1 becomes an uncompressed vmlinux with its modules, in a cache.

A named kernel comes from Debian's packages, by an apt configuration of its own (sources, lists and state in the cache),
so this machine's package lists never change. A path names a vmlinux that was built with everything built in.

Invariants: apt verifies what it downloads. A kernel in the cache needs neither network nor apt. This module must not
install anything on the machine, and must not boot anything (`tests.vm.emulator` does).
"""

from __future__ import annotations

import json
import lzma
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from netpol_ebpf.errors import PlatformError, UsageError

NAMES = ("5.10", "6.1", "6.1-rt", "6.12", "6.12-rt", "6.18", "newest", "newest-rt")
"""The kernels that Debian's packages offer: those of bullseye, bookworm, trixie, trixie-backports, and the newest; some
are real-time kernels."""

SUITES = ("bullseye", "bookworm", "trixie", "trixie-backports", "sid")
SECURITY_SUITES = ("bullseye-security", "bookworm-security", "trixie-security")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE = "NETPOL_VM_MIRROR"
CACHE_VARIABLE = "NETPOL_VM_CACHE"
DOWNLOAD_TIMEOUT_S = 300.0
LISTS_AGE_S = 3600.0  # arbitrary: all kernels of one run use the same lists

IMAGE_PACKAGE = re.compile(
    r"linux-image-(?P<release>(?P<series>\d+\.\d+)\.[0-9][\w.+~-]*?)-(?P<flavour>cloud|rt)-amd64"
)
BACKPORT = re.compile(r"deb1[12]$|\.deb11\.")
"""Matches a kernel of a newer Debian that was rebuilt for an older one. Another entry has the original."""

ELF = b"\x7fELF"
SETUP_SECTORS_AT, PAYLOAD_AT = (
    0x1F1,
    0x248,
)  # Documentation/arch/x86/boot.rst: setup_sects, payload_offset and payload_length
SECTOR_BYTES = 512
SIZE_BYTES = 4  # the length of the uncompressed kernel follows the payload (scripts/Makefile.lib, size_append)
DECOMPRESSORS = {b"\x02\x21\x4c\x18": "lz4", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that is ready to boot.

    ``name``: the name that the caller gave. ``modules``: the directory of its modules (with modules.dep); None if
    everything is built in. ``source``: the package and its version, or "built".
    """

    name: str
    vmlinux: Path
    modules: Path | None
    source: str

    @property
    def slug(self) -> str:
        """The name, in a form for file names."""
        return self.name if self.name in NAMES else f"{self.vmlinux.parent.name}-built"


def cache_dir() -> Path:
    """The directory in which kernels are kept between runs."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "netpol-vm")


def find(name: str, *, refresh: bool = False) -> Kernel:
    """The kernel with this name or path.

    It is downloaded if the cache lacks it, or with ``refresh`` if there is a newer one. Raises UsageError if the name
    is neither known nor a file. Raises PlatformError if the kernel is not available.
    """
    if "/" in name:
        return _built(Path(name))
    if name not in NAMES:
        raise UsageError(
            f"{name} is no kernel known here", hint=f"Give one of {', '.join(NAMES)}, or the path of a vmlinux."
        )
    note = cache_dir() / "kernels" / f"{name}.json"
    if refresh or not note.exists():
        _download(name, note)
    record = json.loads(note.read_text())
    return Kernel(name, Path(record["vmlinux"]), Path(record["modules"]), record["source"])


def _built(path: Path) -> Kernel:
    vmlinux = path.resolve()
    try:
        with vmlinux.open("rb") as file:
            is_elf = file.read(len(ELF)) == ELF
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if not is_elf:
        raise UsageError(
            f"{path} is not an uncompressed vmlinux", hint="Give the ELF file that the kernel's build leaves."
        )
    return Kernel(str(path), vmlinux, None, "built")


# --- packages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mirror:
    """A source of Debian's packages. ``security``: None if no security archive is known for the mirror."""

    main: str
    security: str | None


def find_mirror() -> Mirror:
    """The mirror in NETPOL_VM_MIRROR, otherwise the mirror of this machine's own apt."""
    if chosen := os.environ.get(MIRROR_VARIABLE):
        return Mirror(chosen, None)
    rows = _run(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages"])
    by_label = {
        label: uri for origin, label, uri in (row.split("|") for row in rows.splitlines()) if origin == "Debian"
    }
    if "Debian" not in by_label:
        raise PlatformError(
            "this machine's apt knows no Debian mirror",
            hint=f"Run `apt-get update` once, or name a mirror in {MIRROR_VARIABLE}.",
        )
    return Mirror(by_label["Debian"], by_label.get("Debian-Security"))


class Apt:
    """apt with its own lists, cache and state below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stamp = directory / "updated"
        self._options = [
            f"Dir::Etc::sourcelist={directory}/sources.list",
            "Dir::Etc::sourceparts=/dev/null",
            "Dir::Etc::preferences=/dev/null",
            "Dir::Etc::preferencesparts=/dev/null",
            f"Dir::State={directory}/state",
            f"Dir::State::lists={directory}/lists",
            f"Dir::State::status={directory}/status",
            f"Dir::Cache={directory}/cache",
            "Dir::Cache::pkgcache=pkgcache.bin",
            "Acquire::Languages=none",
            "APT::Architecture=amd64",
            "APT::Sandbox::User=root",  # the cache belongs to the caller, and apt's own user may not write there
        ]

    def update(self, mirror: Mirror) -> None:
        """Download the lists of all suites. Lists of old suites are no longer renewed, so their age is no error."""
        for part in ("state", "lists/partial", "cache/archives/partial"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        (self.directory / "status").touch()
        rows = [(mirror.main, suite) for suite in SUITES]
        rows += [(mirror.security, suite) for suite in SECURITY_SUITES if mirror.security is not None]
        options = f"[arch=amd64 signed-by={KEYRING} check-valid-until=no]"
        (self.directory / "sources.list").write_text(
            "".join(f"deb {options} {uri} {suite} main\n" for uri, suite in rows)
        )
        self._call("apt-get", "--quiet=2", "--error-on=any", "update")
        self._stamp.touch()

    def age_s(self) -> float:
        """The age of the lists in seconds; infinite if there are none."""
        return time.time() - self._stamp.stat().st_mtime if self._stamp.exists() else math.inf

    def names(self, prefix: str) -> list[str]:
        """All package names that begin with ``prefix``."""
        return self._call("apt-cache", "pkgnames", prefix).split()

    def version(self, package: str) -> str:
        """The newest version of a package."""
        shown = self._call("apt-cache", "--no-all-versions", "show", package)
        return next(line.removeprefix("Version: ") for line in shown.splitlines() if line.startswith("Version: "))

    def download(self, packages: Iterable[str], directory: Path) -> list[Path]:
        """Download the packages into ``directory``, verified by apt. Returns their files."""
        self._call("apt-get", "--quiet=2", "download", *packages, cwd=directory)
        return sorted(directory.glob("*.deb"))

    def _call(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        options = [part for option in self._options for part in ("-o", option)]
        return _run([tool, *options, *arguments], cwd=cwd)


def choose_package(name: str, packages: Iterable[str]) -> str:
    """The image package of the newest kernel for ``name`` (one of NAMES). Raises PlatformError if there is none."""
    series, _, flavour = name.partition("-")
    found = [
        match
        for match in map(IMAGE_PACKAGE.fullmatch, packages)
        if match
        and match["flavour"] == (flavour or "cloud")
        and (match["series"] == series or series == "newest")
        and not BACKPORT.search(match["release"])
    ]
    if not found:
        raise PlatformError(f"the mirror has no package of kernel {name}")
    return max(found, key=lambda match: _version_key(match["release"]))[0]


def _version_key(release: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", release)))


def _download(name: str, note: Path) -> None:
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    apt = Apt(cache / "apt")
    if apt.age_s() > LISTS_AGE_S:
        apt.update(find_mirror())
    image = choose_package(name, apt.names("linux-image-"))
    source = f"{image} {apt.version(image)}"
    directory = cache / "kernels" / image
    if not directory.is_dir():
        directory.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _unpack(apt, image, Path(scratch)).rename(directory)  # atomic
    release = image.removeprefix("linux-image-")
    record = {"vmlinux": f"{directory}/vmlinux", "modules": f"{directory}/lib/modules/{release}", "source": source}
    unfinished = note.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record))
    unfinished.rename(note)


def _unpack(apt: Apt, image: str, scratch: Path) -> Path:
    """Make a directory with vmlinux and lib/modules from the package's files."""
    release = image.removeprefix("linux-image-")
    # From 6.19 on the image package is empty, and these packages have its parts.
    parts = [f"linux-{part}-{release}" for part in ("base", "binary", "modules")]
    known = set(apt.names("linux-binary-"))
    tree = scratch / "tree"
    for package in apt.download(parts if parts[1] in known else [image], scratch):
        _run(["dpkg-deb", "--extract", str(package), str(tree)])
    result = scratch / image
    result.mkdir()
    (image_file,) = (*tree.glob("boot/vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz"))
    (result / "vmlinux").write_bytes(extract_vmlinux(image_file.read_bytes()))
    modules = next(path for path in (tree / "lib/modules", tree / "usr/lib/modules") if path.is_dir())
    (result / "lib").mkdir()
    modules.rename(result / "lib/modules")
    for config in tree.glob("boot/config-*"):
        config.rename(result / "lib/modules" / release / "config")  # the place of this file in newer packages
    _run(["depmod", "--basedir", str(result), release])
    return result


# --- vmlinux ------------------------------------------------------------------------------------------------------------


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF file inside a bzImage. QEMU boots it by PVH, because decompression takes much longer under emulation.

    Raises PlatformError if the image is compressed in another way than Debian's are, or if the tool for it is missing.
    """
    offset, length = struct.unpack_from("<II", image, PAYLOAD_AT)
    begin = (image[SETUP_SECTORS_AT] + 1) * SECTOR_BYTES + offset
    payload = image[begin : begin + length]
    tool = next((tool for magic, tool in DECOMPRESSORS.items() if payload.startswith(magic)), None)
    if tool is None:
        raise PlatformError(
            f"the kernel image is compressed in an unknown way: its payload begins with {payload[:6].hex()}"
        )
    (size,) = struct.unpack("<I", payload[-SIZE_BYTES:])
    vmlinux = _decompress(tool, payload[:-SIZE_BYTES])
    if not vmlinux.startswith(ELF) or len(vmlinux) != size:
        raise PlatformError(f"the kernel image decompresses to {len(vmlinux)} bytes instead of an ELF file of {size}")
    return vmlinux


def _decompress(tool: str, payload: bytes) -> bytes:
    if tool == "xz":
        return lzma.decompress(payload)
    if shutil.which(tool) is None:
        raise PlatformError(f"{tool} is not installed", hint=f"apt install {tool}")
    return subprocess.run([tool, "--decompress", "--stdout"], input=payload, check=True, capture_output=True).stdout


# --- modules ------------------------------------------------------------------------------------------------------------


def modules_in_order(modules: Path, wanted: Iterable[str]) -> list[Path]:
    """The files of the wanted modules, each after the modules that it needs.

    Built-in (or unknown) modules have no file.
    """
    needs: dict[str, tuple[str, ...]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = tuple(rest.split())
    by_name = {_module_name(path): path for path in needs}
    ordered: dict[str, None] = {}

    def add(path: str) -> None:
        for need in needs[path]:
            add(need)
        ordered.setdefault(path)

    for name in wanted:
        if name in by_name:
            add(by_name[name])
    return [modules / path for path in ordered]


def read_module(path: Path) -> bytes:
    """The module in the form that the kernel accepts."""
    raw = path.read_bytes()
    return lzma.decompress(raw) if path.suffix == ".xz" else raw


def _module_name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


def _run(command: list[str], *, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise PlatformError(f"`{Path(command[0]).name} {command[-1]}` failed (exit code {done.returncode}):\n{said}")
    return done.stdout
