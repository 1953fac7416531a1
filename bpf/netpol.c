// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The program that enforces policy at one interface: from a packet to a verdict. There is one program for each hook,
// and there are programs that the hooks' programs tail-call (enum np_call). Read this file from the bottom up:
//
//     np_tc          the fast path, otherwise: packet and endpoint -> np_frame -> np_conclude
//     np_frame       frame -> ARP | IPv4 | IPv6 | other
//     np_ip          parse -> link messages -> forged source -> fragment -> np_sender -> np_ip_own
//     np_ip_own      established connection: pass
//     np_ip_slow     anti-spoofing -> connection: np_ip_known, otherwise np_ip_plan -> np_tc_judge
//     np_tc_judge    one policy list, then the next -> np_tc_names | np_tc_sender | np_ip_verdict
//     np_tc_names    domain names in the list's verdict, then as np_tc_judge
//     np_tc_sender   apply the verdict for a sender that was deferred to this hook -> np_ip_own
//     np_ip_verdict  apply the verdict for the interface's endpoint -> np_ip_known | np_ip_new
//     np_conclude    count, report, pass or drop -> DNS programs (np_dns.h), for a packet from or to a DNS server
//
// Each step returns the reason why the packet passes or is dropped (enum np_reason), or NP_REASON_NONE if the next step
// must decide. A tail call does not return. The called program finds the packet's state in np_scratch, so the verifier
// checks each program separately.
//
// Invariants.
// 1. A packet that the program cannot parse is dropped, and counted under a reason.
// 2. A verdict carries the rule of the table entry that decided.
// 3. After parsing, a packet of an established connection costs at most one look-up in the connection table, no
//    bpf_ktime_get_ns() and no tail call.
// 4. If a tail call fails, the packet is dropped and counted. If the call of a DNS program fails, which is counted too,
//    the packet passes and teaches nothing, so that policy denies what it would have allowed by name.
//
// Files, in the order of use:
//     np_lang (the C dialect)          np_abi (what user space shares)     np_maps (maps)
//     np_parse (parser)                np_ctx (context of a packet)        np_count (counters)
//     np_event (events)                np_bucket (address, class tables)   np_endpoint (endpoints, anti-spoofing)
//     np_outside (source from outside) np_classify (one policy list)       np_judge (sequence of policy lists)
//     np_names (domain names)
//     np_table (conntrack table)       np_conn (connection states)         np_service (sender tags)
//     np_fragment (fragments)          np_link (link messages)             np_kernel (fields of sk_buff)
//     np_flow_cache (fast path)        np_dns (DNS messages), np_dns_question, np_dns_answer, np_dns_cut (fragments),
//                                      np_dns_records (parser), np_dns_learn (learned addresses)

#include "np_lang.h"
#include "np_abi.h"
#include "np_maps.h"
#include "np_parse.h"
#include "np_ctx.h"
#include "np_count.h"
#include "np_event.h"
#include "np_endpoint.h"
#include "np_outside.h"
#include "np_classify.h"
#include "np_table.h"
#include "np_conn.h"
#include "np_judge.h"
#include "np_names.h"
#include "np_service.h"
#include "np_fragment.h"
#include "np_link.h"
#include "np_kernel.h"
#include "np_flow_cache.h"
#include "np_dns.h"
#include "np_dns_question.h"
#include "np_dns_cut.h"
#include "np_dns_answer.h"
#include "np_dns_records.h"
#include "np_dns_learn.h"

// The direction of policy for a packet at this hook.
NP_INLINE __u8 np_direction_at(const int hook, __u32 endpoint_flags)
{
    int host = (endpoint_flags & NP_ENDPOINT_HOST) != 0;
    return (hook == NP_HOOK_INGRESS) == host ? NP_DIRECTION_INGRESS : NP_DIRECTION_EGRESS;
}

// Whether `decision->rule` is the number of the rule that decided. Number 0 stands for exempt traffic.
NP_INLINE int np_has_rule(int reason)
{
    switch (reason) {
    case NP_REASON_POLICY_ALLOW:
    case NP_REASON_ESTABLISHED:
    case NP_REASON_RELATED:
    case NP_REASON_HOST:
    case NP_REASON_SELF:
    case NP_REASON_CONTINUE:
    case NP_REASON_POLICY_DENY:
    case NP_REASON_REVOKED:
        return 1;
    default:
        return 0;
    }
}

// Whether policy judged this packet itself, and not only its connection. Then the decision also has a staged action.
NP_INLINE int np_is_judged(int reason)
{
    return reason == NP_REASON_POLICY_ALLOW || reason == NP_REASON_CONTINUE || reason == NP_REASON_POLICY_DENY ||
           reason == NP_REASON_REVOKED;
}

// Whether the packet opened an allowed flow.
NP_INLINE int np_is_new_flow(int reason)
{
    return reason == NP_REASON_POLICY_ALLOW || reason == NP_REASON_HOST || reason == NP_REASON_SELF;
}

// Let the packet pass: return the verdict of TC. At ingress, also set the mark that proves to the second barrier that
// the program saw the packet.
NP_INLINE int np_pass(struct __sk_buff *skb, const struct np_ctx *ctx)
{
    if (ctx->arrival->hook == NP_HOOK_INGRESS)
        skb->mark |= ctx->config->seen_mark;
    return ctx->ep->end_chain ? NP_PASS_ALONE : NP_PASS;
}

