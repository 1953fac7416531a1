# SPDX-License-Identifier: Apache-2.0
"""Words that this project gave up for the field's (docs/glossary.md) do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GIVEN_UP = {
    r"\b[Ss]hort[ _]way\b|\b[Ll]ong[ _]way\b|LONG_WAY": "fast path, slow path",
    r"\bnp_recent\w*|NP_RECENT\w*": "flow cache",
    r"\bnp_near\w*": "endpoint cache",
    r"\bnp_leg\b": "np_endpoint_ctx",
    r"\bnp_work\b": "np_scratch",
    r"\bnp_special\w*": "np_vip_filter",
    r"\bnp_young\w*|NP_\w*_YOUNG\b|\byoung (one|connection)s?\b": "unreplied",
    r"NP_CONN_CARRIES|\bnp_carr(y|ied)\b|\bset_carrier\b": "sender tag",
    r"\bnp_slot_\w+": "np_ct_*: probe, lookup, reserve, refresh, commit, release",
    r"NP_ASK_\w+|NP_OUTWARDS_\w+|\bhides_source\b": "NP_STEP_*, a list of policy steps",
    r"\bon_the_way_to\b": "without_removed",
    r"\bGrounds\b": "HostPolicyInputs",
    r"class Beginning\b|\bBeginning\(": "InitialState",
    r"\bclass[ _]maps?\b|\bTierPart\b": "class table, TierTemplates",
    r"wrong depth": "wrong indentation level",
    r"refused whole": "rejected; the previous policy stays in force",
}
"""Pattern of what is not written any more, to what is. Only what means nothing else is here."""

HISTORY = re.compile(
    r"CHANGELOG\.md|docs/upgrade\.md|docs/(kernels|versions|networks)\.md|docs/SEMANTICS\.md|"
    r"(bench|tests/vm|tests/netns)/results/|tests/netns/(other_version|test_upgrade)\.py|tests/unit/test_words\.py"
)
"""Files that speak of former versions, that are recorded, or that are of another origin."""


ROOMS = ("bench", "bpf", "deploy", "docs", "examples", "loader", "netpol_ebpf", "scripts", "tests")
KINDS = {".py", ".h", ".c", ".md", ".sh", ".toml", ".yaml"}


def texts() -> list[Path]:
    """Every source and page, but for the history."""
    paths = [*ROOT.glob("*"), *(path for room in ROOMS for path in (ROOT / room).rglob("*"))]
    named = ((path, str(path.relative_to(ROOT))) for path in paths if path.suffix in KINDS and path.is_file())
    return [path for path, name in named if not HISTORY.match(name)]


@pytest.mark.parametrize("pattern", GIVEN_UP)
def test_word_is_not_used(pattern: str) -> None:
    """Not in code, comments, messages or documents."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"write: {GIVEN_UP[pattern]}"


def test_the_list_finds_what_it_is_for() -> None:
    """Each pattern matches the word it stands for, and none the word in its place."""
    words = [
        "short_way", "np_recent4", "np_near_find", "np_leg", "np_work", "np_special", "np_young6", "NP_CONN_CARRIES",
        "np_slot_own", "NP_ASK_NORMAL", "on_the_way_to", "Grounds", "Beginning(", "class_map", "wrong depth", "refused whole",
    ]  # fmt: skip
    assert all(re.search(pattern, word) for pattern, word in zip(GIVEN_UP, words, strict=True))
    assert not any(re.search(pattern, better) for pattern in GIVEN_UP for better in GIVEN_UP.values())


def test_glossary_is_in_alphabetical_order() -> None:
    """Each term has one line, where a reader looks for it."""
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)[1:]
    assert len(terms) > 50
    assert terms == sorted(set(terms), key=str.lower)
