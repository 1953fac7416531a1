# SPDX-License-Identifier: Apache-2.0
"""From C sources to programs in force: compile, load, pin, attach, renew, upgrade, repair, remove."""
