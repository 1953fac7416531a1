// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The parser: from a frame to addresses, protocol, ports, TCP flags and fragment fields (struct np_packet). The parser
// only reads bytes. Each function returns NP_REASON_NONE or the reason to drop the packet. One source serves both
// families: `version` is the constant 4 or 6, so the compiler removes the code of the other family.
//
// Invariant: each read is bounds-checked against the end of the linear part (skb->data_end). np_parse_frame makes the
// first NP_PULL_BYTES of the frame linear. 2 VLAN tags, the IPv6 header and 8 short extension headers fit into
// NP_PULL_BYTES. A packet with a header beyond these bytes is dropped as NP_REASON_SHORT.
#pragma once

#include "np_abi.h"
#include "np_lang.h"

#define NP_ETHERTYPE_IP4 0x0800
#define NP_ETHERTYPE_ARP 0x0806
#define NP_ETHERTYPE_VLAN 0x8100
#define NP_ETHERTYPE_IP6 0x86dd
#define NP_ETHERTYPE_QINQ 0x88a8

#define NP_PROTOCOL_HOP_BY_HOP 0
#define NP_PROTOCOL_ICMP 1
#define NP_PROTOCOL_IPIP 4
#define NP_PROTOCOL_TCP 6
#define NP_PROTOCOL_UDP 17
#define NP_PROTOCOL_IP6 41
#define NP_PROTOCOL_ROUTING 43
#define NP_PROTOCOL_FRAGMENT 44
#define NP_PROTOCOL_GRE 47
#define NP_PROTOCOL_AUTHENTICATION 51
#define NP_PROTOCOL_ICMPV6 58
#define NP_PROTOCOL_NONE 59
#define NP_PROTOCOL_DESTINATION 60
#define NP_PROTOCOL_SCTP 132

#define NP_TCP_FIN 1
#define NP_TCP_SYN 2
#define NP_TCP_RST 4
#define NP_TCP_ACK 16

struct np_eth_header {
    __u8 destination[6];
    __u8 source[6];
    __be16 type_be;
};

struct np_vlan_header {
    __be16 tag_be;
    __be16 type_be;
};

struct np_ip4_header {
    __u8 version_words; // IP version in the high half; header length in 32-bit words in the low half
    __u8 traffic_class;
    __be16 total_bytes_be;
    __be16 id_be;
    __be16 fragment_be; // flags in the high 3 bits; offset in units of 8 bytes in the others
    __u8 ttl;
    __u8 protocol;
    __be16 checksum_be;
    __u32 source;
    __u32 destination;
};

struct np_ip6_header {
    __u8 version_class;
    __u8 class_label;
    __be16 label_be;
    __be16 payload_bytes_be;
    __u8 next;
    __u8 hop_limit;
    __u32 source[4];
    __u32 destination[4];
};

struct np_ip6_extension {
    __u8 next;
    __u8 length; // length of the header without its first 8 bytes, in units of 8 bytes; AH: in units of 4 bytes
};

struct np_ip6_fragment {
    __u8 next;
    __u8 length; // reserved; in other extension headers this byte is the length
    __be16 offset_be; // offset in the high 13 bits, "more fragments" in the lowest bit
    __u32 id;
};

struct np_ports {
    __be16 source_be;
    __be16 destination_be;
};

struct np_udp_header {
    struct np_ports ports;
    __be16 bytes_be; // length of header and payload
    __be16 checksum_be;
};

struct np_tcp_header {
    struct np_ports ports;
    __u32 sequence;
    __u32 acknowledgement;
    __u8 words; // header length in 32-bit words in the high half
    __u8 flags;
    __be16 window_be;
    __be16 checksum_be;
    __be16 urgent_be;
};

struct np_icmp_header {
    __u8 type;
    __u8 code;
    __be16 checksum_be;
    __be16 id_be;
    __be16 sequence_be;
};

