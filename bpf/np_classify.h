// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Policy classification: from a tuple (addresses, ports, protocol) to a verdict, in four steps. The number
// of look-ups is fixed, whatever the number of rules is.
//
//   1. peer address -> identity     np_addr (exact); otherwise np_cidr (longest prefix); otherwise the world identity
//                                   of the address family
//   2. identity     -> peer class   np_peer_class; otherwise the set's default class for the family.  The same for the
//                                   endpoint's own address, if the set has own classes.
//   3. protocol and destination port, or ICMP type and code -> atom (np_l4_atom) -> L4 class (np_l4_col).  The same for
//      the source port, if a rule of the set matches on source ports.
//   4. the classes  -> verdict      np_verdict
//
// If a required row is missing, the packet is denied; each such case has its own reason.
#pragma once

#include "np_endpoint.h"
#include "np_ctx.h"
#include "np_maps.h"

// Whether processes of this node receive packets to the tuple's destination. Most new flows need the answer twice, so
// np_tuple stores the answer.
enum np_to_node {
    NP_TO_NODE_UNASKED = 0,
    NP_TO_NODE_NO = 1,
    NP_TO_NODE_YES = 2,
};

// The input of policy: addresses, ports and protocol of the flow's first packet.
struct np_tuple {
    __u32 source[4];
    __u32 destination[4]; // must be directly after the source (np_identity_of)
    __u16 source_port;
    __u16 destination_port;
    __u8 protocol;
    __u8 icmp_type;
    __u8 icmp_code;
    __u8 to_node; // enum np_to_node
};
_Static_assert(NP_DIRECTION_EGRESS == 1 && NP_DIRECTION_INGRESS == 0, "a direction chooses an address");

NP_INLINE int np_is_to_node(const struct np_ctx *ctx, struct np_tuple *tuple, const int version)
{
    if (tuple->to_node == NP_TO_NODE_UNASKED)
        tuple->to_node = np_reaches_node(ctx, tuple->destination, version) ? NP_TO_NODE_YES : NP_TO_NODE_NO;
    return tuple->to_node == NP_TO_NODE_YES;
}

// The identity of the tuple's source (`side` 0) or destination (`side` 1). Sets `holder` to the endpoint or node that
// has the address, as in struct np_addr.
NP_INLINE __u32 np_identity_of(struct np_ctx *ctx, const struct np_tuple *tuple, __u32 side, __u32 *holder,
                               const int version)
{
    __u32 address[4];
    const void *chosen = (const void *)tuple->source + (side & 1) * sizeof(tuple->source);
    __builtin_memcpy(address, chosen, version == 4 ? 4 : 16);
    const struct np_addr *addr = np_addr_find(ctx, address, version);
    *holder = addr->holder;
    if (NP_LIKELY(addr->identity))
        return addr->identity;
    union np_cidr_key key;
    if (version == 4) {
        key.v4.prefix_bits = 32;
        __builtin_memcpy(key.v4.address, address, sizeof(key.v4.address));
    } else {
        key.v6.prefix_bits = 128;
        __builtin_memcpy(key.v6.address, address, sizeof(key.v6.address));
    }
    struct np_cidr *cidr = np_cidr_lookup(&key, version);
    if (cidr)
        return cidr->identity;
    return version == 4 ? NP_IDENTITY_WORLD_V4 : NP_IDENTITY_WORLD_V6;
}

// The class of an atom, or -1 if a row is outside the tables. The atom is at `index` of row `block` in np_l4_atom; its
// class is in the rows of np_l4_col from `column_base` on.
NP_INLINE int np_column_class(__u32 block, __u32 index, __u32 column_base)
{
    struct np_l4_atom *atoms = np_l4_atom_lookup(block);
    if (!atoms)
        return -1;
    __u32 atom = atoms->atom[index & (NP_ATOM_BLOCK - 1)];
    struct np_l4_col *column = np_l4_col_lookup(column_base + atom / NP_COLUMN_BLOCK);
    if (!column)
        return -1;
    return column->l4_class[atom % NP_COLUMN_BLOCK];
}

