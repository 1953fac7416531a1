# SPDX-License-Identifier: Apache-2.0
"""Installs the CNI plugin on a node: its program in the runtime's plugin directory, its entry in the configuration.

A runtime uses the configuration that is first by file name. If that configuration is a list of plugins, our entry is
added at the end of the list. If it is the configuration of a single plugin, it is converted to a list, and the original
file is renamed so that no runtime reads the original.

Invariants: each file is replaced atomically, the program before any configuration that names it. Other entries of a
configuration stay. A configuration that cannot be parsed is reported and not changed.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netpol_ebpf.apply.records import checked, checked_list, load_regular, parse_json, reason_of
from netpol_ebpf.errors import InvalidInputError, PlatformError

TYPE = "netpol-cni"
PROGRAM = Path(__file__).with_name(TYPE)
"""Path of the plugin's program. `make -C cni` writes it, and images and packages contain it."""
DEFAULT_BIN_DIR, DEFAULT_CONF_DIR = Path("/opt/cni/bin"), Path("/etc/cni/net.d")
"""Default directories of CNI plugins and network configurations, as containerd, CRI-O and other runtimes have them."""
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Versions of the CNI specification that the plugin supports (cni/netpol_cni.c)."""
LIST, SINGLE = ".conflist", (".conf", ".json")
"""File name extensions of the configurations that libcni reads. LIST: of lists of plugins; SINGLE: of single
plugins."""
SAVED = ".netpol-saved"
"""Suffix that is added to the file name of a single plugin's configuration when it is converted to a list."""
BUILD_HINT = "Build it (make -C cni), or use an image or a package of this architecture that has it."
MOST_BYTES = 1 << 20
"""Largest accepted configuration, in bytes. The number is arbitrary; real configurations have some kilobytes."""


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """The plugin's settings, which its entry in the configuration has.

    ``socket``: path of the agent's control socket. ``timeout_s``: how long a pod's start waits for its policy.
    ``posture``: "closed" or "open".
    """

    socket: Path
    timeout_s: int
    posture: str

    def render(self) -> dict[str, Any]:
        """The plugin's entry for the list of plugins, as a JSON object."""
        return {"type": TYPE, "socket": str(self.socket), "timeout": self.timeout_s, "posture": self.posture}


@dataclass(frozen=True, slots=True)
class Installed:
    """One thing that the installation made: the program, or our entry in a configuration.

    ``remove`` removes it; raises OSError or InvalidInputError.
    """

    kind: str
    path: Path
    remove: Callable[[], None]


def install(bin_dir: Path, conf_dir: Path, settings: PluginSettings) -> list[Path]:
    """Install the program and the configuration entry. Returns the paths of the files that were written.

    The list is empty if everything was installed already. Raises PlatformError if the program does not exist, cannot be
    executed on this machine, or cannot be written. Raises InvalidInputError if there is no configuration, or if our
    plugin cannot be added to it.
    """
    program = _load_program()
    written = []
    path = bin_dir / TYPE
    try:
        bin_dir.mkdir(parents=True, exist_ok=True)
        if not _is_program(path, program):
            _replace(path, program, 0o755)
            written.append(path)
        first = first_configuration(conf_dir)
        if first.suffix == LIST:
            return written + _extend(first, settings)
        return written + _convert(first, settings)
    except OSError as error:
        raise PlatformError(
            f"{error.filename}: {error.strerror}", hint="Run it as root, where the directory can be written."
        ) from error