// Count the packet, write its events, and return the verdict of TC.
NP_INLINE int np_account(struct __sk_buff *skb, struct np_ctx *ctx, int reason)
{
    struct np_decision *decision = ctx->decision;
    int dropped = reason >= NP_REASON_POLICY_DENY || reason == NP_REASON_NONE;
    if (np_has_rule(reason))
        np_count_rule(decision->rule, ctx->arrival->frame_bytes);
    if (reason == NP_REASON_ESTABLISHED)
        return np_pass(skb, ctx);
    np_count_reason(reason, ctx->arrival->frame_bytes);
    if (np_is_judged(reason))
        np_count_staged(decision->staged_rule, ctx->arrival->frame_bytes);
    if (decision->log_list)
        np_event_log(ctx, reason);

    __u8 kind = 0;
    if (dropped) {
        kind = NP_EVENT_DENY;
        if (!np_has_rule(reason)) // policy did not decide, so there is no staged action either
            decision->action = decision->staged_action = NP_ACTION_DENY;
    } else if (np_is_new_flow(reason) || reason == NP_REASON_CONTINUE) {
        // NP_REASON_CONTINUE opens no flow, but has an event
        __u32 wanted = ctx->config->flags;
        if (wanted & NP_CONFIG_ALLOW_EVENTS ||
            (wanted & NP_CONFIG_STAGED_EVENTS && decision->staged_action != decision->action))
            kind = NP_EVENT_ALLOW;
    }
    if (kind)
        np_event_write(ctx, kind, reason);
    return dropped ? NP_DROP : np_pass(skb, ctx);
}

// The end of every packet on the slow path: as np_account. A packet from or to a DNS server goes on to np_tc_question
// or np_tc_answer if it passes.
NP_INLINE int np_conclude(struct __sk_buff *skb, struct np_ctx *ctx, int reason)
{
    int verdict = np_account(skb, ctx, reason);
    if (np_is_dns(ctx) && verdict != NP_DROP) {
        if (ctx->ep->direction == NP_DIRECTION_EGRESS)
            np_dns_call(skb, ctx, NP_CALL_QUESTION);
        else
            np_dns_call(skb, ctx, NP_CALL_ANSWER);
    }
    return verdict;
}

// The reason why policy does not apply to the packet, or NP_REASON_NONE. Policy does not apply if a process of the node
// sends to a workload, or if a workload sends to itself through the node. In the second case the node may have replaced
// the source address by its own.
NP_INLINE int np_exempt(const struct np_ctx *ctx, const int hook, const int version)
{
    if (hook != NP_HOOK_EGRESS || ctx->ep->endpoint_flags & NP_ENDPOINT_HOST)
        return NP_REASON_NONE;
    if (ctx->arrival->is_from_node)
        return NP_REASON_HOST;
    if (ctx->arrival->ingress_ifindex == ctx->arrival->ifindex)
        return NP_REASON_SELF;
    if (ctx->ep->sender && ctx->ep->sender == ctx->ep->endpoint && np_is_local(ctx, ctx->packet->source, version))
        return NP_REASON_SELF;
    return NP_REASON_NONE;
}

// The kind of the flow that this first packet opens: NP_CONN_DEFERRED, NP_CONN_FORWARDED, or 0.
NP_INLINE __u8 np_ip_kind(const struct np_ctx *ctx, struct np_tuple *tuple, const int hook, const int version)
{
    int is_host = (ctx->ep->endpoint_flags & NP_ENDPOINT_HOST) != 0;
    if (hook == NP_HOOK_EGRESS)
        return is_host && !ctx->arrival->is_from_node ? NP_CONN_FORWARDED : 0;
    if (np_vip_of(ctx, tuple, version))
        return NP_CONN_DEFERRED;
    return is_host && !np_is_for_node(ctx, tuple->destination, version) ? NP_CONN_FORWARDED : 0;
}

// The policy steps at a host's interface. `last`: the step that comes last: NP_STEP_NORMAL for packets from or to a
// process of the node, NP_STEP_FORWARD for forwarded packets, NP_STEP_NONE for forwarded packets with a deferred
// verdict.
NP_INLINE __u32 np_host_steps(__u8 direction, __u32 last)
{
    int is_local = last == NP_STEP_NORMAL;
    if (direction == NP_DIRECTION_INGRESS)
        return is_local ? np_steps(NP_STEP_FAILSAFE, NP_STEP_UNTRACKED, NP_STEP_PRE_DNAT, last)
                        : np_steps(NP_STEP_UNTRACKED, NP_STEP_PRE_DNAT, last, NP_STEP_NONE);
    return is_local ? np_steps(NP_STEP_FAILSAFE, NP_STEP_UNTRACKED, last, NP_STEP_NONE)
                    : np_steps(NP_STEP_UNTRACKED, last, NP_STEP_NONE, NP_STEP_NONE);
}

// The policy steps for a packet that a workload sends. Such a packet enters the host, so steps of the wildcard host
// endpoint follow the workload's. `is_deferred`: whether the packet is to a service and its verdict is deferred.
// `to_host`: whether the packet is to a process of the node.
NP_INLINE __u32 np_workload_steps(const struct np_config *config, __u32 host, int is_deferred, int to_host)
{
    __u32 last = NP_STEP_NONE;
    if (to_host && config->flags & NP_CONFIG_TO_HOST_PASS)
        last = NP_STEP_NORMAL;
    else if (!to_host && !is_deferred)
        last = NP_STEP_FORWARD;
    __u32 steps = host ? np_steps(NP_STEP_PRE_DNAT, last, NP_STEP_NONE, NP_STEP_NONE) : 0;
    if (!is_deferred)
        return steps << NP_STEP_BITS | NP_STEP_WORKLOAD;
    return config->due_mark ? steps << NP_STEP_BITS | NP_STEP_SERVICE : steps;
}

