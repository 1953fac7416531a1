// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The program np_tc_learn: writes the addresses of an answer to np_learned4 and np_learned6, under the classes of the
// chain's names, and reports each address to the agent. An address in a refused range is neither written nor reported.
// A step enters one class into the row of one address. The program calls itself for further steps.
#pragma once

#include "np_dns.h"
#include "np_dns_records.h"
#include "np_table.h"

#define NP_DNS_LEARN_STEPS 64 // steps of one call
#define NP_DNS_LONGEST_S 604800 // a longer time to live counts as a week; arbitrary
#define NP_DNS_TOKENS 4096 // new rows that an endpoint may write until the next refill; arbitrary
#define NP_DNS_REFILL_S 60 // arbitrary
_Static_assert(NP_DNS_LEARN_STEPS *NP_DNS_LEARN_CALLS >= NP_DNS_ADDRESSES, "all addresses of a message");

// Take a token for a new row. Without this limit, an endpoint could evict the rows of all others.
NP_INLINE int np_dns_token(const struct np_ctx *ctx, struct np_asked *asked)
{
    __u64 now = ctx->arrival->now_jiffies;
    if (now - asked->refilled_jiffies >= (__u64)NP_DNS_REFILL_S * ctx->config->jiffies_per_second) {
        asked->refilled_jiffies = now;
        asked->tokens = NP_DNS_TOKENS;
    }
    if (!asked->tokens)
        return 0;
    asked->tokens--;
    return 1;
}

// Whether the address is in a range that is never learned: a range of np_unlearned, or IPv4-mapped addresses.
NP_INLINE void np_dns_refuse(struct np_dns *dns, const struct np_dns_address *one, const int version)
{
    union np_cidr_key *key = &dns->range_key; // in a map, so that the verifier sees the same state for each address
    if (version == 4) {
        key->v4.prefix_bits = 32;
        *(np_half *)key->v4.address = (__u32)one->address[0];
        dns->is_refused = np_is_unlearned(key, 4);
        return;
    }
    key->v6.prefix_bits = 128;
    *(np_word *)key->v6.address = one->address[0];
    *(np_word *)(key->v6.address + 8) = one->address[1];
    dns->is_refused = np_is_unlearned(key, 6);
    if (!one->address[0] && (__u32)one->address[1] == np_host32(0x0000ffff))
        dns->is_refused = 1;
}

NP_INLINE void np_dns_report(const struct np_ctx *ctx, const struct np_dns *dns, const struct np_dns_address *one)
{
    struct np_dns_event *event = np_dns_event_reserve();
    if (!event) {
        np_dns_count(ctx, NP_REASON_DNS_EVENT_LOST);
        return;
    }
    event->time_jiffies = ctx->arrival->now_jiffies;
    event->endpoint = ctx->ep->endpoint;
    event->ttl_s = one->ttl_s;
    event->name_class = dns->asked_class;
    event->ip_version = one->version;
    __builtin_memset(event->pad, 0, sizeof(event->pad));
    __builtin_memcpy(event->address, one->address, sizeof(event->address));
    __builtin_memcpy(event->server, ctx->packet->source, sizeof(event->server));
    np_copy_words(event->labels, dns->asked.labels, sizeof(event->labels));
    np_dns_event_submit(event);
}

// When an address expires, in units of NP_LEARNED_JIFFIES.
NP_INLINE __u32 np_dns_until(const struct np_ctx *ctx, __u32 ttl_s)
{
    const struct np_config *config = ctx->config;
    __u64 floor_s = config->name_floor_s;
    __u64 life_s = floor_s + ttl_s - np_lesser(floor_s, ttl_s); // the greater one
    life_s = np_lesser(life_s, NP_DNS_LONGEST_S) + config->name_extra_s;
    __u64 until = ctx->arrival->now_jiffies + life_s * config->jiffies_per_second;
    return (__u32)((until + NP_LEARNED_JIFFIES - 1) / NP_LEARNED_JIFFIES);
}

// Copy the address's row to dns->row. The kernel may give the memory of a row to another key at any time, so the copy
// counts only if the key still has the row after it was made.
NP_INLINE void np_dns_row_read(const struct np_ctx *ctx, struct np_dns *dns, const struct np_dns_address *one,
                               const int version)
{
    union np_learned_key *key = &dns->row_key;
    if (version == 4) {
        key->v4.endpoint = ctx->ep->endpoint;
        *(np_half *)key->v4.address = (__u32)one->address[0];
    } else {
        key->v6.endpoint = ctx->ep->endpoint;
        *(np_word *)key->v6.address = one->address[0];
        *(np_word *)(key->v6.address + 8) = one->address[1];
    }
    dns->is_known = 0;
    np_barrier();
    const struct np_learned *row = np_learned_lookup(key, version);
    if (!row)
        return;
    np_copy_words(&dns->row, row, sizeof(dns->row));
    np_barrier();
    dns->is_known = np_learned_lookup(key, version) == row;
}

