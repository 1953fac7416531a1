// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Link-local control messages: ARP, IPv6 neighbour and listener discovery, DHCP. No host can communicate without these
// messages, so they pass before policy. Because policy never sees them, the program must check that each one is
// genuine.
//
// passes    a well-formed message that no router forwards: about the sender itself, or a question about the link
// dropped   a message in the name of another host, a router or a DHCP server
// policy    every other packet of these types
//
// A message that a workload sends is checked in full at the workload's own interface (TC ingress). For any other
// message, the program checks only the hop limit. If a workload of this node sent it, the workload's own hook has
// checked it. If it comes from outside the node, this program cannot check the sender.
#pragma once

#include "np_endpoint.h"
#include "np_ctx.h"
#include "np_parse.h"

#define NP_MLD_QUERY 130
#define NP_MLD_DONE 132
#define NP_ROUTER_SOLICITATION 133
#define NP_ROUTER_ADVERTISEMENT 134
#define NP_NEIGHBOUR_SOLICITATION 135
#define NP_NEIGHBOUR_ADVERTISEMENT 136
#define NP_REDIRECT6 137
#define NP_MLD2_REPORT 143
#define NP_REDIRECT4 5 // type of an ICMP (IPv4) message

#define NP_LINK_HOP_LIMIT 255 // proves that no router has forwarded the message
#define NP_MLD_HOP_LIMIT 1 // no router will forward the message
#define NP_LINK_OPTIONS 3 // most options of a message; policy judges a message with more
#define NP_OPTION_SOURCE 1 // source link-layer address
#define NP_OPTION_TARGET 2 // target link-layer address
#define NP_OPTION_NONCE 14 // nonce: tells a node's own looped-back message from a duplicate address (RFC 7527)

#define NP_ROUTER_ALERT 0x0502
#define NP_PAD_NOTHING 0x0100
#define NP_MLD_BYTES 24 // an MLDv1 message
#define NP_MLD2_QUERY 28 // an MLDv2 query without sources
#define NP_MLD2_RECORD 20 // a record of an MLDv2 report, without sources
#define NP_MLD2_RECORDS 32 // most records of an MLDv2 report; policy judges one with more. Hosts join about five groups
#define NP_ARP_PADDING 18 // bytes that pad an ARP frame to the minimum of Ethernet

#define NP_FAMILY_IP6 10
#define NP_FIB_NO_NEIGHBOUR 7 // BPF_FIB_LKUP_RET_NO_NEIGH: there is a route, but no neighbour entry

struct np_arp {
    __be16 hardware_be;
    __be16 protocol_be;
    __u8 hardware_bytes;
    __u8 protocol_bytes;
    __be16 operation_be;
    __u8 sender_mac[6];
    __u8 sender[4];
    __u8 target_mac[6];
    __u8 target[4];
};
_Static_assert(sizeof(struct np_arp) == 28, "np_arp");

// A hop-by-hop options header with a router alert and no other option.
struct np_link_alert {
    __u8 next;
    __u8 length;
    __be16 options_be; // type and length of the router alert option
    __u16 value;
    __be16 pad_be;
};

// The first bytes of a record of an MLDv2 report.
struct np_link_record {
    __u8 type;
    __u8 auxiliary;
    __be16 sources_be;
    __u8 group[4];
};

struct np_link_option {
    __u8 type;
    __u8 length; // length of the option in units of 8 bytes
    __u8 mac[6];
};

NP_INLINE int np_is_workloads_own(const struct np_ctx *ctx, const int hook)
{
    return hook == NP_HOOK_INGRESS && !(ctx->ep->endpoint_flags & NP_ENDPOINT_HOST);
}

NP_INLINE int np_is_unspecified(const __u32 *address)
{
    return !(address[0] | address[1] | address[2] | address[3]);
}

// Whether the address is a multicast group of link-local scope. No router forwards packets to such a group.
NP_INLINE int np_is_link_group(const __u32 *address)
{
    return (address[0] & np_host32(0xff0f0000)) == np_host32(0xff020000);
}

