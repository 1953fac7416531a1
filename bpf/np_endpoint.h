// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// From the interface to its endpoint, and whether a workload owns the address that it sends from.
#pragma once

#include "np_bucket.h"
#include "np_ctx.h"
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
NP_INLINE __u32 np_set_check(const struct np_set *set, __u32 number, __u32 place, __u32 flags, __u32 link)
{
    __u32 value = NP_CHECK_SEED;
    value = np_fold(value, number);
    value = np_fold(value, place);
    value = np_fold(value, flags);
    value = np_fold(value, link);
    value = np_fold(value, set->number);
    value = np_fold(value, np_halves(set->default_class4, set->default_class6));
    value = np_fold(value, set->peer_classes);
    value = np_fold(value, set->own_set);
    value = np_fold(value, np_halves(set->own_default_class4, set->own_default_class6));
    value = np_fold(value, set->own_classes);
    value = np_fold(value, set->l4_base);
    value = np_fold(value, np_halves(set->l4_classes, set->asks_source));
    value = np_fold(value, set->source_base);
    value = np_fold(value, set->source_classes);
    return np_fold(value, set->verdict_base);
}

// Copy the row of an interface into np_ep_cache.  The kernel may reuse the memory of a replaced element while it is
// read (preallocated or not, since 6.1); the check words show that, and the row is looked up again.
NP_INLINE int np_ep_cache_fill(struct np_ep_cache *cached, __u32 ifindex, __u32 epoch)
{
    cached->epoch = cached->identity4 = cached->identity6 = 0;
#pragma clang loop unroll(disable)
    for (int attempt = 0; attempt < NP_ENDPOINT_TRIES; attempt++) {
        struct np_endpoint *row = np_endpoint_lookup(ifindex);
        if (!row)
            return NP_REASON_UNKNOWN_ENDPOINT;
        cached->ifindex = ifindex;
        cached->number = row->number;
        cached->flags = row->flags;
        cached->link = row->link;
        cached->ingress = row->ingress;
        cached->egress = row->egress;
        np_keep_in_memory(cached); // and what was read may not be read again
        if (np_set_check(&cached->ingress, cached->number, ifindex, cached->flags, cached->link) ==
                cached->ingress.check &&
            np_set_check(&cached->egress, cached->number, ifindex, cached->flags, cached->link) ==
                cached->egress.check) {
            cached->epoch = epoch;
            return NP_REASON_NONE;
        }
    }
    return NP_REASON_TORN_ENDPOINT;
}

// The row of an interface from the endpoint cache; NULL, with the reason, when there is none.
NP_INLINE struct np_ep_cache *np_ep_cache_find(__u32 ifindex, __u32 epoch, int *reason)
{
    struct np_ep_cache *cached = np_ep_cache_lookup(ifindex);
    *reason = NP_REASON_UNKNOWN_ENDPOINT;
    if (!cached) // a row of an array: cannot happen
        return 0;
    if (NP_LIKELY(cached->ifindex == ifindex && cached->epoch == epoch))
        return cached;
    *reason = np_ep_cache_fill(cached, ifindex, epoch);
    return *reason ? 0 : cached;
}

// Copy one policy set of a host endpoint. NP_REASON_CONTINUE: it has none, so no opinion.
NP_INLINE int np_host_read(__u32 number, __u32 index, struct np_owner *owner)
{
    struct np_host *row = np_host_lookup(number);
    if (!row)
        return NP_REASON_UNKNOWN_ENDPOINT;
    np_forget(index); // the compiler knows its range, verifiers before 6.10 have to be shown one
    index &= NP_HOST_SETS - 1;
    __u32 present = row->present;
    owner->number = row->number;
    owner->flags = row->version;
    owner->set = row->sets[index];
    np_keep_in_memory(owner); // and what was read may not be read again
    if (np_set_check(&owner->set, owner->number, index | present << 8, owner->flags, 0) != owner->set.check)
        return NP_REASON_TORN_ENDPOINT;
    return present >> index & 1 ? NP_REASON_NONE : NP_REASON_CONTINUE;
}

