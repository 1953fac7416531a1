# SPDX-License-Identifier: Apache-2.0
"""Where objects come from: a directory of manifests, later the API server."""
