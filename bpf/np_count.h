// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Counters for each rule and each reason. The counters are per CPU, so they need no atomic operations. No verdict
// depends on a counter.
#pragma once

#include "np_maps.h"

NP_INLINE void np_count_add(struct np_count *count, __u32 bytes)
{
    count->packets++;
    count->bytes += bytes;
}

NP_INLINE void np_count_reason(__u32 reason, __u32 bytes)
{
    struct np_count *count = np_reason_count_lookup(reason);
    if (count) // always true: every reason is below NP_REASON_COUNT
        np_count_add(count, bytes);
}

NP_INLINE void np_count_rule(__u32 rule, __u32 bytes)
{
    struct np_count *count = np_rule_count_lookup(rule);
    if (NP_LIKELY(count))
        np_count_add(count, bytes);
    else
        np_count_reason(NP_REASON_RULE_RANGE, bytes);
}

// Count a packet that policy judged, for the rule that would decide if staged policies were enforced.
NP_INLINE void np_count_staged(__u32 rule, __u32 bytes)
{
    struct np_count *count = np_staged_count_lookup(rule);
    if (NP_LIKELY(count))
        np_count_add(count, bytes);
    else
        np_count_reason(NP_REASON_RULE_RANGE, bytes);
}