NP_INLINE int np_l4_class_of(const struct np_tuple *tuple, const struct np_set *set)
{
    __u8 protocol = tuple->protocol;
    __u16 port = tuple->destination_port;
    __u32 slot;
    __u32 high = port >> 8;
    __u32 low = port & 255;
    switch (protocol) {
    case NP_PROTOCOL_TCP:
        slot = NP_SLOT_TCP;
        break;
    case NP_PROTOCOL_UDP:
        slot = NP_SLOT_UDP;
        break;
    case NP_PROTOCOL_SCTP:
        slot = NP_SLOT_SCTP;
        break;
    case NP_PROTOCOL_ICMP:
    case NP_PROTOCOL_ICMPV6:
        slot = protocol == NP_PROTOCOL_ICMP ? NP_SLOT_ICMP : NP_SLOT_ICMPV6;
        high = tuple->icmp_type;
        low = tuple->icmp_code;
        break;
    default:
        return np_column_class(NP_OTHER_BLOCK, protocol, set->l4_base);
    }
    return np_column_class(slot * 256 + high, low, set->l4_base);
}

// The class of the source port. Only TCP, UDP and SCTP have source ports; for all other protocols the port is 0.
NP_INLINE int np_source_class_of(const struct np_tuple *tuple, const struct np_set *set)
{
    __u8 protocol = tuple->protocol;
    __u16 port = tuple->source_port;
    if (protocol != NP_PROTOCOL_TCP && protocol != NP_PROTOCOL_UDP && protocol != NP_PROTOCOL_SCTP)
        port = 0;
    return np_column_class(NP_SLOT_SOURCE * 256 + (port >> 8), port & 255, set->source_base);
}

// Do all four steps, and fill in the decision except its reason. Returns NP_REASON_NONE, or NP_REASON_SELF if the peer
// is the endpoint `self` (0: none is), or the reason to deny the packet.
NP_INLINE int np_classify(struct np_ctx *ctx, const struct np_tuple *tuple, const struct np_set *set, __u8 direction,
                          __u32 self, const int version)
{
    struct np_decision *decision = ctx->decision;
    __u32 endpoint;
    // the direction is the peer's side: egress is 1, and its peer is the destination (side 1)
    decision->peer_identity = np_identity_of(ctx, tuple, direction, &endpoint, version);
    if (self && endpoint == self)
        return NP_REASON_SELF;
    decision->set = set->number;
    __u32 class = np_class_of(ctx, set->number, decision->peer_identity,
                              version == 4 ? set->default_class4 : set->default_class6);
    decision->peer_class = class;
    if (NP_UNLIKELY(class >= set->peer_classes))
        return NP_REASON_CLASS_RANGE;

    __u32 index = class * set->own_classes;
    if (NP_UNLIKELY(set->own_set)) {
        ctx->ep->own_identity = np_identity_of(ctx, tuple, !direction, &endpoint, version);
        __u32 own_class = np_class_of(ctx, set->own_set, ctx->ep->own_identity,
                                      version == 4 ? set->own_default_class4 : set->own_default_class6);
        if (own_class >= set->own_classes)
            return NP_REASON_CLASS_RANGE;
        index += own_class;
    }

    index *= set->l4_classes;
    if (set->l4_classes > 1) {
        int l4_class = np_l4_class_of(tuple, set);
        if (l4_class < 0 || (__u32)l4_class >= set->l4_classes)
            return NP_REASON_L4_RANGE;
        index += l4_class;
    }

    index *= set->source_classes;
    if (NP_UNLIKELY(set->source_classes > 1)) {
        int source_class = np_source_class_of(tuple, set);
        if (source_class < 0 || (__u32)source_class >= set->source_classes)
            return NP_REASON_L4_RANGE;
        index += source_class;
    }

    struct np_verdict *verdict = np_verdict_lookup(set->verdict_base + index);
    if (!verdict)
        return NP_REASON_VERDICT_RANGE;
    decision->rule = verdict->rule;
    decision->staged_rule = verdict->staged_rule;
    decision->log_list = verdict->log_list;
    decision->action = verdict->action;
    decision->staged_action = verdict->staged_action;
    decision->flags = verdict->flags;
    return decision->action == NP_ACTION_NONE ? NP_REASON_VERDICT_EMPTY : NP_REASON_NONE;
}