// Whether the frame ends where the IP packet ends, without padding.
NP_INLINE int np_is_alone(const struct np_ctx *ctx)
{
    return ctx->packet->end == ctx->arrival->frame_bytes;
}

// Whether neither the node nor a workload with a known interface has the address.
NP_INLINE int np_is_nobodys(struct np_ctx *ctx, const __u32 *address, const int version)
{
    if (np_local_flags(ctx, address, version) & NP_LOCAL_OWN)
        return 0;
    return !np_ifindex_of(ctx, address, version);
}

// Whether the workload may say, by ARP or neighbour discovery, that it has the address: one that it owns or may borrow,
// or a link-local address that nobody else has. While the interface has no endpoint, the workload may claim only such a
// link-local address.
NP_INLINE int np_may_claim(struct np_ctx *ctx, const __u32 *address, const int version)
{
    if (!ctx->ep->missing && (np_is_own(ctx, address, version) || np_may_borrow(ctx, address, version)))
        return 1;
    return version == 6 && np_is_link_local(address) && np_is_nobodys(ctx, address, version);
}

// Whether a local workload on the same link as this interface has the address.
NP_INLINE int np_is_beside(struct np_ctx *ctx, const __u32 *address)
{
    const struct np_ifindex *place = np_ifindex_of(ctx, address, 6);
    const struct np_endpoint *row = place ? np_endpoint_lookup(place->ifindex) : 0;
    return row && row->link == ctx->ep->link;
}

// Whether the address is on the link of this interface. A link-local address is on the link. So is an address that a
// workload on this link has, or that the FIB routes to this link without a gateway. If the node does not forward, the
// FIB lookup fails, and no further address is on the link.
//
// The node's own addresses always count as on the link, because np_local has at most one interface of an address, but
// container networks put one gateway address on many interfaces, or put the gateway beside a bridge. This is safe: a
// message to or about the node goes no further than the node and the link.
NP_INLINE int np_is_on_link(struct __sk_buff *skb, struct np_ctx *ctx, const __u32 *address)
{
    if (np_is_link_local(address))
        return 1;
    if (ctx->ep->missing)
        return 0;
    if (np_is_own(ctx, address, 6) || np_is_beside(ctx, address))
        return 1;
    const struct np_local *local = np_local_find(ctx, address, 6);
    if (local && local->flags & NP_LOCAL_OWN)
        return 1;
    struct bpf_fib_lookup route = {.family = NP_FAMILY_IP6, .ifindex = ctx->ep->link};
    __builtin_memcpy(route.ipv6_src, ctx->packet->source, sizeof(route.ipv6_src));
    __builtin_memcpy(route.ipv6_dst, address, sizeof(route.ipv6_dst));
    long host_version = np_fib_lookup(skb, &route, sizeof(route), 0);
    if (host_version && host_version != NP_FIB_NO_NEIGHBOUR)
        return 0;
    __u32 other = route.ipv6_dst[0] ^ address[0]; // bpf_fib_lookup() overwrites ipv6_dst with a gateway
    other |= (route.ipv6_dst[1] ^ address[1]) | (route.ipv6_dst[2] ^ address[2]) | (route.ipv6_dst[3] ^ address[3]);
    return !other && route.ifindex == ctx->ep->link;
}

