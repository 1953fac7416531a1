# SPDX-License-Identifier: Apache-2.0
"""The internal policy model, and the translation of every policy kind into this model."""
