# SPDX-License-Identifier: Apache-2.0
"""The chained CNI plugin on a node: its place among the runtime's plugins. `make -C cni` puts the program itself here."""
