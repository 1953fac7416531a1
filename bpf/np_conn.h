// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Connections: which one a packet belongs to, whether that is still alive, how it moves on.  Knows nothing of policy: a
// connection only says under which generation policy allowed it, and who may re-judge it with the first packet's tuple.
//
// Two tables.  np_young holds connections without a reply, np_conn those with one: a flood of new flows evicts only
// young ones.  The first reply moves an entry; until then each packet pays two look-ups.
#pragma once

#include "np_flow.h"
#include "np_maps.h"

#define NP_ICMP_HEADER_BYTES 8

// What was found under a key. No pointers to the entries: policy may be asked in between, and the verifier would walk
// that once for each combination of them.
struct np_found {
    __u8 is_known; // a connection that is alive and covers the packet
    __u8 is_young; // it is in np_young
    __u8 has_stale; // an entry of np_conn that is not it
    __u8 pad;
};

// The leg's key for a pair of addresses and ports; `from_endpoint`: the source is the endpoint's side.
NP_INLINE void np_conn_key_set(union np_conn_key *key, const struct np_flow *flow, const __u32 *source,
                               const __u32 *destination, __u16 source_port, __u16 destination_port, __u8 protocol,
                               int from_endpoint, const int version)
{
    __u16 local_port = from_endpoint ? source_port : destination_port;
    __u16 remote_port = from_endpoint ? destination_port : source_port;
    __u8 *local;
    __u8 *remote;
    int words;
    if (version == 4) {
        key->v4 = (struct np_conn4_key){.endpoint = flow->leg->endpoint,
                                        .local_port = local_port,
                                        .remote_port = remote_port,
                                        .protocol = protocol};
        local = key->v4.local;
        remote = key->v4.remote;
        words = 1;
    } else {
        key->v6 = (struct np_conn6_key){.endpoint = flow->leg->endpoint,
                                        .local_port = local_port,
                                        .remote_port = remote_port,
                                        .protocol = protocol};
        local = key->v6.local;
        remote = key->v6.remote;
        words = 4;
    }
#pragma unroll
    for (int word = 0; word < words; word++) { // selects words, not pointers: the verifier loses track of those
        __u32 ours = from_endpoint ? source[word] : destination[word];
        __u32 theirs = from_endpoint ? destination[word] : source[word];
        __builtin_memcpy(local + word * 4, &ours, 4);
        __builtin_memcpy(remote + word * 4, &theirs, 4);
    }
}

NP_INLINE void np_conn_key_of(union np_conn_key *key, const struct np_flow *flow, const int version)
{
    const struct np_packet *packet = flow->packet;
    np_conn_key_set(key, flow, packet->source, packet->destination, packet->source_port, packet->destination_port,
                    packet->protocol, flow->leg->direction == NP_DIRECTION_EGRESS, version);
}

// For an ICMP error: the leg of the packet it is about.  That packet went the other way, so its source is the
// endpoint's side when the error comes towards the endpoint.  Returns NP_REASON_RELATED; NP_REASON_NONE when the error
// carries no readable header (then it is about nothing, and policy judges it like any other message); or
// NP_REASON_ICMP_UNRELATED when it is not addressed to the sender of that packet: else a workload could send errors
// with any content to anyone as long as it has one connection.
NP_INLINE int np_conn_key_inner(struct __sk_buff *skb, union np_conn_key *key, const struct np_flow *flow,
                                const int version)
{
    __u32 offset = flow->packet->l4_offset + NP_ICMP_HEADER_BYTES;
    __u32 source[4] = {};
    __u32 destination[4] = {};
    __u8 protocol;
    if (version == 4) {
        struct np_ip4_header ip;
        if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.version_words >> 4 != 4 ||
            (ip.version_words & 15) < 5 || ip.fragment_be & np_net16(0x1fff))
            return NP_REASON_NONE;
        source[0] = ip.source;
        destination[0] = ip.destination;
        protocol = ip.protocol;
        offset += (ip.version_words & 15) * 4;
    } else {
        struct np_ip6_header ip;
        if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.version_class >> 4 != 6)
            return NP_REASON_NONE;
        __builtin_memcpy(source, ip.source, sizeof(source));
        __builtin_memcpy(destination, ip.destination, sizeof(destination));
        protocol = ip.next;
        offset += sizeof(ip);
