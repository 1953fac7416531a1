# SPDX-License-Identifier: Apache-2.0
"""`netpolctl explain`, asked of the agent: the answer for the objects that are in force here, with its own settings.

Invariant: where this node does not do what policy alone says, or nobody can say what it does, the question is refused with the
reason.  Reads only; runs in a child of the agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from netpol_ebpf.agent.core import Agent
from netpol_ebpf.analysis.explanation import explain, parse_engine, parse_request
from netpol_ebpf.cases.runner import Cast
from netpol_ebpf.errors import InvalidInputError
from netpol_ebpf.policy.journey import Journey
from netpol_ebpf.policy.types import EndpointKey, EndpointKind, World


def answer_question(agent: Agent, request: Mapping[str, Any]) -> dict[str, Any]:
    """``ways``: see `netpol_ebpf.analysis.explanation.explain`. Raises NetpolError."""
    probe, engine = parse_request(request), parse_engine(request)
    world = _enforced(agent)
    cast = Cast(agent.derivation.resources(), world, borrow_sources=agent.settings.borrow_sources)
    ways = explain(cast, world, probe, engine, lambda journey: _require_enforced(agent, journey))
    return {"node": agent.settings.node, "ways": ways}


def _enforced(agent: Agent) -> World:
    """The world in force without the host endpoints of this node that have no interface here."""
    world, here = agent.world_in_force, agent.own.plan.in_force

    def is_absent(key: EndpointKey) -> bool:
        one = world.endpoints[key]
        return one.kind is EndpointKind.HOST and one.node == agent.settings.node and key not in here

    return replace(world, endpoints={key: one for key, one in world.endpoints.items() if not is_absent(key)})


def _require_enforced(agent: Agent, journey: Journey) -> None:
    """Refuse where a workload of this node has a say and is not under its policy, or packets to services are denied altogether."""
    if agent.settings.node is None:  # a workload without an interface here may be on any node
        return
    local = {one.key for one in agent.local_endpoints()}
    for question in journey.questions():
        key = question.endpoint
        if key in local and not agent.applier.is_enforced(key):
            raise InvalidInputError(
                f"policy of {key} is NOT enforced: no interface of this node is known to be its",
                hint="`netpolctl status` says what is in the way.",
            )
        if key in local and journey.flow.dnat_to is not None and agent.own.no_exit is not None:
            raise InvalidInputError(agent.own.no_exit.message, hint="`netpolctl status` says what is in the way.")
