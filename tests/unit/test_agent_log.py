# SPDX-License-Identifier: Apache-2.0
"""The agent's log: a line for each change in force, for the begin and for the end of each problem.

And its two formats.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_agent_core import CLUSTER, POLICY, Bench, settle

from netpol_ebpf.agent.change_record import BUCKETS_S, LINE_S, ChangeRecord, ObjectCounts
from netpol_ebpf.agent.objects import ClusterObjects
from netpol_ebpf.agent.problem_log import MOST_LINES, ProblemLog
from netpol_ebpf.agent.settings import AgentSettings
from netpol_ebpf.errors import Location, Problem
from netpol_ebpf.terminal import LOG_FORMATS

PROBLEM = Problem(Location("a.yaml", 3), "spec", "is wrong", obj="Pod/x/y")


class Watch:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _every_line(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO):
        yield


def lines(caplog: pytest.LogCaptureFixture, log_format: str = "text") -> list[str]:
    """The lines since the last call, in a format."""
    found = [LOG_FORMATS[log_format].format(one) for one in caplog.records]
    caplog.clear()
    return found


def test_each_change_has_its_line_and_its_time(caplog: pytest.LogCaptureFixture) -> None:
    """The objects by kind of change, the generation, and the milliseconds. The histogram has the same time."""
    clock = Watch()
    record = ChangeRecord(clock)
    record.begin()
    clock.now_s += 0.02
    record.note({"policies": ObjectCounts(1, 2, 3), "endpoints": ObjectCounts(4, 0, 0), "nodes": ObjectCounts()}, 7)
    (line,) = lines(caplog)
    assert line.endswith(
        " INFO in force changes=1 generation=7 milliseconds=20.0 added=5 changed=2 removed=3 policies=+1~2-3 endpoints=+4~0-0"
    )
    found = record.histogram()
    assert [count for _, count in found["buckets"]] == [int(bound >= 0.02) for bound in BUCKETS_S] + [1]
    assert found["sum"] == pytest.approx(0.02)


def test_changes_in_a_row_share_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """No change is left out, however many there are in a second. The line has the longest time."""
    clock = Watch()
    record = ChangeRecord(clock)
    for took_s in (0.01, 0.03, 0.02):
        record.begin()
        clock.now_s += took_s
        record.note({"policies": ObjectCounts(1, 0, 0)}, 7)
    assert len(lines(caplog)) == 1
    record.write_line()
    assert lines(caplog) == []
    clock.now_s += LINE_S
    record.write_line()
    (line,) = lines(caplog)
    assert "changes=2 generation=7 milliseconds=30.0 added=2" in line
    record.write_line()
    assert lines(caplog) == []
    assert record.histogram()["buckets"][-1] == ["+Inf", 3]


def test_the_time_of_a_change_begins_when_it_is_taken_up(caplog: pytest.LogCaptureFixture) -> None:
    """A change without effect stops the clock. A change that waits for room keeps counting."""
    clock = Watch()
    record = ChangeRecord(clock)
    record.begin()
    record.drop()
    clock.now_s = 100.0
    record.begin()
    clock.now_s = 105.0
    record.begin()
    clock.now_s = 106.0
    record.note({}, 1)
    assert "milliseconds=6000.0" in lines(caplog)[0]


def test_agent_tells_what_came_into_force(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log of a real agent: its start, a new, a changed and a removed policy."""
    bench = Bench(tmp_path)
    bench.write("cluster.yaml", CLUSTER)
    bench.write("policy.yaml", POLICY)
    agent = bench.agent()

    def told() -> list[str]:
        bench.now_s += 10.0
        settle(agent)
        found = [line for line in lines(caplog) if " in force changes=" in line]
        assert all("milliseconds=0.0 " in line for line in found), "the clock stands still while the agent works"
        return found

    try:
        (line,) = told()
        assert "policies=+1~0-0" in line
        bench.write("more.yaml", POLICY.replace("name: db,", "name: more,"))
        (line,) = told()
        assert "added=1 changed=0 removed=0 policies=+1~0-0" in line
        bench.write("more.yaml", POLICY.replace("name: db,", "name: more,").replace("5432", "5433"))
        (line,) = told()
        assert "added=0 changed=1 removed=0 policies=+0~1-0" in line
        bench.remove("more.yaml")
        (line,) = told()
        assert "added=0 changed=0 removed=1 policies=+0~0-1" in line
        assert told() == []
        count = agent.enforcement.record.histogram()["buckets"][-1][1]
        assert count == agent.enforcement.changes_applied
    finally:
        bench.close()


