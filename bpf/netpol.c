// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// A packet's way through the policy of one interface.  A program for each hook, and two that they call (enum np_call);
// read them from the bottom up:
//
//     np_tc          the fast path, else: the packet and its endpoint -> np_frame -> np_conclude
//     np_frame       frame -> ARP | IPv4 | IPv6 | the rest
//     np_ip          parse -> messages of the link -> what nobody may send -> fragment -> np_sender -> np_ip_own
//     np_ip_own      established connection: done
//     np_ip_slow     anti-spoofing -> connection: np_ip_known, else np_ip_plan -> np_tc_judge
//     np_tc_judge    one policy list, and the next one -> np_tc_sender | np_ip_verdict
//     np_tc_sender   policy has answered for a sender that was deferred to here -> np_ip_own
//     np_ip_verdict  policy has answered for the interface's endpoint -> np_ip_known | np_ip_new
//     np_conclude    count, tell, pass or drop
//
// Each step returns why the packet passes or is dropped (enum np_reason), or NP_REASON_NONE: the next step decides.  A
// call does not return; what the called program needs is in np_scratch, so it is verified by itself.
//
// Invariants.  A packet that the program cannot read is dropped, and counted under a reason.  A verdict carries the
// rule of the table entry that decided.  A packet of an established connection costs at most one look-up in the table
// of connections after parsing, no time call and no tail call.  A call that fails drops the packet and is counted.
//
// Files, in the order of use: np_lang (words), np_abi (what is shared), np_maps (tables), np_parse, np_ctx (what the
// steps tell each other), np_count, np_event, np_bucket (addresses and classes), np_endpoint (whose), np_outside (from
// whom), np_classify (one policy), np_judge (which policies), np_table (connections), np_conn, np_service (what is
// judged elsewhere), np_fragment, np_link (messages of the link), np_kernel (what the kernel alone knows),
// np_flow_cache (the fast path).

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
#include "np_service.h"
#include "np_fragment.h"
#include "np_link.h"
#include "np_kernel.h"
#include "np_flow_cache.h"

// The policy's direction at this hook.
NP_INLINE __u8 np_direction_at(const int hook, __u32 endpoint_flags)
{
    int host = (endpoint_flags & NP_ENDPOINT_HOST) != 0;
    return (hook == NP_HOOK_INGRESS) == host ? NP_DIRECTION_INGRESS : NP_DIRECTION_EGRESS;
}

// Whether the packet was decided by a rule, or by rule 0: exempt.
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

// Whether policy was asked about this very packet, so that there is a pending verdict beside the enforced one.
NP_INLINE int np_is_judged(int reason)
{
    return reason == NP_REASON_POLICY_ALLOW || reason == NP_REASON_CONTINUE || reason == NP_REASON_POLICY_DENY ||
           reason == NP_REASON_REVOKED;
}

// Whether the packet opened a flow that was allowed.
NP_INLINE int np_is_new_flow(int reason)
{
    return reason == NP_REASON_POLICY_ALLOW || reason == NP_REASON_HOST || reason == NP_REASON_SELF;
}

// Let the packet pass; where it enters the node, with the sign that the program saw it.
NP_INLINE int np_pass(struct __sk_buff *skb, const struct np_ctx *ctx)
{
    if (ctx->arrival->hook == NP_HOOK_INGRESS)
        skb->mark |= ctx->config->seen_mark;
    return ctx->ep->end_chain ? NP_PASS_ALONE : NP_PASS;
}

// Count the packet, report it as an event if that is wanted, and return the verdict to the kernel.
NP_INLINE int np_conclude(struct __sk_buff *skb, struct np_ctx *ctx, int reason)
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
        if (!np_has_rule(reason)) // not policy's doing, so not a staged policy's either
            decision->action = decision->staged_action = NP_ACTION_DENY;
    } else if (np_is_new_flow(reason) || reason == NP_REASON_CONTINUE) { // the latter opens none, and is told likewise
        __u32 wanted = ctx->config->flags;
        if (wanted & NP_CONFIG_ALLOW_EVENTS ||
            (wanted & NP_CONFIG_STAGED_EVENTS && decision->staged_action != decision->action))
            kind = NP_EVENT_ALLOW;
    }
    if (kind)
        np_event_write(ctx, kind, reason);
    return dropped ? NP_DROP : np_pass(skb, ctx);
}

