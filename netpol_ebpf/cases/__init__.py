# SPDX-License-Identifier: Apache-2.0
"""Case files: policies, probes and expected verdicts, run on the three engines."""
