# SPDX-License-Identifier: Apache-2.0
"""The node agent: reads objects from the sources, compiles them, and enforces policy on the endpoints of this node."""
