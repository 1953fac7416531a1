# SPDX-License-Identifier: Apache-2.0
"""Answers about policy that need the objects alone: `explain`."""
