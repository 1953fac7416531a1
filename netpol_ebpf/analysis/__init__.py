# SPDX-License-Identifier: Apache-2.0
"""Analyses of policy that need only the objects, not the kernel: `explain`."""
