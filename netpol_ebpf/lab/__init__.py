# SPDX-License-Identifier: Apache-2.0
"""The network laboratory: pods, nodes and outside hosts as network namespaces, and real connections between them."""
