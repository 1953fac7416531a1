// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Fragments. Only the first fragment of a packet has ports. For each first fragment that passes, the fragment table
// records the ports under the packet's identification. A later fragment takes its ports from there; then it is judged
// like any other packet. A later fragment that arrives before the first one is dropped. Rejected: a table that keeps
// such fragments, because an attacker could fill it.
#pragma once

#include "np_ctx.h"
#include "np_maps.h"

NP_INLINE void np_fragment_key(union np_frag_key *key, const struct np_ctx *ctx, const int version)
{
    const struct np_packet *packet = ctx->packet;
    if (version == 4) {
        key->v4 = (struct np_frag4_key){
            .endpoint = ctx->ep->endpoint, .id = packet->fragment_id, .protocol = packet->protocol};
        __builtin_memcpy(key->v4.source, packet->source, sizeof(key->v4.source));
        __builtin_memcpy(key->v4.destination, packet->destination, sizeof(key->v4.destination));
    } else { // the key has no protocol: the first fragment may have extension headers, so its protocol may differ
        key->v6 = (struct np_frag6_key){.endpoint = ctx->ep->endpoint, .id = packet->fragment_id};
        __builtin_memcpy(key->v6.source, packet->source, sizeof(key->v6.source));
        __builtin_memcpy(key->v6.destination, packet->destination, sizeof(key->v6.destination));
    }
}

// Restore the fields of the transport header in a later fragment, as recorded for the first fragment. Returns
// NP_REASON_FRAGMENT if there is no such record, or if the later fragment overlaps the first fragment's headers.
NP_INLINE int np_fragment_recall(struct np_ctx *ctx, const int version)
{
    struct np_packet *packet = ctx->packet;
    union np_frag_key key;
    np_fragment_key(&key, ctx, version);
    struct np_frag *first = np_frag_lookup(&key, version);
    if (!first || ctx->arrival->now_jiffies - first->seen_jiffies > ctx->config->timeout_jiffies[NP_CONN_FRAGMENT])
        return NP_REASON_FRAGMENT;
    if (packet->fragment_units < first->header_units)
        return NP_REASON_FRAGMENT;
    packet->source_port = first->source_port;
    packet->destination_port = first->destination_port;
    packet->protocol = first->protocol;
    packet->icmp_type = first->icmp_type;
    packet->icmp_code = first->icmp_code;
    if (packet->protocol == (version == 4 ? NP_PROTOCOL_ICMP : NP_PROTOCOL_ICMPV6))
        packet->icmp_kind = np_icmp_kind_of(first->icmp_type, version);
    return NP_REASON_NONE;
}

// Record a first fragment that passes. Returns NP_REASON_NONE or NP_REASON_FRAGMENT_FULL.
NP_INLINE int np_fragment_remember(const struct np_ctx *ctx, const int version)
{
    const struct np_packet *packet = ctx->packet;
    union np_frag_key key;
    np_fragment_key(&key, ctx, version);
    struct np_frag first = {
        .seen_jiffies = ctx->arrival->now_jiffies,
        .source_port = packet->source_port,
        .destination_port = packet->destination_port,
        .protocol = packet->protocol,
        .icmp_type = packet->icmp_type,
        .icmp_code = packet->icmp_code,
        .header_units = packet->fragment_units, // fits into 8 bits: at most NP_PULL_BYTES / 8, and a transport header
    };
    return np_frag_update(&key, &first, version) ? NP_REASON_FRAGMENT_FULL : NP_REASON_NONE;
}
