// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The fast path: a per-CPU cache of the tuples of established connections, in which an entry holds for one second. A
// look-up in the connection table costs more than the rest of the slow path. A look-up in this cache costs one
// multiplication and one cache line.
//
// The fast path handles an unfragmented packet in an Ethernet frame, with UDP, or with TCP without SYN, FIN and RST,
// after an IPv4 header without options or an IPv6 header without extension headers. Such a packet is called a
// candidate. Every other packet takes the slow path.
//
// Invariant: an entry repeats what np_conn had at most a second ago, under the same generation, about an established
// connection or an unreplied UDP one. So the slow path updates each live connection in np_conn once a second, and
// packets of a removed connection pass for at most a second. A packet that changes a connection's state, or that
// carries a sender tag, never takes the fast path.
#pragma once

#include "np_count.h"
#include "np_ctx.h"
#include "np_kernel.h"
#include "np_maps.h"
#include "np_service.h"

#define NP_SLOW_PATH (-2) // no verdict of TC: the packet takes the slow path

// Ports and protocol of a candidate, which the fast path compares besides the addresses.
struct np_candidate {
    __u32 ports_be;
    __u32 protocol;
};

// The slot of the flow cache for a tuple at a hook. A packet between two workloads of the node passes a hook of each on
// one CPU. The two slots are adjacent, so they are in one cache line (IPv4).
NP_INLINE struct np_flow_cache_fact *np_flow_cache_slot(const __u32 *source, const __u32 *destination, __u32 ports_be,
                                                        const int hook, const int version)
{
    __u64 mixed = (__u64)(source[0] ^ ports_be) << 32 | (destination[0] ^ ports_be);
    if (version == 4) {
        struct np_flow_cache4 *slot = np_flow_cache4_lookup(np_hash(mixed) ^ (__u32)hook);
        np_forget(slot); // otherwise the compiler (LLVM 14 on arm64) adds to the pointer before the NULL check
        return slot ? &slot->fact : 0;
    }
    mixed ^= (__u64)(source[3] ^ source[1]) << 32 | (destination[3] ^ destination[1]);
    struct np_flow_cache6 *slot = np_flow_cache6_lookup(np_hash(mixed) ^ (__u32)hook);
    np_forget(slot);
    return slot ? &slot->fact : 0;
}

// Nonzero if the packet's addresses differ from those of the slot, which are stored directly before its `fact`. Both in
// the packet and in the slot, the destination follows the source. IPv6 addresses are compared in 8-byte words, although
// these are unaligned in the packet. The verifier allows unaligned loads where the CPU does. The wide words halve the
// number of loads.
NP_INLINE __u64 np_flow_cache_differs(const struct np_flow_cache_fact *fact, const __u32 *source, const int version)
{
    if (version == 4) {
        const __u32 *address = (const __u32 *)fact - 2;
        return (address[0] ^ source[0]) | (address[1] ^ source[1]);
    }
    const np_word *address = (const np_word *)fact - 4;
    const np_word *packet = (const np_word *)source;
    return (address[0] ^ packet[0]) | (address[1] ^ packet[1]) | (address[2] ^ packet[2]) | (address[3] ^ packet[3]);
}

// Write the flow cache's entry of a tuple, for one hook of the packet's interface.
NP_INLINE void np_flow_cache_store(const struct np_ctx *ctx, const __u32 *source, const __u32 *destination,
                                   struct np_ports ports, __u32 rule, __u32 sender_tag, int is_due, const int hook,
                                   const int version)
{
    __u32 ports_be;
    __builtin_memcpy(&ports_be, &ports, sizeof(ports_be));
    struct np_flow_cache_fact *fact = np_flow_cache_slot(source, destination, ports_be, hook, version);
    // A packet without an Ethernet header gets no entry, because the fast path parses only Ethernet. An incoming packet
    // of a tunnel gets none, because the fast path does not check the outer source.
    const __u32 never = hook == NP_HOOK_INGRESS ? NP_ENDPOINT_LAYER3 | NP_ENDPOINT_EXTERNAL : NP_ENDPOINT_LAYER3;
    if (!fact || ctx->ep->endpoint_flags & never)
        return;
    const int words = version == 4 ? 1 : 4;
    __u32 *address = (__u32 *)fact - 2 * words;
#pragma unroll
    for (int word = 0; word < words; word++) {
        address[word] = source[word];
        address[words + word] = destination[word];
    }
    fact->ports_be = ports_be;
    fact->ifindex = ctx->arrival->ifindex;
    fact->generation = ctx->arrival->generation;
    fact->until_jiffies = (__u32)ctx->arrival->now_jiffies + ctx->config->jiffies_per_second;
    fact->rule = rule;
    fact->sender_tag = sender_tag;
    fact->protocol = ctx->packet->protocol;
    fact->hook = is_due ? hook | NP_FLOW_CACHE_DUE : hook;
}

// Write the flow cache's entry of the packet's own tuple, for the packet's hook.
NP_INLINE void np_flow_cache_fill(const struct np_ctx *ctx, __u32 rule, __u32 sender_tag, int is_due, const int hook,
                                  const int version)
{
    const struct np_packet *packet = ctx->packet;
    if (packet->protocol != NP_PROTOCOL_TCP && packet->protocol != NP_PROTOCOL_UDP)
        return;
    struct np_ports ports = {np_net16(packet->source_port), np_net16(packet->destination_port)};
    np_flow_cache_store(ctx, packet->source, packet->destination, ports, rule, sender_tag, is_due, hook, version);
}

