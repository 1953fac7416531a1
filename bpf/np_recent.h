// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The short way for packets of open connections: what this CPU saw of the connection tables within the last second.  A
// hash look-up costs more than all the rest of the way; this costs a multiplication and one cache line.
//
// Invariant: an entry says only what np_conn said, under the same generation, at most a second ago; so a connection is
// refreshed there once a second, and one that was removed there passes for a second at most.  Packets that change a
// connection (SYN, FIN, RST), ICMP and packets whose sender is judged here never come here.
#pragma once

#include "np_flow.h"
#include "np_maps.h"

#define NP_RECENT_MULTIPLIER                                                                                           \
    0x9e3779b97f4a7c15ull // 2^64 divided by the golden ratio: spreads neighbours over the table

NP_INLINE struct np_recent *np_recent_slot(const struct np_flow *flow, const int version)
{
    const struct np_packet *packet = flow->packet;
    __u32 ports = (__u32)packet->source_port << 16 | packet->destination_port;
    __u64 mixed = (__u64)(packet->source[0] ^ ports) << 32 | (packet->destination[0] ^ ports);
    if (version == 6)
        mixed ^=
            (__u64)(packet->source[3] ^ packet->source[1]) << 32 | (packet->destination[3] ^ packet->destination[1]);
    return np_recent_lookup(mixed * NP_RECENT_MULTIPLIER >> 40);
}

NP_INLINE int np_recent_matches(const struct np_recent *recent, const struct np_flow *flow, const int hook,
                                const int version)
{
    const struct np_packet *packet = flow->packet;
    __u32 other = (recent->source[0] ^ packet->source[0]) | (recent->destination[0] ^ packet->destination[0]) |
                  (recent->source_port ^ packet->source_port) | (recent->destination_port ^ packet->destination_port) |
                  (recent->protocol ^ packet->protocol) | (recent->version ^ version) | (recent->hook ^ hook) |
                  (recent->ifindex ^ flow->ifindex) | (recent->generation ^ flow->generation);
    if (version == 6)
        other |= (recent->source[1] ^ packet->source[1]) | (recent->source[2] ^ packet->source[2]) |
                 (recent->source[3] ^ packet->source[3]) | (recent->destination[1] ^ packet->destination[1]) |
                 (recent->destination[2] ^ packet->destination[2]) | (recent->destination[3] ^ packet->destination[3]);
    return !other && flow->now_jiffies < recent->until_jiffies;
}

// Remember what np_conn said of the packet's connection.
NP_INLINE void np_recent_fill(struct np_recent *recent, const struct np_flow *flow, __u32 rule, __u32 carries,
                              const int hook, const int version)
{
    const struct np_packet *packet = flow->packet;
    recent->until_jiffies = flow->now_jiffies + flow->config->jiffies_per_second;
    recent->generation = flow->generation;
    recent->ifindex = flow->ifindex;
#pragma unroll
    for (int word = 0; word < 4; word++) {
        recent->source[word] = packet->source[word];
        recent->destination[word] = packet->destination[word];
    }
    recent->source_port = packet->source_port;
    recent->destination_port = packet->destination_port;
    recent->protocol = packet->protocol;
    recent->version = version;
    recent->hook = hook;
    recent->rule = rule;
    recent->carries = carries;
}