// Traffic that no policy applies to: of the node's own processes to its workload, and of a workload to itself through
// the node, which may have put its own address in place of the workload's.
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

// The kind of flow that a first packet begins: NP_CONN_DEFERRED, NP_CONN_FORWARDED.
NP_INLINE __u8 np_ip_kind(const struct np_ctx *ctx, struct np_tuple *tuple, const int hook, const int version)
{
    int is_host = (ctx->ep->endpoint_flags & NP_ENDPOINT_HOST) != 0;
    if (hook == NP_HOOK_EGRESS)
        return is_host && !ctx->arrival->is_from_node ? NP_CONN_FORWARDED : 0;
    if (np_vip_of(ctx, tuple, version))
        return NP_CONN_DEFERRED;
    return is_host && !np_is_for_node(ctx, tuple->destination, version) ? NP_CONN_FORWARDED : 0;
}

// The steps at a host's interface. `last`: NP_STEP_NORMAL for a process of the node, NP_STEP_FORWARD for what passes
// through, NP_STEP_NONE where the verdict of those is deferred.
NP_INLINE __u32 np_host_steps(__u8 direction, __u32 last)
{
    int is_local = last == NP_STEP_NORMAL;
    if (direction == NP_DIRECTION_INGRESS)
        return is_local ? np_steps(NP_STEP_FAILSAFE, NP_STEP_UNTRACKED, NP_STEP_PRE_DNAT, last)
                        : np_steps(NP_STEP_UNTRACKED, NP_STEP_PRE_DNAT, last, NP_STEP_NONE);
    return is_local ? np_steps(NP_STEP_FAILSAFE, NP_STEP_UNTRACKED, last, NP_STEP_NONE)
                    : np_steps(NP_STEP_UNTRACKED, last, NP_STEP_NONE, NP_STEP_NONE);
}

// The steps for what a workload sends, which enters the host. `is_deferred`: to a service whose backend is judged
// elsewhere; `to_host`: to a process of the node.
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

