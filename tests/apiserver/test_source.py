# SPDX-License-Identifier: Apache-2.0
"""The source of a cluster at a real API server: rights, events, changed definitions, crashes, a lost etcd."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from server import TOKEN, Server

pytest.importorskip("msgspec", reason="the extra [kubernetes] is not installed")

from netpol_ebpf.sources.kubernetes import probing, source, watching  # noqa: E402
from netpol_ebpf.sources.kubernetes.client import Cluster, Credentials  # noqa: E402
from netpol_ebpf.sources.kubernetes.source import KubernetesSource  # noqa: E402
from netpol_ebpf.sources.source import Upsert  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0
ADMINISTRATOR = Credentials({"Authorization": f"Bearer {TOKEN}"})
TIERS = "tiers.projectcalico.org"
DEFINITION = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{TIERS}"


class OwnServer(Server):
    """A server that tests may kill, stop, and restore to an earlier state."""

    @property
    def etcd(self) -> Any:
        return self._processes[0]

    def kill(self) -> None:
        """Kill only the API server, as in a crash."""
        self._processes[1].kill()
        self._processes[1].wait()

    def revive(self) -> None:
        """Start the API server again at the same port."""
        command = self._processes.pop(1).args
        self._spawn("apiserver", command)  # type: ignore[arg-type]
        self.wait_for(self._is_ready, "the server is back")

    def set_back(self, change: Callable[[Path], None]) -> None:
        """Stop both programs, change etcd's data, and start both."""
        commands = [process.args for process in self._processes]
        self.kill()
        self.etcd.terminate()
        self.etcd.wait()
        self._processes.clear()
        change(self._directory / "data")
        for name, command in zip(("etcd", "apiserver"), commands, strict=True):
            self._spawn(name, command)  # type: ignore[arg-type]
        self.wait_for(self._is_ready, "the server is back")

    def define_tiers(self) -> None:
        """Apply the definition of tiers, and wait until it is served."""
        (definition,) = yaml.safe_load_all((ROOT / "deploy" / "chart" / "crds" / f"{TIERS}.yaml").read_text())
        assert self.apply(definition).status in (200, 201)
        self.wait_for(lambda: self.get("/apis/projectcalico.org/v3/tiers").status == 200, "tiers are served")


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """A server with the role of deploy/manifests/rbac.yaml, bound to the user `agent`, and the definition of tiers."""
    made = OwnServer(Path(os.environ["KUBE_APISERVER"]), Path(os.environ["ETCD"]), tmp_path_factory.mktemp("own"))
    try:
        documents = yaml.safe_load_all((ROOT / "deploy" / "manifests" / "rbac.yaml").read_text(encoding="utf-8"))
        (role,) = (one for one in documents if one["kind"] == "ClusterRole")
        assert made.apply(role).status in (200, 201)
        binding = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "netpol-agent"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "netpol-agent"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "agent"}],
        }
        assert made.apply(binding).status in (200, 201)
        made.define_tiers()
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "GRACE_S", 1.0)
    monkeypatch.setattr(watching, "LONGEST_RETRY_S", 2.0)
    monkeypatch.setattr(source, "SYNC_S", DEADLINE_S)


def cluster(server: Server, user: str = "agent") -> Cluster:
    """The server with the credentials of a user."""
    headers = {
        "Authorization": f"Bearer {TOKEN}",
        "Impersonate-User": user,
        "Impersonate-Group": "system:authenticated",
    }
    return Cluster(
        f"https://127.0.0.1:{server.port}",
        authority=server._authority.read_bytes,
        credentials=lambda _refused: Credentials(headers),
    )


@pytest.fixture
def followed(own_server: OwnServer) -> Iterator[KubernetesSource]:
    """A source that has synced."""
    made = KubernetesSource(cluster(own_server))
    try:
        made.sync()
        yield made
    finally:
        made.close()


def take(followed: KubernetesSource, is_there: Callable[[list[str]], bool]) -> list[str]:
    """Collect the events as texts until a condition on them is true."""
    found: list[str] = []
    until_s = time.monotonic() + DEADLINE_S
    while not is_there(found):
        assert time.monotonic() < until_s, (found, followed.problems, followed.states())
        select.select([followed.fileno()], [], [], 0.2)
        followed.note_news()
        update = followed.step()
        found += [f"{'+' if isinstance(one, Upsert) else '-'}{one.key}" for one in (update.events if update else ())]
    return found


