# SPDX-License-Identifier: Apache-2.0
"""The tables of the packet path as the control plane reads and writes them. Knows their layouts; knows nothing of pins and policy."""
