# SPDX-License-Identifier: Apache-2.0
"""Typed resources: what users write, parsed from YAML with its positions and validated."""
