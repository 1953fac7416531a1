# SPDX-License-Identifier: Apache-2.0
"""The life of the programs: compile, load, pin, attach, renew, upgrade, repair, remove."""
