# SPDX-License-Identifier: Apache-2.0
"""The agent's metrics: their names, their number, and their text as Prometheus reads it."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import pytest
from canned_state import full_state, rule, waiting_state

from netpol_ebpf.agent.metrics import (
    INTERFACES,
    OBJECTS,
    RULES,
    Family,
    families,
    render,
)
from netpol_ebpf.agent.report import rule_labels
from netpol_ebpf.policy.types import Action, Cause, CauseKind, Direction, PolicyKey

parser = pytest.importorskip("prometheus_client.parser", reason="the extra [metrics] is not installed")
NAME = re.compile(r"netpol(_[a-z0-9]+)+")
BASE_UNITS = {"milliseconds", "microseconds", "nanoseconds", "ms", "kilobytes", "kib", "mib", "percent"}
"""Words for units that are no base units, or for ratios times 100."""


def read(found: list[Family]) -> dict[str, Any]:
    """The families as Prometheus reads them, by the names of their metrics."""
    text = render(found).decode()
    return {one.name: one for one in parser.text_string_to_metric_families(text)}


def samples(found: list[Family], name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """The values of a metric, by labels."""
    every = (one for family in read(found).values() for one in family.samples)
    return {tuple(sorted(one.labels.items())): one.value for one in every if one.name == name}


@pytest.mark.parametrize("state", [full_state(), waiting_state()], ids=["in force", "waiting"])
def test_prometheus_reads_every_metric(state: dict[str, Any]) -> None:
    """The parser finds each metric with its type and meaning, and no series twice."""
    found = families(state, [rule(1), rule(2)])
    text = render(found).decode()
    known = read(found)
    assert {one.name.removesuffix("_total") for one in found} == {name.removesuffix("_total") for name in known}
    for family in found:
        one = known[family.name.removesuffix("_total") if family.kind == "counter" else family.name]
        assert (one.type, one.documentation) == (family.kind, family.meaning)
    series = Counter(line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#"))
    assert [name for name, count in series.items() if count > 1] == []
    assert all(family.samples for family in found if family.name != "netpol_series_left_out")


def test_names_follow_the_conventions() -> None:
    """Only counters end in _total. Names have base units. Labels have names of one form."""
    for family in families(full_state(), [rule(1)]):
        assert NAME.fullmatch(family.name)
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert not BASE_UNITS & set(family.name.split("_")), family.name
        for labels, _ in family.samples:
            assert all(re.fullmatch("[a-z_]+", name) and name not in ("le", "job", "instance") for name in labels)
        assert len({tuple(labels) for labels, _ in family.samples}) <= 1, family.name


def test_values_of_a_state() -> None:
    """Each number of the state is in the metric with its name."""
    found = families(full_state(), [rule(4, packets=7)])
    assert samples(found, "netpol_packets_total") == {(("reason", "policy-deny"),): 4}
    assert samples(found, "netpol_events_lost_total") == {(): 5}
    assert samples(found, "netpol_map_entries")[(("map", "np_rule"),)] == 8
    assert samples(found, "netpol_map_entries")[(("map", "np_conn4"),)] == 6
    assert samples(found, "netpol_map_max_entries")[(("map", "np_conn4"),)] == 64
    assert samples(found, "netpol_connections")[(("map", "np_conn4"), ("state", "unreplied"))] == 1
    assert samples(found, "netpol_ready") == {
        (("check", "synced"),): 1,
        (("check", "programmed"),): 0,
        (("check", "fresh"),): 1,
    }
    assert samples(found, "netpol_problems") == {(("kind", "invalid"), ("severity", "error")): 1}
    assert samples(found, "netpol_refused_object") == {(("map", "np_rule"), ("object", "Pod/shop/db")): 1}
    assert samples(found, "netpol_change_duration_seconds_count") == {(): 2}
    assert samples(found, "netpol_change_duration_seconds_bucket")[(("le", "0.025"),)] == 1
    assert samples(found, "netpol_change_duration_seconds_sum")[()] == pytest.approx(120.02)
    (read_at,) = samples(found, "netpol_source_last_read_timestamp_seconds").values()
    assert read_at == 1767323045
    pods = (("kind", "pods"), ("source", "https://api:6443"))
    assert samples(found, "netpol_source_watches_total")[pods] == 3
    assert samples(found, "netpol_source_gaps_total")[pods] == 1
    assert samples(found, "netpol_source_went_back_total") == {(("source", "https://api:6443"),): 1}
    assert samples(found, "netpol_source_last_sync_timestamp_seconds")[pods] == 1767323045
    labels, value = next(iter(samples(found, "netpol_rule_bytes_total").items()))
    assert (dict(labels)["policy"], dict(labels)["rule"], value) == ("db", "4", 700)


def test_number_of_series_has_a_limit_that_is_told() -> None:
    """The limit holds for any number of rules, objects and interfaces.

    The rest is counted, and used rules come first.
    """
    state = full_state()
    state["refused"]["waiting"] = [f"Pod/shop/{number}" for number in range(OBJECTS + 2)]
    state["barrier"] = {**state["barrier"], "unsigned": {f"cali{number}": 1 for number in range(INTERFACES + 3)}}
    rules = [rule(number, packets=number == RULES + 3) for number in range(RULES + 5)]
    found = families(state, rules)
    left_out = {
        "netpol_rule_packets_total": 5, "netpol_rule_bytes_total": 5, "netpol_rule_staged_packets_total": 5,
        "netpol_refused_object": 2, "netpol_barrier_unsigned_packets_total": 3,
    }  # fmt: skip
    assert samples(found, "netpol_series_left_out") == {(("metric", name),): count for name, count in left_out.items()}
    shown = samples(found, "netpol_rule_packets_total")
    assert len(shown) == RULES
    assert max(shown.values()) == 1
    assert samples(families(state, rules[:RULES]), "netpol_rule_packets_total").keys() >= {
        key for key in shown if dict(key)["rule"] != str(RULES + 3)
    }


def test_strange_names_are_read_as_they_are() -> None:
    """The parser returns quotes, backslashes and line breaks of a label. Unprintable characters are escaped."""
    strange = 'a "b" \\c\nd'
    found = families(full_state(), [rule(1, policy=strange), rule(2, policy="x\x1b[2J")])
    assert {dict(key)["policy"] for key in samples(found, "netpol_rule_packets_total")} == {strange, "x\\x1b[2J"}


def test_different_causes_have_different_labels() -> None:
    """No two causes of one node have the same series, because Prometheus would reject the whole scrape."""
    keys = [PolicyKey(kind, "shop", "db") for kind in ("NetworkPolicy", "KubernetesNetworkPolicy")]
    causes = [
        Cause(kind, direction, tier, policy, "", index, action)
        for kind, policies in ((CauseKind.RULE, keys), (CauseKind.TIER_END, keys), (CauseKind.FAILSAFE, [None]),
                               (CauseKind.TUNNEL, [None]))
        for direction, tier, policy, index, action in itertools.product(
            Direction, ("a", "b"), policies, (-1,) if kind is CauseKind.TIER_END else (0, 1), (Action.ALLOW, Action.DENY)
        )
    ]  # fmt: skip
    causes += [Cause(CauseKind.PROFILE, way, profile=name, index=index)
               for way, name, index in itertools.product(Direction, ("kns.a", "kns.b"), (-1, 0, 1))]  # fmt: skip
    causes += [Cause(CauseKind.NO_MATCH, way, action=action) for way in Direction for action in Action]
    labels = [tuple(sorted(rule_labels(one).items())) for one in causes]
    assert len(set(labels)) == len(labels)


def test_plain_values_make_the_same_metric() -> None:
    """Values that were sent over the control socket are rendered like the original ones."""
    found = families(full_state(), [rule(1)])
    assert render(Family.from_dict(one.as_dict()) for one in found) == render(found)
