# SPDX-License-Identifier: Apache-2.0
"""One real API server for all tests of this directory, started from the programs that KUBE_APISERVER and ETCD name.

Without these two variables the tests are not run.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from api_objects import CHART, documents
from server import Server

PROGRAMS = ("KUBE_APISERVER", "ETCD")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that need the two programs if the variables do not name them. No package has the programs."""
    here = Path(__file__).parent
    ours = [one for one in items if here in one.path.parents]
    for one in ours:
        one.add_marker(pytest.mark.apiserver)
    if any(not os.environ.get(name) for name in PROGRAMS):
        config.hook.pytest_deselected(items=ours)
        items[:] = [one for one in items if one not in ours]


@pytest.fixture(scope="session")
def bare_server(
    tmp_path_factory: pytest.TempPathFactory, record_testsuite_property: Callable[[str, object], None]
) -> Iterator[Server]:
    """A server with only its own kinds. The test report has its version."""
    apiserver, etcd = (Path(os.environ[name]).resolve() for name in PROGRAMS)
    server = Server(apiserver, etcd, tmp_path_factory.mktemp("apiserver"))
    record_testsuite_property("kubernetes", server.version())
    record_testsuite_property("etcd", server.etcd_version())
    yield server
    server.close()


@pytest.fixture(scope="session")
def server(bare_server: Server) -> Server:
    """The server, which serves all our definitions."""
    for path in sorted((CHART / "crds").glob("*.*.yaml")):
        (definition,) = documents(path)
        answer = bare_server.apply(definition, fieldValidation="Strict")
        assert answer.status in (200, 201), f"{path.name}: {answer.message}"
    for path in sorted((CHART / "crds").glob("*.*.yaml")):
        (definition,) = documents(path)
        spec = definition["spec"]
        where = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
        bare_server.wait_for(lambda where=where: bare_server.get(where).status == 200, f"{where} is served")
    return bare_server


@pytest.fixture
def takes_an_empty_tier(server: Server) -> Iterator[None]:
    """Install, for the duration of the test, definitions of staged policies that accept an empty tier, unlike ours."""
    (ours,) = documents(CHART / "crds" / "stagednetworkpolicies.projectcalico.org.yaml")
    theirs = copy.deepcopy(ours)
    spec = theirs["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec["properties"]["tier"] = {"type": "string"}
    empty = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "StagedNetworkPolicy",
        "metadata": {"name": "empty", "namespace": "default"},
        "spec": {"tier": ""},
    }
    assert server.apply(theirs).status == 200
    server.wait_for(lambda: server.create(empty, dryRun="All").status == 201, "the other definition is served")
    yield
    assert server.apply(ours).status == 200
    server.wait_for(lambda: server.create(empty, dryRun="All").status == 422, "our definition is served")
