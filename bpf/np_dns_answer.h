// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The program np_tc_answer: a DNS server sends an answer to an endpoint. The program accepts the answer if the server
// is trusted and if the endpoint has asked the same question: server, ports, protocol, id, name with its case, type and
// class. The first answer ends the question.
#pragma once

#include "np_dns.h"
#include "np_dns_cut.h"

// End the pending question of the message. Returns 0 if there is none.
NP_INLINE int np_dns_settle(struct np_asked *asked, struct np_dns *dns, const struct np_ctx *ctx, __u64 now)
{
    __u32 first = np_dns_slots_of(now);
    __u64 longest = (__u64)NP_DNS_PENDING_S * ctx->config->jiffies_per_second / NP_LEARNED_JIFFIES + 1;
    dns->slot = NP_ASKED_SLOTS;
#pragma unroll
    for (__u32 way = 0; way < NP_ASKED_WAYS; way++) {
        __u64 slot = asked->slot[first + way];
        if (!((slot ^ now) >> 16) && np_dns_age(now, slot) <= longest) {
            dns->slot = first + way;
            dns->pending = slot;
        }
        np_barrier();
    }
    if (dns->slot >= NP_ASKED_SLOTS)
        return 0;
    asked->slot[dns->slot & (NP_ASKED_SLOTS - 1)] = 0;
    return 1;
}

// An answer to a pending question that the program cannot read. Returns NP_REASON_NONE, or the reason to drop the
// packet. In that case the question stays pending, so that a copy of the answer is dropped too.
NP_INLINE int np_dns_unread(const struct np_ctx *ctx, const struct np_dns *dns, __u32 reason)
{
    np_dns_count(ctx, reason);
    if (ctx->config->unread_dns != NP_UNREAD_DNS_DROP)
        return NP_REASON_NONE;
    struct np_asked *asked = np_asked_lookup(ctx->ep->endpoint);
    if (asked)
        asked->slot[dns->slot & (NP_ASKED_SLOTS - 1)] = dns->pending;
    return NP_REASON_DNS_UNREAD;
}

// Prepare np_tc_records. It reads the name of the question first.
NP_INLINE void np_dns_records_begin(struct np_dns *dns)
{
    dns->result = NP_DNS_RUNNING;
    dns->kind = NP_DNS_NAME_QUESTION;
    dns->at = dns->start = dns->lowest = dns->current_at = NP_DNS_HEADER_BYTES;
    dns->limit = dns->message_bytes;
    dns->name_at = NP_NAME_BYTES - 1;
    dns->name[NP_NAME_BYTES - 1] = 0;
    dns->pointers = dns->targets = dns->addresses = dns->learned = dns->asked_class = dns->is_full = 0;
    np_zero_words(dns->name_class, sizeof(dns->name_class));
    np_zero_words(dns->class_ttl_s, sizeof(dns->class_ttl_s));
}

// Returns NP_REASON_NONE, or the reason to drop the packet.
NP_INLINE int np_dns_answer(struct __sk_buff *skb, const struct np_ctx *ctx, struct np_dns *dns)
{
    const struct np_packet *packet = ctx->packet;
    struct np_asked *asked = np_asked_lookup(ctx->ep->endpoint);
    if (!asked || !np_dns_is_trusted(ctx, 1))
        return NP_REASON_NONE;
    np_barrier();
    if (packet->fragment == NP_FRAGMENT_LATER)
        return np_dns_is_cut(packet) ? NP_REASON_DNS_FRAGMENT : NP_REASON_NONE;
    if (ctx->arrival->dns_calls == 1 && packet->end == (__u32)packet->l4_offset + packet->l4_bytes)
        return NP_REASON_NONE; // a TCP segment without data
    if (!np_dns_load(skb, ctx, dns) || !np_dns_question_find(dns, 1)) {
        np_dns_count(ctx, NP_REASON_DNS_MALFORMED);
        return NP_REASON_NONE;
    }
    np_barrier();
    __u64 now = np_dns_pending(skb, ctx, dns, 1);
    if (!now || !np_dns_settle(asked, dns, ctx, now)) {
        np_dns_count(ctx, NP_REASON_DNS_NOT_ASKED);
        np_dns_following(skb, ctx, dns, NP_CALL_ANSWER);
        return NP_REASON_NONE;
    }
    np_barrier();
    if (packet->fragment == NP_FRAGMENT_FIRST && packet->protocol == NP_PROTOCOL_UDP) {
        np_dns_cut(skb, ctx, dns);
        return NP_REASON_NONE;
    }
    if (dns->stated_bytes > dns->message_bytes)
        return np_dns_unread(ctx, dns, NP_REASON_DNS_TOO_LONG);
    if (dns->flags & NP_DNS_RCODE || !dns->records_left) {
        np_dns_following(skb, ctx, dns, NP_CALL_ANSWER);
        return NP_REASON_NONE;
    }
    np_dns_records_begin(dns);
    np_dns_call(skb, ctx, NP_CALL_RECORDS);
    return NP_REASON_NONE;
}
