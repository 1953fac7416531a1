# SPDX-License-Identifier: Apache-2.0
"""The node's own state: interfaces, addresses, routes, connections, the second barrier.

The package knows no BPF maps or pins.
"""
