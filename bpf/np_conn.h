// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Connection tracking: finds the connection of a packet, says whether the connection is alive, and keeps its state.
// This file knows no policy. An entry records the generation under which policy allowed the connection, and the tuple
// from which policy can judge the connection again.
//
// A connection is unreplied until its first reply; then it is established. A new connection may have the tuple of an
// established one. The established one stays until the new connection has a reply; then it is removed. Otherwise a SYN
// with a forged source could end a connection.
#pragma once

#include "np_ctx.h"
#include "np_table.h"

#define NP_ICMP_HEADER_BYTES 8

// The result of a look-up: a copy, because another CPU may reuse the slot at any time. All fields are from one
// connection. All but is_known and is_unreplied are copies of the fields of struct np_conn with the same names.
struct np_found {
    __u32 generation;
    __u32 rule;
    __u8 is_known; // 1: the packet belongs to a live connection
    __u8 is_unreplied; // 1: that connection is unreplied
    __u8 direction;
    __u8 flags;
    __u8 icmp_type;
    __u8 icmp_code;
    __u8 pad[2];
};

// Fill in the conntrack key of a tuple. `from_endpoint`: whether the source is the endpoint's (local) side.
NP_INLINE void np_conn_key_set(union np_conn_key *key, const struct np_ctx *ctx, const __u32 *source,
                               const __u32 *destination, __u16 source_port, __u16 destination_port, __u8 protocol,
                               int from_endpoint, const int version)
{
    __u16 local_port = from_endpoint ? source_port : destination_port;
    __u16 remote_port = from_endpoint ? destination_port : source_port;
    __u8 *local;
    __u8 *remote;
    int words;
    if (version == 4) {
        key->v4 = (struct np_conn4_key){
            .endpoint = ctx->ep->endpoint, .local_port = local_port, .remote_port = remote_port, .protocol = protocol};
        local = key->v4.local;
        remote = key->v4.remote;
        words = 1;
    } else {
        key->v6 = (struct np_conn6_key){
            .endpoint = ctx->ep->endpoint, .local_port = local_port, .remote_port = remote_port, .protocol = protocol};
        local = key->v6.local;
        remote = key->v6.remote;
        words = 4;
    }
#pragma unroll
    for (int word = 0; word < words; word++) { // chooses words, not pointers: the verifier loses track of pointers
        __u32 ours = from_endpoint ? source[word] : destination[word];
        __u32 theirs = from_endpoint ? destination[word] : source[word];
        __builtin_memcpy(local + word * 4, &ours, 4);
        __builtin_memcpy(remote + word * 4, &theirs, 4);
    }
}

NP_INLINE void np_conn_key_of(union np_conn_key *key, const struct np_ctx *ctx, const int version)
{
    const struct np_packet *packet = ctx->packet;
    np_conn_key_set(key, ctx, packet->source, packet->destination, packet->source_port, packet->destination_port,
                    packet->protocol, ctx->ep->direction == NP_DIRECTION_EGRESS, version);
}

// Fill in the conntrack key of the packet inside an ICMP error.  The inner packet went in the opposite direction, so
// its source is the local side if the error goes towards the endpoint.  Returns
//   NP_REASON_RELATED          the key is filled in
//   NP_REASON_NONE             the inner header is not readable, so policy judges the error like any other message
//   NP_REASON_ICMP_UNRELATED   the error's destination is not the source of the inner packet. Without this check, a
//                              workload with one connection could send errors with any content to anyone.
NP_INLINE int np_conn_key_inner(struct __sk_buff *skb, union np_conn_key *key, const struct np_ctx *ctx,
                                const int version)
{
    __u32 offset = ctx->packet->l4_offset + NP_ICMP_HEADER_BYTES;
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
            struct np_ip6_fragment extension; // no IPv6 extension header is shorter than a fragment header
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
    struct np_icmp_header l4; // an error must carry the first eight bytes of any transport header
    if (offset + sizeof(l4) > ctx->packet->end || bpf_skb_load_bytes(skb, offset, &l4, sizeof(l4)))
        return NP_REASON_NONE;
    __u32 other = source[0] ^ ctx->packet->destination[0];
    if (version == 6)
        other |= (source[1] ^ ctx->packet->destination[1]) | (source[2] ^ ctx->packet->destination[2]) |
                 (source[3] ^ ctx->packet->destination[3]);
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
    np_conn_key_set(key, ctx, source, destination, source_port, destination_port, protocol,
                    ctx->ep->direction == NP_DIRECTION_INGRESS, version);
    return NP_REASON_RELATED;
}