// Choose the policy steps for a flow of the given kind, from the original tuple and the direction of the flow's first
// packet. Returns NP_REASON_NONE, or the reason to drop the packet without policy.
NP_INLINE int np_ip_plan(struct np_ctx *ctx, struct np_scratch *scratch, __u8 kind, __u8 direction, const int version)
{
    const struct np_config *config = ctx->config;
    struct np_tuple *original = &scratch->tuples[NP_TUPLE_ORIGINAL];
    int is_deferred = (kind & NP_CONN_DEFERRED) != 0;
    int is_node_backend = 0; // 1: the backend is a process of this node, so no later hook judges the packet
    scratch->is_source_hidden = scratch->default_drop = 0;
    scratch->number = ctx->ep->endpoint;
    scratch->ifindex = ctx->arrival->ifindex;
    scratch->asked_tuple = NP_TUPLE_ORIGINAL;
    if (is_deferred) {
        struct np_vip *vip = np_vip_of(ctx, original, version);
        if (!(config->flags & NP_CONFIG_DEFER))
            return NP_REASON_NO_EXIT;
        if (vip && vip->flags & NP_VIP_MANY)
            return NP_REASON_LOCAL_BACKENDS;
        if (vip && vip->flags & NP_VIP_LOCAL) {
            struct np_tuple *translated = &scratch->tuples[NP_TUPLE_TRANSLATED];
            is_node_backend = 1;
            scratch->asked_tuple = NP_TUPLE_TRANSLATED;
            *translated = *original;
            translated->destination_port = vip->local_port;
            translated->to_node = NP_TO_NODE_UNASKED;
            __builtin_memcpy(translated->destination, vip->local, version == 4 ? 4 : 16);
        }
    }
    int to_host = is_node_backend;
    is_deferred = is_deferred && !is_node_backend;

    if (ctx->ep->endpoint_flags & NP_ENDPOINT_HOST) {
        scratch->host = ctx->ep->endpoint;
        scratch->egress_steps = direction == NP_DIRECTION_EGRESS ? NP_EGRESS_STEPS_HOST : 0;
        if (is_deferred)
            scratch->steps = np_host_steps(direction, NP_STEP_NONE);
        else if (kind & NP_CONN_FORWARDED)
            scratch->steps = np_host_steps(direction, NP_STEP_FORWARD);
        else
            scratch->steps = np_host_steps(direction, NP_STEP_NORMAL);
        return NP_REASON_NONE;
    }

    scratch->host = config->wildcard;
    if (direction == NP_DIRECTION_INGRESS) { // a packet that enters a workload leaves the host
        scratch->egress_steps = NP_EGRESS_STEPS_HOST;
        scratch->steps =
            scratch->host ? np_steps(NP_STEP_FORWARD, NP_STEP_WORKLOAD, NP_STEP_NONE, NP_STEP_NONE) : NP_STEP_WORKLOAD;
        return NP_REASON_NONE;
    }
    scratch->egress_steps = NP_EGRESS_STEPS_WORKLOAD;
    if (!(kind & NP_CONN_DEFERRED))
        to_host = np_is_to_node(ctx, original, version);
    scratch->steps = np_workload_steps(config, scratch->host, is_deferred, to_host);
    if (to_host && config->flags & NP_CONFIG_TO_HOST_DENY)
        scratch->default_drop = NP_REASON_TO_HOST;
    return NP_REASON_NONE;
}

// Apply a new verdict to a known connection that was allowed under an older generation. Precondition: policy has judged
// the tuple of the connection's first packet. A denied connection keeps its old generation, so policy judges each
// further packet again. It also keeps its entry, so that a packet of the other side does not pass as the first packet
// of a new flow. Returns NP_REASON_NONE or the reason to drop the packet.
NP_INLINE int np_ip_again(struct np_ctx *ctx, const struct np_scratch *scratch, const struct np_ct_slot *slot,
                          const int version)
{
    struct np_decision *decision = ctx->decision;
    struct np_conn *conn = slot->conn;
    int allowed = decision->action != NP_ACTION_DENY;
    if (!allowed && !(ctx->config->flags & NP_CONFIG_KEEP_REVOKED))
        return decision->reason == NP_REASON_POLICY_DENY ? NP_REASON_REVOKED : decision->reason;
    if (allowed) {
        conn->rule = decision->rule;
        *np_ct_slot_name_class(slot, version) = decision->name_class;
    }
    if (allowed && conn->flags & NP_CONN_DEFERRED) {
        __u32 flags = conn->flags & ~NP_CONN_DUE;
        if (ctx->ep->endpoint_flags & NP_ENDPOINT_HOST)
            flags = decision->action == NP_ACTION_ALLOW ? flags & ~NP_CONN_TAGGED : flags | NP_CONN_TAGGED;
        conn->flags = scratch->is_due ? flags | NP_CONN_DUE : flags;
    }
    decision->log_list = 0; // Log rules apply only to new flows
    return NP_REASON_NONE;
}

