// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The connection table: buckets of eight, whose tags lie in one cache line, apart from the connections, so that the
// tags of all buckets stay near the processor.  A look-up reads a bucket's tags and one entry; a new flow writes one. A
// new connection takes the place that is free, else the one whose tag says that least is lost with it: first what is
// closed, then what is unreplied, then what is established, and of these what expires first.  So there is no list to
// keep, nothing to collect, and a flood of new flows evicts unreplied ones; only where all eight are open does the one
// go that was silent longest, and then it is the newcomer's place that is taken next.
//
// Invariants.  A place is owned by whoever puts a tag of rank NONE into it by compare-and-swap, until the entry is
// written.  An entry is read only behind a tag of its key's hash.  A tag's time and rank serve the choice of what goes;
// whether a connection is alive its entry says.
//
// What was found goes through the leg, which is in a map, as in np_bucket.h.
#pragma once

#include "np_count.h"
#include "np_ctx.h"
#include "np_maps.h"

#define NP_TAG_WHO 0xffffffff80000000ull // the part that does not change with time
#define NP_TAG_TIME_MASK ((1u << NP_TAG_TIME_BITS) - 1)
#define NP_WORTH_OWNED (~0ull >> 4) // more than any connection's

// A connection in its place.
struct np_ct_slot {
    struct np_conn *conn; // NULL: there is none
    __u64 *tag;
};

NP_INLINE __u32 np_key_words(const int version)
{
    return (version == 4 ? sizeof(struct np_conn4_key) : sizeof(struct np_conn6_key)) / sizeof(np_half);
}

// The lesser of two numbers below 2^63.  Without a branch: the verifier would go both ways at each place of a bucket.
NP_INLINE __u64 np_lesser(__u64 one, __u64 other)
{
    long long more = other - one;
    np_forget(more);
    return one + (more & more >> 63);
}

NP_INLINE __u32 np_tag_time(__u64 jiffies)
{
    return jiffies / NP_TAG_JIFFIES & NP_TAG_TIME_MASK;
}

// When a connection in this state expires, as far as a tag can tell.
NP_INLINE __u64 np_tag_expiry(const struct np_ctx *ctx, __u32 state)
{
    __u64 units = ctx->config->timeout_jiffies[state & (NP_CONN_STATES - 1)] / NP_TAG_JIFFIES;
    if (units > NP_TAG_TIME_MASK / 2)
        units = NP_TAG_TIME_MASK / 2;
    return (np_tag_time(ctx->arrival->now_jiffies) + units) & NP_TAG_TIME_MASK;
}

// What is lost when a place is taken: 0 free, 1 its time is past, NP_WORTH_OWNED it is being written.  Without a
// branch, as np_lesser.
NP_INLINE __u64 np_tag_worth(__u64 tag, __u32 now)
{
    __u64 rank = tag & NP_TAG_RANK_MASK;
    __u64 left = (((__u32)tag >> NP_TAG_TIME_SHIFT) - now) & NP_TAG_TIME_MASK;
    __u64 is_past = left >> (NP_TAG_TIME_BITS - 1);
    __u64 is_owned = (rank - 1) >> 63 & ~is_past;
    __u64 is_used = (tag | -tag) >> 63;
    np_forget(is_past); // the compiler would rather have branches
    np_forget(is_owned);
    np_forget(is_used);
    __u64 worth = rank << NP_TAG_TIME_BITS | left | (-is_owned & NP_WORTH_OWNED);
    return ((worth & (is_past - 1)) | is_past) & -is_used;
}

// Where a connection stands, in both of its forms: the bucket's hash, and the places in it; NP_CONN_WAYS or more: none.
// A place at most has a hash: a second key with it is not found, and judged anew with each packet, which does no harm.
NP_INLINE void np_ct_probe(const struct np_ctx *ctx, const union np_conn_key *key, const int version)
{
    struct np_endpoint_ctx *ep = ctx->ep;
    ep->established_slot = ep->unreplied_slot = NP_CONN_WAYS;
    const struct np_secret *secret = np_secret_lookup();
    if (!secret) // never: there is one row
        return;
    __u64 sum = secret->number[NP_HASH_WORDS - 1];
#pragma unroll
    for (__u32 word = 0; word < np_key_words(version); word++)
        sum += secret->number[word] * ((const np_half *)key)[word]; // multilinear: the upper half is as good as random
    __u32 hash = (__u32)(sum >> 32) | NP_HASH_BIT;
    const struct np_conn_tags *tags = np_conn_tags_lookup(hash, version);
    ep->hash = hash;
    if (!tags)
        return;
    __u64 open = NP_CONN_WAYS;
    __u64 unreplied = NP_CONN_WAYS;
#pragma unroll
    for (int place = 0; place < NP_CONN_WAYS; place++) {
        __u64 other = (tags->tag[place] >> 31 ^ (__u64)hash << 1) << 3 |
                      place; // only `place`: it is; 8 more: as an unreplied one
        open = np_lesser(open, other);
        unreplied = np_lesser(unreplied, other ^ NP_CONN_WAYS);
        np_barrier(); // else the compiler reads all tags at once, into more registers than there are
    }
    ep->established_slot = (__u32)open;
    ep->unreplied_slot = (__u32)unreplied;
    np_barrier();
}

