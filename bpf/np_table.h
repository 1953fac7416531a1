// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The connection table (conntrack): buckets of eight slots. A slot is a tag and an entry. The eight tags of a bucket
// fill one cache line. They are in another map than the entries, so that the tags of all buckets fit into the CPU's
// cache. A look-up reads a bucket's tags and one entry; a new flow writes one entry.
//
// A new connection takes a free or expired slot. If there is none, it evicts the connection of the lowest worth: a
// closed one first, then an unreplied one, then an established one; of several, the one that expires first. So the
// table needs neither a list nor garbage collection, and a flood of new flows evicts unreplied connections. If all
// eight connections are established, the new one evicts the one that expires first. As the new one is unreplied, the
// next new connection evicts it in turn.
//
// Invariants.
// 1. Only one CPU writes a new entry: it first reserves the slot, by a compare-and-swap that gives the tag the rank
//    NONE.
// 2. The program reads an entry only if the tag of its slot has the hash of the key.
// 3. The time and rank of a tag serve only eviction. The entry decides whether the connection is alive.
//
// np_ct_probe stores its results in the endpoint context, which is in a map. The verifier does not know values that
// were stored in a map. So it checks the code after the look-up once, and not once for each slot in which the
// connection may be.
#pragma once

#include "np_count.h"
#include "np_ctx.h"
#include "np_maps.h"

#define NP_TAG_WHO 0xffffffff80000000ull // hash and unreplied bit: what identifies the connection
#define NP_TAG_TIME_MASK ((1u << NP_TAG_TIME_BITS) - 1)
#define NP_WORTH_OWNED (~0ull >> 4) // greater than the worth of any connection

// A slot of a bucket.
struct np_ct_slot {
    struct np_conn *conn; // the connection in the slot; NULL: there is no slot
    __u64 *tag;
};

NP_INLINE __u32 np_key_words(const int version)
{
    return (version == 4 ? sizeof(struct np_conn4_key) : sizeof(struct np_conn6_key)) / sizeof(np_half);
}

// The lesser of two numbers below 2^63. The computation has no branch, because the verifier would follow both branches
// for each of the eight slots.
NP_INLINE __u64 np_lesser(__u64 one, __u64 other)
{
    long long more = other - one;
    np_forget(more);
    return one + (more & more >> 63);
}

// 0 if the number is 0, otherwise 1. The computation has no branch, for the reason at np_lesser.
NP_INLINE __u64 np_is_nonzero(__u64 number)
{
    np_forget(number);
    __u64 sign = number | -number;
    np_forget(sign);
    return sign >> 63;
}

NP_INLINE __u32 np_tag_time(__u64 jiffies)
{
    return jiffies / NP_TAG_JIFFIES & NP_TAG_TIME_MASK;
}

// When a connection in this state expires if no further packet arrives, in units of NP_TAG_JIFFIES.
NP_INLINE __u64 np_tag_expiry(const struct np_ctx *ctx, __u32 state)
{
    __u64 units = ctx->config->timeout_jiffies[state & (NP_CONN_STATES - 1)] / NP_TAG_JIFFIES;
    if (units > NP_TAG_TIME_MASK / 2)
        units = NP_TAG_TIME_MASK / 2;
    return (np_tag_time(ctx->arrival->now_jiffies) + units) & NP_TAG_TIME_MASK;
}

// The worth of a slot; the slot of the lowest worth is taken. 0: free; 1: expired; NP_WORTH_OWNED: reserved. The
// computation has no branch, for the reason at np_lesser.
NP_INLINE __u64 np_tag_worth(__u64 tag, __u32 now)
{
    __u64 rank = tag & NP_TAG_RANK_MASK;
    __u64 left = (((__u32)tag >> NP_TAG_TIME_SHIFT) - now) & NP_TAG_TIME_MASK;
    __u64 is_past = left >> (NP_TAG_TIME_BITS - 1);
    __u64 is_owned = (rank - 1) >> 63 & ~is_past;
    __u64 is_used = (tag | -tag) >> 63;
    np_forget(is_past); // like the next two lines, keeps the compiler from making branches
    np_forget(is_owned);
    np_forget(is_used);
    __u64 worth = rank << NP_TAG_TIME_BITS | left | (-is_owned & NP_WORTH_OWNED);
    return ((worth & (is_past - 1)) | is_past) & -is_used;
}

