# SPDX-License-Identifier: Apache-2.0
"""The benchmark's contenders enforce the same policies on real packets, and one that does not is detected."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_scene import wait_for

from bench.end_to_end import NEEDS
from bench.loads import CONNECTS, Traffic, workshop
from bench.site import (
    BPFFS,
    EMPTY,
    IPTABLES_RULES,
    IPTABLES_SET,
    MEASURED_ADDRESS,
    NFT_MAP,
    NFT_RULES,
    NOTHING,
    OURS,
    PEER_ADDRESS,
    Contender,
    Scenario,
    Site,
)
from bench.verdicts import Examination, choose_peers
from netpol_ebpf.errors import NetpolError
from netpol_ebpf.policy.types import Direction

pytestmark = pytest.mark.netns
RULES = 20


def scenario(direction: Direction) -> Scenario:
    bare = Scenario(direction, MEASURED_ADDRESS, (PEER_ADDRESS,))
    return replace(bare, peers=choose_peers(bare, [RULES], PEER_ADDRESS))


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("kind", [OURS, NFT_RULES, NFT_MAP, IPTABLES_RULES, IPTABLES_SET])
def test_a_contender_gives_the_models_verdicts(kind: str, direction: Direction) -> None:
    """With each contender, real packets pass or are dropped as the reference model says."""
    for tool in NEEDS.get(kind, ()):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    given = scenario(direction)
    with Site(Contender(kind, RULES), given, given.world(RULES)) as site:
        allowed, denied = Examination(given, [RULES]).examine(site)
    assert allowed > 3
    assert denied > 3


def test_a_contender_with_other_policies_is_found_out() -> None:
    """A contender that claims to enforce, and does not, is an error with its name."""
    given = scenario(Direction.INGRESS)
    with Site(Contender(NOTHING), given, None) as site:
        site.contender = Contender(OURS, RULES)
        with pytest.raises(NetpolError, match="netpol-ebpf, 20 rules: .* the model says deny, seen: allow"):
            Examination(given, [RULES]).examine(site)


def test_connections_are_counted_and_metered() -> None:
    """The load that opens and closes connections gives a rate, percentiles and processor time for each packet."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    given = scenario(Direction.INGRESS)
    with workshop() as tools, Site(Contender(EMPTY), given, None) as site:
        figures = {figure.name: figure.value for figure in Traffic(site, tools).measure(CONNECTS, 0.2)}
    assert figures.keys() >= {"", "latency p50", "cpu per packet, client and server"}
    assert all(value > 0 for name, value in figures.items() if not name.startswith("cpu"))


@pytest.mark.parametrize("suite", ["micro", "scale", "end-to-end"])
def test_a_run_that_is_told_to_end_leaves_nothing_behind(suite: str, tmp_path: Path) -> None:
    """SIGTERM in the middle of a suite, with maps pinned by the command or by a part of it: all maps are removed."""
    before = pins()
    command = [
        sys.executable,
        "-m",
        "netpol_ebpf.cli.main",
        "bench",
        "--smoke",
        "--suites",
        suite,
        "-o",
        str(tmp_path / "r.json"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: pins() - before or process.poll() is not None, "maps are pinned")
        assert process.poll() is None, process.communicate()[1]
        process.terminate()
        assert process.wait(120) == 130
    finally:
        process.kill()
        process.communicate()
    assert pins() - before == set()


def pins() -> set[Path]:
    """The directories that have maps of benchmarks."""
    return {
        path.parent.parent for prefix in ("bench", "scale") for path in BPFFS.glob(f"netpol-{prefix}-*/*/np_config")
    }
