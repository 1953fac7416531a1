# SPDX-License-Identifier: Apache-2.0
"""The control plane's access to the program's tables.

The package knows the layouts of the tables, but no pins and no policy.
"""
