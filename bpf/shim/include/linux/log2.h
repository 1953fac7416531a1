// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Empty: BCC includes it, nothing here needs it.
