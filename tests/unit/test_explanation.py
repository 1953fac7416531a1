# SPDX-License-Identifier: Apache-2.0
"""What `netpolctl explain` answers to every probe of the project's own cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from netpol_ebpf.analysis.explanation import as_request, explain, parse_request
from netpol_ebpf.cases.case import Case, load_cases
from netpol_ebpf.cases.engines import open_engine
from netpol_ebpf.cases.runner import Cast
from netpol_ebpf.policy.translate import derive

ROOT = Path(__file__).parents[2]
CASES = [
    case for group in ("decisions", "shared") for case in load_cases([ROOT / "tests" / "cases" / group]).cases
] + load_cases([ROOT / "examples" / "cases"]).cases


def test_there_are_probes_of_hosts_and_of_what_passes_through() -> None:
    """Processes of nodes at either end, traffic that passes host endpoints, and translated destinations are among the cases."""
    stages = set()
    for case in CASES:
        cast = Cast(case.resources, derive(case.resources))
        for probe in case.probes:
            stages |= {question.stage.value for journey in cast.journeys(probe) for question in journey.questions()}
    assert stages == {"normal", "forward", "pre-dnat", "untracked"}


@pytest.mark.parametrize("engine", ["model", "tables"])
def test_each_probe_is_explained_as_its_case_expects(engine: str) -> None:
    """Every way is allowed, or denied, as the case says; whoever decided is the last step with a say, and of a denial its denier."""
    wrong = []
    with open_engine(engine) as judge:
        for case in CASES:
            world = derive(case.resources)
            cast = Cast(case.resources, world)
            judge.load(world)
            for probe in case.probes:
                for way in explain(cast, world, probe, judge):
                    deniers = [step for step in way["steps"] if step["verdict"] == "deny"]
                    is_told = (
                        not way["steps"] or way["allowed"] or (deniers[-1]["sentence"] == way["decided_by"]["sentence"])
                    )
                    if way["allowed"] != probe.expect_allow or bool(deniers) == way["allowed"] or not is_told:
                        wrong.append((case.name, probe.written))
    assert wrong == []


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name and len(case.probes) < 50], ids=lambda case: case.name
)
def test_a_question_arrives_at_the_agent_as_it_was_asked(case: Case) -> None:
    """What is sent over the socket says the same; a destination's translation is the agent's own affair."""
    for probe in case.probes:
        sent = parse_request(as_request(probe))
        fields = ("source", "destination", "protocol", "port", "source_port", "icmp_type", "icmp_code")
        assert [getattr(sent, field) for field in fields] == [getattr(probe, field) for field in fields]
