// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Packets to services. Where a packet to a service enters the node, it still has the service's address. Only later does
// netfilter or IPVS replace that address by a backend's. So the verdict of the sender's policy is deferred to the hook
// where the packet enters a workload or leaves the node. Until then the packet carries a sender tag, the number of the
// sender's endpoint. The later hook judges the packet for that endpoint, by the translated address.
//
// Invariants.
// 1. A packet with a deferred verdict gets that verdict at the hook where the packet leaves the node or enters a
//    workload.
// 2. If the backend is a process of this node, no hook follows. Then policy judges the backend's address at once.
// 3. If the sender may not send to the service's own address, the packet carries due_mark, so that no process of this
//    node receives the packet.
// 4. A sender tag that another program wrote can only add a verdict, never replace one.
#pragma once

#include "np_conn.h"
#include "np_endpoint.h"
#include "np_ctx.h"
#include "np_judge.h"
#include "np_maps.h"

#define NP_SENDER_TAG_MASK 0xffffu // a tag has 16 bits, as skb->tc_index has

// The np_vip row for the tuple's destination: the row of the address itself, otherwise the row of a node port, which
// holds for every address of the node. NULL: the destination is no service.
NP_INLINE struct np_vip *np_vip_of(const struct np_ctx *ctx, struct np_tuple *tuple, const int version)
{
    if (NP_LIKELY(!np_vip_filter_has(tuple->destination, version))) {
        if (NP_LIKELY(!np_may_be_in_net(ctx, tuple->destination, version)))
            tuple->to_node = NP_TO_NODE_NO;
        return 0;
    }
    union np_vip_key key = {};
    struct np_vip *vip;
    if (version == 4) {
        key.v4.port = tuple->destination_port;
        key.v4.protocol = tuple->protocol;
        __builtin_memcpy(key.v4.address, tuple->destination, sizeof(key.v4.address));
    } else {
        key.v6.port = tuple->destination_port;
        key.v6.protocol = tuple->protocol;
        __builtin_memcpy(key.v6.address, tuple->destination, sizeof(key.v6.address));
    }
    vip = np_vip_lookup(&key, version);
    if (vip)
        return vip;
    if (!np_is_to_node(ctx, tuple, version))
        return 0;
    if (version == 4)
        __builtin_memset(key.v4.address, 0, sizeof(key.v4.address));
    else
        __builtin_memset(key.v6.address, 0, sizeof(key.v6.address));
    return np_vip_lookup(&key, version);
}

// The sender tag of the packet; 0: the packet has none.
NP_INLINE __u32 np_sender_tag_get(const struct __sk_buff *skb, const struct np_config *config)
{
    if (!(config->flags & NP_CONFIG_DEFER))
        return 0;
    if (config->mark_shift)
        return skb->mark >> (config->mark_shift & 31) & NP_SENDER_TAG_MASK;
    return skb->tc_index;
}

// Set the sender tag of the packet; 0 removes the tag. `is_due`: whether to set due_mark, so that no process of this
// node receives the packet. Returns 1 if this program must be the last at its hook. This is so if the tag is in
// tc_index: netfilter keeps tc_index, but a later clsact program that returns TC_ACT_OK overwrites it. clsact itself
// copies tc_classid to tc_index, so the program sets both.
NP_INLINE __u8 np_sender_tag_set(struct __sk_buff *skb, const struct np_config *config, __u32 number, __u32 is_due)
{
    __u32 shift = config->mark_shift & 31;
    __u32 mark = (skb->mark & ~config->due_mark) | (is_due ? config->due_mark : 0);
    if (shift) {
        skb->mark = (mark & ~(NP_SENDER_TAG_MASK << shift)) | number << shift;
        return 0;
    }
    skb->mark = mark;
    skb->tc_index = number;
    skb->tc_classid = number;
    return number != 0;
}

// Choose the policy steps of the sender, for the hook where the packet leaves the node or enters a workload.
NP_INLINE void np_sender_plan(struct np_ctx *ctx, struct np_scratch *scratch, const int version)
{
    const __u32 *source = scratch->tuples[NP_TUPLE_TRANSLATED].source;
    scratch->default_drop = 0;
    scratch->self = 0;
    scratch->asked_tuple = NP_TUPLE_TRANSLATED;
    scratch->number = ctx->ep->sender;
    scratch->egress_steps = NP_EGRESS_STEPS_WORKLOAD; // a packet that leaves a workload enters the host
    if (scratch->ifindex) { // the sender is a workload
        const struct np_addr *addr = np_addr_find(ctx, source, version);
        scratch->is_source_hidden = !addr->identity || addr->holder != ctx->ep->sender;
        scratch->host = ctx->config->wildcard;
        scratch->steps =
            np_steps(NP_STEP_WORKLOAD, scratch->host ? NP_STEP_FORWARD : NP_STEP_NONE, NP_STEP_NONE, NP_STEP_NONE);
    } else {
        scratch->is_source_hidden = np_is_local(ctx, source, version);
        scratch->host = ctx->ep->sender;
        scratch->steps = NP_STEP_FORWARD;
    }
}

