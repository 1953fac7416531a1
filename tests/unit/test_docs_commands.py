# SPDX-License-Identifier: Apache-2.0
"""The test commands in the documents select tests, and the tests that the documents name exist."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from netpol_ebpf.agent.main import build_parser as build_agent_parser
from netpol_ebpf.cli.main import build_parser
from netpol_ebpf.policy.types import UDP, Action, Cause, CauseKind, Direction, PolicyKey, Tunnel
from netpol_loader.abi import SCHEMA_VERSION

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
WHOLE = re.compile(r"pytest((?: +(?:-s\b|-k +(?:\"[^\"]+\"|\w+)|[\w./-]+))*)")
"""Somewhere in a line or a code span; whatever follows further on is prose."""
SHORT = re.compile(r"`((?:tests/|test_)[\w./-]*(?: -k (?:\"[^\"]+\"|\w+))?)`")
"""A code span without the word pytest, as in lists of tests."""


@dataclass(frozen=True)
class Selection:
    """The selection of a page's command: files or directories, and an expression of -k."""

    page: str
    text: str
    paths: tuple[str, ...]
    expression: str

    @property
    def alternatives(self) -> list[str]:
        """The parts that have to select something each."""
        return re.split(r"\bor\b", self.expression) if re.search(r"\bor\b", self.expression) else [self.expression]


def read(page: Path) -> Iterator[Selection]:
    """Every selection of a page."""
    text = page.read_text(encoding="utf-8")
    found = [match[1] for match in WHOLE.finditer(text)] + [match[1] for match in SHORT.finditer(text)]
    for one in found:
        words = iter(shlex.split(re.split(r" {2,}", one.strip())[0]))
        paths, expression = [], ""
        for word in words:
            if word == "-k":
                expression = next(words)
            elif not word.startswith("-"):
                paths.append(word)
        yield Selection(page.name, one.strip(), tuple(paths), expression)


@pytest.fixture(scope="module")
def tests() -> list[str]:
    """Every test that pytest finds, as file::name."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) > 1000
    return found


def lies_in(test: str, path: str) -> bool:
    """Whether a test is in a file or directory, which may be given without its directory."""
    file = test.partition("::")[0]
    return file == path or file.startswith(path.rstrip("/") + "/") or ("/" not in path and file.endswith("/" + path))


def has_words(test: str, part: str) -> bool:
    """Whether a test is selected by words that are joined by "and" and "not"."""
    name = (test.partition("::")[0].rpartition("/")[2] + "::" + test.partition("::")[2]).lower()
    words = part.strip(" ()").split(" and ")
    return all((word[4:] not in name) if word.startswith("not ") else (word in name) for word in words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path, tests: list[str]) -> None:
    """Each command, and each alternative of its expression, selects at least one test; named files and tests are there."""
    names = {re.sub(r"\[.*", "", test).rpartition("::")[2] for test in tests}
    wrong = []
    for one in read(page):
        for path in one.paths:
            if path in names or (
                path.startswith("tests/") and not path.endswith((".py", "/")) and (ROOT / path).exists()
            ):
                continue
            if path.endswith(".py") and not Path(path).name.startswith("test_") and (ROOT / path).exists():
                continue
            if not any(lies_in(test, path) for test in tests):
                wrong.append(f"{one.text}: there is no {path}")
        within = [test for test in tests if any(lies_in(test, path) for path in one.paths)]
        wrong += [
            f"{one.text}: {part.strip()!r} selects nothing"
            for part in one.alternatives
            if part and not any(has_words(test, part.lower()) for test in within)
        ]
    assert wrong == []


def test_commands_are_found() -> None:
    """The reading itself: a page with many commands, one in a code block with prose behind it, one in a list of tests."""
    read_all = [one for page in PAGES for one in read(page)]
    assert len(read_all) > 40
    texts = {one.text for one in read_all}
    assert "tests/fuzz" in texts
    assert {one.page for one in read_all if one.expression} >= {"SECURITY.md", "agent.md", "packet-parsing.md"}
    found = Selection("", "", ("tests/unit/test_docs_commands.py",), "commands_are or (names and not nothing)")
    test = "tests/unit/test_docs_commands.py::test_what_a_page_names_exists[agent.md]"
    assert [has_words(test, part) for part in found.alternatives] == [False, True]
    assert lies_in(test, "tests/unit")
    assert lies_in(test, "test_docs_commands.py")
    assert not lies_in(test, "tests/un")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pins_are_where_a_page_says(page: Path) -> None:
    """A path with the schema in it has the schema of these sources; a table of two schemas names each by itself."""
    named = re.findall(r"/netpol/v(\d+)", page.read_text(encoding="utf-8"))
    assert set(named) <= {str(SCHEMA_VERSION)}


def test_rules_are_written_as_the_page_of_case_files_says() -> None:
    """Each form of a cause is one of the page's, with this very text for an example."""
    page = (ROOT / "docs" / "case-files.md").read_text(encoding="utf-8")
    policy = PolicyKey("KubernetesNetworkPolicy", "shop", "db")
    causes = (
        Cause(CauseKind.RULE, Direction.INGRESS, "default", policy, index=0, action=Action.ALLOW),
        Cause(CauseKind.TIER_END, Direction.INGRESS, "default", policy),
        Cause(CauseKind.PROFILE, Direction.EGRESS, profile="kns.shop", index=0, action=Action.ALLOW),
        Cause(CauseKind.NO_MATCH, Direction.INGRESS),
        Cause(CauseKind.FAILSAFE, Direction.INGRESS, index=0, action=Action.ALLOW),
        Cause(CauseKind.TUNNEL, Direction.EGRESS, index=Tunnel(UDP, 4789).number, action=Action.ALLOW),
    )
    assert [str(one) for one in causes if f"`{one}`" not in page] == []
    assert {one.kind for one in causes} == set(CauseKind)