// The part of a fragmented packet that the frame has.
enum np_fragment {
    NP_FRAGMENT_WHOLE = 0, // not a fragment
    NP_FRAGMENT_FIRST = 1, // the fragment with offset 0, which has the transport header, and so the ports
    NP_FRAGMENT_LATER = 2, // any other fragment; its ports are those of the first fragment
};

// How connection tracking treats an ICMP message, by its type.
enum np_icmp_kind {
    NP_ICMP_PLAIN = 0, // belongs to no connection; also the value for every protocol but ICMP
    NP_ICMP_QUERY = 1, // a request, which opens a connection with its identifier as port
    NP_ICMP_ANSWER = 2, // the reply to a query
    NP_ICMP_ERROR = 3, // an error, which carries the header of the packet that caused it
};

// A parsed packet. Addresses are in network order, IPv4 in the first word. Ports are in host order. An offset counts
// from skb->data. The frame begins there, with the link header or, on an interface without link headers, with the
// network header.
struct np_packet {
    __u32 source[4];
    __u32 destination[4];
    __u16 source_port; // an ICMP query has its identifier here
    __u16 destination_port; // an ICMP answer has its identifier here
    __u16 ethertype;
    __u16 l4_offset; // offset of the transport header; until the network header is parsed, of the network header
    __u32 end; // offset of the packet's end, by the length in the IP header; padding may follow
    __u16 fragment_start; // offset behind the IPv6 fragment header, or behind a fragment's IPv4 header; 0: neither
    __u16 fragment_units; // units of 8 bytes: a later fragment's offset, or the end of the first one's headers
    __u8 fragment; // enum np_fragment
    __u8 protocol;
    __u8 tcp_flags;
    __u8 icmp_type;
    __u8 icmp_code;
    __u8 icmp_kind; // enum np_icmp_kind
    __u8 version; // 4 or 6; 0: not IP, or not parsed
    __u8 slow_only; // 1: the fast path never takes the packet: SYN, FIN, RST, ICMP, or fragment
    __u32 fragment_id; // identification field of the fragmented packet, as on the wire
    __u8 hop_limit; // set only for IPv6
    __u8 l4_bytes; // length of the transport header, TCP options included; 0: no transport header was parsed
    __u16 l3_offset; // offset of the network header
};
_Static_assert(sizeof(struct np_packet) == 64, "np_packet is whole words");

// The linear part of the frame: skb->data and skb->data_end.
struct np_bytes {
    void *start;
    void *end;
};

#define NP_OFFSET_MASK 511u // bounds the offset for the verifier; no valid offset exceeds NP_PULL_BYTES + 8

// Offset of the next header to parse. The mask is a bound for the verifier.
NP_INLINE __u32 np_offset(const struct np_packet *packet)
{
    return packet->l4_offset & NP_OFFSET_MASK;
}

// Parse the Ethernet header and VLAN tags. Set ethertype, and set l3_offset and l4_offset to the network header.
// `has_link` 0: the frame begins with the network header.
NP_INLINE int np_parse_frame(struct __sk_buff *skb, struct np_bytes *bytes, struct np_packet *packet, int has_link)
{
    __u32 linear = skb->data_end - skb->data;
    if (NP_UNLIKELY(linear < NP_PULL_BYTES && linear < skb->len))
        bpf_skb_pull_data(skb, skb->len < NP_PULL_BYTES ? skb->len : NP_PULL_BYTES); // failure gives NP_REASON_SHORT
    bytes->start = (void *)(long)skb->data;
    bytes->end = (void *)(long)skb->data_end;

    packet->end = skb->len;
    packet->l3_offset = 0;
    if (NP_UNLIKELY(!has_link)) {
        packet->ethertype = np_host16((__u16)skb->protocol);
        return NP_REASON_NONE;
    }
    struct np_eth_header *eth = bytes->start;
    if ((void *)(eth + 1) > bytes->end)
        return NP_REASON_SHORT;
    __u16 type = np_host16(eth->type_be);
    __u32 offset = sizeof(*eth);
#pragma unroll
    for (int tag = 0; tag < NP_VLAN_TAGS; tag++) {
        if (NP_LIKELY(type != NP_ETHERTYPE_VLAN && type != NP_ETHERTYPE_QINQ))
            break;
        struct np_vlan_header *vlan = bytes->start + offset;
        if ((void *)(vlan + 1) > bytes->end)
            return NP_REASON_SHORT;
        type = np_host16(vlan->type_be);
        offset += sizeof(*vlan);
    }
    packet->ethertype = type;
    packet->l3_offset = packet->l4_offset = offset;
    return NP_REASON_NONE;
}

