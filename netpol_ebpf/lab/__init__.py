# SPDX-License-Identifier: Apache-2.0
"""The laboratory: network namespaces as pods, nodes and outside hosts, with real connections between them."""
