# SPDX-License-Identifier: Apache-2.0
"""`netpolctl` and its command `test`: exit codes, output formats, and failures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from netpol_ebpf import __version__
from netpol_ebpf.cli.main import build_parser, main, run
from netpol_ebpf.errors import PlatformError, UnreachableError, UsageError

CASE = """\
name: a case
manifests:
- {apiVersion: v1, kind: Pod, metadata: {name: p, namespace: ns}, status: {podIPs: [{ip: 10.0.0.1}]}}
probes:
- {from: 10.0.0.9, to: ns/p, protocol: TCP, port: 80, srcPort: 9, expect: allow}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(CASE)
    return path


@pytest.fixture
def failing(tmp_path: Path) -> Path:
    path = tmp_path / "failing.yaml"
    path.write_text(CASE.replace("expect: allow", "expect: deny"))
    return path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.yaml"
    path.write_text(CASE.replace("ns/p", "ns/q"))
    return path


def test_exit_codes(good: Path, failing: Path, broken: Path) -> None:
    """0 as expected, 1 not as expected, 3 if any input is not valid."""
    assert main(["test", str(good)]) == 0
    assert main(["test", str(good), str(failing)]) == 1
    assert main(["test", str(good), str(broken)]) == 3
    assert main(["test", str(failing), str(broken)]) == 3


def test_json(failing: Path, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is the stable format, and nothing else."""
    assert main(["test", str(failing), str(broken), "-o", "json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    probe = {"from": "10.0.0.9", "to": "ns/p", "protocol": "TCP", "port": 80, "srcPort": 9, "expect": "deny"}
    rule = "Pod/ns/p: profile|kns.ns|ingress|0|allow"
    assert shown["failed"] == [{"case": "a case", "probe": probe, "expected": "deny", "got": "allow", "rule": rule}]
    assert (shown["cases"], shown["probes"]) == (1, 1)
    assert [invalid["case"] for invalid in shown["invalid"]] == ["a case"]


def test_yaml_is_the_same(failing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The YAML has the same values as the JSON."""
    main(["test", str(failing), "-o", "json"])
    as_json = json.loads(capsys.readouterr().out)
    main(["test", str(failing), "-o", "yaml"])
    assert yaml.safe_load(capsys.readouterr().out) == as_json


def test_text_shows_failures_with_their_rule(failing: Path, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has the place, the expected and the actual result, and the reason."""
    main(["test", str(failing), str(broken)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED a case"
    assert lines[1] == f'  {failing}:5: 10.0.0.9 -> ns/p TCP 80 {{"srcPort": 9}}'
    assert lines[2:4] == ["  expected deny, got allow", "  rule: Pod/ns/p: profile|kns.ns|ingress|0|allow"]
    assert lines[4] == "INVALID a case"
    assert lines[-1] == "1 cases, 1 probes: 0 as expected, 1 failed; 1 cases not valid"


def test_wide_shows_every_probe(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each probe has its verdict and rule."""
    assert main(["test", str(good), "-o", "wide"]) == 0
    assert capsys.readouterr().out.startswith("allow  10.0.0.9 -> ns/p TCP 80")


def test_a_directory_without_cases_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped directory must not look like a passed test."""
    (tmp_path / "x.yaml").write_text("a: b\n")
    assert main(["test", str(tmp_path)]) == 3
    shown = capsys.readouterr().err
    assert "x.yaml: skipped, since it has neither manifests nor probes" in shown
    assert "error: no case found" in shown


def test_usage_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown commands, missing arguments and unknown engines."""
    for arguments in ([], ["nonsense"], ["test"], ["test", "x", "--engine", "y"]):
        with pytest.raises(SystemExit) as ending:
            main(arguments)
        assert ending.value.code == 2
    assert "usage: netpolctl" in capsys.readouterr().err


def test_version_needs_neither_root_nor_bcc() -> None:
    """No module for the kernel is imported for it."""
    code = (
        "import sys; from netpol_ebpf.cli.main import build_parser; build_parser(); "
        "sys.exit(any(name.split('.')[0] in ('bcc', 'pyroute2', 'netpol_loader') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    shown = subprocess.run(
        [sys.executable, "-m", "netpol_ebpf.cli.main", "--version"], check=True, capture_output=True, text=True
    )
    assert shown.stdout.strip() == f"netpolctl {__version__}"


def arguments(*, debug: bool = False) -> argparse.Namespace:
    return argparse.Namespace(debug=debug)


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("u"), 2), (UnreachableError("u"), 4), (PlatformError("u", hint="do this"), 5)]
)
def test_known_errors_say_what_to_do(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is one line with the hint and the error's own exit code, without a traceback."""

    def command(_: argparse.Namespace) -> int:
        raise error

    assert run(command, arguments()) == code
    shown = capsys.readouterr().err
    assert shown.startswith("netpolctl: error: u\nnetpolctl: hint: ")
    assert "Traceback" not in shown


def test_a_bug_is_one_line_and_exit_70(capsys: pytest.CaptureFixture[str]) -> None:
    """Only --debug shows the traceback."""

    def command(_: argparse.Namespace) -> int:
        raise KeyError("x")

    assert run(command, arguments()) == 70
    shown = capsys.readouterr().err
    assert shown.startswith("netpolctl: bug: KeyError: 'x' (")
    assert "Traceback" not in shown
    assert run(command, arguments(debug=True)) == 70
    assert "Traceback" in capsys.readouterr().err


def test_interruption_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """After Ctrl-C there is no error message."""

    def command(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    assert run(command, arguments()) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_goes_away_is_no_error(good: Path) -> None:
    """The reader ends early, as in `netpolctl ... | head -1`."""
    shell = f"'{sys.executable}' -m netpol_ebpf.cli.main test {' '.join([str(good)] * 1)} -o wide"
    done = subprocess.run(
        ["bash", "-c", f"({shell}; echo code $? >&2) | true"], check=False, capture_output=True, text=True
    )
    assert done.stderr.strip() in ("code 141", "code 0"), "0 when all was written before the reader had gone"


def test_every_command_sets_what_to_run() -> None:
    """Every registered subcommand can be run."""
    parser = build_parser()
    (action,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    assert "test" in action.choices
    for name, subparser in action.choices.items():
        nested = any(isinstance(one, argparse._SubParsersAction) for one in subparser._actions)
        assert nested or subparser.get_default("run") is not None, name
