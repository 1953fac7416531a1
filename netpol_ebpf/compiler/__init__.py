# SPDX-License-Identifier: Apache-2.0
"""From the policy model to the tables that give each packet its verdict in constant time."""
