# SPDX-License-Identifier: Apache-2.0
"""The node agent: sources to compiler to kernel, for the local endpoints."""
