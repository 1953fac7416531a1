# SPDX-License-Identifier: Apache-2.0
"""Answers about policy that are worked out from objects alone: `explain`."""