// Whether every option up to the end of the packet is the sender's own link-layer address or a nonce.
NP_INLINE int np_link_options_fit(struct __sk_buff *skb, const struct np_ctx *ctx, __u32 offset)
{
    struct np_link_option option;
    __u8 mac[6];
    __u32 end = ctx->packet->end;
    int has_link = !(ctx->ep->endpoint_flags & NP_ENDPOINT_LAYER3);
    if (bpf_skb_load_bytes(skb, __builtin_offsetof(struct np_eth_header, source), mac, sizeof(mac)))
        return 0;
#pragma unroll
    for (int count = 0; count < NP_LINK_OPTIONS; count++) {
        if (offset == end)
            return 1;
        if (offset + sizeof(option) > end || bpf_skb_load_bytes(skb, offset, &option, sizeof(option)) ||
            option.length != 1)
            return 0;
        if (option.type == NP_OPTION_SOURCE || option.type == NP_OPTION_TARGET) {
            int is_own = option.mac[0] == mac[0] && option.mac[1] == mac[1] && option.mac[2] == mac[2] &&
                         option.mac[3] == mac[3] && option.mac[4] == mac[4] && option.mac[5] == mac[5];
            if (!has_link || !is_own || np_is_unspecified(ctx->packet->source))
                return 0;
        } else if (option.type != NP_OPTION_NONCE) {
            return 0;
        }
        offset += sizeof(option);
    }
    return offset == end;
}

// Check a neighbour discovery message that a workload sends; its hop limit was checked before. Receivers accept an
// advertisement even if the rest of the packet is irregular, so the advertised target is checked first. Returns the
// same as np_link_message.
NP_INLINE int np_link_spoken(struct __sk_buff *skb, struct np_ctx *ctx)
{
    const struct np_packet *packet = ctx->packet;
    const __u32 *source = packet->source;
    const __u32 *destination = packet->destination;
    int is_nobody = np_is_unspecified(source);
    int has_target = packet->icmp_type != NP_ROUTER_SOLICITATION;
    int forged = ctx->ep->endpoint_flags & NP_ENDPOINT_ROUTES ? NP_REASON_NONE : NP_REASON_LINK_FORGED;
    __u32 offset = packet->l4_offset + sizeof(struct np_icmp_header);
    __u32 target[4] = {};
    if (ctx->ep->missing)
        forged = ctx->ep->missing;
    if (has_target) {
        if (offset + sizeof(target) > packet->end || bpf_skb_load_bytes(skb, offset, target, sizeof(target)))
            return NP_REASON_NONE;
        offset += sizeof(target);
        if (packet->icmp_type == NP_NEIGHBOUR_ADVERTISEMENT && !np_may_claim(ctx, target, 6))
            return forged;
    }
    if (packet->l4_offset != packet->l3_offset + sizeof(struct np_ip6_header) || !np_is_alone(ctx))
        return NP_REASON_NONE;
    if (!is_nobody && !np_may_claim(ctx, source, 6))
        return NP_REASON_NONE;
    if (!np_is_link_group(destination) && !np_is_on_link(skb, ctx, destination))
        return NP_REASON_NONE;
    if (packet->icmp_type == NP_NEIGHBOUR_SOLICITATION) {
        if (is_nobody && !np_may_claim(ctx, target, 6))
            return forged;
        if (!is_nobody && !ctx->ep->missing && !np_is_on_link(skb, ctx, target))
            return NP_REASON_NONE;
    }
    return np_link_options_fit(skb, ctx, offset) ? NP_REASON_NEIGHBOUR : NP_REASON_NONE;
}

// Whether every record of an MLDv2 report names a multicast group, without sources and without auxiliary data.
NP_INLINE int np_are_records_plain(struct __sk_buff *skb, __u32 offset, __u32 count)
{
#pragma clang loop unroll(disable)
    for (__u32 at = 0; at < NP_MLD2_RECORDS; at++) {
        struct np_link_record record;
        if (at == count)
            return 1;
        if (bpf_skb_load_bytes(skb, offset, &record, sizeof(record)) || record.auxiliary || record.sources_be ||
            record.group[0] != 0xff)
            return 0;
        offset += NP_MLD2_RECORD;
    }
    return count == NP_MLD2_RECORDS;
}

