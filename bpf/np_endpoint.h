// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Whose packet it is: from the interface to the endpoint, and whether a workload owns the address it sends from.
#pragma once

#include "np_flow.h"
#include "np_maps.h"

#define NP_ENDPOINT_TRIES 4 // a row is replaced at most once in the time of a few reads; arbitrary beyond that

// The row's number, flags and one of its policy sets, copied.
struct np_owner {
    __u32 number;
    __u32 flags;
    struct np_set set;
};

NP_INLINE __u32 np_fold(__u32 value, __u32 word)
{
    return (value ^ word) * NP_CHECK_PRIME;
}

// Two fields of 16 bits as the one word that they are.
NP_INLINE __u32 np_halves(__u16 low, __u16 high)
{
    return (__u32)high << 16 | low;
}

// The check word of a set, as seal_endpoint() of the loader computes it.
NP_INLINE __u32 np_owner_check(const struct np_owner *owner, __u32 ifindex)
{
    const struct np_set *set = &owner->set;
    __u32 value = NP_CHECK_SEED;
    value = np_fold(value, owner->number);
    value = np_fold(value, ifindex);
    value = np_fold(value, owner->flags);
    value = np_fold(value, set->number);
    value = np_fold(value, np_halves(set->default_class4, set->default_class6));
    value = np_fold(value, set->peer_classes);
    value = np_fold(value, set->own_set);
    value = np_fold(value, np_halves(set->own_default_class4, set->own_default_class6));
    value = np_fold(value, set->own_classes);
    value = np_fold(value, set->l4_base);
    value = np_fold(value, set->l4_classes);
    value = np_fold(value, set->source_base);
    value = np_fold(value, set->source_classes);
    return np_fold(value, set->verdict_base);
}

// Copy the row of an interface with the set of one direction.  The kernel may give a replaced element's memory to
// another row while we read it (preallocated or not, since 6.1); the check word tells (NP_REASON_TORN_ENDPOINT), and
// the row is to be looked up again.
NP_INLINE int np_owner_read(__u32 ifindex, __u8 direction, struct np_owner *owner)
{
    struct np_endpoint *row = np_endpoint_lookup(ifindex);
    if (!row)
        return NP_REASON_UNKNOWN_ENDPOINT;
    owner->number = row->number;
    owner->flags = row->flags;
    owner->set = direction == NP_DIRECTION_EGRESS ? row->egress : row->ingress;
    np_keep_in_memory(owner); // and what was read may not be read again
    return np_owner_check(owner, ifindex) == owner->set.check ? NP_REASON_NONE : NP_REASON_TORN_ENDPOINT;
}

// The same for one set of a host endpoint. NP_REASON_CONTINUE: it has none, so no opinion.
NP_INLINE int np_host_read(__u32 number, __u32 index, struct np_owner *owner)
{
    struct np_host *row = np_host_lookup(number);
    if (!row)
        return NP_REASON_UNKNOWN_ENDPOINT;
    index &= NP_HOST_SETS - 1;
    __u32 present = row->present;
    owner->number = row->number;
    owner->flags = row->version;
    owner->set = row->sets[index];
    np_keep_in_memory(owner); // and what was read may not be read again
    if (np_owner_check(owner, index | present << 8) != owner->set.check)
        return NP_REASON_TORN_ENDPOINT;
    return present >> index & 1 ? NP_REASON_NONE : NP_REASON_CONTINUE;
}

// Number and flags of the interface's endpoint, from np_near or, once per CPU and generation, from the row.
NP_INLINE int np_endpoint_find(struct np_flow *flow)
{
    struct np_near *near = np_near_lookup(flow->ifindex);
    if (NP_LIKELY(near && near->ifindex == flow->ifindex && near->generation == flow->generation)) {
        flow->leg->endpoint = near->number;
        flow->leg->endpoint_flags = near->flags;
        return NP_REASON_NONE;
    }
    struct np_owner owner;
    int reason = NP_REASON_TORN_ENDPOINT;
    for (int attempt = 0; attempt < NP_ENDPOINT_TRIES && reason == NP_REASON_TORN_ENDPOINT; attempt++)
        reason = np_owner_read(flow->ifindex, NP_DIRECTION_INGRESS, &owner);
    if (reason)
        return reason;
    flow->leg->endpoint = owner.number;
    flow->leg->endpoint_flags = owner.flags;
    if (near) {
        near->ifindex = flow->ifindex;
        near->generation = flow->generation;
        near->number = owner.number;
        near->flags = owner.flags;
    }
    return NP_REASON_NONE;
}

NP_INLINE struct np_addr *np_addr_of(const void *address, const int version)
{
    union np_addr_key key;
    __builtin_memcpy(&key, address, version == 4 ? sizeof(key.v4) : sizeof(key.v6));
    return np_addr_lookup(&key, version);
}

// Whether an address is one of the node's own.
NP_INLINE int np_is_local(const void *address, const int version)
{
    union np_addr_key key;
    __builtin_memcpy(&key, address, version == 4 ? sizeof(key.v4) : sizeof(key.v6));
    return np_local_lookup(&key, version) != 0;
}

// Whether the node's own processes may be meant: its addresses, and what is for many.
NP_INLINE int np_is_for_node(const __u32 *address, const int version)
{
    if (version == 4 && ((address[0] & np_host32(0xf0000000)) == np_host32(0xe0000000) || address[0] == 0xffffffff))
        return 1;
    if (version == 6 && (address[0] & np_host32(0xff000000)) == np_host32(0xff000000))
        return 1;
    return np_is_local(address, version);
}

NP_INLINE int np_is_link_local(const __u32 *address)
{
    return (address[0] & np_host32(0xffc00000)) == np_host32(0xfe800000);
}

NP_INLINE int np_may_borrow(const struct np_flow *flow, const int version)
{
    union np_source_key key;
    if (version == 4) {
        key.v4.prefix_bits = 64;
        key.v4.endpoint = flow->leg->endpoint;
        __builtin_memcpy(key.v4.address, flow->packet->source, sizeof(key.v4.address));
    } else {
        key.v6.prefix_bits = 160;
        key.v6.endpoint = flow->leg->endpoint;
        __builtin_memcpy(key.v6.address, flow->packet->source, sizeof(key.v6.address));
    }
    return np_source_lookup(&key, version) != 0;
}

// Whether a workload sends from an address it may not use.  Its own: the address row names this endpoint.  IPv6
// link-local: meaningful on this link only, so any.  Borrowed: a prefix of np_source; such packets leave no connection,
// lest a workload fill the table with addresses of its choice.
NP_INLINE int np_is_spoofed(struct np_flow *flow, const int version)
{
    if (flow->leg->direction != NP_DIRECTION_EGRESS || flow->leg->endpoint_flags & NP_ENDPOINT_HOST)
        return 0;
    const __u32 *source = flow->packet->source;
    struct np_addr *addr = np_addr_of(source, version);
    if (NP_LIKELY(addr && addr->endpoint == flow->leg->endpoint)) {
        flow->leg->own_identity = addr->identity;
        return 0;
    }
    if (version == 6 && np_is_link_local(source))
        return 0;
    if (flow->leg->endpoint_flags & NP_ENDPOINT_SOURCES && np_may_borrow(flow, version)) {
        flow->leg->untracked = 1;
        return 0;
    }
    return 1;
}
