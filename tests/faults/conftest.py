# SPDX-License-Identifier: Apache-2.0
"""A laboratory with an agent, for everything that may happen to it; short by default, long with NETPOL_FAULTS=long."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernel"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "netns"))

from agent_scene import CLUSTER, NODE, Scene, scene_in

from netpol_ebpf.lab.laboratory import Lab
from netpol_ebpf.lab.scene import plan_for
from netpol_ebpf.lab.topology import Host
from netpol_ebpf.resources.load import parse_documents

LATE = Host("shop/late", NODE, (ip_address("10.1.0.9"), ip_address("fd00:1::9")))
"""A pod that is there from the start, but that the manifests do not know."""


@pytest.fixture(scope="session")
def is_long() -> bool:
    """Whether the long version was asked for."""
    return os.environ.get("NETPOL_FAULTS") == "long"


@pytest.fixture(scope="session")
def pin_root() -> Path:
    return Path(f"/sys/fs/bpf/netpol-test-faults-{os.getpid()}")


@pytest.fixture(scope="session")
def lab(pin_root: Path) -> Iterator[Lab]:
    resources = parse_documents(CLUSTER, "cluster.yaml").check()
    with Lab(plan_for(resources, outside=[LATE]), directories=[pin_root]) as one:
        yield one


@pytest.fixture(scope="module")
def lasting_scene(lab: Lab, tmp_path_factory: pytest.TempPathFactory, pin_root: Path) -> Iterator[Scene]:
    with scene_in(lab, tmp_path_factory.mktemp("agent") / "home", pin_root / "lasting") as one:
        yield one


@pytest.fixture
def scene(lasting_scene: Scene) -> Scene:
    """An agent that has the manifests of the beginning in force; one for all tests of a file."""
    lasting_scene.reset()
    return lasting_scene


@pytest.fixture
def own_scene(lasting_scene: Scene, lab: Lab, tmp_path: Path, pin_root: Path) -> Iterator[Scene]:
    """A scene without an agent, on a node on which nothing is enforced."""
    lasting_scene.retire()
    with scene_in(lab, tmp_path / "home", pin_root / "own") as one:
        yield one
