// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The check of the source address of a packet that comes from outside the node. Such a packet may not have the address
// of a local workload, whose packets come in by the workload's own interface. A packet with the address of a remote
// workload must come from that workload's node. A tunnel device in metadata mode (external, collect_md) gives the outer
// addresses of each packet, which prove the sending node. Other tunnels and the network itself prove nothing.
#pragma once

#include "np_endpoint.h"
#include "np_ctx.h"
#include "np_lang.h"
#include "np_maps.h"

// struct bpf_tunnel_key of Linux 5.15. Newer kernels have more fields, and accept this size too.
struct np_outer {
    __u32 tunnel;
    __u32 source[4]; // IPv4: the first word, in host order; IPv6: in network order
    __u8 tos;
    __u8 ttl;
    __u16 pad;
    __u32 label;
};
_Static_assert(sizeof(struct np_outer) == 28, "np_outer");

#define NP_OUTER_IP4 0
#define NP_OUTER_IP6 1 // BPF_F_TUNINFO_IPV6

// Whether the outer source address is the given node's own, and not a workload's. `outer`: memory for the tunnel key.
NP_INLINE int np_is_sent_by(struct __sk_buff *skb, struct np_outer *outer, __u32 node)
{
    union np_addr_key *key = (void *)outer->source;
    const struct np_local *sender = 0;
    if (!np_outer_key(skb, outer, sizeof(*outer), NP_OUTER_IP4)) {
        outer->source[0] = np_host32(outer->source[0]);
        sender = np_local_lookup(key, 4);
    } else if (!np_outer_key(skb, outer, sizeof(*outer), NP_OUTER_IP6)) {
        sender = np_local_lookup(key, 6);
    }
    return sender && sender->node == node;
}

// The reason to drop a packet from outside because of its source address; NP_REASON_NONE: the source is plausible. The
// packet is dropped if the address belongs to this node, to a local workload, or to a remote node that did not send the
// packet. Link-local addresses of the node are allowed, because many nodes have the same ones.
NP_INLINE int np_outside(struct __sk_buff *skb, struct np_ctx *ctx, struct np_outer *outer, const int version)
{
    const __u32 *source = ctx->packet->source;
    __u32 flags = ctx->ep->endpoint_flags;
    if (NP_LIKELY(!(flags & NP_ENDPOINT_OUTSIDE)) || ctx->config->flags & NP_CONFIG_HAIRPIN)
        return NP_REASON_NONE;
    if (np_is_local(ctx, source, version) && !(version == 6 && np_is_link_local(source)))
        return NP_REASON_FOREIGN_SOURCE;
    if (np_ifindex_of(ctx, source, version))
        return NP_REASON_FOREIGN_SOURCE;
    __u32 node = ctx->ep->addr.holder;
    if (NP_UNLIKELY(flags & NP_ENDPOINT_EXTERNAL && node >= NP_NODE_FIRST) && !np_is_sent_by(skb, outer, node))
        return NP_REASON_TUNNEL_SOURCE;
    return NP_REASON_NONE;
}
