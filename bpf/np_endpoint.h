// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Look-ups of three kinds: the endpoint of an interface, the owner of an address (anti-spoofing), and whether an
// address is the node's.
#pragma once

#include "np_bucket.h"
#include "np_ctx.h"
#include "np_maps.h"

#define NP_ENDPOINT_TRIES 4 // arbitrary: the agent replaces a row at most once during a few reads

// A copy of a host endpoint's number, of the version of its row (in `flags`), and of one of its policy sets.
struct np_owner {
    __u32 number;
    __u32 flags;
    struct np_set set;
};

NP_INLINE __u32 np_fold(__u32 value, __u32 word)
{
    return (value ^ word) * NP_CHECK_PRIME;
}

// The 32-bit word that two adjacent 16-bit fields form.
NP_INLINE __u32 np_halves(__u16 low, __u16 high)
{
    return (__u32)high << 16 | low;
}

// The check word of a policy set. `place`: the ifindex; for a host endpoint, the index of the set and the bits of all
// sets that the endpoint has. The loader's seal_endpoint() must compute the same.
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

// Copy an interface's row of np_endpoint into np_ep_cache. The kernel may reuse the memory of a replaced hash element
// while a program still reads that memory (since Linux 6.1 with or without preallocation). The check words then differ,
// and the program looks up the row again.
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
        np_keep_in_memory(cached); // keeps the compiler from reading the row again
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

// The interface's row in the endpoint cache, copied from np_endpoint if necessary. Returns NULL and sets `reason` if
// there is no valid row.
NP_INLINE struct np_ep_cache *np_ep_cache_find(__u32 ifindex, __u32 epoch, int *reason)
{
    struct np_ep_cache *cached = np_ep_cache_lookup(ifindex);
    *reason = NP_REASON_UNKNOWN_ENDPOINT;
    if (!cached) // cannot happen: an array always has its row
        return 0;
    if (NP_LIKELY(cached->ifindex == ifindex && cached->epoch == epoch))
        return cached;
    *reason = np_ep_cache_fill(cached, ifindex, epoch);
    return *reason ? 0 : cached;
}

// Copy the policy set `index` of a host endpoint. Returns NP_REASON_CONTINUE if the endpoint has no such set; then the
// next policy step follows.
NP_INLINE int np_host_read(__u32 number, __u32 index, struct np_owner *owner)
{
    struct np_host *row = np_host_lookup(number);
    if (!row)
        return NP_REASON_UNKNOWN_ENDPOINT;
    np_forget(index); // keeps the compiler from removing the bound, which verifiers before Linux 6.10 need
    index &= NP_HOST_SETS - 1;
    __u32 present = row->present;
    owner->number = row->number;
    owner->flags = row->version;
    owner->set = row->sets[index];
    np_keep_in_memory(owner); // keeps the compiler from reading the row again
    if (np_set_check(&owner->set, owner->number, index | present << 8, owner->flags, 0) != owner->set.check)
        return NP_REASON_TORN_ENDPOINT;
    return present >> index & 1 ? NP_REASON_NONE : NP_REASON_CONTINUE;
}

// Set number, flags and link of the interface's endpoint in the endpoint context. Returns NP_REASON_NONE or the reason
// why there is no valid row.
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

// The interface of the local workload that has the address. NULL: no local workload has it, or the workload's interface
// is unknown.
NP_INLINE const struct np_ifindex *np_ifindex_of(struct np_ctx *ctx, const __u32 *address, const int version)
{
    __u32 holder = np_addr_find(ctx, address, version)->holder;
    return holder && holder < NP_NODE_FIRST ? np_ifindex_lookup(holder) : 0;
}

NP_INLINE int np_is_loopback(const __u32 *address, const int version)
{
    return version == 4 && (address[0] & np_host32(0xff000000)) == np_host32(0x7f000000);
}

// Whether an address that has no row in np_local may still be an address of the node.
NP_INLINE int np_may_be_in_net(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    return ctx->config->flags & NP_CONFIG_LOCAL_NETS || np_is_loopback(address, version);
}

