# SPDX-License-Identifier: Apache-2.0
"""Typed resources: users' objects, parsed from YAML or JSON and validated, with their positions for messages."""