TYPED = re.compile(
    r"(?:^ *(?:[\w$]+\$ +)?(?:sudo )?(?:\.venv/bin/)?|`)(netpolctl|netpol-agent) ([^`\n]+)", re.MULTILINE
)
"""A command at the beginning of a line or of a code span."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_taken_as_they_stand(page: Path) -> None:
    """Each verb exists, and so does each option that is shown with it; words in capitals stand for values."""
    wrong = []
    for program, rest in TYPED.findall(page.read_text(encoding="utf-8")):
        words = shlex.split(re.split(r" +#| {2,}| [|>&] ", rest)[0].replace("[", " ").replace("]", " "), posix=False)
        options = [one.partition("=")[0] for one in words if one.startswith("-") and one != "-"]
        parser = build_agent_parser() if program == "netpol-agent" else verbs().get(words[0])
        if parser is None:
            wrong.append(f"{program} {rest}: there is no {words[0]}")
        else:
            wrong += [
                f"{program} {rest}: no option {one}" for one in options if one not in parser._option_string_actions
            ]
    assert wrong == []


def verbs() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command of netpolctl."""
    (found,) = [one.choices for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction)]
    return dict(found)


def test_commands_with_options_are_found() -> None:
    """The reading itself: some pages show commands with options, at the beginning of a line and in the middle."""
    shown = {
        (program, rest.split()[0])
        for page in PAGES
        for program, rest in TYPED.findall(page.read_text(encoding="utf-8"))
    }
    assert {("netpolctl", one) for one in ("bench", "explain", "flows", "get", "test", "compile")} <= shown
    assert ("netpol-agent", "--manifests") in shown


def test_the_pages_have_every_option() -> None:
    """Each long option is in a table: of docs/configuration.md, or of docs/agent.md if it is on the command line alone."""
    pages = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("configuration", "agent"))
    cells = " ".join(re.findall(r"^\|.*$", pages, re.MULTILINE))
    shown = set(re.findall(r"--[a-z-]+", cells))
    options = {one for one in build_agent_parser()._option_string_actions if one.startswith("--")}
    assert len(options) > 20
    assert sorted(options - shown) == []