// Handle a packet of a known connection that this generation allows: update the connection, set the packet's sender
// tag, and fill the flow cache.
NP_INLINE int np_ip_known(struct __sk_buff *skb, struct np_ctx *ctx, union np_conn_key *key,
                          const struct np_found *found, struct np_ct_slot *slot, int hook, const int version)
{
    const struct np_packet *packet = ctx->packet;
    struct np_conn *conn = slot->conn;
    __u32 sender_tag = conn->flags & NP_CONN_TAGGED ? ctx->ep->endpoint : 0;
    if (conn->generation != ctx->arrival->generation)
        np_conn_renew(conn, ctx->arrival->generation);
    ctx->decision->rule = conn->rule;
    int is_due = (conn->flags & NP_CONN_DUE) != 0;
    if (conn->flags & NP_CONN_TAGGED && !ctx->ep->reply)
        ctx->ep->end_chain = np_sender_tag_set(skb, ctx->config, ctx->ep->endpoint, is_due);
    if (ctx->ep->related)
        return NP_REASON_RELATED;
    np_conn_advance(ctx, key, slot, found, version);
    if (found->is_unreplied && ctx->ep->reply && !(packet->tcp_flags & NP_TCP_RST)) {
        // the connection is now established
        np_flow_cache_fill(ctx, ctx->decision->rule, 0, 0, hook, version);
        np_flow_cache_fill_reply(ctx, ctx->decision->rule, sender_tag, is_due, hook, version);
    } else if (found->is_unreplied && packet->protocol == NP_PROTOCOL_UDP && packet->fragment == NP_FRAGMENT_WHOLE) {
        // some UDP streams have no replies
        np_flow_cache_fill(ctx, ctx->decision->rule, sender_tag, is_due, hook, version);
    }
    return NP_REASON_ESTABLISHED;
}

