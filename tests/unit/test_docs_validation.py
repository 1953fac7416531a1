# SPDX-License-Identifier: Apache-2.0
"""The list of slugs in the documentation is complete and holds none that are gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = [
    *(ROOT / "netpol_ebpf" / "resources").glob("*.py"),
    *(ROOT / "netpol_ebpf" / "policy").glob("lint*.py"),
]


def test_every_slug_is_documented() -> None:
    """Slugs are an interface: what reads the JSON output keys on them."""
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    used = set(re.findall(r'slug(?:: str)? ?= ?"([a-z-]+)"', text))
    used |= set(re.findall(r'yield (?:_|Name)Warning\([^)]*?"([a-z]+-[a-z-]+)"', text, re.DOTALL))
    used |= set(re.findall(r'^ *yield "([a-z-]+)", ', text, re.MULTILINE))
    used |= set(re.findall(r'yield \(\s*"([a-z-]+)",', text))
    page = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    tables = page[page.index("## Slugs of errors") :]
    documented = {
        slug
        for line in tables.splitlines()
        if line.startswith("| `")
        for slug in re.findall(r"`([a-z-]+)`", line.split("|")[1])
    }
    assert used == documented
