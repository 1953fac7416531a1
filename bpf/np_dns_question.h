// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The program np_tc_question: an endpoint sends a question to a DNS server. If the endpoint has rules with domain names
// and the server is trusted, the program records the question as pending. A question that it cannot read is not
// recorded, so its answer teaches nothing.
#pragma once

#include "np_dns.h"
#include "np_table.h"

// Record a question, in place of the same question, of a free slot, or of the oldest one.
NP_INLINE void np_dns_ask(struct np_asked *asked, struct np_dns *dns, __u64 pending)
{
    __u32 first = np_dns_slots_of(pending);
    __u64 least = ~0ull >> 1;
#pragma unroll
    for (__u32 way = 0; way < NP_ASKED_WAYS; way++) {
        __u64 slot = asked->slot[first + way];
        __u64 is_other = np_is_nonzero((slot ^ pending) >> 16);
        __u64 worth = 1 + (-np_is_nonzero(slot) & (1 + 0xffff - np_dns_age(pending, slot)));
        least = np_lesser(least, (-is_other & worth) << 2 | way);
        np_barrier();
    }
    dns->slot = first + (least & (NP_ASKED_WAYS - 1));
    np_barrier();
    asked->slot[dns->slot & (NP_ASKED_SLOTS - 1)] = pending;
}

NP_INLINE void np_dns_question(struct __sk_buff *skb, const struct np_ctx *ctx, struct np_dns *dns)
{
    struct np_asked *asked = np_asked_lookup(ctx->ep->endpoint);
    if (!asked || ctx->packet->fragment != NP_FRAGMENT_WHOLE || !np_dns_is_trusted(ctx, 0))
        return;
    np_barrier();
    if (!np_dns_load(skb, ctx, dns) || !np_dns_question_find(dns, 0) || dns->stated_bytes > dns->message_bytes)
        return;
    np_barrier();
    __u64 pending = np_dns_pending(skb, ctx, dns, 0);
    if (pending)
        np_dns_ask(asked, dns, pending);
    np_barrier();
    np_dns_following(skb, ctx, dns, NP_CALL_QUESTION);
}