// Whether a workload's listener message has the length that its type requires, and no extension header but a router
// alert (RFC 2711).
NP_INLINE int np_is_listener_whole(struct __sk_buff *skb, const struct np_ctx *ctx)
{
    const struct np_packet *packet = ctx->packet;
    __u32 begin = packet->l3_offset + sizeof(struct np_ip6_header);
    __u32 length = packet->end - packet->l4_offset;
    struct np_icmp_header message;
    if (packet->l4_offset != begin) {
        struct np_link_alert alert;
        __u8 next;
        if (packet->l4_offset != begin + sizeof(alert) || bpf_skb_load_bytes(skb, begin, &alert, sizeof(alert)) ||
            bpf_skb_load_bytes(skb, packet->l3_offset + __builtin_offsetof(struct np_ip6_header, next), &next, 1) ||
            next != NP_PROTOCOL_HOP_BY_HOP || alert.options_be != np_net16(NP_ROUTER_ALERT) || alert.value ||
            alert.pad_be != np_net16(NP_PAD_NOTHING))
            return 0;
    }
    if (!np_is_alone(ctx) || bpf_skb_load_bytes(skb, packet->l4_offset, &message, sizeof(message)))
        return 0;
    if (packet->icmp_type == NP_MLD2_REPORT) {
        __u32 count = np_host16(message.sequence_be);
        return length == sizeof(message) + count * NP_MLD2_RECORD &&
               np_are_records_plain(skb, packet->l4_offset + sizeof(message), count);
    }
    return length == NP_MLD_BYTES || (packet->icmp_type == NP_MLD_QUERY && length == NP_MLD2_QUERY);
}

// Whether a multicast listener report, done or query cannot leave the link and, if a workload sends it, is genuine.
NP_INLINE int np_is_listener_message(struct __sk_buff *skb, struct np_ctx *ctx, int is_workloads_own)
{
    const struct np_packet *packet = ctx->packet;
    const __u32 *source = packet->source;
    if (packet->hop_limit != NP_MLD_HOP_LIMIT || !np_is_many(packet->destination, 6))
        return 0;
    if (is_workloads_own && !np_is_listener_whole(skb, ctx))
        return 0;
    if (np_is_unspecified(source))
        return 1;
    return np_is_link_local(source) && (!is_workloads_own || np_may_claim(ctx, source, 6));
}

// Judge an ICMPv6 message. Returns NP_REASON_NEIGHBOUR if the message passes without policy, NP_REASON_NONE if policy
// must judge it, otherwise the reason to drop it: NP_REASON_LINK_FORGED, or why the interface has no endpoint.
NP_INLINE int np_link_message(struct __sk_buff *skb, struct np_ctx *ctx, const int hook)
{
    const struct np_packet *packet = ctx->packet;
    if (NP_LIKELY(packet->protocol != NP_PROTOCOL_ICMPV6))
        return NP_REASON_NONE;
    int is_workloads_own = np_is_workloads_own(ctx, hook);
    __u8 type = packet->icmp_type;
    if (is_workloads_own && (type == NP_ROUTER_ADVERTISEMENT || type == NP_REDIRECT6))
        return ctx->ep->endpoint_flags & NP_ENDPOINT_ROUTES ? NP_REASON_NONE : NP_REASON_LINK_FORGED;
    if (packet->icmp_code || packet->fragment != NP_FRAGMENT_WHOLE)
        return NP_REASON_NONE;
    if ((type >= NP_MLD_QUERY && type <= NP_MLD_DONE) || type == NP_MLD2_REPORT)
        return np_is_listener_message(skb, ctx, is_workloads_own) ? NP_REASON_NEIGHBOUR : NP_REASON_NONE;
    if ((type != NP_ROUTER_SOLICITATION && type != NP_NEIGHBOUR_SOLICITATION && type != NP_NEIGHBOUR_ADVERTISEMENT) ||
        packet->hop_limit != NP_LINK_HOP_LIMIT)
        return NP_REASON_NONE;
    if (is_workloads_own)
        return np_link_spoken(skb, ctx);
    if (hook == NP_HOOK_EGRESS) // the hop limit proves that no router forwarded the message
        return NP_REASON_NEIGHBOUR;
    int stays = np_is_many(packet->destination, 6) || np_is_link_local(packet->destination) ||
                np_is_local(ctx, packet->destination, 6);
    return stays ? NP_REASON_NEIGHBOUR : NP_REASON_NONE;
}