NP_INLINE int np_parse_ip4(const struct np_bytes *bytes, struct np_packet *packet)
{
    struct np_ip4_header *ip = bytes->start + np_offset(packet);
    if ((void *)(ip + 1) > bytes->end)
        return NP_REASON_SHORT;
    __u32 header_bytes = (ip->version_words & 15) * 4;
    __u32 room = packet->end - packet->l4_offset;
    __u32 total_bytes = np_host16(ip->total_bytes_be);
    __u32 place = ip->fragment_be & np_net16(0x3fff); // the flag "more fragments", and the offset
    if (!total_bytes && !place) // length 0: a GSO packet (BIG TCP) above 64 kB
        total_bytes = room;
    if (ip->version_words >> 4 != 4 || header_bytes < sizeof(*ip) || total_bytes < header_bytes || total_bytes > room)
        return NP_REASON_BAD_IP;
    packet->end = packet->l4_offset + total_bytes;
    packet->version = 4;
    packet->source[0] = ip->source;
    packet->destination[0] = ip->destination;
    packet->protocol = ip->protocol;
    packet->l4_offset += header_bytes;
    if (NP_UNLIKELY(place)) {
        packet->fragment = place & np_net16(0x1fff) ? NP_FRAGMENT_LATER : NP_FRAGMENT_FIRST;
        packet->fragment_start = packet->l4_offset;
        packet->fragment_units = np_host16(ip->fragment_be) & 0x1fff;
        packet->fragment_id = ip->id_be;
        packet->slow_only = 1;
    }
    return NP_REASON_NONE;
}

NP_INLINE int np_is_ip6_extension(__u8 protocol)
{
    return protocol == NP_PROTOCOL_HOP_BY_HOP || protocol == NP_PROTOCOL_ROUTING || protocol == NP_PROTOCOL_FRAGMENT ||
           protocol == NP_PROTOCOL_AUTHENTICATION || protocol == NP_PROTOCOL_DESTINATION;
}

