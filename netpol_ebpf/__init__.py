# SPDX-License-Identifier: Apache-2.0
"""The control plane: resources, selectors, policy model, compiler, engines, sources, agent and command line.

The package can be imported and tested without root, BCC or a cluster.
"""

__version__ = "0.1.0"