// Whether both sides have sent FIN, or one side RST. Anybody outside who knows the tuple can forge FIN and RST.
NP_INLINE int np_conn_is_closed(const struct np_conn *conn)
{
    return conn->state == NP_CONN_TCP_CLOSING || conn->state == NP_CONN_TCP_RESET;
}

// Whether the connection is alive. A closed connection has the time-out of an established one, because its FIN or RST
// may be forged. Only its slot is evicted earlier (np_ct_refresh).
NP_INLINE int np_conn_is_alive(const struct np_conn *conn, const struct np_ctx *ctx)
{
    __u32 state = np_conn_is_closed(conn) ? NP_CONN_TCP_OPEN : conn->state;
    // the difference is negative if another CPU, one tick ahead, wrote seen_jiffies
    return (long long)(ctx->arrival->now_jiffies - conn->seen_jiffies) <=
           (long long)ctx->config->timeout_jiffies[state & (NP_CONN_STATES - 1)];
}

// Record that policy allows the connection under a newer generation. The generation is stored after rule and flags, so
// that a CPU that reads the new generation also reads the new rule and flags.
NP_INLINE void np_conn_renew(struct np_conn *conn, __u32 generation)
{
#ifdef NP_WEAK_ORDER // there is no 32-bit exchange
    union {
        __u32 halves[2];
        __u64 word;
    } both = {.halves = {generation, conn->rule}};
    _Static_assert(__builtin_offsetof(struct np_conn, rule) == __builtin_offsetof(struct np_conn, generation) + 4, "");
    np_store_last((np_word *)&conn->generation, both.word);
#else
    np_store_last(&conn->generation, generation);
#endif
}

// Whether the packet is an initial SYN. An initial SYN never belongs to a known connection: policy judges each one.
NP_INLINE int np_conn_is_initial(const struct np_packet *packet)
{
    return packet->protocol == NP_PROTOCOL_TCP && (packet->tcp_flags & (NP_TCP_SYN | NP_TCP_ACK)) == NP_TCP_SYN;
}

// Whether the packet, which is not an initial SYN, belongs to the connection with its key. An ICMP connection has the
// query that opened it, the reply of the matching type, and errors about the connection. Every other ICMP message
// belongs to no connection, although it may have the same key.
NP_INLINE int np_conn_covers(const struct np_conn *conn, const struct np_ctx *ctx)
{
    const struct np_packet *packet = ctx->packet;
    if (packet->icmp_kind == NP_ICMP_QUERY)
        return packet->icmp_type == conn->icmp_type && packet->icmp_code == conn->icmp_code;
    if (packet->icmp_kind == NP_ICMP_ANSWER) // type 0 answers 8; each of 14, 16, 18 and 129 answers the type below it
        return packet->icmp_type == (conn->icmp_type == 8 ? 0 : conn->icmp_type + 1);
    if (packet->protocol == NP_PROTOCOL_ICMP || packet->protocol == NP_PROTOCOL_ICMPV6)
        return packet->icmp_kind == NP_ICMP_ERROR;
    return 1;
}

// Whether the packet may answer an initial SYN: SYN with ACK, or RST. Such a packet is looked up among unreplied
// connections first, because an older established connection with the same tuple may still exist.
NP_INLINE int np_conn_may_answer(const struct np_packet *packet)
{
    return packet->protocol == NP_PROTOCOL_TCP && packet->tcp_flags & (NP_TCP_SYN | NP_TCP_RST);
}

