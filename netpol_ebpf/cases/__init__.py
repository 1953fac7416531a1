# SPDX-License-Identifier: Apache-2.0
"""Case files: test cases for policies. Users test their policies with them; the project tests its engines with them."""
