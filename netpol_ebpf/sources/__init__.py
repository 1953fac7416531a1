# SPDX-License-Identifier: Apache-2.0
"""The sources of objects: a directory of manifests, and the API of a cluster."""
