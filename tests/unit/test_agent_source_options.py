# SPDX-License-Identifier: Apache-2.0
"""The options for the source of the agent's objects: the resulting source, and errors before any change."""

from __future__ import annotations

import argparse
import builtins
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from netpol_ebpf import sources
from netpol_ebpf.agent import main as agent_main
from netpol_ebpf.agent.source_options import NODE_VARIABLE, add_source_options, node_name, plan_source
from netpol_ebpf.errors import UsageError
from netpol_loader.pins import doctor

KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: one
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}, {name: d, cluster: {server: "http://127.0.0.1:2"}}]
contexts: [{name: one, context: {cluster: c}}, {name: two, context: {cluster: d}}]
"""


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_source_options(parser)
    parser.add_argument("--node")
    return parser.parse_args(options)


@pytest.fixture
def kubeconfig(tmp_path: Path) -> str:
    (tmp_path / "kubeconfig").write_text(KUBECONFIG)
    return str(tmp_path / "kubeconfig")


def names(tmp_path: Path, *options: str) -> str:
    """The name of the source that the options make."""
    source = plan_source(parsed(*options), tmp_path)(False)  # noqa: FBT003 - a plan is a plain callable
    try:
        return source.name
    finally:
        source.close()


def test_options_make_their_sources(tmp_path: Path, kubeconfig: str) -> None:
    """Manifests, the API of the current or the named context, or both with the API first."""
    assert names(tmp_path, "--manifests", str(tmp_path)) == str(tmp_path)
    assert names(tmp_path, "--kubeconfig", kubeconfig) == "http://127.0.0.1:1"
    assert names(tmp_path, "--kubeconfig", kubeconfig, "--context", "two") == "http://127.0.0.1:2"
    both = names(tmp_path, "--manifests", str(tmp_path), "--kubeconfig", kubeconfig)
    assert both == f"http://127.0.0.1:1, {tmp_path}"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 2, "there is no source"),
        (("--context", "one", "--manifests", "DIR"), 2, "give --kubeconfig FILE"),
        (("--kubernetes", "--context", "one"), 2, "--kubernetes reads none"),
        (("--kubernetes",), 3, "this is no pod with a service account"),
        (("--kubeconfig", "FILE.none"), 3, "there is no such file"),
        (("--kubeconfig", "FILE", "--context", "three"), 3, "has no entry named 'three'"),
        (("--kubeconfig", "FILE", "--manifests", "DIR/none"), 3, "there is no such directory"),
    ],
)
def test_wrong_options_end_before_anything_is_touched(
    tmp_path: Path,
    kubeconfig: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    """The error has the exit code of its cause, and names it."""
    monkeypatch.setattr(doctor, "require_all", lambda _root: pytest.fail("the machine was looked at"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    given = [one.replace("FILE", kubeconfig).replace("DIR", str(tmp_path)) for one in options]
    assert agent_main.main([*given, "--node", "here"]) == code
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_both_ways_to_an_api_exclude_each_other(kubeconfig: str) -> None:
    """The parser reports this, with its exit code."""
    with pytest.raises(SystemExit, match="2"):
        parsed("--kubernetes", "--kubeconfig", kubeconfig)


def test_missing_extra_is_one_line_and_exit_5(
    kubeconfig: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the package, and the extra that has it."""
    real = builtins.__import__

    def without_msgspec(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "msgspec":
            raise ModuleNotFoundError("No module named 'msgspec'", name="msgspec")
        return real(name, *arguments, **options)

    package = importlib.import_module("netpol_ebpf.sources.kubernetes")
    monkeypatch.setattr(sources, "kubernetes", package)  # so that the import below leaves no other one there
    for name in [one for one in sys.modules if one.startswith("netpol_ebpf.sources.kubernetes")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_msgspec)
    assert agent_main.main(["--kubeconfig", kubeconfig, "--node", "here"]) == 5
    said = capsys.readouterr().err
    assert said.startswith("netpol-agent: error: the Python package msgspec is missing")
    assert "netpol-ebpf[kubernetes]" in said


def test_node_s_name_is_needed_to_watch_a_cluster(kubeconfig: str) -> None:
    """The name is that of the option, or of the variable that a pod's downward API or the unit sets.

    Manifests need none.
    """
    told = {NODE_VARIABLE: "of-the-pod"}
    assert node_name(parsed("--kubernetes", "--node", "given"), told) == "given"
    assert node_name(parsed("--kubernetes"), told) == "of-the-pod"
    assert node_name(parsed("--kubeconfig", kubeconfig), told) == "of-the-pod"
    assert node_name(parsed("--manifests", "m"), told) == "of-the-pod"
    assert node_name(parsed("--manifests", "m"), {}) is None
    for options in (("--kubernetes",), ("--kubeconfig", kubeconfig)):
        with pytest.raises(UsageError, match="the name of this node is needed"):
            node_name(parsed(*options), {})