// The np_local row that says what the address is at this node; NULL: there is none.
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

// What the address is at this node (enum np_local_flag); 0: nothing that np_local lists.
NP_INLINE __u32 np_local_flags(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    if (NP_UNLIKELY(np_is_loopback(address, version)))
        return NP_LOCAL_OWN;
    const struct np_local *found = np_local_find(ctx, address, version);
    return found ? found->flags : 0;
}

// Whether the address is one of the node's own.
NP_INLINE int np_is_local(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    return (np_local_flags(ctx, address, version) & NP_LOCAL_OWN) != 0;
}

// Whether the address is multicast or 255.255.255.255.
NP_INLINE int np_is_many(const __u32 *address, const int version)
{
    if (version == 4)
        return (address[0] & np_host32(0xf0000000)) == np_host32(0xe0000000) || address[0] == 0xffffffff;
    return (address[0] & np_host32(0xff000000)) == np_host32(0xff000000);
}

// Whether processes of the node receive packets to the address: an own or broadcast address of the node, or a multicast
// group that the node has joined.
NP_INLINE int np_reaches_node(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    if (version == 4 && address[0] == 0xffffffff)
        return 1;
    return (np_local_flags(ctx, address, version) & (NP_LOCAL_OWN | NP_LOCAL_MANY | NP_LOCAL_GROUP)) != 0;
}

// Whether processes of the node may receive a packet to the address. Any multicast address counts.
NP_INLINE int np_is_for_node(const struct np_ctx *ctx, const __u32 *address, const int version)
{
    return np_is_many(address, version) || np_reaches_node(ctx, address, version);
}

NP_INLINE int np_is_link_local(const __u32 *address)
{
    return (address[0] & np_host32(0xffc00000)) == np_host32(0xfe800000);
}

// Whether the workload may borrow the address: np_source allows it to send from the address, which it does not own.
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

// Whether the workload owns the address, according to np_ep_cache or to the address's row in np_addr.
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

// Whether only the node can receive this packet, which has a link-local source. This is so if no other host is on the
// link, or if the destination is the node's address on the link. Any other receiver's policy would need the owner of
// the source, but np_addr does not have link-local addresses.
NP_INLINE int np_is_for_node_alone(const struct np_ctx *ctx)
{
    if (ctx->ep->link == ctx->arrival->ifindex)
        return 1;
    const struct np_local *local = np_local_find(ctx, ctx->packet->destination, 6);
    return local && local->flags & NP_LOCAL_OWN && local->ifindex == ctx->ep->link;
}

// Whether a workload sends from an address that it may not use. A workload may use three kinds of addresses:
//   own          the address's row in np_addr names this endpoint
//   borrowed     a prefix in np_source has the address; the packet records no connection, because the workload could
//                otherwise fill the table with addresses of its choice
//   link-local   any such address, if only the node can receive the packet
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

// Whether a packet that leaves by a workload's interface is not for that workload. A packet may be for an address that
// the workload owns or may borrow, and for a multicast or broadcast address. It may also be for any link-local address,
// because the agent does not know the owners of link-local addresses.
NP_INLINE int np_is_misdelivered(struct np_ctx *ctx, const int version)
{
    const __u32 *destination = ctx->packet->destination;
    if (ctx->ep->direction != NP_DIRECTION_INGRESS || ctx->ep->endpoint_flags & (NP_ENDPOINT_HOST | NP_ENDPOINT_ROUTES))
        return 0;
    if (NP_LIKELY(np_is_own(ctx, destination, version)))
        return 0;
    if (np_is_dhcp_request(ctx->packet, version)) // only DHCP servers may receive a DHCP request
        return 1;
    if (np_is_many(destination, version) || (version == 6 && np_is_link_local(destination)))
        return 0;
    return !(np_local_flags(ctx, destination, version) & NP_LOCAL_MANY) && !np_may_borrow(ctx, destination, version);
}

// Whether a workload sends a packet in an encapsulation that a tunnel device of a node would accept from any sender.
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