#pragma unroll
        for (int header = 0; header < NP_IP6_HEADERS; header++) {
            struct np_ip6_fragment extension; // of the least size that any has
            if (!np_is_ip6_extension(protocol))
                break;
            if (bpf_skb_load_bytes(skb, offset, &extension, sizeof(extension)))
                return NP_REASON_NONE;
            if (protocol == NP_PROTOCOL_FRAGMENT) {
                if (extension.offset_be & np_net16(0xfff8))
                    return NP_REASON_NONE;
                offset += sizeof(extension);
            } else if (protocol == NP_PROTOCOL_AUTHENTICATION) {
                offset += (extension.length + 2) * 4;
            } else {
                offset += (extension.length + 1) * 8;
            }
            protocol = extension.next;
        }
        if (np_is_ip6_extension(protocol))
            return NP_REASON_NONE;
    }

    __u16 source_port = 0;
    __u16 destination_port = 0;
    struct np_icmp_header l4; // eight bytes: of any protocol, the most an error must carry
    if (offset + sizeof(l4) > flow->packet->end || bpf_skb_load_bytes(skb, offset, &l4, sizeof(l4)))
        return NP_REASON_NONE;
    __u32 other = source[0] ^ flow->packet->destination[0];
    if (version == 6)
        other |= (source[1] ^ flow->packet->destination[1]) | (source[2] ^ flow->packet->destination[2]) |
                 (source[3] ^ flow->packet->destination[3]);
    if (other)
        return NP_REASON_ICMP_UNRELATED;
    if (protocol == NP_PROTOCOL_TCP || protocol == NP_PROTOCOL_UDP || protocol == NP_PROTOCOL_SCTP) {
        struct np_ports ports;
        __builtin_memcpy(&ports, &l4, sizeof(ports));
        source_port = np_host16(ports.source_be);
        destination_port = np_host16(ports.destination_be);
    } else if (protocol == (version == 4 ? NP_PROTOCOL_ICMP : NP_PROTOCOL_ICMPV6)) {
        __u8 kind = np_icmp_kind_of(l4.type, version);
        if (kind == NP_ICMP_QUERY)
            source_port = np_host16(l4.id_be);
        else if (kind == NP_ICMP_ANSWER)
            destination_port = np_host16(l4.id_be);
    }
    np_conn_key_set(key, flow, source, destination, source_port, destination_port, protocol,
                    flow->leg->direction == NP_DIRECTION_INGRESS, version);
    return NP_REASON_RELATED;
}

NP_INLINE int np_conn_is_alive(const struct np_conn *conn, const struct np_flow *flow)
{
    // seen_jiffies may be a tick ahead of us when another CPU wrote it; the difference is then negative, and small
    return (long long)(flow->now_jiffies - conn->seen_jiffies) <=
           (long long)flow->config->timeout_jiffies[conn->state & (NP_CONN_STATES - 1)];
}

// An initial SYN.  It never belongs to a connection: policy decides it each time.
NP_INLINE int np_conn_is_initial(const struct np_packet *packet)
{
    return packet->protocol == NP_PROTOCOL_TCP && (packet->tcp_flags & (NP_TCP_SYN | NP_TCP_ACK)) == NP_TCP_SYN;
}

// Whether the connection speaks for the packet, which is no initial SYN.  An ICMP query must ask what the first one
// asked, an answer must answer it, an error must be about it (then its key is the connection's); all other ICMP stands
// alone, whatever was asked with the identifier 0.
NP_INLINE int np_conn_covers(const struct np_conn *conn, const struct np_flow *flow)
{
    const struct np_packet *packet = flow->packet;
    if (packet->icmp_kind == NP_ICMP_QUERY)
        return packet->icmp_type == conn->icmp_type && packet->icmp_code == conn->icmp_code;
    if (packet->icmp_kind == NP_ICMP_ANSWER) // 0 answers 8; 14, 16, 18 and 129 answer the type before
        return packet->icmp_type == (conn->icmp_type == 8 ? 0 : conn->icmp_type + 1);
    if (packet->protocol == NP_PROTOCOL_ICMP || packet->protocol == NP_PROTOCOL_ICMPV6)
        return packet->icmp_kind == NP_ICMP_ERROR;
    return 1;
}

// Whether a packet may answer an initial SYN, by SYN with ACK or by RST.  Then np_young comes first: np_conn may still
// hold an older connection with the same tuple, which the SYN did not look for, and which the answer replaces.
NP_INLINE int np_conn_may_answer(const struct np_packet *packet)
{
    return packet->protocol == NP_PROTOCOL_TCP && packet->tcp_flags & (NP_TCP_SYN | NP_TCP_RST);
}

// What np_conn holds under a packet's key, if that is to be asked first.
NP_INLINE struct np_conn *np_conn_first(union np_conn_key *key, const struct np_packet *packet, const int version)
{
    return np_conn_may_answer(packet) ? 0 : np_conn_lookup(key, version);
}