// Copy an entry into `found`. The generation is read first, so that rule and flags are of that generation or of a newer
// one. Returns whether the slot still has the same connection after the copy.
NP_INLINE int np_conn_copy(struct np_found *found, const struct np_ct_slot *slot, const struct np_ctx *ctx,
                           int unreplied)
{
    __u32 generation = slot->conn->generation;
    const struct np_conn *conn = np_load_after((const struct np_conn *)slot->conn, generation);
    found->generation = generation;
    found->rule = conn->rule;
    found->direction = conn->direction;
    found->flags = conn->flags;
    found->icmp_type = conn->icmp_type;
    found->icmp_code = conn->icmp_code;
    return np_ct_slot_is_kept(slot, found->rule + found->flags, unreplied, ctx);
}

// Find the packet's connection, after np_ct_probe. The result has no slot if the packet belongs to no live connection.
// An initial SYN belongs to none, so for a flood of denied SYNs the program does not read the large map of entries.
NP_INLINE struct np_ct_slot np_conn_find(struct np_found *found, const union np_conn_key *key, const struct np_ctx *ctx,
                                         const int version)
{
    const struct np_ct_slot none = {};
    int may_answer = np_conn_may_answer(ctx->packet);
    struct np_ct_slot slot = none;
    *found = (struct np_found){};
    if (np_conn_is_initial(ctx->packet))
        return none;
#pragma clang loop unroll(disable)
    for (int turn = 0; turn < 2; turn++) {
        int unreplied = may_answer ? !turn : turn;
        slot = np_ct_lookup(ctx, key, unreplied, version);
        if (slot.conn && np_conn_is_alive(slot.conn, ctx) && np_conn_covers(slot.conn, ctx) &&
            np_conn_copy(found, &slot, ctx, unreplied)) {
            found->is_known = 1;
            found->is_unreplied = unreplied;
            return slot;
        }
    }
    return none;
}

// Look up the connection in `found` again, after the policy steps. The result has no slot if the connection was evicted
// meanwhile.
NP_INLINE struct np_ct_slot np_conn_again(const struct np_ctx *ctx, const struct np_found *found,
                                          const union np_conn_key *key, const int version)
{
    return np_ct_lookup(ctx, key, found->is_unreplied, version);
}