// Find the slots with the key's hash: one of an established connection, one of an unreplied connection. A slot number
// of NP_CONN_WAYS or more means that there is none. If two keys of one bucket have the same hash, only one of them is
// found. Policy then judges each packet of the other connection, which is slow but correct.
NP_INLINE void np_ct_probe(const struct np_ctx *ctx, const union np_conn_key *key, const int version)
{
    struct np_endpoint_ctx *ep = ctx->ep;
    ep->established_slot = ep->unreplied_slot = NP_CONN_WAYS;
    const struct np_secret *secret = np_secret_lookup();
    if (!secret) // cannot happen: an array always has its row
        return;
    __u64 sum = secret->number[NP_HASH_WORDS - 1];
    // a multilinear hash: its high half is as good as random
#pragma unroll
    for (__u32 word = 0; word < np_key_words(version); word++)
        sum += secret->number[word] * ((const np_half *)key)[word];
    __u32 hash = (__u32)(sum >> 32) | NP_HASH_BIT;
    const struct np_conn_tags *tags = np_conn_tags_lookup(hash, version);
    ep->hash = hash;
    if (!tags)
        return;
    __u64 open = NP_CONN_WAYS;
    __u64 unreplied = NP_CONN_WAYS;
#pragma unroll
    for (int way = 0; way < NP_CONN_WAYS; way++) {
        __u64 other = (tags->tag[way] >> 31 ^ (__u64)hash << 1) << 3 |
                      way; // with this hash, below 8: an established connection; 8 to 15: an unreplied one
        open = np_lesser(open, other);
        unreplied = np_lesser(unreplied, other ^ NP_CONN_WAYS);
        np_barrier(); // otherwise the compiler loads all tags at once, which needs more registers than there are
    }
    ep->established_slot = (__u32)open;
    ep->unreplied_slot = (__u32)unreplied;
    np_barrier();
}

// Slot `way` of the bucket, free or not.
NP_INLINE struct np_ct_slot np_ct_slot_at(const struct np_ctx *ctx, __u32 way, const int version)
{
    struct np_ct_slot slot = {};
    struct np_conn_tags *tags = np_conn_tags_lookup(ctx->ep->hash, version);
    if (!tags)
        return slot;
    np_forget(way); // keeps the compiler from removing the bound, which the verifier needs
    way &= NP_CONN_WAYS - 1;
    np_forget(tags); // otherwise the compiler adds to the pointer before the NULL check
    slot.tag = &tags->tag[way];
    slot.conn = np_conn_lookup(ctx->ep->hash, way, version);
    return slot;
}

// Address of the key in the entry of a slot.
NP_INLINE void *np_ct_slot_key(const struct np_ct_slot *slot, const int version)
{
    return (void *)slot->conn - (version == 4 ? __builtin_offsetof(struct np_conn4_entry, conn)
                                              : __builtin_offsetof(struct np_conn6_entry, conn));
}

// The name class in the entry of a slot. It is directly after the key.
NP_INLINE __u32 *np_ct_slot_name_class(const struct np_ct_slot *slot, const int version)
{
    _Static_assert(__builtin_offsetof(struct np_conn4_entry, name_class) == sizeof(struct np_conn4_key),
                   "after the key");
    _Static_assert(__builtin_offsetof(struct np_conn6_entry, name_class) == sizeof(struct np_conn6_key),
                   "after the key");
    return (__u32 *)np_ct_slot_key(slot, version) + np_key_words(version);
}

// The slot that np_ct_probe found, if the slot's entry has this key; otherwise no slot. `unreplied`: whether to take
// the slot of an unreplied connection.
NP_INLINE struct np_ct_slot np_ct_lookup(const struct np_ctx *ctx, const union np_conn_key *key, int unreplied,
                                         const int version)
{
    const struct np_ct_slot none = {};
    __u32 way = unreplied ? ctx->ep->unreplied_slot : ctx->ep->established_slot;
    if (way >= NP_CONN_WAYS)
        return none;
    struct np_ct_slot slot = np_ct_slot_at(ctx, way, version);
    if (!slot.conn)
        return none;
    const np_half *stored = np_ct_slot_key(&slot, version);
    __u32 other = 0;
#pragma unroll
    for (__u32 word = 0; word < np_key_words(version); word++) {
        __u32 differs = stored[word] ^ ((const np_half *)key)[word];
        np_forget(differs); // otherwise the compiler makes a branch for each word
        other |= differs;
    }
    if (other)
        slot.conn = 0;
    np_forget(slot.conn); // verifiers before Linux 6.8 lose track if slot.tag is set to NULL too
    return slot;
}