// Write the flow cache's entry of the reply tuple, for the interface's other hook. So packets of both directions take
// the fast path as soon as a connection is established.
NP_INLINE void np_flow_cache_fill_reply(const struct np_ctx *ctx, __u32 rule, __u32 sender_tag, int is_due,
                                        const int hook, const int version)
{
    const struct np_packet *packet = ctx->packet;
    if (packet->protocol != NP_PROTOCOL_TCP && packet->protocol != NP_PROTOCOL_UDP)
        return;
    struct np_ports ports = {np_net16(packet->destination_port), np_net16(packet->source_port)};
    np_flow_cache_store(ctx, packet->destination, packet->source, ports, rule, sender_tag, is_due, !hook, version);
}

// Parse the transport header; returns 0 if the packet is no candidate for the fast path. `room`: length of header and
// payload. The caller has checked that 20 bytes are readable.
NP_INLINE int np_candidate_l4(const struct np_tcp_header *tcp, __u8 protocol, __u32 room,
                              struct np_candidate *candidate)
{
    if (NP_LIKELY(protocol == NP_PROTOCOL_TCP)) {
        __u32 header_bytes = (tcp->words >> 4) * 4;
        if (header_bytes < sizeof(*tcp) || header_bytes > room || tcp->flags & (NP_TCP_SYN | NP_TCP_FIN | NP_TCP_RST))
            return 0;
    } else if (protocol != NP_PROTOCOL_UDP || room < 8) {
        return 0;
    }
    __builtin_memcpy(&candidate->ports_be, &tcp->ports, sizeof(candidate->ports_be));
    candidate->protocol = protocol;
    return 1;
}

// The verdict for a candidate from the flow cache; NP_SLOW_PATH if the cache has no valid entry.
NP_INLINE int np_fast_path_pass(struct __sk_buff *skb, const struct np_config *config,
                                const struct np_candidate *candidate, const __u32 *source, const __u32 *destination,
                                const int hook, const int version)
{
    struct np_flow_cache_fact *fact = np_flow_cache_slot(source, destination, candidate->ports_be, hook, version);
    if (!fact)
        return NP_SLOW_PATH;
    __u64 other = np_flow_cache_differs(fact, source, version) | (fact->ports_be ^ candidate->ports_be) |
                  (fact->protocol ^ candidate->protocol) | ((fact->hook ^ (__u32)hook) & NP_HOOK_EGRESS) |
                  (fact->ifindex ^ skb->ifindex) | (fact->generation ^ config->generation);
    // `left` is large if the entry has expired, even if the low 32 bits have wrapped since then
    __u32 left = fact->until_jiffies - (__u32)bpf_jiffies64() - 1;
    if (NP_UNLIKELY(other || left >= config->jiffies_per_second))
        return NP_SLOW_PATH;
    const __u32 l4_offset =
        sizeof(struct np_eth_header) + (version == 4 ? sizeof(struct np_ip4_header) : sizeof(struct np_ip6_header));
    __u32 checksum = np_checksum_at(skb);
    if (NP_UNLIKELY(checksum != NP_NO_CHECKSUM &&
                    checksum != l4_offset + (candidate->protocol == NP_PROTOCOL_TCP ? 16 : 6)))
        return NP_SLOW_PATH;
    np_count_rule(fact->rule, skb->len);
    if (hook == NP_HOOK_INGRESS)
        skb->mark |= config->seen_mark;
    if (NP_UNLIKELY(fact->sender_tag) &&
        np_sender_tag_set(skb, config, fact->sender_tag, fact->hook & NP_FLOW_CACHE_DUE))
        return NP_PASS_ALONE;
    return NP_PASS;
}

NP_INLINE int np_fast_path(struct __sk_buff *skb, const struct np_config *config, const int hook)
{
    void *start = (void *)(long)skb->data;
    void *end = (void *)(long)skb->data_end;
    struct np_eth_header *eth = start;
    struct np_candidate candidate;
    if (NP_UNLIKELY(np_sender_tag_get(skb, config)))
        return NP_SLOW_PATH;

    struct np_ip4_header *ip4 = (void *)(eth + 1);
    struct np_tcp_header *tcp4 = (void *)(ip4 + 1);
    if ((void *)(tcp4 + 1) > end)
        return NP_SLOW_PATH;
    if (eth->type_be == np_net16(NP_ETHERTYPE_IP4)) {
        __u32 total_bytes = np_host16(ip4->total_bytes_be);
        if (ip4->version_words != 0x45 || ip4->fragment_be & np_net16(0x3fff) ||
            total_bytes > skb->len - sizeof(*eth) || total_bytes < sizeof(*ip4) ||
            !np_candidate_l4(tcp4, ip4->protocol, total_bytes - sizeof(*ip4), &candidate))
            return NP_SLOW_PATH;
        return np_fast_path_pass(skb, config, &candidate, &ip4->source, &ip4->destination, hook, 4);
    }

    struct np_ip6_header *ip6 = (void *)(eth + 1);
    struct np_tcp_header *tcp6 = (void *)(ip6 + 1);
    if (eth->type_be != np_net16(NP_ETHERTYPE_IP6) || (void *)(tcp6 + 1) > end)
        return NP_SLOW_PATH;
    __u32 payload_bytes = np_host16(ip6->payload_bytes_be);
    if (ip6->version_class >> 4 != 6 || payload_bytes > skb->len - sizeof(*eth) - sizeof(*ip6) ||
        !np_candidate_l4(tcp6, ip6->next, payload_bytes, &candidate))
        return NP_SLOW_PATH;
    return np_fast_path_pass(skb, config, &candidate, ip6->source, ip6->destination, hook, 6);
}
