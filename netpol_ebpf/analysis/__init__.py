# SPDX-License-Identifier: Apache-2.0
"""Analyses of policy from the objects alone, without the kernel: `explain`."""
