# SPDX-License-Identifier: Apache-2.0
"""The files in deploy/ fit the program."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from netpol_ebpf.agent.configuration import CONFIG_VARIABLE, parse_arguments
from netpol_ebpf.agent.main import build_parser
from netpol_ebpf.agent.source_options import NODE_VARIABLE, node_name
from netpol_ebpf.resources.calico import BUILT_IN_TIERS
from netpol_ebpf.resources.load import load_paths
from netpol_ebpf.resources.schema_calico import RESOURCES
from netpol_ebpf.resources.types import Tier
from netpol_loader.pins.compiled import CACHE_DIR
from netpol_loader.pins.doctor import CAPABILITIES

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "chart"
UNIT = DEPLOY / "netpol-agent.service"
MOST_EXPOSED = 4.0


def read_unit() -> ConfigParser:
    unit = ConfigParser(interpolation=None, strict=False)  # SystemCallFilter= stands twice
    unit.optionxform = str  # type: ignore[method-assign,assignment]  # names keep their case
    unit.read_string(UNIT.read_text())
    return unit


def test_service_has_the_capabilities_that_are_tested() -> None:
    """The service has exactly those with which tests/netns/test_privilege.py runs the agent, and no way to more."""
    service = read_unit()["Service"]
    assert set(service["CapabilityBoundingSet"].split()) == {one.name for one in CAPABILITIES}
    assert service["NoNewPrivileges"] == "yes"
    assert set(service["RestrictAddressFamilies"].split()) == {"AF_UNIX", "AF_NETLINK", "AF_INET", "AF_INET6"}


def test_service_keeps_the_compiled_program() -> None:
    """The unit's file system is read-only but for what it names: without the cache each start would compile again."""
    service = read_unit()["Service"]
    assert service["ProtectSystem"] == "strict"
    assert Path("/var/cache") / service["CacheDirectory"] == CACHE_DIR
    assert int(service["CacheDirectoryMode"], 8) & 0o022 == 0, "else the file is not trusted"


def test_service_starts_the_agent_with_the_configuration_file_alone() -> None:
    """No option on the command line, which would count before the file; the state is in the directories that systemd keeps."""
    service = read_unit()["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert Path(program).name == "netpol-agent"
    assert arguments == []
    parsed = parse_arguments(build_parser(), arguments, {CONFIG_VARIABLE: "none"})
    assert parsed.state_dir == Path("/run") / service["RuntimeDirectory"]
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert parsed.saved_state.parent == Path("/var/lib") / service["StateDirectory"]
    assert int(service["StateDirectoryMode"], 8) & 0o077 == 0, "the saved state tells of all pods"
    name, _, value = service["Environment"].partition("=")
    assert (name, value) == (NODE_VARIABLE, "%H")
    assert node_name(parsed, {name: "this-host"}) == "this-host"


def test_service_never_gives_up() -> None:
    """No end of the agent and no number of ends keeps it from being started again, nor does a hang; a slow start is none."""
    unit = read_unit()
    assert unit["Service"]["Restart"] == "always"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert not [name for name in unit["Unit"] if name.startswith(("Assert", "Condition", "Requires=", "BindsTo"))]
    assert not [name for name in unit["Service"] if name.startswith(("RestartPrevent", "RestartForce", "ExecStop"))]
    assert unit["Service"]["Type"] == "notify"
    assert unit["Service"]["WatchdogSec"] == unit["Service"]["TimeoutStartSec"] == "10min"


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    """Every name and value is known to the version here; the path of the program is the only one that is not there."""
    require_systemd()
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", UNIT.read_text(), flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], check=False, capture_output=True, text=True
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


def test_systemd_finds_little_exposed() -> None:
    """The exposure, from 0 to 10, stays below what three capabilities and the Internet's families cost."""
    require_systemd()
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSED * 10:.0f}", str(UNIT)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def require_systemd() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")


def admission(name: str) -> dict[str, Any]:
    """The first object of a file, which is the policy."""
    policy: dict[str, Any] = next(yaml.safe_load_all((CHART / "admission" / f"{name}.yaml").read_text()))
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
    folder = CHART / "admission"
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    template = (CHART / "templates" / "admission.yaml").read_text()
    assert set(re.findall(r'"([a-z-]+\.yaml)"', template)) == files
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization["resources"]) == files - {"tier-label.yaml", "tier-label-check.yaml"}


def test_the_built_in_tiers_are_those_of_the_parser() -> None:
    """As objects they say what is in force without them."""
    tiers = load_paths([DEPLOY / "tiers.yaml"]).check()
    assert {one.meta.name: (one.order, one.default_action) for one in tiers if isinstance(one, Tier)} == BUILT_IN_TIERS