// Number and flags of the interface's endpoint.
NP_INLINE int np_endpoint_find(struct np_ctx *ctx)
{
    int reason;
    struct np_ep_cache *cached = np_ep_cache_find(ctx->arrival->ifindex, ctx->arrival->epoch, &reason);
    if (!cached)
        return reason;
    ctx->ep->endpoint = cached->number;
    ctx->ep->endpoint_flags = cached->flags;
    ctx->ep->link = cached->link;
    return NP_REASON_NONE;
}

// Where the local workload is that has an address; NULL when none has, or its interface is not known.
NP_INLINE const struct np_ifindex *np_ifindex_of(struct np_ctx *ctx, const __u32 *address, const int version)
{
    __u32 holder = np_addr_find(ctx, address, version)->holder;
    return holder && holder < NP_NODE_FIRST ? np_ifindex_lookup(holder) : 0;
}

NP_INLINE int np_is_loopback(const __u32 *address, const int version)
{
    return version == 4 && (address[0] & np_host32(0xff000000)) == np_host32(0x7f000000);
}

// Whether an address may be the node's without a row of its own.
NP_INLINE int np_may_be_in_net(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    return ctx->config->flags & NP_CONFIG_LOCAL_NETS || np_is_loopback(address, version);
}

// What an address means to the node: its row, NULL when it means nothing.
NP_INLINE const struct np_local *np_local_find(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    const struct np_local *found = 0;
    if (NP_UNLIKELY(np_vip_filter_has(address, version))) {
        union np_addr_key key;
        __builtin_memcpy(&key, address, version == 4 ? sizeof(key.v4) : sizeof(key.v6));
        found = np_local_lookup(&key, version);
    }
    if (NP_UNLIKELY(!found && ctx->config->flags & NP_CONFIG_LOCAL_NETS)) {
        union np_cidr_key key;
        if (version == 4) {
            key.v4.prefix_bits = 32;
            __builtin_memcpy(key.v4.address, address, sizeof(key.v4.address));
        } else {
            key.v6.prefix_bits = 128;
            __builtin_memcpy(key.v6.address, address, sizeof(key.v6.address));
        }
        found = np_local_net_lookup(&key, version);
    }
    return found;
}

// The same as flags, enum np_local_flag.
NP_INLINE __u32 np_local_flags(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    if (NP_UNLIKELY(np_is_loopback(address, version)))
        return NP_LOCAL_OWN;
    const struct np_local *found = np_local_find(ctx, address, version);
    return found ? found->flags : 0;
}

// Whether an address is one of the node's own.
NP_INLINE int np_is_local(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    return (np_local_flags(ctx, address, version) & NP_LOCAL_OWN) != 0;
}

// Whether an address is that of a group or of all on a link, as far as it says so itself.
NP_INLINE int np_is_many(const __u32 *address, const int version)
{
    if (version == 4)
        return (address[0] & np_host32(0xf0000000)) == np_host32(0xe0000000) || address[0] == 0xffffffff;
    return (address[0] & np_host32(0xff000000)) == np_host32(0xff000000);
}

// Whether processes of the node get what is sent there: its addresses, broadcast, groups that it has joined.
NP_INLINE int np_reaches_node(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    if (version == 4 && address[0] == 0xffffffff)
        return 1;
    return (np_local_flags(ctx, address, version) & (NP_LOCAL_OWN | NP_LOCAL_MANY | NP_LOCAL_GROUP)) != 0;
}

// Whether the node's own processes may be meant: its addresses, and what is for many.
NP_INLINE int np_is_for_node(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    return np_is_many(address, version) || np_reaches_node(ctx, address, version);
}

NP_INLINE int np_is_link_local(const __u32 *address)
{
    return (address[0] & np_host32(0xffc00000)) == np_host32(0xfe800000);
}

// Whether an address is in a prefix that the workload may send from although it does not own it.
NP_INLINE int np_may_borrow(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    union np_source_key key;
    if (!(ctx->ep->endpoint_flags & NP_ENDPOINT_SOURCES))
        return 0;
    if (version == 4) {
        key.v4.prefix_bits = 64;
        key.v4.endpoint = ctx->ep->endpoint;
        __builtin_memcpy(key.v4.address, address, sizeof(key.v4.address));
    } else {
        key.v6.prefix_bits = 160;
        key.v6.endpoint = ctx->ep->endpoint;
        __builtin_memcpy(key.v6.address, address, sizeof(key.v6.address));
    }
    return np_source_lookup(&key, version) != 0;
}

