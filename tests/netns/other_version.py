# SPDX-License-Identifier: Apache-2.0
"""Makes another version of the whole program from this one: a copy of its sources with some changes.

Its agent pins what such a version would pin: its own schema number, layouts and programs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent_scene import Scene, with_capabilities

from netpol_loader import abi
from netpol_loader.pins.doctor import CAPABILITIES

ROOT = Path(__file__).resolve().parents[2]
ABI = "bpf/np_abi.h"

Change = tuple[str, str, str]
"""(file, text that occurs in it once, its replacement)."""

WIDER_CONFIG: Change = (ABI, "struct np_config {\n", "struct np_config {\n    __u64 other; // of that version\n")
"""Every setting, including the generation, has another offset."""
WIDER_ENDPOINT: Change = (ABI, "struct np_endpoint {\n", "struct np_endpoint {\n    __u64 other; // of that version\n")
"""A layout of a policy map that the two versions cannot share."""
OTHER_CONNECTION: Change = (
    ABI,
    "    __u32 generation; // the generation under which policy last allowed the connection\n    __u32 rule;",
    "    __u32 rule;\n    __u32 generation;",
)
"""Of the same size, but not the same."""
WITHOUT_NAME_CLASS: tuple[Change, ...] = (
    *(
        change
        for family in ("4", "6")
        for change in (
            (
                ABI,
                f"    struct np_conn{family}_key key;\n    __u32 name_class;",
                f"    struct np_conn{family}_key key;\n    __u32 pad;",
            ),
            (
                "bpf/np_table.h",
                f"__builtin_offsetof(struct np_conn{family}_entry, name_class)",
                f"__builtin_offsetof(struct np_conn{family}_entry, pad)",
            ),
        )
    ),
    ("loader/netpol_loader/tables/connections.py", "self._layout.name_class", "self._layout.pad"),
)
"""Connections of before the domain names: padding in the place of the class, as in schema 9."""
OTHER_PROGRAM: Change = ("bpf/np_endpoint.h", "#define NP_ENDPOINT_TRIES 4", "#define NP_ENDPOINT_TRIES 3")


def schema(step: int) -> Change:
    """The schema number that is ``step`` higher than this one."""
    name = "#define NP_SCHEMA_VERSION "
    return (ABI, f"{name}{abi.SCHEMA_VERSION} ", f"{name}{abi.SCHEMA_VERSION + step} ")


NAMES_OF_SCHEMA_8 = {
    "np_flow_cache4": "np_recent4", "np_flow_cache6": "np_recent6", "np_flow_cache_fact": "np_recent_fact",
    "np_ep_cache": "np_near", "np_vip_filter": "np_special", "np_ifindex": "np_place",
}  # fmt: skip
"""Maps and layouts with other names in that schema."""


def make_version(tree: Path, changes: Sequence[Change], names: Mapping[str, str] | None = None) -> Path:
    """Copy the sources and change them.

    Returns the directory. ``names``: maps names of this version to those of the other one.
    """
    for part in ("bpf", "loader", "netpol_ebpf", "scripts"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "reasons.md", tree / "docs")  # generated together with the rest
    for path in (*tree.rglob("*.py"), *tree.rglob("*.[ch]")) if names else ():
        path.write_text(re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), path.read_text()))
    for name, old, new in changes:
        path = tree / name
        text = path.read_text()
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new))
    if any(name == ABI for name, _, _ in changes):
        header = tree / ABI  # this file asserts the sizes of this version
        header.write_text(re.sub(r"(?m)^_Static_assert.*$", "", header.read_text()))
    subprocess.run([sys.executable, str(tree / "scripts/generate_abi.py")], check=True, capture_output=True)
    return tree


@dataclass
class VersionedScene(Scene):
    """A scene whose agent is of another version.

    ``tree``: its sources; None: this version's. ``is_least``: whether it has only the capabilities of the service.
    """

    tree: Path | None = None
    is_least: bool = False

    def command(self, *options: str) -> list[str]:
        """See `Scene`. The working directory matters as well as the path, because Python searches it first."""
        plain = super().command(*options)
        if self.tree is not None:
            plain = ["env", "-C", str(self.tree), f"PYTHONPATH={self.tree}:{self.tree / 'loader'}", *plain]
        if self.is_least:
            plain = [*with_capabilities(one.name.removeprefix("CAP_").lower() for one in CAPABILITIES), *plain]
        return plain