// Parse the extension headers that a Linux receiver parses, AH included, at most NP_IP6_HEADERS of them. An ESP or
// mobility header ends the chain, and counts as the packet's protocol, because the kernel parses no header behind it.
NP_INLINE int np_parse_ip6_headers(const struct np_bytes *bytes, struct np_packet *packet, __u8 next,
                                   __u32 stated_bytes)
{
    __u32 offset = np_offset(packet);
#pragma unroll
    for (int header = 0; header <= NP_IP6_HEADERS; header++) {
        if (next == NP_PROTOCOL_NONE)
            return NP_REASON_NO_NEXT_HEADER;
        if (!np_is_ip6_extension(next)) {
            packet->protocol = next;
            packet->l4_offset = offset;
            return NP_REASON_NONE;
        }
        if (header == NP_IP6_HEADERS || packet->fragment == NP_FRAGMENT_LATER)
            break;
        struct np_ip6_extension *extension = bytes->start + offset;
        if ((void *)extension + sizeof(struct np_ip6_fragment) > bytes->end ||
            offset + sizeof(struct np_ip6_fragment) > packet->end)
            return NP_REASON_SHORT;
        if (next == NP_PROTOCOL_FRAGMENT) {
            struct np_ip6_fragment *fragment = (void *)extension;
            __u32 place = fragment->offset_be & np_net16(0xfff9);
            if (packet->fragment_start) // a second fragment header: no host sends such a packet legitimately
                return NP_REASON_IP6_HEADERS;
            packet->fragment_id = fragment->id;
            offset += sizeof(*fragment);
            packet->fragment_start = offset;
            if (place) { // otherwise it is an atomic fragment (RFC 6946), which is a whole packet
                if (!stated_bytes)
                    return NP_REASON_BAD_IP;
                packet->fragment = place & np_net16(0xfff8) ? NP_FRAGMENT_LATER : NP_FRAGMENT_FIRST;
                packet->fragment_units = np_host16(fragment->offset_be) >> 3;
                packet->slow_only = 1;
            }
        } else if (next == NP_PROTOCOL_AUTHENTICATION) {
            offset += (extension->length + 2) * 4;
        } else {
            offset += (extension->length + 1) * 8;
        }
        next = extension->next;
        if (offset > packet->end)
            return NP_REASON_SHORT;
        // no header follows: `next` is the type of the first header in the fragmented part
        if (packet->fragment == NP_FRAGMENT_LATER) {
            packet->protocol = next;
            packet->l4_offset = offset;
            return NP_REASON_NONE;
        }
        if (offset > NP_PULL_BYTES)
            return NP_REASON_SHORT;
    }
    return NP_REASON_IP6_HEADERS;
}

NP_INLINE int np_parse_ip6(const struct np_bytes *bytes, struct np_packet *packet)
{
    struct np_ip6_header *ip = bytes->start + np_offset(packet);
    if ((void *)(ip + 1) > bytes->end)
        return NP_REASON_SHORT;
    __u32 room = packet->end - packet->l4_offset - sizeof(*ip);
    __u32 stated_bytes = np_host16(ip->payload_bytes_be); // 0: a GSO packet (BIG TCP) above 64 kB
    if (ip->version_class >> 4 != 6 || stated_bytes > room)
        return NP_REASON_BAD_IP;
    packet->version = 6;
    if (stated_bytes)
        packet->end -= room - stated_bytes;
    __builtin_memcpy(packet->source, ip->source, sizeof(packet->source));
    __builtin_memcpy(packet->destination, ip->destination, sizeof(packet->destination));
    packet->hop_limit = ip->hop_limit;
    packet->l4_offset += sizeof(*ip);
    if (NP_LIKELY(ip->next == NP_PROTOCOL_TCP || ip->next == NP_PROTOCOL_UDP)) {
        packet->protocol = ip->next;
        return NP_REASON_NONE;
    }
    return np_parse_ip6_headers(bytes, packet, ip->next, stated_bytes);
}

// The kind of an ICMP message by its type. A type that is not listed belongs to no connection: policy judges each such
// message on its own.
NP_INLINE __u8 np_icmp_kind_of(__u8 type, const int version)
{
    if (version == 6) {
        if (type == 128)
            return NP_ICMP_QUERY;
        if (type == 129)
            return NP_ICMP_ANSWER;
        // 1: unreachable, 2: packet too big, 3: time exceeded, 4: parameter problem
        return type >= 1 && type <= 4 ? NP_ICMP_ERROR : NP_ICMP_PLAIN;
    }
    switch (type) {
    case 8: // echo
    case 13: // timestamp
    case 15: // information
    case 17: // address mask
        return NP_ICMP_QUERY;
    case 0:
    case 14:
    case 16:
    case 18:
        return NP_ICMP_ANSWER;
    case 3: // unreachable
    case 4: // source quench
    case 5: // redirect
    case 11: // time exceeded
    case 12: // parameter problem
        return NP_ICMP_ERROR;
    default:
        return NP_ICMP_PLAIN;
    }
}