// Whether an address is the workload's own: by np_ep_cache, else by the address's row.
NP_INLINE int np_is_own(struct np_ctx *ctx, const __u32 *address, const int version)
{
    struct np_ep_cache *cached = np_ep_cache_lookup(ctx->arrival->ifindex);
    if (!cached)
        return 0;
    __u32 *own = version == 4 ? cached->own4 : cached->own6;
    __u32 *identity = version == 4 ? &cached->identity4 : &cached->identity6;
    __u32 other = own[0] ^ address[0];
    if (version == 6)
        other |= (own[1] ^ address[1]) | (own[2] ^ address[2]) | (own[3] ^ address[3]);
    if (NP_UNLIKELY(other || !*identity)) {
        const struct np_addr *addr = np_addr_find(ctx, address, version);
        if (!addr->identity || addr->holder != ctx->ep->endpoint)
            return 0;
        *identity = addr->identity;
        __builtin_memcpy(own, address, version == 4 ? 4 : 16);
    }
    ctx->ep->own_identity = *identity;
    return 1;
}

// Whether a link-local source reaches nobody but the node: on a link without others, or because it is sent to the node.
// Others know their peers by address, and of these they know none.
NP_INLINE int np_is_for_node_alone(const struct np_ctx *ctx)
{
    if (ctx->ep->link == ctx->arrival->ifindex)
        return 1;
    const struct np_local *local = np_local_find(ctx, ctx->packet->destination, 6);
    return local && local->flags & NP_LOCAL_OWN && local->ifindex == ctx->ep->link;
}

// Whether a workload sends from an address it may not use.  Its own: the address row names this endpoint.  Borrowed: a
// prefix of np_source; such packets leave no connection, lest a workload fill the table with addresses of its choice.
// Link-local: any, where the node alone gets it.
NP_INLINE int np_is_spoofed(struct np_ctx *ctx, const int version)
{
    if (ctx->ep->direction != NP_DIRECTION_EGRESS || ctx->ep->endpoint_flags & NP_ENDPOINT_HOST)
        return 0;
    const __u32 *source = ctx->packet->source;
    if (NP_LIKELY(np_is_own(ctx, source, version)))
        return 0;
    if (version == 6 && np_is_link_local(source) && np_is_for_node_alone(ctx))
        return 0;
    if (np_may_borrow(ctx, source, version)) {
        ctx->ep->untracked = 1;
        return 0;
    }
    return 1;
}

// Whether a packet is at a workload's interface without being for it: for one of its addresses, a prefix that it may
// send from, many, or a link-local address, of which it is not known whose it is.
NP_INLINE int np_is_misdelivered(struct np_ctx *ctx, const int version)
{
    const __u32 *destination = ctx->packet->destination;
    if (ctx->ep->direction != NP_DIRECTION_INGRESS || ctx->ep->endpoint_flags & (NP_ENDPOINT_HOST | NP_ENDPOINT_ROUTES))
        return 0;
    if (NP_LIKELY(np_is_own(ctx, destination, version)))
        return 0;
    if (np_is_dhcp_request(ctx->packet, version)) // for the servers of the link
        return 1;
    if (np_is_many(destination, version) || (version == 6 && np_is_link_local(destination)))
        return 0;
    return !(np_local_flags(ctx, destination, version) & NP_LOCAL_MANY) && !np_may_borrow(ctx, destination, version);
}

// Whether a workload sends a node what a tunnel device there would take from anyone, and unpack.
NP_INLINE int np_is_tunnelled(const struct np_ctx *ctx, const int version)
{
    const struct np_packet *packet = ctx->packet;
    __u16 port = 0;
    switch (packet->protocol) {
    case NP_PROTOCOL_UDP:
        port = packet->destination_port;
        break;
    case NP_PROTOCOL_IPIP:
    case NP_PROTOCOL_IP6:
    case NP_PROTOCOL_GRE:
        break;
    default:
        return 0;
    }
    if (NP_LIKELY(!np_is_tunnel(packet->protocol, port)))
        return 0;
    return np_is_many(packet->destination, version) || np_local_flags(ctx, packet->destination, version);
}
