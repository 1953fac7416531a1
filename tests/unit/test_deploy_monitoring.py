# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alert rules name metrics and labels that the agent has, and docs/metrics.md has them all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from canned_state import full_state, rule

from netpol_ebpf.agent.metrics import Family, families

ROOT = Path(__file__).parents[2]
ALERTS = yaml.safe_load((ROOT / "deploy" / "alerts" / "netpol-ebpf.yaml").read_text())
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "netpol-ebpf.json").read_text())
RULES = [rule(1), rule(2, action="deny")]
FAMILIES = {one.name: one for one in families(full_state(), RULES)}
OF_PROMETHEUS = {"instance", "job"}
"""Labels that a scrape adds."""
SELECTION = re.compile(r"\b(netpol_\w+)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring) ?\(([^)]*)\)")
LABEL_OF_TEXT = re.compile(r"\$labels\.(\w+)")


def family_of(name: str) -> Family:
    """The metric of a series; a histogram has three series."""
    base = re.sub("_(bucket|sum|count)$", "", name)
    found = FAMILIES.get(name) or FAMILIES.get(base)
    assert found is not None, f"there is no metric {name}"
    assert (found.kind == "histogram") == (found.name != name), name
    return found


def labels_of(expression: str) -> set[str]:
    """Every label that the series of an expression may have."""
    found = set(OF_PROMETHEUS)
    for name, _ in SELECTION.findall(expression):
        family = family_of(name)
        found |= set(family.samples[0][0]) if family.samples else {"metric"}
        found |= {"le"} if name.endswith("_bucket") else set()
    return found


def check(expression: str) -> None:
    """Every metric, label and value that an expression names exists."""
    selections = SELECTION.findall(expression)
    assert selections, expression
    for name, matchers in selections:
        family = family_of(name)
        wanted = {}
        for label, operator, value in MATCHER.findall(matchers):
            assert label in labels_of(name), f"{name} has no label {label}"
            if operator == "=" and not value.startswith("$"):
                wanted[label] = value
        values = [{key: str(value) for key, value in labels.items()} for labels, _ in family.samples]
        assert not wanted or any(wanted.items() <= one.items() for one in values), f"{name} is never {wanted}"
    for grouping in GROUPING.findall(expression):
        assert {one.strip() for one in grouping.split(",")} <= labels_of(expression), expression


def alerts() -> Iterator[dict[str, Any]]:
    for group in ALERTS["groups"]:
        yield from group["rules"]


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


@pytest.mark.parametrize("alert", list(alerts()), ids=lambda one: one["alert"])
def test_alerts_name_what_exists(alert: dict[str, Any]) -> None:
    """Metrics, labels and values, in the text for people too."""
    check(alert["expr"])
    kept = GROUPING.findall(alert["expr"])
    known = {one.strip() for one in kept[0].split(",")} if kept else labels_of(alert["expr"])
    for text in alert["annotations"].values():
        assert set(LABEL_OF_TEXT.findall(text)) <= known
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}


@pytest.mark.parametrize("expression", list(expressions()))
def test_panels_name_what_exists(expression: str) -> None:
    """The same for the dashboard; each legend names labels that the result has."""
    check(expression)


def test_panels_have_places_and_legends_of_their_own() -> None:
    """No two panels overlap, and a legend names only labels that its expression keeps."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            kept = {one.strip() for group in GROUPING.findall(target["expr"]) for one in group.split(",")}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target
    assert len({one["id"] for one in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_a_name_that_does_not_exist_is_found() -> None:
    """The check itself: a metric, a label, a value and a grouping that nothing has."""
    for wrong in (
        "netpol_nothing == 1",
        'netpol_local_endpoints{status="waiting"}',
        'netpol_local_endpoints{state="lost"}',
        "sum by (namespace) (netpol_packets_total)",
        "netpol_change_duration_seconds",
    ):
        with pytest.raises(AssertionError):
            check(wrong)


def test_the_page_has_every_metric() -> None:
    """docs/metrics.md has a row for each metric, with its kind, its labels and its meaning."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(netpol_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    expected = []
    for name, one in FAMILIES.items():
        labels = list(one.samples[0][0]) if one.samples else ["metric"]
        expected.append((name, one.kind, ", ".join(f"`{label}`" for label in labels), one.meaning))
    assert [(name, kind, labels.strip(), meaning) for name, kind, labels, meaning in rows] == expected