// Update when the connection was last seen. All CPUs share the entry, so the time is written at most once a second.
NP_INLINE void np_conn_touch(const struct np_ct_slot *slot, const struct np_ctx *ctx)
{
    if (ctx->arrival->now_jiffies - slot->conn->seen_jiffies < ctx->config->jiffies_per_second)
        return;
    slot->conn->seen_jiffies = ctx->arrival->now_jiffies;
    np_ct_refresh(slot, (*slot->tag & NP_TAG_UNREPLIED) != 0, ctx);
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

// Whether a packet that policy allowed opens a connection. A SYN with ACK, a RST and an ICMP reply do not, because
// their connection should already exist. An ICMP message that is not a query, and an untracked packet, belong to no
// connection.
NP_INLINE int np_conn_opens(const struct np_ctx *ctx)
{
    const struct np_packet *packet = ctx->packet;
    if (ctx->ep->untracked || packet->tcp_flags & NP_TCP_RST ||
        (packet->tcp_flags & (NP_TCP_SYN | NP_TCP_ACK)) == (NP_TCP_SYN | NP_TCP_ACK))
        return 0;
    if (packet->protocol == NP_PROTOCOL_ICMP || packet->protocol == NP_PROTOCOL_ICMPV6)
        return packet->icmp_kind == NP_ICMP_QUERY;
    return 1;
}

// Remove an older established connection with the same key.
NP_INLINE void np_conn_remove(const struct np_ctx *ctx, const union np_conn_key *key, const int version)
{
    struct np_ct_slot open = np_ct_lookup(ctx, key, 0, version);
    if (open.conn)
        np_ct_release(&open);
}

// Record a connection with this packet as its first. `state` 0: the protocol's first state. If the packet is an initial
// SYN, an older established connection with the same key stays; any other packet replaces that connection.
NP_INLINE int np_conn_open(const struct np_ctx *ctx, const union np_conn_key *key, __u8 state, __u8 flags,
                           const int version)
{
    const struct np_packet *packet = ctx->packet;
    if (np_conn_is_initial(packet))
        np_ct_probe(ctx, key, version);
    else
        np_conn_remove(ctx, key, version);
    struct np_ct_slot slot = np_ct_reserve(ctx, version);
    if (!slot.conn)
        return NP_REASON_CONN_FULL;
    np_half *stored = np_ct_slot_key(&slot, version);
#pragma unroll
    for (__u32 word = 0; word < np_key_words(version); word++)
        stored[word] = ((const np_half *)key)[word];
    *np_ct_slot_name_class(&slot, version) = ctx->decision->name_class;
    *slot.conn = (struct np_conn){
        .seen_jiffies = ctx->arrival->now_jiffies,
        .generation = ctx->arrival->generation,
        .rule = ctx->decision->rule,
        .direction = ctx->ep->direction,
        .state = state ? state : np_conn_first_state(packet->protocol),
        .flags = flags,
        .icmp_type = packet->icmp_type,
        .icmp_code = packet->icmp_code,
    };
    np_ct_commit(&slot, ctx);
    return NP_REASON_NONE;
}

// Whether the packet is a TCP packet with data that neither opens nor ends a connection.
NP_INLINE int np_goes_on(const struct np_packet *packet)
{
    return packet->protocol == NP_PROTOCOL_TCP && !(packet->tcp_flags & (NP_TCP_SYN | NP_TCP_FIN | NP_TCP_RST)) &&
           packet->end > packet->l4_offset + packet->l4_bytes;
}

// Update a connection from one of its packets: when it was last seen, and its state. FIN and RST close it. The first
// reply makes it established. Data on a closed connection makes it established again.
NP_INLINE void np_conn_advance(const struct np_ctx *ctx, const union np_conn_key *key, const struct np_ct_slot *slot,
                               const struct np_found *found, const int version)
{
    const struct np_packet *packet = ctx->packet;
    struct np_conn *conn = slot->conn;
    int unreplied = found->is_unreplied;
    int is_over = 0;
    int revives = !unreplied && np_conn_is_closed(conn) && np_goes_on(packet);
    np_conn_touch(slot, ctx);
    if (NP_UNLIKELY(revives)) {
        conn->state = NP_CONN_TCP_OPEN;
        conn->flags &= ~(NP_CONN_FIN_ORIGINAL | NP_CONN_FIN_REPLY);
    }
    if (packet->tcp_flags & NP_TCP_FIN && !(packet->tcp_flags & NP_TCP_RST)) {
        conn->flags |= ctx->ep->reply ? NP_CONN_FIN_REPLY : NP_CONN_FIN_ORIGINAL;
        is_over = !(~conn->flags & (NP_CONN_FIN_ORIGINAL | NP_CONN_FIN_REPLY));
    }
    if (packet->tcp_flags & NP_TCP_RST)
        conn->state = NP_CONN_TCP_RESET;
    else if (is_over)
        conn->state = NP_CONN_TCP_CLOSING;
    if (unreplied && ctx->ep->reply && !(packet->tcp_flags & NP_TCP_RST)) {
        np_conn_remove(ctx, key, version); // an older established connection with the same key, if there is one
        if (conn->state == NP_CONN_TCP_NEW)
            conn->state = NP_CONN_TCP_OPEN;
        conn->seen_jiffies = ctx->arrival->now_jiffies;
        unreplied = 0;
    } else if (!(packet->tcp_flags & NP_TCP_RST) && !is_over && !revives) {
        return;
    }
    np_ct_refresh(slot, unreplied, ctx);
}