// Whether a process of the node listens on the packet's source port. If so, the node did not open this connection. The
// look-up uses the remote port 0, which no connection has, so that it can find only a listening socket.
NP_INLINE int np_is_served(struct __sk_buff *skb, const struct np_packet *packet, const int version)
{
    struct bpf_sock_tuple tuple = {};
    if (version == 4) {
        tuple.ipv4.saddr = packet->destination[0];
        tuple.ipv4.daddr = packet->source[0];
        tuple.ipv4.dport = np_net16(packet->source_port);
    } else {
        __builtin_memcpy(tuple.ipv6.saddr, packet->destination, sizeof(tuple.ipv6.saddr));
        __builtin_memcpy(tuple.ipv6.daddr, packet->source, sizeof(tuple.ipv6.daddr));
        tuple.ipv6.dport = np_net16(packet->source_port);
    }
    struct bpf_sock *found =
        np_socket_lookup(skb, &tuple, version == 4 ? sizeof(tuple.ipv4) : sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
    if (!found)
        return 0;
    np_socket_release(found);
    return 1;
}

// Record the connection of an allowed first packet, and set the packet's sender tag if its verdict is deferred. Returns
// the reason why the packet passes or is dropped.
NP_INLINE int np_ip_new(struct __sk_buff *skb, struct np_ctx *ctx, const struct np_scratch *scratch,
                        union np_conn_key *key, __u8 kind, const int version)
{
    const struct np_packet *packet = ctx->packet;
    int reason = ctx->decision->reason;
    __u8 flags = reason == NP_REASON_HOST || reason == NP_REASON_SELF ? NP_CONN_EXEMPT : kind;
    if (kind & NP_CONN_DEFERRED &&
        (ctx->decision->action == NP_ACTION_CONTINUE || !(ctx->ep->endpoint_flags & NP_ENDPOINT_HOST))) {
        flags |= scratch->is_due ? NP_CONN_TAGGED | NP_CONN_DUE : NP_CONN_TAGGED;
        ctx->ep->end_chain = np_sender_tag_set(skb, ctx->config, ctx->ep->endpoint, scratch->is_due);
        reason = NP_REASON_DEFERRED;
    }
    // A packet from the node in the middle of a TCP connection opens no connection if a process listens on its source
    // port. In that case the workload opened the connection, and the entry was evicted.
    if (reason == NP_REASON_HOST && packet->protocol == NP_PROTOCOL_TCP && !(packet->tcp_flags & NP_TCP_SYN) &&
        np_is_served(skb, packet, version))
        return reason;
    if (!np_conn_opens(ctx))
        return reason;
    int failed = np_conn_open(ctx, key, 0, flags, version);
    return failed ? failed : reason;
}

// Whether a workload asks all DHCP servers on its link for an address.
NP_INLINE int np_asks_for_address(const struct np_ctx *ctx, const int version)
{
    return ctx->ep->direction == NP_DIRECTION_EGRESS && !(ctx->ep->endpoint_flags & NP_ENDPOINT_HOST) &&
           np_is_dhcp_request(ctx->packet, version);
}

// Record a first fragment that passes, so that its later fragments pass too. Returns the reason why the packet passes
// or is dropped.
NP_INLINE int np_ip_remember(const struct np_ctx *ctx, const struct np_scratch *scratch, int reason, const int version)
{
    // An ICMP error fits into one packet. Without this check, later fragments could pass as the beginning of another
    // ICMP error.
    if (ctx->packet->fragment != NP_FRAGMENT_FIRST || reason >= NP_REASON_POLICY_DENY || scratch->is_error)
        return reason;
    int failed = np_fragment_remember(ctx, version);
    return failed ? failed : reason;
}

// Apply the verdict of policy for the interface's endpoint. `decision->reason` has the reason, also if policy was
// skipped.
NP_INLINE int np_ip_verdict(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch, const int version)
{
    union np_conn_key *key = &scratch->key;
    struct np_ct_slot slot = {};
    int reason = ctx->decision->reason;
    if (scratch->found.is_known) {
        slot = np_conn_again(ctx, &scratch->found, key, version);
        if (slot.conn) {
            int cut = np_ip_again(ctx, scratch, &slot, version);
            if (cut)
                return cut;
        } // the entry was evicted meanwhile, so the packet counts as a first one
    }
    if (slot.conn)
        reason = np_ip_known(skb, ctx, key, &scratch->found, &slot, ctx->arrival->hook, version);
    else if (ctx->decision->action != NP_ACTION_DENY)
        reason = np_ip_new(skb, ctx, scratch, key, ctx->ep->kind, version);
    return np_ip_remember(ctx, scratch, reason, version);
}

// Judge a new flow, or a connection of an older generation, by its conntrack key. If `scratch->reason` is set, policy
// does not apply. Otherwise the policy steps run, and np_ip_verdict continues.
NP_INLINE int np_ip_ask(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch,
                        const union np_conn_key *key, const int hook, const int version)
{
    struct np_tuple *tuple = &scratch->tuples[NP_TUPLE_ORIGINAL];
    struct np_endpoint_ctx *ep = ctx->ep;
    np_tuple_of_key(tuple, key, ep->first_direction, version);
    if (!scratch->found.is_known && !scratch->reason)
        ep->kind = np_ip_kind(ctx, tuple, hook, version);
    scratch->self = ep->first_direction == NP_DIRECTION_EGRESS && !(ep->endpoint_flags & NP_ENDPOINT_HOST) &&
                            !(ep->kind & NP_CONN_DEFERRED)
                        ? ep->endpoint
                        : 0;
    np_barrier();
    __u8 action = NP_ACTION_ALLOW;
    if (!scratch->reason) {
        scratch->reason = np_ip_plan(ctx, scratch, ep->kind, ep->first_direction, version);
        action = NP_ACTION_DENY;
    }
    np_barrier();
    if (!scratch->reason) {
        scratch->is_sender = 0;
        return np_judge(skb, ctx, scratch);
    }
    ctx->decision->action = ctx->decision->staged_action = action;
    ctx->decision->reason = scratch->reason;
    return np_ip_verdict(skb, ctx, scratch, version);
}

// The slow path, for every packet that neither the flow cache nor an established connection of this generation decides.
NP_INLINE int np_ip_slow(struct __sk_buff *skb, struct np_ctx *ctx, union np_conn_key *key, struct np_scratch *scratch,
                         const int hook, const int version)
{
    const struct np_packet *packet = ctx->packet;
    struct np_tuple *tuple = &scratch->tuples[NP_TUPLE_ORIGINAL];
    struct np_found *found = &scratch->found;
    struct np_endpoint_ctx *ep = ctx->ep;
    scratch->is_error = packet->icmp_kind == NP_ICMP_ERROR;
    scratch->is_due = 0;

    if (np_is_spoofed(ctx, version)) { // the packet may come from a DHCP client without an address
        int has_none = version == 4 ? !packet->source[0] : np_is_link_local(packet->source);
        return has_none && np_asks_for_address(ctx, version) ? NP_REASON_DHCP : NP_REASON_SPOOFED;
    }
    if (np_is_misdelivered(ctx, version))
        return NP_REASON_MISDELIVERED;
    if (np_is_workloads_own(ctx, hook) && np_is_tunnelled(ctx, version))
        return NP_REASON_TUNNEL;

    ep->related = NP_REASON_NONE;
    if (scratch->is_error) {
        ep->related = np_conn_key_inner(skb, key, ctx, version);
        if (ep->related == NP_REASON_ICMP_UNRELATED)
            return NP_REASON_ICMP_UNRELATED;
        if (ep->related == NP_REASON_NONE)
            ctx->packet->icmp_kind = NP_ICMP_PLAIN; // policy judges the error like any other message
    }
    np_barrier();
    if (ep->related)
        np_ct_probe(ctx, key, version);
    struct np_ct_slot slot = np_conn_find(found, key, ctx, version);
    struct np_conn *conn = slot.conn;
    if (ep->related && !conn)
        return NP_REASON_ICMP_UNRELATED;
    if (!conn && np_asks_for_address(ctx, version))
        return NP_REASON_DHCP;

    ep->first_direction = ep->direction;
    tuple->icmp_type = packet->icmp_type;
    tuple->icmp_code = packet->icmp_code;
    scratch->reason = NP_REASON_NONE;
    if (conn) {
        ep->first_direction = found->direction;
        ep->kind = found->flags & (NP_CONN_DEFERRED | NP_CONN_FORWARDED);
        ep->reply = found->direction != ep->direction;
        tuple->icmp_type = found->icmp_type;
        tuple->icmp_code = found->icmp_code;
        if (found->generation == ctx->arrival->generation || found->flags & NP_CONN_EXEMPT)
            return np_ip_remember(ctx, scratch, np_ip_known(skb, ctx, key, found, &slot, hook, version), version);
    } else {
        scratch->reason = np_exempt(ctx, hook, version);
    }
    np_barrier();
    return np_ip_ask(skb, ctx, scratch, key, hook, version);
}

// Continue after the sender's policy allowed the packet (`scratch->reason` has the reason). Remove the sender tag, and
// return to the endpoint of this interface.
NP_INLINE void np_ip_sender_allowed(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch)
{
    np_account(skb, ctx, scratch->reason);
    np_barrier();
    ctx->ep->endpoint = scratch->own_endpoint;
    ctx->ep->direction = np_direction_at(NP_HOOK_EGRESS, ctx->ep->endpoint_flags);
    ctx->ep->untracked = 0;
    __builtin_memset(ctx->decision, 0, sizeof(*ctx->decision));
    ctx->ep->end_chain = np_sender_tag_set(skb, ctx->config, 0, 0);
}

// Judge the packet for the interface's own endpoint. A packet of an established connection passes here, unless it needs
// the slow path.
NP_INLINE int np_ip_own(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch, const int hook,
                        const int version)
{
    const struct np_packet *packet = ctx->packet;
    union np_conn_key *key = &scratch->key;
    if (ctx->ep->endpoint_flags & NP_ENDPOINT_UPLINK)
        return NP_REASON_UPLINK;
    np_conn_key_of(key, ctx, version);
    if (NP_LIKELY(!np_conn_is_initial(packet)))
        np_ct_probe(ctx, key, version);
    if (NP_LIKELY(!packet->slow_only)) {
        struct np_ct_slot slot = np_ct_lookup(ctx, key, 0, version);
        struct np_conn *open = slot.conn;
        __u32 generation = open ? open->generation : 0; // read before rule and flags; a generation is never 0
        if (NP_LIKELY(open && generation == ctx->arrival->generation && np_conn_is_alive(open, ctx) &&
                      !np_conn_is_closed(open))) {
            open = np_load_after(open, generation);
            __u32 rule = open->rule;
            __u32 flags = open->flags;
            int sender_tag = flags & NP_CONN_TAGGED && open->direction == ctx->ep->direction;
            int is_due = (flags & NP_CONN_DUE) != 0;
            if (NP_LIKELY(np_ct_slot_is_kept(&slot, rule + flags, 0, ctx))) {
                np_conn_touch(&slot, ctx);
                np_flow_cache_fill(ctx, rule, sender_tag ? ctx->ep->endpoint : 0, is_due, hook, version);
                if (NP_UNLIKELY(sender_tag))
                    ctx->ep->end_chain = np_sender_tag_set(skb, ctx->config, ctx->ep->endpoint, is_due);
                ctx->decision->rule = rule;
                return NP_REASON_ESTABLISHED;
            }
        }
    }
    return np_ip_slow(skb, ctx, key, scratch, hook, version);
}

// The reason for a malformed packet. The packet is dropped, but on an uplink (a host interface without policy) it
// passes unless it has a sender tag.
NP_INLINE int np_malformed(struct np_ctx *ctx, int reason)
{
    return ctx->ep->endpoint_flags & NP_ENDPOINT_UPLINK && !ctx->ep->sender ? NP_REASON_UPLINK : reason;
}

NP_INLINE int np_ip(struct __sk_buff *skb, const struct np_bytes *bytes, struct np_ctx *ctx, struct np_scratch *scratch,
                    const int hook, const int version)
{
    struct np_packet *packet = ctx->packet;
    int reason = np_parse_ip(bytes, packet, version);
    if (NP_UNLIKELY(reason))
        return np_malformed(ctx, reason);
    if (version == 6) {
        reason = np_link_message(skb, ctx, hook);
        np_barrier();
        if (NP_UNLIKELY(reason))
            return reason;
    }
    if (NP_UNLIKELY(ctx->ep->missing))
        return ctx->ep->missing;
    ctx->ep->direction = np_direction_at(hook, ctx->ep->endpoint_flags);
    if (NP_UNLIKELY(np_is_forged(ctx, hook, version)))
        return NP_REASON_LINK_FORGED;
    if (hook == NP_HOOK_INGRESS) {
        reason = np_outside(skb, ctx, &scratch->outer, version);
        np_barrier();
        if (NP_UNLIKELY(reason))
            return reason;
    }
    if (hook == NP_HOOK_INGRESS && ctx->ep->sender) {
        // A packet that a workload sends meets this hook first, so a sender tag on the packet is forged. A packet on a
        // host interface may have come through a bridge from a hook that set the tag, so its tag stays.
        if (!(ctx->ep->endpoint_flags & NP_ENDPOINT_HOST))
            ctx->ep->end_chain = np_sender_tag_set(skb, ctx->config, 0, 0);
        ctx->ep->sender = 0;
    }
    if (ctx->ep->endpoint_flags & NP_ENDPOINT_UPLINK && !ctx->ep->sender)
        return NP_REASON_UPLINK;
    if (NP_UNLIKELY(np_checksum_misaims(skb, packet)))
        return NP_REASON_CHECKSUM_AIM;
    if (NP_UNLIKELY(packet->fragment == NP_FRAGMENT_LATER)) {
        reason = np_fragment_recall(ctx, version);
        if (reason && !(ctx->ep->endpoint_flags & NP_ENDPOINT_UPLINK))
            return reason;
    }
    if (hook == NP_HOOK_EGRESS && NP_UNLIKELY(ctx->ep->sender)) {
        scratch->own_endpoint = ctx->ep->endpoint;
        reason = np_sender(skb, ctx, scratch, version);
        np_barrier();
        if (reason)
            return reason;
        np_ip_sender_allowed(skb, ctx, scratch);
    }
    return np_ip_own(skb, ctx, scratch, hook, version);
}

// The reason for a packet that is neither IP nor ARP. The packet is dropped at a workload's interface, and passes at a
// host's.
NP_INLINE int np_not_ip(struct np_ctx *ctx)
{
    if (ctx->ep->missing)
        return ctx->ep->missing;
    if (ctx->ep->endpoint_flags & NP_ENDPOINT_UPLINK)
        return NP_REASON_UPLINK;
    return ctx->ep->endpoint_flags & NP_ENDPOINT_HOST ? NP_REASON_HOST_NON_IP : NP_REASON_NON_IP;
}

NP_INLINE int np_frame(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch, const int hook)
{
    struct np_bytes bytes;
    __u32 flags = ctx->ep->endpoint_flags;
    if (NP_UNLIKELY(flags & NP_ENDPOINT_UNREADABLE))
        return flags & NP_ENDPOINT_UPLINK && !ctx->ep->sender ? NP_REASON_UPLINK : NP_REASON_LINK_TYPE;
    int reason = np_parse_frame(skb, &bytes, ctx->packet, !(flags & NP_ENDPOINT_LAYER3));
    if (NP_UNLIKELY(reason))
        return np_malformed(ctx, reason);
    switch (ctx->packet->ethertype) {
    case NP_ETHERTYPE_IP4:
        return np_ip(skb, &bytes, ctx, scratch, hook, 4);
    case NP_ETHERTYPE_IP6:
        return np_ip(skb, &bytes, ctx, scratch, hook, 6);
    case NP_ETHERTYPE_ARP:
        return np_link_arp(skb, ctx, hook);
    default:
        return np_not_ip(ctx);
    }
}

NP_INLINE void np_ctx_set(struct np_ctx *ctx, struct np_scratch *scratch, const struct np_config *config)
{
    ctx->packet = &scratch->packet;
    ctx->decision = &scratch->decision;
    ctx->ep = &scratch->ep;
    ctx->arrival = &scratch->arrival;
    ctx->config = config;
}

NP_INLINE int np_tc(struct __sk_buff *skb, const int hook)
{
    const struct np_config *config = np_config_lookup();
    if (!config) { // cannot happen: an array always has its row
        np_count_reason(NP_REASON_NO_CONFIG, skb->len);
        return NP_DROP;
    }
    int verdict = np_fast_path(skb, config, hook);
    if (NP_LIKELY(verdict != NP_SLOW_PATH))
        return verdict;

    struct np_scratch *scratch = (void *)np_scratch_lookup();
    struct np_ctx ctx;
    if (!scratch) { // cannot happen: an array always has its row
        np_count_reason(NP_REASON_NO_CONFIG, skb->len);
        return NP_DROP;
    }
    np_ctx_set(&ctx, scratch, config);
    // One load reads both generation and epoch, before any row. Otherwise a verdict from a row that was cached under
    // the old epoch could carry the new generation.
    __u64 version = *(const volatile __u64 *)config;
    np_barrier();
    scratch->arrival = (struct np_arrival){
        .now_jiffies = bpf_jiffies64(),
        .ifindex = skb->ifindex,
        .ingress_ifindex = skb->ingress_ifindex,
        .frame_bytes = skb->len,
        .hook = hook,
        // A packet from the node has no ingress_ifindex, but a forwarded packet that the stack builds anew (IPv6
        // fragments) has none either. A packet from the node has a socket or the node mark, but a packet that a bridge
        // forwards also has its sender's socket. So both conditions must hold.
        .is_from_node = !skb->ingress_ifindex && (skb->sk || skb->mark & config->node_mark),
    };
    *(np_word *)&scratch->arrival.generation = version;
    scratch->calls_left = NP_JUDGE_CALLS;
    np_barrier();
    np_zero_words(&scratch->packet, sizeof(scratch->packet));
    np_zero_words(&scratch->decision, sizeof(scratch->decision));
    np_zero_words(&scratch->ep, sizeof(scratch->ep));
    ctx.ep->direction = np_direction_at(hook, 0);
    ctx.ep->sender = np_sender_tag_get(skb, config);
    np_keep_in_memory(&ctx);
    ctx.ep->missing = np_endpoint_find(&ctx);
    np_barrier();
    scratch->reason = np_frame(skb, &ctx, scratch, hook);
    np_barrier(); // the verifier forgets the reason here, so it checks np_conclude once and not once for each reason
    return np_conclude(skb, &ctx, scratch->reason);
}

// Restore the context in a tail-called program. Returns NULL if there is no configuration or no scratch memory.
NP_INLINE struct np_scratch *np_resume(struct __sk_buff *skb, struct np_ctx *ctx)
{
    const struct np_config *config = np_config_lookup();
    struct np_scratch *scratch = (void *)np_scratch_lookup();
    if (!config || !scratch) { // cannot happen: an array always has its row
        np_count_reason(NP_REASON_NO_CONFIG, skb->len);
        return 0;
    }
    np_ctx_set(ctx, scratch, config);
    return scratch;
}

// Go on after a policy list: evaluate the next one, or apply the verdict. Returns the verdict of TC.
NP_INLINE int np_judged(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch, int outcome)
{
    if (outcome != NP_JUDGED_FINAL) {
        scratch->reason = np_judge_call(skb, scratch, outcome == NP_JUDGED_NAMES ? NP_CALL_NAMES : NP_CALL_JUDGE);
    } else {
        np_judge_end(ctx, scratch);
        np_barrier();
        if (NP_UNLIKELY(scratch->is_sender)) {
            np_call_program(skb, NP_CALL_SENDER);
            scratch->reason = NP_REASON_CALL_MISSING;
        } else if (ctx->packet->version == 4) {
            scratch->reason = np_ip_verdict(skb, ctx, scratch, 4);
        } else {
            scratch->reason = np_ip_verdict(skb, ctx, scratch, 6);
        }
    }
    np_barrier();
    return np_conclude(skb, ctx, scratch->reason);
}

int np_tc_judge(struct __sk_buff *skb)
{
    struct np_ctx ctx;
    struct np_scratch *scratch = np_resume(skb, &ctx);
    if (!scratch)
        return NP_DROP;
    int outcome = ctx.packet->version == 4 ? np_judge_step(&ctx, scratch, 4) : np_judge_step(&ctx, scratch, 6);
    np_barrier();
    return np_judged(skb, &ctx, scratch, outcome);
}

int np_tc_names(struct __sk_buff *skb)
{
    struct np_ctx ctx;
    struct np_scratch *scratch = np_resume(skb, &ctx);
    if (!scratch)
        return NP_DROP;
    if (ctx.packet->version == 4)
        np_names(&ctx, scratch, 4);
    else
        np_names(&ctx, scratch, 6);
    np_barrier();
    int outcome = np_judge_apply(&ctx, scratch, scratch->names.step, NP_REASON_NONE);
    np_barrier();
    return np_judged(skb, &ctx, scratch, outcome);
}

NP_INLINE int np_sender_goes_on(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch,
                                const int version)
{
    int reason = np_sender_verdict(ctx, scratch, version);
    np_barrier();
    if (reason)
        return reason;
    np_ip_sender_allowed(skb, ctx, scratch);
    return np_ip_own(skb, ctx, scratch, NP_HOOK_EGRESS, version);
}

int np_tc_sender(struct __sk_buff *skb)
{
    struct np_ctx ctx;
    struct np_scratch *scratch = np_resume(skb, &ctx);
    if (!scratch)
        return NP_DROP;
    scratch->reason =
        ctx.packet->version == 4 ? np_sender_goes_on(skb, &ctx, scratch, 4) : np_sender_goes_on(skb, &ctx, scratch, 6);
    np_barrier();
    return np_conclude(skb, &ctx, scratch->reason);
}

// Conclude a DNS program: let the packet pass, or drop it for a reason that np_account counts and reports.
NP_INLINE int np_dns_conclude(struct __sk_buff *skb, struct np_ctx *ctx, int reason)
{
    if (NP_LIKELY(!reason))
        return np_pass(skb, ctx);
    ctx->decision->log_list = 0; // np_conclude has written that event
    return np_account(skb, ctx, reason);
}

// Restore the context in a DNS program. Returns NULL if there is no configuration or no memory.
NP_INLINE struct np_dns *np_dns_resume(struct __sk_buff *skb, struct np_ctx *ctx)
{
    struct np_dns *dns = (void *)np_dns_scratch_lookup();
    if (!np_resume(skb, ctx))
        return 0;
    if (!dns) // cannot happen: an array always has its row
        np_count_reason(NP_REASON_NO_CONFIG, skb->len);
    return dns;
}

int np_tc_question(struct __sk_buff *skb)
{
    struct np_ctx ctx;
    struct np_dns *dns = np_dns_resume(skb, &ctx);
    if (!dns)
        return NP_DROP;
    np_dns_question(skb, &ctx, dns);
    return np_dns_conclude(skb, &ctx, NP_REASON_NONE);
}

int np_tc_answer(struct __sk_buff *skb)
{
    struct np_ctx ctx;
    struct np_dns *dns = np_dns_resume(skb, &ctx);
    if (!dns)
        return NP_DROP;
    int reason = np_dns_answer(skb, &ctx, dns);
    np_barrier();
    return np_dns_conclude(skb, &ctx, reason);
}

int np_tc_records(struct __sk_buff *skb)
{
    struct np_ctx ctx;
    struct np_dns *dns = np_dns_resume(skb, &ctx);
    if (!dns)
        return NP_DROP;
    int reason = np_dns_records(skb, &ctx, dns);
    np_barrier();
    return np_dns_conclude(skb, &ctx, reason);
}

int np_tc_learn(struct __sk_buff *skb)
{
    struct np_ctx ctx;
    struct np_dns *dns = np_dns_resume(skb, &ctx);
    if (!dns)
        return NP_DROP;
    np_dns_learn(skb, &ctx, dns);
    return np_dns_conclude(skb, &ctx, NP_REASON_NONE);
}

int np_tc_ingress(struct __sk_buff *skb)
{
    return np_tc(skb, NP_HOOK_INGRESS);
}

int np_tc_egress(struct __sk_buff *skb)
{
    return np_tc(skb, NP_HOOK_EGRESS);
}
