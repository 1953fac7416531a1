// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// A DNS answer by UDP in IP fragments. The program sees one fragment at a time, so it cannot read such an answer. It
// cuts the first fragment to a whole packet with the header and the question, in which the bit TC says that the answer
// was truncated. The workload then asks again by TCP (RFC 7766), and the program reads that answer. The later fragments
// are dropped.
#pragma once

#include "np_dns.h"
#include "np_fragment.h"
#include "np_parse.h"

// np_frag.icmp_type of a UDP packet: its first fragment was cut, so the later ones are dropped.
#define NP_DNS_FRAGMENT_CUT 1

#define NP_DNS_CHECKED_BYTES 288 // longest cut message, rounded up

// Whether the packet is a later fragment of an answer that was cut.
NP_INLINE int np_dns_is_cut(const struct np_packet *packet)
{
    return packet->protocol == NP_PROTOCOL_UDP && packet->icmp_type == NP_DNS_FRAGMENT_CUT;
}

// The UDP checksum of the cut message, which is in dns->message. `header`: the new UDP header, with checksum 0.
NP_INLINE __u16 np_dns_checksum(const struct np_packet *packet, struct np_dns *dns, const struct np_udp_header *header,
                                __u32 bytes)
{
    *(np_word *)(dns->message + (bytes & 511)) = 0;
    np_barrier();
    __u32 padded = (bytes + 3) & 508;
    __u32 sum = np_net16(NP_PROTOCOL_UDP) + header->bytes_be; // the pseudo-header's part that is not addresses
    sum = (__u32)np_checksum_diff(0, 0, packet->source, 32, sum); // source and destination; IPv4: the rest is zero
    sum = (__u32)np_checksum_diff(0, 0, header, sizeof(*header), sum);
    sum = (__u32)np_checksum_diff(0, 0, dns->message, padded, sum);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    __u16 result = (__u16)~sum;
    return result ? result : 0xffff;
}

// Store the new lengths in the IP header, and make the packet a whole one. IPv4: offset 0 and no further fragments;
// IPv6: an atomic fragment, which receivers treat as a whole packet (RFC 6946). Returns 0, or an error.
NP_INLINE long np_dns_cut_ip(struct __sk_buff *skb, const struct np_packet *packet, __u32 udp_bytes)
{
    __u32 at = packet->l3_offset;
    __u32 header_bytes = packet->l4_offset - at;
    if (packet->version == 4) {
        struct np_ip4_header ip;
        if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)))
            return -1;
        __be16 total_bytes_be = np_host16((__u16)(header_bytes + udp_bytes));
        __be16 whole = 0;
        const __u32 checksum_at = at + __builtin_offsetof(struct np_ip4_header, checksum_be);
        return np_ip4_checksum_replace(skb, checksum_at, ip.total_bytes_be, total_bytes_be, 2) ||
               np_ip4_checksum_replace(skb, checksum_at, ip.fragment_be, whole, 2) ||
               np_store_bytes(skb, at + __builtin_offsetof(struct np_ip4_header, total_bytes_be), &total_bytes_be, 2,
                              0) ||
               np_store_bytes(skb, at + __builtin_offsetof(struct np_ip4_header, fragment_be), &whole, 2, 0);
    }
    __be16 payload_be = np_host16((__u16)(header_bytes - sizeof(struct np_ip6_header) + udp_bytes));
    __be16 whole = 0;
    const __u32 fragment_at = packet->fragment_start - (__u32)sizeof(struct np_ip6_fragment);
    return np_store_bytes(skb, at + __builtin_offsetof(struct np_ip6_header, payload_bytes_be), &payload_be, 2,
                          BPF_F_RECOMPUTE_CSUM) ||
           np_store_bytes(skb, fragment_at + __builtin_offsetof(struct np_ip6_fragment, offset_be), &whole, 2,
                          BPF_F_RECOMPUTE_CSUM);
}

// Cut the first fragment of an answer. Precondition: np_dns_question_find succeeded. An error leaves a packet that the
// workload discards; its question then times out.
NP_INLINE void np_dns_cut(struct __sk_buff *skb, const struct np_ctx *ctx, struct np_dns *dns)
{
    struct np_packet *packet = ctx->packet;
    __u32 bytes = (NP_DNS_HEADER_BYTES + dns->question_bytes) & 511;
    struct np_udp_header header = {
        .ports = {np_net16(packet->source_port), np_net16(packet->destination_port)},
        .bytes_be = np_host16((__u16)(sizeof(header) + bytes)),
    };
    dns->message[2] |= NP_DNS_FLAG_TRUNCATED >> 8;
    __builtin_memset(dns->message + 6, 0, 6); // no records in any section
    header.checksum_be = np_dns_checksum(packet, dns, &header, bytes);
    np_barrier();
    if (np_change_tail(skb, packet->l4_offset + sizeof(header) + bytes, 0) ||
        np_dns_cut_ip(skb, packet, sizeof(header) + bytes) ||
        np_store_bytes(skb, packet->l4_offset, &header, sizeof(header), BPF_F_RECOMPUTE_CSUM) ||
        np_store_bytes(skb, dns->message_at, dns->message, NP_DNS_HEADER_BYTES, BPF_F_RECOMPUTE_CSUM)) {
        np_dns_count(ctx, NP_REASON_DNS_TOO_LONG);
        return;
    }
    packet->icmp_type = NP_DNS_FRAGMENT_CUT;
    if (packet->version == 4)
        np_fragment_remember(ctx, 4);
    else
        np_fragment_remember(ctx, 6);
    np_dns_count(ctx, NP_REASON_DNS_TRUNCATED);
}
