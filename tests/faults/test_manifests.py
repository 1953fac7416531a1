# SPDX-License-Identifier: Apache-2.0
"""Manifests that must not end an agent: it keeps its policy, reports the problem, and still closes new interfaces."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from agent_scene import DB_POLICY, NODE, OTHER_ALLOWED, Scene, to_db, wait_for

pytestmark = pytest.mark.netns

SURROGATE = r"""{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p\udfff", "namespace": "shop"},
"spec": {"nodeName": "node-1", "containers": []}, "status": {"podIPs": [{"ip": "10.1.0.9"}]}}"""


def put_surrogate(manifests: Path) -> None:
    (manifests / "zz.json").write_text(SURROGATE, encoding="utf-8")


def put_sparse_file(manifests: Path) -> None:
    (manifests / "zz.yaml").touch()
    os.truncate(manifests / "zz.yaml", 100 << 30)


def put_link_to_the_kernel_s_log(manifests: Path) -> None:
    (manifests / "zz.yaml").symlink_to("/proc/kmsg")


def put_pipe(manifests: Path) -> None:
    os.mkfifo(manifests / "zz.yaml")


def replace_by_directory(manifests: Path) -> None:
    (manifests / "db.yaml").unlink()
    (manifests / "db.yaml").mkdir()


def replace_root_by_pipe(manifests: Path) -> None:
    manifests.rename(manifests.with_name("away"))
    os.mkfifo(manifests)


def replace_root_by_empty_directory(manifests: Path) -> None:
    manifests.rename(manifests.with_name("away"))
    manifests.mkdir()


def restore(manifests: Path) -> None:
    """Restore the manifests, whatever was changed."""
    away = manifests.with_name("away")
    if away.exists():
        if manifests.is_dir():
            manifests.rmdir()
        else:
            manifests.unlink()
        away.rename(manifests)
    for path in manifests.glob("zz.*"):
        path.unlink()
    if (manifests / "db.yaml").is_dir():
        (manifests / "db.yaml").rmdir()


def is_closed_at_once(scene: Scene) -> bool:
    """Whether a new interface gets its programs."""
    lab, namespace = scene.lab, f"{scene.lab.token}-newborn"
    lab.record(namespaces=[namespace])
    lab.run(NODE, ["ip", "netns", "add", namespace])
    try:
        lab.run(NODE, ["ip", "link", "add", "newborn", "type", "veth", "peer", "name", "eth0", "netns", namespace])
        return bool(
            wait_for(lambda: scene.attached().get("newborn") == {"ingress", "egress"}, "a new interface is closed")
        )
    finally:
        lab.run(NODE, ["ip", "link", "del", "newborn"])
        lab.run(NODE, ["ip", "netns", "del", namespace])


@pytest.mark.parametrize(
    "put",
    [
        put_surrogate, put_sparse_file, put_link_to_the_kernel_s_log, put_pipe, replace_by_directory, replace_root_by_pipe,
        replace_root_by_empty_directory,
    ],
)  # fmt: skip
def test_nothing_in_the_manifests_ends_the_agent_or_what_it_enforces(scene: Scene, put: Callable[[Path], None]) -> None:
    """The problem is reported and policy stays.

    A new interface is closed. SIGTERM ends the agent, and a new one starts or reports why it cannot.
    """
    put(scene.manifests)
    try:
        state = scene.await_status(lambda now: not now["in_force"], "it is told")
        assert {one["slug"] for one in state["problems"]} <= {"encoding", "unreadable", "empty"}
        assert is_closed_at_once(scene)
        assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
        scene.stop()
        scene.launch()
        assert scene.process is not None
        if put is replace_root_by_pipe:
            assert scene.process.wait(60) == 3
        else:
            assert not scene.state()["in_force"]
        assert scene.reached(to_db("shop/web"), to_db("shop/other")) == [True, False]
    finally:
        restore(scene.manifests)


def test_large_manifests_are_taken_up_while_new_interfaces_are_closed(scene: Scene) -> None:
    """While the files are read, for some seconds, a new interface gets its programs and requests get answers.

    Then the policy is in force.
    """
    scene.write("db.yaml", "# a\n" * 4_000_000 + DB_POLICY)
    scene.write("other.yaml", OTHER_ALLOWED.replace("name: other,", "name: zz,"))
    assert is_closed_at_once(scene)
    assert scene.state()["objects"]["policies"] in (1, 2)
    scene.await_status(lambda now: now["in_force"] and now["objects"]["policies"] == 2, "both are in force")
    scene.await_reached(to_db("shop/other"), expected=True)