def _load_program() -> bytes:
    """Load the program after a check that it can be executed here and supports VERSIONS. Raises PlatformError."""
    try:
        done = subprocess.run(
            [PROGRAM], env={"CNI_COMMAND": "VERSION"}, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        found = json.loads(done.stdout)["supportedVersions"] if done.returncode == 0 else None
        if found != [*VERSIONS]:
            raise PlatformError(f"{PROGRAM} is not the CNI plugin of this version", hint=BUILD_HINT)
        return PROGRAM.read_bytes()
    except OSError as error:  # the program does not exist, or is of another architecture
        raise PlatformError(f"the CNI plugin cannot be run: {PROGRAM}: {error.strerror}", hint=BUILD_HINT) from error
    except (ValueError, LookupError, TypeError) as error:
        raise PlatformError(f"{PROGRAM} is not the CNI plugin", hint=BUILD_HINT) from error


def first_configuration(conf_dir: Path) -> Path:
    """The path of the configuration that runtimes use, which is the first by name.

    Raises InvalidInputError if there is none, OSError if the directory cannot be read.
    """
    names = sorted(one.name for one in conf_dir.iterdir() if one.is_file()) if conf_dir.is_dir() else []
    for name in names:
        if Path(name).suffix in (LIST, *SINGLE):
            return conf_dir / name
    raise InvalidInputError(
        f"{conf_dir} has no network configuration",
        hint="Install the cluster's network first, or wait for it with --follow.",
    )


def find_installed(bin_dir: Path, conf_dir: Path) -> Iterator[Installed]:
    """Find the program and our configuration entries, in the order in which they must be removed. Raises OSError."""
    for path in sorted(conf_dir.glob(f"*{LIST}")) if conf_dir.is_dir() else []:
        if path.is_file() and not path.is_symlink() and _names_ours(path):
            yield Installed("CNI configuration", path, lambda path=path: _take_out(path))  # type: ignore[misc]
    program = bin_dir / TYPE
    if program.exists():
        yield Installed("CNI plugin", program, program.unlink)


def _names_ours(path: Path) -> bool:
    """Whether the list in a file includes our plugin.

    If the file cannot be parsed: whether our plugin's name occurs in it.
    """
    try:
        return any(one.get("type") == TYPE for one in _plugins(_load(path), path))
    except InvalidInputError:
        return TYPE.encode() in path.read_bytes()


def _extend(path: Path, settings: PluginSettings) -> list[Path]:
    """Put our entry at the end of the list in a file. Returns the files that were written."""
    document = _load(path)
    others = [one for one in _plugins(document, path) if one.get("type") != TYPE]
    if not others:
        raise InvalidInputError(f"{path}: there is no other plugin in the list: none makes an interface")
    wanted = {**document, "plugins": [*others, settings.render()]}
    if wanted == document:
        return []
    _require_version(document, path)
    _replace(path, _encode(wanted), None)
    return [path]


def _convert(path: Path, settings: PluginSettings) -> list[Path]:
    """Convert a single plugin's configuration to a list that ends with our entry.

    Returns the files that were written.
    """
    document = _load(path)
    target = path.with_suffix(LIST)
    if not isinstance(document.get("type"), str):
        raise InvalidInputError(f"{path}: is no plugin's configuration: it has no type")
    _require_version(document, path)
    if target.exists() and not any(one.get("type") == TYPE for one in _plugins(_load(target), target)):
        raise InvalidInputError(
            f"{path}: cannot be made a list: {target} is there, and is another one's", hint="Remove one of the two."
        )
    common = {name: document[name] for name in ("cniVersion", "name") if name in document}
    plugin = {name: value for name, value in document.items() if name not in common}
    mode = stat.S_IMODE(path.stat().st_mode)
    _replace(target, _encode({**common, "plugins": [plugin, settings.render()]}), mode)
    path.replace(path.with_name(path.name + SAVED))
    return [target]


def _take_out(path: Path) -> None:
    """Remove our entry from a list.

    If the list was converted from a single plugin's file, restore that file instead.
    """
    for suffix in SINGLE:
        saved = path.with_name(path.stem + suffix + SAVED)
        if saved.exists():
            saved.replace(path.with_suffix(suffix))
            path.unlink()
            return
    document = _load(path)
    others = [one for one in _plugins(document, path) if one.get("type") != TYPE]
    if not others:
        raise InvalidInputError(f"{path}: has no plugin but ours, and a list must have one", hint="Remove the file.")
    _replace(path, _encode({**document, "plugins": others}), None)


def _require_version(document: dict[str, Any], path: Path) -> None:
    version = document.get("cniVersion")
    if version not in VERSIONS:
        known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        raise InvalidInputError(
            f"{path}: its cniVersion is {version!r}, and the plugin knows {known}: it stays as it is"
        )


def _load(path: Path) -> dict[str, Any]:
    """Load a JSON object from a file. Raises InvalidInputError, and OSError if the file cannot be read."""
    try:
        return checked(parse_json(load_regular(path, MOST_BYTES)), dict, "the file")
    except ValueError as error:
        raise InvalidInputError(f"{path}: is no network configuration: {reason_of(error)}") from error


def _plugins(document: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    try:
        return checked_list(document.get("plugins"), dict, "plugins")
    except ValueError as error:
        raise InvalidInputError(f"{path}: is no list of plugins: {error}") from error


def _encode(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _is_program(path: Path, program: bytes) -> bool:
    try:
        return os.access(path, os.X_OK) and path.read_bytes() == program
    except FileNotFoundError:
        return False


def _replace(path: Path, content: bytes, mode: int | None) -> None:
    """Write a file atomically: under a name that no runtime reads, then rename it.

    ``mode``: the mode of the new file. None: the new file gets mode and owner of the file that it replaces.
    """
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    owner = path.stat() if mode is None else None
    with draft.open("xb") as file:
        os.fchmod(file.fileno(), stat.S_IMODE(owner.st_mode) if owner is not None else mode or 0)
        if owner is not None:
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