// A place of the bucket, whatever is there.
NP_INLINE struct np_ct_slot np_ct_slot_at(const struct np_ctx *ctx, __u32 place, const int version)
{
    struct np_ct_slot slot = {};
    struct np_conn_tags *tags = np_conn_tags_lookup(ctx->ep->hash, version);
    if (!tags)
        return slot;
    np_forget(place); // the compiler may know its range, the verifier has to be shown one
    place &= NP_CONN_WAYS - 1;
    np_forget(tags); // else the compiler adds to it before it looks whether it is there
    slot.tag = &tags->tag[place];
    slot.conn = np_conn_lookup(ctx->ep->hash, place, version);
    return slot;
}

// Where an entry keeps its key.
NP_INLINE void *np_ct_slot_key(const struct np_ct_slot *slot, const int version)
{
    return (void *)slot->conn - (version == 4 ? __builtin_offsetof(struct np_conn4_entry, conn)
                                              : __builtin_offsetof(struct np_conn6_entry, conn));
}

// What np_ct_probe found, if it is still there. `unreplied`: in that form.
NP_INLINE struct np_ct_slot np_ct_lookup(const struct np_ctx *ctx, const union np_conn_key *key, int unreplied,
                                         const int version)
{
    const struct np_ct_slot none = {};
    __u32 place = unreplied ? ctx->ep->unreplied_slot : ctx->ep->established_slot;
    if (place >= NP_CONN_WAYS)
        return none;
    struct np_ct_slot slot = np_ct_slot_at(ctx, place, version);
    if (!slot.conn)
        return none;
    const np_half *stored = np_ct_slot_key(&slot, version);
    __u32 other = 0;
#pragma unroll
    for (__u32 word = 0; word < np_key_words(version); word++) {
        __u32 differs = stored[word] ^ ((const np_half *)key)[word];
        np_forget(differs); // else the compiler makes a branch of each word
        other |= differs;
    }
    if (other)
        slot.conn = 0;
    np_forget(slot.conn); // one value to test; verifiers before 6.8 lose track when the tag is dropped with it
    return slot;
}

// Whether a slot is still that of the connection that np_ct_lookup found.  `read`: made of what was read of the entry,
// so that the tag is read after that.
NP_INLINE int np_ct_slot_is_kept(const struct np_ct_slot *slot, __u32 read, int unreplied, const struct np_ctx *ctx)
{
    const __u64 *tag = np_load_after((const __u64 *)slot->tag, read);
    return *tag >> 31 == ((__u64)ctx->ep->hash << 1 | (unreplied ? 1 : 0));
}

// Let the tag say what became of the connection.  Whose it is stays: if another took the place meanwhile, nothing is
// lost but its time.  When another CPU changes the tag at this moment, that one's word counts.
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

// Own a place for an unreplied connection: the one that np_ct_probe found, else the one that is worth least.  No slot:
// others were writing wherever it looked.
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
        for (int place = 0; place < NP_CONN_WAYS; place++) {
            least = np_lesser(least, np_tag_worth(tags->tag[place], now) << 3 | place);
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

// The owned connection is written: let everybody see it.  Where the processor keeps the order of stores that is a plain
// one, which need not wait until the entry's line has come.
NP_INLINE void np_ct_commit(const struct np_ct_slot *slot, const struct np_ctx *ctx)
{
    __u64 expires = np_tag_expiry(ctx, slot->conn->state);
    np_store_last(slot->tag, (__u64)ctx->ep->hash << NP_TAG_HASH_SHIFT | NP_TAG_UNREPLIED |
                                 expires << NP_TAG_TIME_SHIFT | NP_RANK_UNREPLIED);
}
