# SPDX-License-Identifier: Apache-2.0
"""What people read: names that others chose cannot move the cursor, reorder a line or make another one."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import pytest
import yaml

from netpol_ebpf.cli import flows
from netpol_ebpf.cli.output import print_value, render_json, render_table
from netpol_ebpf.terminal import LogFormatter, escaped, paragraph, say

ROOT = Path(__file__).parents[2]
HOSTILE = {
    "escape": "\x1b[2Jx", "carriage return": "a\rb", "backspace": "a\bb", "delete": "a\x7fb", "C1 control": "a\x9bb",
    "right to left": "a\u202egnp.exe", "isolate": "a\u2066b\u2069", "mark": "a\u200fb", "zero width": "a\u200bb",
    "line separator": "a\u2028b", "lone surrogate": "a\udcffb", "tag": "a\U000e0041b", "bell": "\a", "nul": "a\0b",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_unprintable_is_shown_as_its_escape(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way out leaves printable characters alone; nothing is lost from sight."""
    for shown in (escaped(text), paragraph(text), render_table(("name",), [(text,)]).split("\n")[1]):
        assert shown.isprintable()
        assert "\\" in shown
    say(text)
    assert capsys.readouterr().out.rstrip("\n").isprintable()


@pytest.mark.parametrize("text", ["shop/db", "naïve Ünïcode 日本語", "a\\b", "", "x" * 5000])
def test_printable_is_left_alone(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Names in any script are shown as they are."""
    assert escaped(text) == text
    say(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_line_breaks_are_ours() -> None:
    """A cell never has one, a message's later lines are indented: neither can pass for another line."""
    assert escaped("a\nerror: b") == r"a\nerror: b"
    assert paragraph("a\nerror: b") == "a\n  error: b"
    assert render_table(("name",), [("a\nroot",)]).split("\n")[1:] == [r"a\nroot"]


def test_log_lines_are_escaped_with_their_arguments_and_tracebacks() -> None:
    """What was logged cannot forge a line of the log."""
    record = logging.LogRecord(
        "x", logging.ERROR, "f", 1, "interface %s", ("\x1b[31meth0\n2026 INFO all is well",), None
    )
    assert LogFormatter("%(message)s").format(record) == "interface \\x1b[31meth0\n  2026 INFO all is well"
    with pytest.raises(ValueError, match="title") as caught:
        int("\x1b]0;title\a")
    record.exc_info = (caught.type, caught.value, caught.tb)
    lines = LogFormatter("%(message)s").format(record).split("\n")
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_json_and_yaml_are_exact_and_printable(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A reader of JSON or YAML gets the very name; a terminal gets nothing but printable ASCII."""
    assert print_value("json", {"name": text})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"name": text}
    assert shown.replace("\n", "").isprintable()
    assert shown.isascii()
    assert json.loads(render_json([text])) == [text]
    if not any(0xD800 <= ord(one) <= 0xDFFF for one in text):  # which YAML has no word for
        assert print_value("yaml", {"name": text})
        shown = capsys.readouterr().out
        assert yaml.safe_load(shown) == {"name": text}
        assert shown.replace("\n", "").isprintable()


def test_flow_of_a_hostile_name_is_one_line() -> None:
    """Names of workloads and files in a flow stay inside it."""
    flow = {
        "kind": "deny", "direction": "ingress", "reason": "policy-deny", "endpoint": "Pod/a/\nb", "ifindex": 1, "frame_bytes": 9,
        "decided_by": {"sentence": "denied\x1b[0m", "file": "a\nallow  all", "line": 1},
    }  # fmt: skip
    assert escaped(flows.render_flow(flow)).isprintable()


def test_nothing_is_printed_past_the_escapes() -> None:
    """Every print of the package goes through `terminal.say`, but those of exact formats and of our own colours."""
    allowed = {"terminal.py": 1, "output.py": 2, "metrics.py": 1, "demo.py": 1}
    found: dict[str, int] = {}
    for path in sorted((ROOT / "netpol_ebpf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name in ("print", "traceback.print_exc", "sys.stdout.write", "sys.stderr.write"):
                found[path.name] = found.get(path.name, 0) + 1
    assert found == allowed