// Whether the slot still has the connection that np_ct_lookup found. `read`: a value that was computed from the entry,
// so that the CPU reads the tag after the entry.
NP_INLINE int np_ct_slot_is_kept(const struct np_ct_slot *slot, __u32 read, int unreplied, const struct np_ctx *ctx)
{
    const __u64 *tag = np_load_after((const __u64 *)slot->tag, read);
    return *tag >> 31 == ((__u64)ctx->ep->hash << 1 | (unreplied ? 1 : 0));
}

// Update the time and rank of a tag, but not its hash: if another connection has taken the slot meanwhile, only the
// time of that connection's tag is wrong. If another CPU changes the tag at the same moment, the change of that CPU
// remains.
NP_INLINE void np_ct_refresh(const struct np_ct_slot *slot, int unreplied, const struct np_ctx *ctx)
{
    __u32 state = slot->conn->state;
    __u64 expires = np_tag_expiry(ctx, state);
    __u64 rank = unreplied ? NP_RANK_UNREPLIED : NP_RANK_ESTABLISHED;
    if (state == NP_CONN_TCP_CLOSING || state == NP_CONN_TCP_RESET)
        rank = NP_RANK_CLOSED;
    __u64 was = *slot->tag;
    __u64 who = was & NP_TAG_WHO & ~NP_TAG_UNREPLIED;
    if (was & NP_TAG_RANK_MASK)
        __sync_val_compare_and_swap(slot->tag, was,
                                    who | (unreplied ? NP_TAG_UNREPLIED : 0) | expires << NP_TAG_TIME_SHIFT | rank);
}

NP_INLINE void np_ct_release(const struct np_ct_slot *slot)
{
    __u64 was = *slot->tag;
    if (was & NP_TAG_RANK_MASK)
        __sync_val_compare_and_swap(slot->tag, was, 0);
}

// Reserve a slot for an unreplied connection: the slot that np_ct_probe found, otherwise the one of the lowest worth.
// The result has no slot if another CPU has reserved it.
NP_INLINE struct np_ct_slot np_ct_reserve(const struct np_ctx *ctx, const int version)
{
    struct np_ct_slot slot = {};
    const struct np_conn_tags *tags = np_conn_tags_lookup(ctx->ep->hash, version);
    if (!tags)
        return slot;
    __u32 now = np_tag_time(ctx->arrival->now_jiffies);
    if (ctx->ep->unreplied_slot >= NP_CONN_WAYS) {
        __u64 least = NP_WORTH_OWNED << 3;
#pragma unroll
        for (int way = 0; way < NP_CONN_WAYS; way++) {
            least = np_lesser(least, np_tag_worth(tags->tag[way], now) << 3 | way);
            np_barrier();
        }
        ctx->ep->unreplied_slot = least & (NP_CONN_WAYS - 1);
    }
    np_barrier();
    __u64 owned = (__u64)((now + NP_TAG_OWNED_UNITS) & NP_TAG_TIME_MASK) << NP_TAG_TIME_SHIFT | NP_RANK_NONE;
    slot = np_ct_slot_at(ctx, ctx->ep->unreplied_slot, version);
    if (!slot.conn)
        return slot;
    __u64 was = *slot.tag;
    __u64 worth = np_tag_worth(was, now);
    if (worth == NP_WORTH_OWNED || __sync_val_compare_and_swap(slot.tag, was, owned) != was)
        slot.conn = 0;
    else if (worth >> NP_TAG_TIME_BITS == NP_RANK_ESTABLISHED)
        np_count_reason(NP_REASON_CONN_EVICTED, ctx->arrival->frame_bytes);
    return slot;
}

// Make the entry in the reserved slot valid by storing the slot's tag. On a strongly ordered CPU this is a plain store,
// which does not wait for the cache line of the entry.
NP_INLINE void np_ct_commit(const struct np_ct_slot *slot, const struct np_ctx *ctx)
{
    __u64 expires = np_tag_expiry(ctx, slot->conn->state);
    np_store_last(slot->tag, (__u64)ctx->ep->hash << NP_TAG_HASH_SHIFT | NP_TAG_UNREPLIED |
                                 expires << NP_TAG_TIME_SHIFT | NP_RANK_UNREPLIED);
}