def test_a_problem_is_told_when_it_begins_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    """There is one line each, even if the message changes meanwhile.

    Another problem of the same object is a different one.
    """
    objects = ClusterObjects(AgentSettings())
    other = replace(PROBLEM, path="metadata", severity="warning")
    objects.note_problems((PROBLEM,))
    (line,) = lines(caplog)
    assert line.endswith("ERROR a.yaml:3: error: Pod/x/y: spec: is wrong problem=invalid")
    objects.note_problems((replace(PROBLEM, message="is still wrong"), other))
    (line,) = lines(caplog)
    assert "WARNING" in line
    objects.note_problems((other,))
    (line,) = lines(caplog)
    assert line.endswith("INFO over: a.yaml:3: error: Pod/x/y: spec: is still wrong problem=invalid")
    objects.note_problems(())
    assert len(lines(caplog)) == 1
    objects.note_problems(())
    assert lines(caplog) == []


def test_many_problems_at_once_have_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    """The others are counted, for begins and ends."""
    objects = ClusterObjects(AgentSettings())
    objects.note_problems(tuple(replace(PROBLEM, obj=f"Pod/x/{number}") for number in range(MOST_LINES + 5)))
    told = lines(caplog)
    assert len(told) == MOST_LINES + 1
    assert "5 more problems began" in told[-1]
    objects.note_problems(())
    told = lines(caplog)
    assert len(told) == MOST_LINES + 1
    assert "5 more problems are over" in told[-1]


def test_json_lines_have_the_same_fields(caplog: pytest.LogCaptureFixture) -> None:
    """One JSON object for each line, in ASCII, with the fields as values, also the traceback."""
    record = ChangeRecord(lambda: 0.0)
    record.note({"policies": ObjectCounts(1, 0, 0)}, 7)
    logging.getLogger("x").warning("odd \x1b[2J\n\u202e%s", "name")
    try:
        raise ValueError("boom")  # noqa: TRY301 - the log has its traceback
    except ValueError:
        logging.getLogger("x").exception("bug")
    text = lines(caplog, "json")
    assert all(line.isascii() and "\n" not in line for line in text)
    first, second, third = map(json.loads, text)
    assert first.items() >= {"level": "INFO", "message": "in force", "generation": 7, "added": 1, "changes": 1}.items()
    assert (second["message"], second["logger"]) == ("odd \x1b[2J\n\u202ename", "x")
    assert "ValueError: boom" in third["traceback"]
    assert first["time"].endswith("+00:00")
    assert sys.exc_info() == (None, None, None)


def test_problems_that_only_their_messages_tell_apart(caplog: pytest.LogCaptureFixture) -> None:
    """Two interfaces without an object or a place are two problems."""
    record = ProblemLog(logging.getLogger("x"))
    one, two = (Problem(Location(""), "", f"eth{number} has a program of others") for number in (0, 1))
    record.note([one])
    record.note([one, two])
    record.note([two])
    assert [line.split(" INFO ")[-1].split(" ERROR ")[-1] for line in lines(caplog)] == [
        "eth0 has a program of others problem=invalid",
        "eth1 has a program of others problem=invalid",
        "over: eth0 has a program of others problem=invalid",
    ]