NP_INLINE void np_parse_ports(const struct np_ports *ports, struct np_packet *packet)
{
    packet->source_port = np_host16(ports->source_be);
    packet->destination_port = np_host16(ports->destination_be);
}

// Parse ports and TCP flags, or the ICMP header. A later fragment has no transport header: np_fragment.h restores its
// ports.
NP_INLINE int np_parse_l4(const struct np_bytes *bytes, struct np_packet *packet, const int version)
{
    if (packet->fragment == NP_FRAGMENT_LATER)
        return NP_REASON_NONE;
    void *l4 = bytes->start + np_offset(packet);
    __u32 room = packet->end - packet->l4_offset;
    __u32 header_bytes = 8;
    __u8 protocol = packet->protocol;
    if (NP_LIKELY(protocol == NP_PROTOCOL_TCP)) {
        struct np_tcp_header *tcp = l4;
        if ((void *)(tcp + 1) > bytes->end || tcp->words >> 4 < 5 || (tcp->words >> 4) * 4u > room)
            return NP_REASON_BAD_L4;
        header_bytes = (tcp->words >> 4) * 4u;
        np_parse_ports(&tcp->ports, packet);
        packet->tcp_flags = tcp->flags;
        if (tcp->flags & (NP_TCP_SYN | NP_TCP_FIN | NP_TCP_RST))
            packet->slow_only = 1;
    } else if (protocol == NP_PROTOCOL_UDP || protocol == NP_PROTOCOL_SCTP) {
        if (protocol == NP_PROTOCOL_SCTP)
            header_bytes = 12;
        if (l4 + 8 > bytes->end || header_bytes > room) // of an SCTP header, the parser reads only the ports
            return NP_REASON_BAD_L4;
        np_parse_ports(l4, packet);
    } else if (protocol == (version == 4 ? NP_PROTOCOL_ICMP : NP_PROTOCOL_ICMPV6)) {
        struct np_icmp_header *icmp = l4;
        if ((void *)(icmp + 1) > bytes->end || sizeof(*icmp) > room)
            return NP_REASON_BAD_L4;
        packet->icmp_type = icmp->type;
        packet->icmp_code = icmp->code;
        packet->icmp_kind = np_icmp_kind_of(icmp->type, version);
        packet->slow_only = 1;
        if (packet->icmp_kind == NP_ICMP_QUERY)
            packet->source_port = np_host16(icmp->id_be);
        else if (packet->icmp_kind == NP_ICMP_ANSWER)
            packet->destination_port = np_host16(icmp->id_be);
    } else {
        header_bytes = 0;
    }
    packet->l4_bytes = header_bytes;
    if (NP_UNLIKELY(packet->fragment == NP_FRAGMENT_FIRST))
        packet->fragment_units = (packet->l4_offset - packet->fragment_start + header_bytes + 7) / 8;
    return NP_REASON_NONE;
}

NP_INLINE int np_parse_ip(const struct np_bytes *bytes, struct np_packet *packet, const int version)
{
    int reason = version == 4 ? np_parse_ip4(bytes, packet) : np_parse_ip6(bytes, packet);
    if (reason)
        return reason;
    return np_parse_l4(bytes, packet, version);
}

// Whether the packet is a DHCP client's message to all DHCP servers on the client's link.
NP_INLINE int np_is_dhcp_request(const struct np_packet *packet, const int version)
{
    const __u32 *to = packet->destination;
    if (NP_LIKELY(packet->protocol != NP_PROTOCOL_UDP) || packet->fragment != NP_FRAGMENT_WHOLE)
        return 0;
    if (version == 4)
        return packet->source_port == 68 && packet->destination_port == 67 && to[0] == 0xffffffff;
    return packet->source_port == 546 && packet->destination_port == 547 && to[0] == np_host32(0xff020000) && !to[1] &&
           !to[2] && to[3] == np_host32(0x00010002); // to ff02::1:2
}
