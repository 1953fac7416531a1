# SPDX-License-Identifier: Apache-2.0
"""Installation of the chained CNI plugin on a node. `make -C cni` builds the plugin's program in this directory."""
