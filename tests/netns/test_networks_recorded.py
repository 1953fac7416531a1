# SPDX-License-Identifier: Apache-2.0
"""docs/networks.md has every network of the tests.

This is a file of its own, because guests run the others without the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from network_scene import NETWORKS, Network

from tests.netns.networks import PAGE

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("network", NETWORKS, ids=lambda one: one.name)
def test_page_has_the_network(network: Network) -> None:
    """Its rows say what the test demands, or that no kernel that has its devices was run."""
    begin, verdict = f"| {network.name} |", "enforced" if network.is_seen else "named as not enforced"
    found = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(begin)]
    assert found
    assert all(f"| {verdict} |" in line or "| not run: " in line for line in found)
