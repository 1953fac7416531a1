# SPDX-License-Identifier: Apache-2.0
"""`netpolctl check`: its output and its exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from netpol_ebpf.cli.main import main

VALID = "apiVersion: v1\nkind: Namespace\nmetadata: {name: 'n'}\n"
SUSPICIOUS = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec:\n  ingress:\n  - {}\n  - ports:\n    - port: 80\n"
BROKEN = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: q}\nspec:\n  ingress:\n  - ports:\n    - port: 0\n"


def test_valid_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0 and one line."""
    (tmp_path / "a.yaml").write_text(VALID, encoding="utf-8")
    assert main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "1 objects valid: 0 errors, 0 warnings\n"


def test_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings are printed. They fail only with an option."""
    file = tmp_path / "a.yaml"
    file.write_text(SUSPICIOUS, encoding="utf-8")
    assert main(["check", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"{file}:7: warning: NetworkPolicy/default/p: spec.ingress[1]: adds nothing: all it allows is allowed by rule 0"
    )
    assert main(["check", "--strict", str(file)]) == 3


def test_errors_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 3. Every error has its place. Checks of the whole input are left out, with a note."""
    (tmp_path / "a.yaml").write_text(BROKEN, encoding="utf-8")
    (tmp_path / "b.yaml").write_text(f"{SUSPICIOUS}---\nkind: [\n", encoding="utf-8")
    assert main(["check", str(tmp_path)]) == 3
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(
        f"{tmp_path}/a.yaml:7: error: NetworkPolicy/default/q: spec.ingress[0].ports[0].port: must be from 1"
    )
    assert out[1].startswith(f"{tmp_path}/b.yaml:11: error: not valid YAML")
    assert out[2:] == [
        "1 objects valid: 2 errors, 0 warnings",
        "Checks that need all objects together did not run; they run once there are no errors.",
    ]


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is one document with numbers and problems."""
    file = tmp_path / "a.yaml"
    file.write_text(BROKEN, encoding="utf-8")
    assert main(["check", "-o", "json", str(file)]) == 3
    value = json.loads(capsys.readouterr().out)
    assert value == {
        "objects": 0,
        "errors": 1,
        "warnings": 0,
        "skipped": {},
        "clusterChecks": False,
        "problems": [
            {
                "file": str(file),
                "line": 7,
                "column": 7,
                "severity": "error",
                "slug": "range",
                "object": "NetworkPolicy/default/q",
                "path": "spec.ingress[0].ports[0].port",
                "message": "must be from 1 to 65535, is 0",
            }
        ],
    }


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The output of another program can be checked without a file."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(BROKEN.encode())))
    assert main(["check", "-"]) == 3
    assert capsys.readouterr().out.startswith("<stdin>:7: error: ")


def test_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty directory is probably a wrong path."""
    assert main(["check", str(tmp_path)]) == 3
    assert f"no object found in {tmp_path}" in capsys.readouterr().err


def test_an_empty_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output of `kubectl get networkpolicy -A -o yaml` is valid there: a List that states that it has no items."""
    file = tmp_path / "empty.yaml"
    for text in ("apiVersion: v1\nkind: List\nmetadata: {resourceVersion: ''}\nitems: []\n", "[]\n"):
        file.write_text(text, encoding="utf-8")
        assert main(["check", str(file)]) == 0
        assert capsys.readouterr().out == "0 objects valid: 0 errors, 0 warnings\n"


def test_objects_of_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are skipped and counted. The other objects determine the exit code."""
    other = "---\napiVersion: v1\nkind: ConfigMap\n---\napiVersion: example.com/v1\nkind: Thing\n"
    file = tmp_path / "a.yaml"
    file.write_text(f"{VALID}{other}---\napiVersion: v1\nkind: ConfigMap\n", encoding="utf-8")
    assert main(["check", "--strict", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 objects valid: 0 errors, 0 warnings",
        "Skipped objects of other kinds: 1 example.com/v1 Thing, 2 v1 ConfigMap",
    ]
    assert main(["check", "-o", "json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == {"example.com/v1 Thing": 1, "v1 ConfigMap": 2}


def test_a_case_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message says that it is a case file, and names the command that runs it."""
    file = tmp_path / "case.yaml"
    file.write_text("name: 'n'\nmanifests: []\nprobes: []\n", encoding="utf-8")
    assert main(["check", str(file)]) == 3
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(
        "is a case file, not a manifest: `netpolctl test` runs it, and validates the manifests in it"
    )
    assert out[0].startswith(f"{file}:1: error: ")


def test_what_only_resembles_a_case_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An object that states its kind is parsed as that kind."""
    file = tmp_path / "object.yaml"
    file.write_text("kind: Pod\nmanifests: []\nprobes: []\n", encoding="utf-8")
    assert main(["check", str(file)]) == 3
    assert "the field `apiVersion` is required" in capsys.readouterr().out
