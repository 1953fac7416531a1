# SPDX-License-Identifier: Apache-2.0
"""Case files: unit tests of policies, and the project's own conformance set."""
