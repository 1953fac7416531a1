# SPDX-License-Identifier: Apache-2.0
"""The files in deploy/ fit the program."""

from __future__ import annotations

import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import yaml

from netpol_ebpf.agent.main import DEFAULT_STATE_DIR, build_parser
from netpol_ebpf.resources.calico import BUILT_IN_TIERS
from netpol_ebpf.resources.load import load_paths
from netpol_ebpf.resources.schema_calico import RESOURCES
from netpol_ebpf.resources.types import Tier
from netpol_loader.pins.compiled import CACHE_DIR
from netpol_loader.pins.doctor import CAPABILITIES

DEPLOY = Path(__file__).parents[2] / "deploy"


def read_unit(name: str = "netpol-agent.service") -> ConfigParser:
    unit = ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[method-assign,assignment]  # names keep their case
    # An empty assignment only takes back what another file assigns.
    text = (DEPLOY / name).read_text()
    unit.read_string(re.sub(r"^ExecStart=\n", "", text, flags=re.MULTILINE))
    return unit


def test_service_has_the_capabilities_that_are_tested() -> None:
    """The service has exactly those with which tests/netns/test_privilege.py runs the agent, and no way to more."""
    service = read_unit()["Service"]
    assert set(service["CapabilityBoundingSet"].split()) == {one.name for one in CAPABILITIES}
    assert service["NoNewPrivileges"] == "yes"
    assert set(service["RestrictAddressFamilies"].split()) == {"AF_UNIX", "AF_NETLINK"}
    assert "--health-address" not in service["ExecStart"]


def test_drop_in_for_health_adds_the_families_of_the_internet_alone() -> None:
    """The unit permits no listening socket of a network protocol; the drop-in permits it and changes nothing else."""
    assert dict(read_unit("netpol-agent-health.conf")["Service"]) == {"RestrictAddressFamilies": "AF_INET AF_INET6"}


def test_service_keeps_the_compiled_program() -> None:
    """The unit's file system is read-only but for what it names: without the cache each start would compile again."""
    service = read_unit()["Service"]
    assert service["ProtectSystem"] == "strict"
    assert Path("/var/cache") / service["CacheDirectory"] == CACHE_DIR
    assert int(service["CacheDirectoryMode"], 8) & 0o022 == 0, "else the file is not trusted"


def test_service_starts_the_agent_with_options_it_knows() -> None:
    """The command line parses, the state directory is the one systemd keeps, and readiness is told."""
    unit = read_unit()
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "netpol-agent"
    parsed = build_parser().parse_args(arguments)
    assert parsed.state_dir == DEFAULT_STATE_DIR == Path("/run") / unit["Service"]["RuntimeDirectory"]
    assert parsed.node == "%H"
    assert unit["Service"]["Type"] == "notify"
    assert unit["Service"]["RuntimeDirectoryPreserve"] == "yes"


def test_the_drop_in_watches_a_cluster() -> None:
    """It replaces the command line, adds the Internet's families, and keeps the saved state on the disk."""
    text = (DEPLOY / "netpol-agent-cluster.conf").read_text()
    assert text.count("ExecStart=") == 2
    assert "\nExecStart=\nExecStart=" in text, "else systemd refuses a second command line"
    drop_in, unit = read_unit("netpol-agent-cluster.conf")["Service"], read_unit()["Service"]
    program, *arguments = shlex.split(drop_in["ExecStart"])
    assert program == shlex.split(unit["ExecStart"])[0]
    parsed = build_parser().parse_args(arguments)
    assert (parsed.manifests, parsed.node) == (None, "%H")
    assert parsed.kubeconfig is not None
    assert parsed.saved_state.parent == Path("/var/lib") / drop_in["StateDirectory"]
    assert int(drop_in["StateDirectoryMode"], 8) & 0o077 == 0, "the saved state tells of all pods"
    assert set(drop_in["RestrictAddressFamilies"].split()) == {"AF_INET", "AF_INET6"}
    assert set(drop_in) == {"ExecStart", "StateDirectory", "StateDirectoryMode", "RestrictAddressFamilies"}


def admission(name: str) -> dict[str, Any]:
    """The first object of a file, which is the policy."""
    policy: dict[str, Any] = next(yaml.safe_load_all((DEPLOY / "admission" / f"{name}.yaml").read_text()))
    return policy["spec"]


def test_admission_policies_judge_every_tiered_kind() -> None:
    """Every kind with a tier in its schema has tier rights; a forgotten kind would have plain rights only."""
    tiered = {one.plural for one in RESOURCES if "tier" in one.spec["properties"]}
    for name in ("tier-rights", "tier-label", "tier-label-check"):
        (match,) = admission(name)["matchConstraints"]["resourceRules"]
        assert set(match["resources"]) == tiered, name


def test_the_guard_of_tiers_names_the_built_in_ones() -> None:
    """Those of the parser, no more."""
    (validation,) = admission("built-in-tiers")["validations"]
    assert set(re.findall(r"'([^']+)'", validation["expression"])) == set(BUILT_IN_TIERS)


def test_the_chart_and_the_kustomization_have_every_admission_policy() -> None:
    """The chart has all files, one label policy or the other; the kustomization those that any API server takes."""
    folder = DEPLOY / "admission"
    files = {path.name for path in folder.glob("*.yaml")} - {"Chart.yaml", "kustomization.yaml"}
    template = (folder / "templates" / "admission.yaml").read_text()
    assert set(re.findall(r'"([a-z-]+\.yaml)"', template)) == files
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization["resources"]) == files - {"tier-label.yaml", "tier-label-check.yaml"}


def test_the_built_in_tiers_are_those_of_the_parser() -> None:
    """As objects they say what is in force without them."""
    tiers = load_paths([DEPLOY / "tiers.yaml"]).check()
    assert {one.meta.name: (one.order, one.default_action) for one in tiers if isinstance(one, Tier)} == BUILT_IN_TIERS