// Find the verdict for the sender, which is the endpoint that the packet's sender tag names. This hook tracks a
// connection of its own under the sender's number. That connection stays unreplied, because replies do not pass here.
// Returns NP_REASON_NONE if this generation allows the connection; `scratch->reason` then says why. Otherwise returns
// the reason to drop the packet; the endpoint context then names the sender. If policy must judge, np_judge does not
// return, and np_tc_sender continues.
NP_INLINE int np_sender(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch, const int version)
{
    const struct np_packet *packet = ctx->packet;
    struct np_tuple *tuple = &scratch->tuples[NP_TUPLE_TRANSLATED];
    union np_conn_key *key = &scratch->sender_key;
    struct np_found *found = &scratch->sender_found;
    struct np_endpoint_ctx *ep = ctx->ep;
    struct np_ifindex *place = np_ifindex_lookup(ep->sender);
    scratch->ifindex = place ? place->ifindex : 0;
    np_barrier();
    ep->endpoint = ep->sender;
    ep->direction = scratch->ifindex ? NP_DIRECTION_EGRESS : NP_DIRECTION_INGRESS;

    ep->related = NP_REASON_NONE;
    if (packet->icmp_kind == NP_ICMP_ERROR) {
        ep->related = np_conn_key_inner(skb, key, ctx, version);
        if (ep->related == NP_REASON_ICMP_UNRELATED)
            return NP_REASON_ICMP_UNRELATED;
        if (ep->related == NP_REASON_NONE)
            ctx->packet->icmp_kind = NP_ICMP_PLAIN; // policy judges the error like any other message
    }
    np_barrier();
    if (scratch->ifindex && np_is_tunnelled(ctx, version))
        return NP_REASON_TUNNEL;
    if (!ep->related)
        np_conn_key_of(key, ctx, version);
    np_ct_probe(ctx, key, version);
    struct np_ct_slot slot = np_conn_find(found, key, ctx, version);
    struct np_conn *conn = slot.conn;
    if (ep->related && !conn)
        return NP_REASON_ICMP_UNRELATED;
    // If nothing has translated the service's address, this is the same connection that the ingress hook recorded. Its
    // entry says only that the verdict is deferred.
    scratch->is_first_leg = conn && found->flags & NP_CONN_DEFERRED;
    if (scratch->is_first_leg) {
        found->is_known = 0;
        conn = 0;
    }
    tuple->icmp_type = packet->icmp_type;
    tuple->icmp_code = packet->icmp_code;
    if (conn) {
        if (found->generation == ctx->arrival->generation) {
            np_conn_touch(&slot, ctx);
            ctx->decision->rule = found->rule;
            scratch->reason = ep->related ? NP_REASON_RELATED : NP_REASON_ESTABLISHED;
            return NP_REASON_NONE;
        }
        tuple->icmp_type = found->icmp_type;
        tuple->icmp_code = found->icmp_code;
    }
    np_barrier();

    np_tuple_of_key(tuple, key, ep->direction, version);
    np_sender_plan(ctx, scratch, version);
    np_barrier();
    scratch->is_sender = 1;
    return np_judge(skb, ctx, scratch);
}

// Apply the verdict of policy for the sender. Returns the same as np_sender.
NP_INLINE int np_sender_verdict(struct np_ctx *ctx, struct np_scratch *scratch, const int version)
{
    const struct np_packet *packet = ctx->packet;
    const struct np_tuple *tuple = &scratch->tuples[NP_TUPLE_TRANSLATED];
    union np_conn_key *key = &scratch->sender_key;
    int denied = ctx->decision->action == NP_ACTION_DENY;
    scratch->reason = ctx->decision->reason;
    if (scratch->sender_found.is_known) {
        if (denied && !(ctx->config->flags & NP_CONFIG_KEEP_REVOKED))
            return scratch->reason == NP_REASON_POLICY_DENY ? NP_REASON_REVOKED : scratch->reason;
        struct np_ct_slot slot = np_conn_again(ctx, &scratch->sender_found, key, version);
        if (slot.conn) {
            if (!denied) {
                slot.conn->rule = ctx->decision->rule;
                *np_ct_slot_name_class(&slot, version) = ctx->decision->name_class;
            }
            ctx->decision->rule = slot.conn->rule;
            np_conn_renew(slot.conn, ctx->arrival->generation);
            np_conn_touch(&slot, ctx);
        }
        ctx->decision->log_list = 0; // Log rules apply only to new flows
        scratch->reason = NP_REASON_ESTABLISHED;
        return NP_REASON_NONE;
    }
    if (denied)
        return scratch->reason;
    // No connection is recorded if the sender chose a source address that it does not own. If the node chose the source
    // address by translation, the connection is recorded.
    if (np_conn_opens(ctx) && !scratch->is_first_leg &&
        (!scratch->is_source_hidden || np_is_local(ctx, tuple->source, version)) &&
        np_conn_open(ctx, key, packet->protocol == NP_PROTOCOL_TCP ? NP_CONN_TCP_OPEN : 0, 0, version))
        return NP_REASON_CONN_FULL;
    return NP_REASON_NONE;
}