// Enter the next class of the chain into dns->row: in place of the same class, of an unused or expired one, or of the
// first to expire. Of two expiries of the same class, the later one holds.
NP_INLINE void np_dns_merge(const struct np_ctx *ctx, struct np_dns *dns, const struct np_dns_address *one)
{
    struct np_learned *row = &dns->row;
    __u32 now = (__u32)(ctx->arrival->now_jiffies / NP_LEARNED_JIFFIES);
    __u32 class_way = dns->way & (NP_LEARNED_CLASSES - 1);
    __u32 name_class = dns->name_class[class_way];
    __u32 until = np_dns_until(ctx, (__u32)np_lesser(dns->class_ttl_s[class_way], one->ttl_s));
    __u64 least = ~0ull >> 1;
#pragma unroll
    for (__u32 way = 0; way < NP_LEARNED_CLASSES; way++) {
        __u64 is_other = np_is_nonzero(row->name_class[way] ^ name_class);
        __u64 left = (__u32)(row->until[way] - now);
        __u64 is_past = left >> 31;
        np_forget(is_past);
        __u64 worth = 1 + (left & -np_is_nonzero(row->name_class[way]) & (is_past - 1));
        least = np_lesser(least, (-is_other & worth) << 2 | way);
        np_barrier();
    }
    dns->is_full |= np_is_nonzero(least >> 3); // the worth is above 1: another class is replaced
    __u32 way = least & (NP_LEARNED_CLASSES - 1);
    np_forget(way); // keeps the bound below
    way &= NP_LEARNED_CLASSES - 1;
    __u64 later = (__u32)(row->until[way] - until); // how much later the row's expiry is, if bit 31 is 0
    __u64 is_earlier = later >> 31;
    __u64 is_same = np_is_nonzero(least >> 2) ^ 1;
    np_forget(is_earlier);
    np_forget(is_same);
    row->name_class[way] = name_class;
    row->until[way] = until + (__u32)(later & (is_earlier - 1) & -is_same);
}

// Begin with an address: report it, and prepare dns->row. Returns 0 if the address is not learned.
NP_INLINE int np_dns_learn_begin(const struct np_ctx *ctx, struct np_dns *dns, struct np_asked *asked,
                                 const struct np_dns_address *one)
{
    if (one->version == 4)
        np_dns_refuse(dns, one, 4);
    else
        np_dns_refuse(dns, one, 6);
    np_barrier();
    if (dns->is_refused) {
        np_dns_count(ctx, NP_REASON_DNS_REFUSED);
        return 0;
    }
    np_dns_report(ctx, dns, one);
    np_barrier();
    if (!dns->name_class[0])
        return 0;
    if (one->version == 4)
        np_dns_row_read(ctx, dns, one, 4);
    else
        np_dns_row_read(ctx, dns, one, 6);
    np_barrier();
    if (dns->is_known)
        return 1;
    np_zero_words(&dns->row, sizeof(dns->row));
    if (np_dns_token(ctx, asked))
        return 1;
    np_dns_count(ctx, NP_REASON_DNS_LIMITED);
    return 0;
}

// Replace the address's row by dns->row, as a whole, for the reason at np_dns_row_read.
NP_INLINE void np_dns_row_write(const struct np_ctx *ctx, struct np_dns *dns, const struct np_dns_address *one)
{
    if (one->version == 4)
        dns->is_known = !np_learned_update(&dns->row_key, &dns->row, 4);
    else
        dns->is_known = !np_learned_update(&dns->row_key, &dns->row, 6);
    np_barrier();
    np_dns_count(ctx, dns->is_known ? NP_REASON_DNS_LEARNED : NP_REASON_DNS_LIMITED);
}

NP_INLINE void np_dns_learn_step(const struct np_ctx *ctx, struct np_dns *dns, struct np_asked *asked)
{
    const struct np_dns_address *one = &dns->address[dns->learned & (NP_DNS_ADDRESSES - 1)];
    dns->is_refused = 0;
    if (!dns->way)
        dns->is_refused = !np_dns_learn_begin(ctx, dns, asked, one);
    np_barrier();
    if (!dns->is_refused) {
        np_dns_merge(ctx, dns, one);
        np_barrier();
        dns->way++;
        if (dns->way < NP_LEARNED_CLASSES && dns->name_class[dns->way & (NP_LEARNED_CLASSES - 1)])
            return;
        np_dns_row_write(ctx, dns, one);
    }
    dns->way = 0;
    dns->learned++;
}

NP_INLINE void np_dns_learn(struct __sk_buff *skb, const struct np_ctx *ctx, struct np_dns *dns)
{
    struct np_asked *asked = np_asked_lookup(ctx->ep->endpoint);
    if (!asked) // the agent has removed the row meanwhile
        return;
#pragma clang loop unroll(disable)
    for (__u32 step = 0; step < NP_DNS_LEARN_STEPS; step++) {
        np_forget(step); // otherwise the compiler counts by something else, which has no bound
        if (dns->learned >= dns->addresses)
            break;
        np_dns_learn_step(ctx, dns, asked);
        np_barrier();
    }
    np_barrier();
    if (dns->learned < dns->addresses) {
        np_dns_call(skb, ctx, NP_CALL_LEARN);
        return;
    }
    if (dns->is_full & 1)
        np_dns_count(ctx, NP_REASON_DNS_FULL);
    if (dns->is_full & 2)
        np_dns_count(ctx, NP_REASON_DNS_TOO_LONG);
    np_dns_following(skb, ctx, dns, NP_CALL_ANSWER);
}