def tier(name: str, order: int = 10) -> dict[str, Any]:
    return {"apiVersion": "projectcalico.org/v3", "kind": "Tier", "metadata": {"name": name}, "spec": {"order": order}}


def test_role_of_the_file_is_enough(own_server: OwnServer, followed: KubernetesSource) -> None:
    """Every kind is either not installed, or listed; by a streaming list, if the server offers one."""
    states = {one.kind: one for one in followed.states()}
    assert all(one.is_synced for one in states.values())
    assert states["namespaces"].objects >= 4
    assert states[TIERS].state == "watching"
    assert states["globalnetworksets.projectcalico.org"].state == "not installed"
    # In version 1.33 the feature is off, in the versions before and after it is on.
    found = re.search(r'kubernetes_feature_enabled{name="WatchList",[^}]*} (\d)', own_server.get("/metrics").body)
    assert found is not None
    listed = [one for one in followed.watchers.values() if one.state is watching.State.WATCHING]
    assert {watcher._streams for watcher in listed} == {found[1] == "1"}
    assert followed.problems == ()
    assert own_server.get("/api/v1/namespaces", user="agent").status == 200
    assert own_server.get("/api/v1/secrets", user="agent").status == 403


def test_user_without_rights_gets_nothing(own_server: OwnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what is forbidden."""
    monkeypatch.setattr(source, "SYNC_S", 5.0)
    made = KubernetesSource(cluster(own_server, "nobody"))
    with pytest.raises(Exception, match="forbids it"):
        made.sync()
    assert not made.has_synced
    made.close()


def test_events_of_objects(own_server: OwnServer, followed: KubernetesSource) -> None:
    """A namespace, a policy and a tier are created and deleted."""
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "deny", "namespace": "default"},
        "spec": {"podSelector": {}},
    }
    assert own_server.create(policy).status == 201
    assert take(followed, bool) == ["+KubernetesNetworkPolicy/default/deny"]
    path = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/deny"
    own_server.request("PATCH", path, {"metadata": {"labels": {"a": "b"}}}, content_type="application/merge-patch+json")
    assert take(followed, bool) == ["+KubernetesNetworkPolicy/default/deny"]
    own_server.request("DELETE", path)
    assert take(followed, bool) == ["-KubernetesNetworkPolicy/default/deny"]
    own_server.create(tier("one"))
    assert take(followed, bool) == ["+Tier/one"]
    own_server.request("DELETE", "/apis/projectcalico.org/v3/tiers/one")
    assert take(followed, bool) == ["-Tier/one"]
    assert followed.problems == ()


def test_new_default_of_a_definition_arrives(own_server: OwnServer, followed: KubernetesSource) -> None:
    """The object changes without an event and with the same resourceVersion."""
    own_server.create({**tier("one"), "spec": {}})
    assert take(followed, bool) == ["+Tier/one"]
    definition = own_server.get(DEFINITION).body
    order = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["order"]
    order["default"] = 77
    assert own_server.request("PUT", DEFINITION, definition).status == 200
    assert take(followed, bool) == ["+Tier/one"]
    (entry,) = (one for name, one in followed.cache.stores[_tiers(followed)].entries.items() if name.name == "one")
    assert entry.resource is not None
    assert entry.resource.order == 77  # type: ignore[union-attr]
    assert entry.version.endswith("+")
    own_server.request("DELETE", "/apis/projectcalico.org/v3/tiers/one")
    take(followed, bool)
    own_server.define_tiers()


def _tiers(followed: KubernetesSource) -> Any:
    return next(kind for kind in followed.kinds if str(kind) == TIERS)


def test_deleted_definition_lifts_nothing(own_server: OwnServer, followed: KubernetesSource) -> None:
    """The server sends DELETED for each object, then 404. All objects stay until they are applied again or released."""
    for name in ("one", "two", "three"):
        own_server.create(tier(name))
    take(followed, lambda found: len(found) == 3)
    assert own_server.request("DELETE", DEFINITION).status == 200
    assert take(followed, lambda _found: followed.watchers[_tiers(followed)].state.value == "definition deleted") == []
    assert [problem.slug for problem in followed.problems] == ["crd-deleted"]
    own_server.define_tiers()
    own_server.create(tier("one", 20))
    followed.probe.step()
    assert take(followed, bool) == ["+Tier/one"]
    assert "2 of its objects" in followed.problems[0].message
    assert followed.release(TIERS) == ("Tier/three", "Tier/two")
    assert sorted(take(followed, lambda found: len(found) == 2)) == ["-Tier/three", "-Tier/two"]
    own_server.request("DELETE", "/apis/projectcalico.org/v3/tiers/one")
    assert take(followed, bool) == ["-Tier/one"]
    assert followed.problems == ()


def test_crash_of_the_server_changes_nothing(own_server: OwnServer, followed: KubernetesSource) -> None:
    """There are problems while the server does not answer, and none afterwards.

    Changes in the meantime become events.
    """
    own_server.create(tier("kept"))
    assert take(followed, bool) == ["+Tier/kept"]
    own_server.kill()
    assert take(followed, lambda _found: len(followed.problems) > 2) == []
    own_server.revive()
    own_server.create(tier("new"))
    assert take(followed, lambda found: "+Tier/new" in found and not followed.problems) == ["+Tier/new"]
    for name in ("kept", "new"):
        own_server.request("DELETE", f"/apis/projectcalico.org/v3/tiers/{name}")
    take(followed, lambda found: len(found) == 2)


def test_etcd_that_hangs_is_told(
    own_server: OwnServer, followed: KubernetesSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server continues as if nothing were wrong, but the probe fails."""
    followed.probe.step()
    assert followed.problems == ()
    monkeypatch.setattr(probing, "ANSWER_S", 2.0)
    own_server.etcd.send_signal(signal.SIGSTOP)
    try:
        for _ in range(2):
            followed.probe.step()
        assert [problem.slug for problem in followed.problems] == ["cut-off"]
        assert take(followed, lambda _found: True) == []
    finally:
        own_server.etcd.send_signal(signal.SIGCONT)
        monkeypatch.undo()
    own_server.wait_for(lambda: followed.probe.step() > 0 and not followed.problems, "the probe is answered")


def test_restored_backup_is_noticed(own_server: OwnServer, followed: KubernetesSource, tmp_path: Path) -> None:
    """ResourceVersions go back, and a WATCH from a lost one is silent.

    A probe makes the source list everything again.
    """
    own_server.set_back(lambda data: shutil.copytree(data, tmp_path / "backup"))
    for number in range(40):
        own_server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"lost-{number}"}})
    take(followed, lambda found: len({one for one in found if "lost-" in one}) == 40)

    def restore(data: Path) -> None:
        shutil.rmtree(data)
        shutil.copytree(tmp_path / "backup", data)

    own_server.set_back(restore)
    take(followed, lambda _found: not followed.problems)
    followed.probe.step()
    gone = take(followed, lambda found: len([one for one in found if "lost-" in one]) == 40)
    assert {one[0] for one in gone if "lost-" in one} == {"-"}
    own_server.create(tier("after"))
    assert "+Tier/after" in take(followed, lambda found: "+Tier/after" in found)


def test_server_without_lists_by_stream(tmp_path: Path) -> None:
    """The server rejects streaming lists, and the kinds are listed in pages."""
    programs = Path(os.environ["KUBE_APISERVER"]), Path(os.environ["ETCD"])
    other = Server(*programs, tmp_path, flags=["--feature-gates=WatchList=false"])
    made = KubernetesSource(Cluster(cluster(other).server, other._authority.read_bytes, lambda _refused: ADMINISTRATOR))
    try:
        made.sync()
        assert made.problems == ()
        listed = [watcher for watcher in made.watchers.values() if watcher.state is watching.State.WATCHING]
        assert len(listed) == 7
        assert not any(watcher._streams for watcher in listed)
        assert other.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "new"}}).status == 201
        assert "+Namespace/new" in take(made, lambda found: "+Namespace/new" in found)
    finally:
        made.close()
        other.close()
