// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Fields of the kernel's sk_buff that __sk_buff lacks: whether a device will write the packet's checksum, and where.
//
// The loader fills in the offsets of these fields on the running kernel (netpol_loader.kernel.facts), and the way to
// read them. One way is the kernel function bpf_cast_to_kern_ctx, which costs nothing. Kernels before 6.2 lack this
// function; there the program copies the fields.
//
// With checksum offload, the device writes the checksum at an offset that the packet's sender chooses. The sender may
// be a virtual machine or a packet socket. A sender could choose the offset of a port or an address; then the network
// would see another packet than policy judged.
#pragma once

#include "np_ctx.h"
#include "np_lang.h"
#include "np_parse.h"

#define NP_CHECKSUM_PARTIAL 3 // the kernel's CHECKSUM_PARTIAL

// np_checksum_at returns the offset from the packet's beginning at which a device will write a checksum, or
// NP_NO_CHECKSUM.
#define NP_NO_CHECKSUM (~0u)

NP_INLINE __u32 np_checksum_in(const void *fields)
{
    __u32 summed = *(const __u8 *)(fields + NP_KERNEL(NP_KERNEL_SUMMED)) >> NP_KERNEL(NP_KERNEL_SUMMED_SHIFT) & 3;
    if (summed != NP_CHECKSUM_PARTIAL)
        return NP_NO_CHECKSUM;
    __u32 start = *(const __u16 *)(fields + NP_KERNEL(NP_KERNEL_CSUM_START));
    __u32 offset = *(const __u16 *)(fields + NP_KERNEL(NP_KERNEL_CSUM_OFFSET));
    __u32 begin = *(const __u16 *)(fields + NP_KERNEL(NP_KERNEL_MAC_HEADER));
    return (start + offset - begin) & 0x7fffffff;
}

NP_INLINE __u32 np_checksum_at(struct __sk_buff *skb)
{
    if (NP_LIKELY(NP_KERNEL(NP_KERNEL_CAST)))
        return np_checksum_in(np_kernel_skb(skb) + NP_KERNEL(NP_KERNEL_FIRST));
    __u8 copy[NP_KERNEL_BYTES];
    if (np_probe_read_kernel(copy, sizeof(copy), (void *)skb + NP_KERNEL(NP_KERNEL_FIRST)))
        return 0; // cannot happen; np_checksum_misaims refuses a checksum at offset 0, so the packet is dropped
    return np_checksum_in(copy);
}

// The offset of the checksum field in a transport header; NP_NO_CHECKSUM: the protocol has no known checksum field.
NP_INLINE __u32 np_checksum_place(__u8 protocol)
{
    switch (protocol) {
    case NP_PROTOCOL_TCP:
        return 16;
    case NP_PROTOCOL_UDP:
        return 6;
    case NP_PROTOCOL_SCTP:
        return 8;
    case NP_PROTOCOL_ICMP:
    case NP_PROTOCOL_ICMPV6:
        return 2;
    default:
        return NP_NO_CHECKSUM;
    }
}

// Whether checksum offload would change bytes that policy judged. The device may write to the checksum field. It may
// also write into the payload, unless the packet is an ICMP error, because policy judges the payload of an error.
NP_INLINE int np_checksum_misaims(struct __sk_buff *skb, const struct np_packet *packet)
{
    __u32 at = np_checksum_at(skb);
    __u32 header = packet->l4_offset;
    // A write behind the transport header is harmless, except in an ICMP error: policy also judges its payload.
    if (NP_LIKELY(at >= header + packet->l4_bytes && packet->icmp_kind != NP_ICMP_ERROR) || at == NP_NO_CHECKSUM)
        return 0;
    __u32 place = np_checksum_place(packet->protocol);
    return place == NP_NO_CHECKSUM || at != header + place;
}
