# SPDX-License-Identifier: Apache-2.0
"""Where each policy of a cluster is in force: reports of the nodes, and what is made of them (ADR 20)."""