// Whether the frame ends with the ARP packet, or has zeros after it up to the minimum length of an Ethernet frame.
NP_INLINE int np_is_arp_whole(struct __sk_buff *skb, const struct np_ctx *ctx)
{
    __u8 padding[NP_ARP_PADDING];
    __u32 end = ctx->packet->l3_offset + sizeof(struct np_arp);
    if (ctx->arrival->frame_bytes == end)
        return 1;
    if (ctx->arrival->frame_bytes != end + sizeof(padding) || bpf_skb_load_bytes(skb, end, padding, sizeof(padding)))
        return 0;
    __u8 any = 0;
#pragma unroll
    for (__u32 at = 0; at < sizeof(padding); at++)
        any |= padding[at];
    return !any;
}

// Judge an ARP packet. A workload must be allowed to claim the sender address or, in an ARP probe (sender 0.0.0.0), the
// target address. Otherwise the packet is dropped as NP_REASON_LINK_FORGED, unless the workload is a router.
NP_INLINE int np_link_arp(struct __sk_buff *skb, struct np_ctx *ctx, const int hook)
{
    struct np_arp arp;
    __u8 mac[6];
    __u32 sender;
    __u32 target;
    if (!np_is_workloads_own(ctx, hook) || ctx->ep->endpoint_flags & NP_ENDPOINT_ROUTES)
        return NP_REASON_ARP;
    ctx->ep->direction = NP_DIRECTION_EGRESS;
    if (ctx->ep->endpoint_flags & NP_ENDPOINT_LAYER3) // such an interface has no hardware addresses, so it needs no ARP
        return NP_REASON_LINK_FORGED;
    if (!np_is_arp_whole(skb, ctx) || bpf_skb_load_bytes(skb, ctx->packet->l3_offset, &arp, sizeof(arp)) ||
        bpf_skb_load_bytes(skb, __builtin_offsetof(struct np_eth_header, source), mac, sizeof(mac)))
        return NP_REASON_LINK_FORGED;
    if (arp.hardware_be != np_net16(1) || arp.protocol_be != np_net16(NP_ETHERTYPE_IP4) || arp.hardware_bytes != 6 ||
        arp.protocol_bytes != 4)
        return NP_REASON_LINK_FORGED;
    int is_own = arp.sender_mac[0] == mac[0] && arp.sender_mac[1] == mac[1] && arp.sender_mac[2] == mac[2] &&
                 arp.sender_mac[3] == mac[3] && arp.sender_mac[4] == mac[4] && arp.sender_mac[5] == mac[5];
    __builtin_memcpy(&sender, arp.sender, sizeof(sender));
    __builtin_memcpy(&target, arp.target, sizeof(target));
    const __u32 *claimed = sender ? &sender : &target;
    if (ctx->ep->missing) // an interface without an endpoint may only probe for an address that nobody has
        return is_own && !sender && np_is_nobodys(ctx, claimed, 4) ? NP_REASON_ARP : ctx->ep->missing;
    return is_own && np_may_claim(ctx, claimed, 4) ? NP_REASON_ARP : NP_REASON_LINK_FORGED;
}

// Whether a workload sends a message that only a router (redirect) or a DHCP server may send.
NP_INLINE int np_is_forged(const struct np_ctx *ctx, const int hook, const int version)
{
    const struct np_packet *packet = ctx->packet;
    if (!np_is_workloads_own(ctx, hook) || ctx->ep->endpoint_flags & NP_ENDPOINT_ROUTES)
        return 0;
    if (packet->protocol == NP_PROTOCOL_UDP)
        return version == 4 ? packet->source_port == 67 && packet->destination_port == 68
                            : packet->source_port == 547 && packet->destination_port == 546;
    return version == 4 && packet->protocol == NP_PROTOCOL_ICMP && packet->icmp_type == NP_REDIRECT4;
}
