# SPDX-License-Identifier: Apache-2.0
"""The examples: every manifest is valid, and the cases test the very policies that the examples show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from netpol_ebpf.resources.load import load_paths

EXAMPLES = Path(__file__).parents[2] / "examples"
SINGLE_FILES = sorted(path for folder in (".", "calico", "sig-network") for path in (EXAMPLES / folder).glob("*.yaml"))
CASES = sorted((EXAMPLES / "cases").glob("*.yaml"))


def policy_key(obj: dict[str, Any]) -> tuple[str, str, str]:
    return (obj["kind"], obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


def policies_shown() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The policies, tiers and sets of the single-file examples."""
    objects = [obj for path in SINGLE_FILES for obj in yaml.safe_load_all(path.read_text())]
    return {policy_key(obj): obj for obj in objects}


@pytest.mark.parametrize("path", [*SINGLE_FILES, EXAMPLES / "demo"], ids=lambda path: path.name)
def test_manifests_are_valid(path: Path) -> None:
    """Not even a warning."""
    result = load_paths([path])
    assert result.problems == []
    assert result.resources


def test_every_policy_shown_is_tested_as_it_is_shown() -> None:
    """An object in a case that bears the name of an example's equals it, and no example goes without a case."""
    shown = policies_shown()
    tested = set()
    for path in CASES:
        for obj in yaml.safe_load(path.read_text())["manifests"]:
            if policy_key(obj) in shown:
                assert obj == shown[policy_key(obj)], path.name
                tested.add(policy_key(obj))
    assert tested == shown.keys()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_cases_expect_both_answers(path: Path) -> None:
    """A case with only one kind of expectation would be passed by an engine that always says so."""
    assert {probe["expect"] for probe in yaml.safe_load(path.read_text())["probes"]} == {"allow", "deny"}
