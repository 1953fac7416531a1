// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Look-ups in the bucketed policy tables. All rows with the same hash are in one bucket of one or two cache lines. A
// look-up therefore fetches one bucket and compares at most five keys, whatever the size of the table. The agent writes
// the buckets with netpol_loader/tables/buckets.py, which must compute the same hashes.
//
// A look-up stores its result in the endpoint context, which is in a map. The verifier does not know values that were
// stored in a map. So it checks the code after a look-up once, and not once for each row of the bucket.
#pragma once

#include "np_ctx.h"
#include "np_maps.h"

NP_INLINE __u32 np_hash(__u64 value)
{
    return value * NP_HASH_MULTIPLIER >> 32;
}

NP_INLINE __u32 np_addr_hash(const __u32 *address, const int version)
{
    if (version == 4)
        return np_hash(address[0]);
    __u64 high = (__u64)address[1] << 32 | address[0];
    __u64 low = (__u64)address[3] << 32 | address[2];
    return np_hash(low ^ high * NP_HASH_MULTIPLIER);
}

// Whether the address may be one of the node or of a service. The result 0 is certain: neither np_local nor np_vip has
// the address.
NP_INLINE int np_vip_filter_has(const __u32 *address, const int version)
{
    __u32 hash = np_addr_hash(address, version);
    struct np_vip_filter *row = np_vip_filter_lookup(hash);
    return !row || row->bits >> (hash & 63) & 1;
}

NP_INLINE __u32 np_addr4_seek(struct np_addr *found, const __u32 *address)
{
    const struct np_addr4_bucket *bucket = np_addr4_bucket_lookup(np_addr_hash(address, 4));
    if (!bucket)
        return 0;
    __u32 used = bucket->used;
    np_barrier(); // `used` must be read before the rows
#pragma unroll
    for (int i = 0; i < NP_BUCKET_ROWS; i++) {
        __u32 key;
        __builtin_memcpy(&key, bucket->key[i].address, sizeof(key));
        if (key == address[0] && used >> i & 1) {
            np_copy_words(found, &bucket->row[i], sizeof(*found)); // one load copies both fields
            return 0;
        }
    }
    return used & NP_BUCKET_MORE;
}

NP_INLINE __u32 np_addr6_seek(struct np_addr *found, const __u32 *address)
{
    const struct np_addr6_bucket *bucket = np_addr6_bucket_lookup(np_addr_hash(address, 6));
    if (!bucket)
        return 0;
    __u32 used = bucket->used;
    np_barrier(); // `used` must be read before the rows
#pragma unroll
    for (int i = 0; i < NP_BUCKET_ROWS; i++) {
        __u32 key[4];
        __builtin_memcpy(key, bucket->key[i].address, sizeof(key));
        if (key[3] == address[3] && !((key[0] ^ address[0]) | (key[1] ^ address[1]) | (key[2] ^ address[2])) &&
            used >> i & 1) {
            np_copy_words(found, &bucket->row[i], sizeof(*found)); // one load copies both fields
            return 0;
        }
    }
    return used & NP_BUCKET_MORE;
}

// The row of an address. If the address has no row, the result has identity 0. The result is valid until the next call.
NP_INLINE const struct np_addr *np_addr_find(struct np_ctx *ctx, const __u32 *address, const int version)
{
    struct np_addr *found = &ctx->ep->addr;
    *found = (struct np_addr){};
    if (NP_UNLIKELY(version == 4 ? np_addr4_seek(found, address) : np_addr6_seek(found, address))) {
        union np_addr_key key;
        __builtin_memcpy(&key, address, version == 4 ? sizeof(key.v4) : sizeof(key.v6));
        const struct np_addr *row = np_addr_more_lookup(&key, version);
        if (row)
            *found = *row;
    }
    np_barrier();
    return found;
}

// The class of an identity in its bucket, or NP_CLASS_NONE. Sets `more` to nonzero if the overflow map may have the
// class.
NP_INLINE __u32 np_class_seek(const struct np_peer_bucket *bucket, __u32 set, __u32 block, __u32 index, __u32 *more)
{
    np_forget(index); // keeps the compiler from removing the bound, which the verifier needs
    index &= 31; // for index 31 of line 1, the read is still within the bucket
#pragma unroll
    for (int i = 0; i < NP_BUCKET_LINES; i++) {
        __u32 owner = bucket->line[i].set;
        np_barrier(); // read `set` first: the agent writes it last, which makes the line valid
        if (owner == set && bucket->line[i].block == block)
            return bucket->line[i].peer_class[index];
    }
    *more = bucket->line[0].flags & NP_BUCKET_MORE;
    return NP_CLASS_NONE;
}

// The peer class of an identity in policy set `set`; `default_class` if the set has no class for the identity.
NP_INLINE __u32 np_class_of(struct np_ctx *ctx, __u32 set, __u32 identity, __u32 default_class)
{
    __u32 *found = &ctx->ep->class;
    __u32 more = 0;
    __u32 block = identity / NP_LINE_CLASSES;
    __u32 index = identity - block * NP_LINE_CLASSES;
    const struct np_peer_bucket *bucket = np_peer_bucket_lookup(np_hash((__u64)block << 32 | set));
    *found = bucket ? np_class_seek(bucket, set, block, index, &more) : NP_CLASS_NONE;
    if (NP_UNLIKELY(more)) {
        struct np_peer_class_key key = {.set = set, .identity = identity};
        const struct np_peer_class *row = np_peer_more_lookup(&key);
        if (row)
            *found = row->peer_class;
    }
    np_barrier();
    return *found == NP_CLASS_NONE ? default_class : *found;
}
