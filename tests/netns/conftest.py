# SPDX-License-Identifier: Apache-2.0
"""The fixtures of the scene that most tests use."""

from scene_fixtures import lab, lasting_scene, own_scene, scene

__all__ = ["lab", "lasting_scene", "own_scene", "scene"]