// Choose the steps that judge a flow of that kind, whose first packet had the original tuple and this direction.
// Returns why it is dropped without them, or NP_REASON_NONE.
NP_INLINE int np_ip_plan(struct np_ctx *ctx, struct np_scratch *scratch, __u8 kind, __u8 direction, const int version)
{
    const struct np_config *config = ctx->config;
    struct np_tuple *original = &scratch->tuples[NP_TUPLE_ORIGINAL];
    int is_deferred = (kind & NP_CONN_DEFERRED) != 0;
    int is_node_backend = 0; // the service's backend is a process of this node, which no hook stands before
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
    if (direction == NP_DIRECTION_INGRESS) { // what enters a workload leaves the host
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

// Policy was asked again about a known connection, which was allowed under another generation, with the tuple of its
// first packet.  What is no longer allowed keeps its entry, and that its generation: it is cut as long as policy says
// so, and no packet of the other side passes for the first of a flow of its own.  Returns why the packet is dropped, or
// NP_REASON_NONE.
NP_INLINE int np_ip_again(struct np_ctx *ctx, const struct np_scratch *scratch, struct np_conn *conn)
{
    struct np_decision *decision = ctx->decision;
    int allowed = decision->action != NP_ACTION_DENY;
    if (!allowed && !(ctx->config->flags & NP_CONFIG_KEEP_REVOKED))
        return decision->reason == NP_REASON_POLICY_DENY ? NP_REASON_REVOKED : decision->reason;
    if (allowed)
        conn->rule = decision->rule;
    if (allowed && conn->flags & NP_CONN_DEFERRED) {
        __u32 flags = conn->flags & ~NP_CONN_DUE;
        if (ctx->ep->endpoint_flags & NP_ENDPOINT_HOST)
            flags = decision->action == NP_ACTION_ALLOW ? flags & ~NP_CONN_TAGGED : flags | NP_CONN_TAGGED;
        conn->flags = scratch->is_due ? flags | NP_CONN_DUE : flags;
    }
    decision->log_list = 0; // Log rules speak of new flows
    return NP_REASON_NONE;
}

// A packet of a known connection that is allowed under this generation.
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
    if (found->is_unreplied && ctx->ep->reply && !(packet->tcp_flags & NP_TCP_RST)) { // it is open from now on
        np_flow_cache_fill(ctx, ctx->decision->rule, 0, 0, hook, version);
        np_flow_cache_fill_reply(ctx, ctx->decision->rule, sender_tag, is_due, hook, version);
    } else if (found->is_unreplied && packet->protocol == NP_PROTOCOL_UDP && packet->fragment == NP_FRAGMENT_WHOLE) {
        np_flow_cache_fill(ctx, ctx->decision->rule, sender_tag, is_due, hook, version); // nobody answers some streams
    }
    return NP_REASON_ESTABLISHED;
}

// Whether a process of the node listens on the port that a packet of the node's comes from: then it is not the node
// that has opened the connection.  No connection has the other side's port 0, so what is found is who listens.
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

// The first packet of a flow that was allowed.
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
    // A packet in the middle of a TCP connection that the workload opened, and whose entry was evicted, opens none.
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

// A first fragment that passes is remembered for the later ones. Returns why the packet passes or is dropped.
NP_INLINE int np_ip_remember(const struct np_ctx *ctx, const struct np_scratch *scratch, int reason, const int version)
{
    // Errors fit into one packet; the rest of one would be taken for its beginning.
    if (ctx->packet->fragment != NP_FRAGMENT_FIRST || reason >= NP_REASON_POLICY_DENY || scratch->is_error)
        return reason;
    int failed = np_fragment_remember(ctx, version);
    return failed ? failed : reason;
}

// Policy has answered for the interface's endpoint, or was not asked; the decision says which.
NP_INLINE int np_ip_verdict(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch, const int version)
{
    union np_conn_key *key = &scratch->key;
    struct np_ct_slot slot = {};
    int reason = ctx->decision->reason;
    if (scratch->found.is_known) {
        slot = np_conn_again(ctx, &scratch->found, key, version);
        if (slot.conn) {
            int cut = np_ip_again(ctx, scratch, slot.conn);
            if (cut)
                return cut;
        } // else it was evicted meanwhile; what policy says counts
    }
    if (slot.conn)
        reason = np_ip_known(skb, ctx, key, &scratch->found, &slot, ctx->arrival->hook, version);
    else if (ctx->decision->action != NP_ACTION_DENY)
        reason = np_ip_new(skb, ctx, scratch, key, ctx->ep->kind, version);
    return np_ip_remember(ctx, scratch, reason, version);
}

// Ask policy about the flow under a connection key, unless it is exempt as `scratch->reason` says; then comes
// np_ip_verdict.
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

// The slow path: every packet but those of established connections.
NP_INLINE int np_ip_slow(struct __sk_buff *skb, struct np_ctx *ctx, union np_conn_key *key, struct np_scratch *scratch,
                         const int hook, const int version)
{
    const struct np_packet *packet = ctx->packet;
    struct np_tuple *tuple = &scratch->tuples[NP_TUPLE_ORIGINAL];
    struct np_found *found = &scratch->found;
    struct np_endpoint_ctx *ep = ctx->ep;
    scratch->is_error = packet->icmp_kind == NP_ICMP_ERROR;
    scratch->is_due = 0;

    if (np_is_spoofed(ctx, version)) { // the client has no address yet, or one of the link alone
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
            ctx->packet->icmp_kind = NP_ICMP_PLAIN; // a message like any other
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

// The endpoint whose number is the sender tag of the packet allows it, as `scratch->reason` says: the flow is this
// interface's again, and the packet has no sender tag.
NP_INLINE void np_ip_sender_allowed(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch)
{
    np_conclude(skb, ctx, scratch->reason);
    np_barrier();
    ctx->ep->endpoint = scratch->own_endpoint;
    ctx->ep->direction = np_direction_at(NP_HOOK_EGRESS, ctx->ep->endpoint_flags);
    ctx->ep->untracked = 0;
    __builtin_memset(ctx->decision, 0, sizeof(*ctx->decision));
    ctx->ep->end_chain = np_sender_tag_set(skb, ctx->config, 0, 0);
}

// The packet's own endpoint: a packet in the middle of an established connection passes, the rest goes on.
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
        __u32 generation = open ? open->generation : 0; // before rule and flags; no generation is 0
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

// Malformed packets: dropped, but not on an interface without policy.
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
        // A workload cannot have a sender before it; what a host's interface gets may come from one behind a bridge.
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

// Neither IP nor ARP: a workload may neither send nor get such packets; a host interface may.
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
    if (!config) { // the one row of an array: cannot happen
        np_count_reason(NP_REASON_NO_CONFIG, skb->len);
        return NP_DROP;
    }
    int verdict = np_fast_path(skb, config, hook);
    if (NP_LIKELY(verdict != NP_SLOW_PATH))
        return verdict;

    struct np_scratch *scratch = (void *)np_scratch_lookup();
    struct np_ctx ctx;
    if (!scratch) { // likewise
        np_count_reason(NP_REASON_NO_CONFIG, skb->len);
        return NP_DROP;
    }
    np_ctx_set(&ctx, scratch, config);
    // Generation and epoch by one load, before any row: a row remembered under the old epoch must not bear the new
    // generation.
    __u64 version = *(const volatile __u64 *)config;
    np_barrier();
    scratch->arrival = (struct np_arrival){
        .now_jiffies = bpf_jiffies64(),
        .ifindex = skb->ifindex,
        .ingress_ifindex = skb->ingress_ifindex,
        .frame_bytes = skb->len,
        .hook = hook,
        // Neither is proof by itself: what the stack makes anew of a packet has no interface, and what a bridge passes
        // on still has its sender's socket.
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
    np_barrier(); // the verifier forgets which way it came: one walk through the end instead of one for each reason
    return np_conclude(skb, &ctx, scratch->reason);
}

// A called program takes up the packet where its caller left it. NULL: it cannot.
NP_INLINE struct np_scratch *np_resume(struct __sk_buff *skb, struct np_ctx *ctx)
{
    const struct np_config *config = np_config_lookup();
    struct np_scratch *scratch = (void *)np_scratch_lookup();
    if (!config || !scratch) { // rows of arrays: cannot happen
        np_count_reason(NP_REASON_NO_CONFIG, skb->len);
        return 0;
    }
    np_ctx_set(ctx, scratch, config);
    return scratch;
}

int np_tc_judge(struct __sk_buff *skb)
{
    struct np_ctx ctx;
    struct np_scratch *scratch = np_resume(skb, &ctx);
    if (!scratch)
        return NP_DROP;
    int is_answered = ctx.packet->version == 4 ? np_judge_step(&ctx, scratch, 4) : np_judge_step(&ctx, scratch, 6);
    np_barrier();
    if (!is_answered) {
        scratch->reason = np_judge_next(skb, scratch);
    } else {
        np_judge_end(&ctx, scratch);
        np_barrier();
        if (NP_UNLIKELY(scratch->is_sender)) {
            np_call_program(skb, NP_CALL_SENDER);
            scratch->reason = NP_REASON_CALL_MISSING;
        } else if (ctx.packet->version == 4) {
            scratch->reason = np_ip_verdict(skb, &ctx, scratch, 4);
        } else {
            scratch->reason = np_ip_verdict(skb, &ctx, scratch, 6);
        }
    }
    np_barrier();
    return np_conclude(skb, &ctx, scratch->reason);
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

int np_tc_ingress(struct __sk_buff *skb)
{
    return np_tc(skb, NP_HOOK_INGRESS);
}

int np_tc_egress(struct __sk_buff *skb)
{
    return np_tc(skb, NP_HOOK_EGRESS);
}
