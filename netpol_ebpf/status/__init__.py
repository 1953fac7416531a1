# SPDX-License-Identifier: Apache-2.0
"""Where each policy of a cluster is in force: reports of the nodes, and conditions made from them (ADR 20)."""