// Find the packet's connection in both tables; NULL when there is none that is alive and covers the packet.  `open`:
// what np_conn_first says.  An initial SYN has none, and the tables are not asked: a denied one costs no look-up in
// tables as large as these.
NP_INLINE struct np_conn *np_conn_find(struct np_found *found, union np_conn_key *key, struct np_conn *open,
                                       const struct np_flow *flow, const int version)
{
    *found = (struct np_found){};
    if (np_conn_is_initial(flow->packet))
        return 0;
    if (open && np_conn_is_alive(open, flow) && np_conn_covers(open, flow)) {
        found->is_known = 1;
        return open;
    }
    found->has_stale = open != 0;
    struct np_conn *young = np_young_lookup(key, version);
    if (young && np_conn_is_alive(young, flow) && np_conn_covers(young, flow)) {
        found->is_known = found->is_young = 1;
        return young;
    }
    if (!np_conn_may_answer(flow->packet))
        return 0;
    open = np_conn_lookup(key, version);
    if (!open || !np_conn_is_alive(open, flow))
        return 0;
    found->is_known = 1;
    return open;
}

// The connection that was found, again; NULL when it has been evicted since.
NP_INLINE struct np_conn *np_conn_again(const struct np_found *found, union np_conn_key *key, const int version)
{
    return found->is_young ? np_young_lookup(key, version) : np_conn_lookup(key, version);
}

// Note that the connection lives, at most once a second: the entry is shared by all CPUs.
NP_INLINE void np_conn_touch(struct np_conn *conn, const struct np_flow *flow)
{
    if (flow->now_jiffies - conn->seen_jiffies >= flow->config->jiffies_per_second)
        conn->seen_jiffies = flow->now_jiffies;
}

NP_INLINE __u8 np_conn_first_state(__u8 protocol)
{
    switch (protocol) {
    case NP_PROTOCOL_TCP:
        return NP_CONN_TCP_NEW;
    case NP_PROTOCOL_UDP:
        return NP_CONN_UDP;
    case NP_PROTOCOL_ICMP:
    case NP_PROTOCOL_ICMPV6:
        return NP_CONN_ICMP;
    default:
        return NP_CONN_OTHER;
    }
}

// Whether a packet that policy allowed opens a connection.  A SYN with ACK, a RST and an ICMP answer follow or end
// something; ICMP messages that are no queries stand alone; borrowed sources are not remembered.
NP_INLINE int np_conn_opens(const struct np_flow *flow)
{
    const struct np_packet *packet = flow->packet;
    if (flow->leg->untracked || packet->tcp_flags & NP_TCP_RST ||
        (packet->tcp_flags & (NP_TCP_SYN | NP_TCP_ACK)) == (NP_TCP_SYN | NP_TCP_ACK))
        return 0;
    if (packet->protocol == NP_PROTOCOL_ICMP || packet->protocol == NP_PROTOCOL_ICMPV6)
        return packet->icmp_kind == NP_ICMP_QUERY;
    return 1;
}

// Record the packet as the first of a connection, in place of what was found under the key.  `state` 0: the protocol's
// first one.
NP_INLINE int np_conn_open(const struct np_flow *flow, union np_conn_key *key, const struct np_found *found, __u8 state,
                           __u8 flags, const int version)
{
    const struct np_packet *packet = flow->packet;
    struct np_conn conn = {
        .seen_jiffies = flow->now_jiffies,
        .generation = flow->generation,
        .rule = flow->decision->rule,
        .direction = flow->leg->direction,
        .state = state ? state : np_conn_first_state(packet->protocol),
        .flags = flags,
        .icmp_type = packet->icmp_type,
        .icmp_code = packet->icmp_code,
    };
    if (found->has_stale)
        np_conn_delete(key, version);
    return np_young_update(key, &conn, version) ? NP_REASON_CONN_FULL : NP_REASON_NONE;
}

// Move the connection on by one of its packets: time, TCP flags, and into np_conn with the first reply.
NP_INLINE int np_conn_advance(const struct np_flow *flow, union np_conn_key *key, struct np_conn *conn,
                              const struct np_found *found, const int version)
{
    const struct np_packet *packet = flow->packet;
    np_conn_touch(conn, flow);
    if (packet->tcp_flags & NP_TCP_RST) {
        conn->state = NP_CONN_TCP_RESET;
        return NP_REASON_NONE;
    }
    if (packet->tcp_flags & NP_TCP_FIN) {
        conn->flags |= flow->leg->reply ? NP_CONN_FIN_REPLY : NP_CONN_FIN_ORIGINAL;
        if ((conn->flags & (NP_CONN_FIN_ORIGINAL | NP_CONN_FIN_REPLY)) == (NP_CONN_FIN_ORIGINAL | NP_CONN_FIN_REPLY))
            conn->state = NP_CONN_TCP_CLOSING;
    }
    if (!found->is_young || !flow->leg->reply)
        return NP_REASON_NONE;
    struct np_conn open = *conn;
    if (open.state == NP_CONN_TCP_NEW)
        open.state = NP_CONN_TCP_OPEN;
    open.seen_jiffies = flow->now_jiffies;
    if (np_conn_update(key, &open, version))
        return NP_REASON_CONN_FULL;
    np_young_delete(key, version);
    return NP_REASON_NONE;
}
