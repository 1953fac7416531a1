// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// A packet's way through the policy of one interface.  Two programs, one for each hook; read them from the bottom up:
//
//     np_tc         the packet's facts -> np_frame -> np_conclude
//     np_frame      frame -> ARP | IPv4 | IPv6 | the rest
//     np_ip         parse -> the short way -> neighbour discovery -> whose -> fragment -> open connection: done
//     np_ip_slow    anti-spoofing -> connection -> policy -> np_ip_known | np_ip_new
//     np_conclude   count, tell, pass or drop
//
// Each step returns why the packet passes or is dropped (enum np_reason), or NP_REASON_NONE: the next step decides.
//
// Invariants.  Whatever is not understood is dropped, and counted under a reason.  A verdict carries the rule of the
// table entry that decided.  A packet of an open connection costs at most one hash look-up after parsing, and no time
// call.
//
// Files, in the order of use: np_lang (words), np_abi (what is shared), np_maps (tables), np_parse, np_flow (what the
// steps tell each other), np_count, np_event, np_endpoint (whose), np_classify (policy), np_conn, np_fragment,
// np_recent (the short way).

#include "np_lang.h"
#include "np_abi.h"
#include "np_maps.h"
#include "np_parse.h"
#include "np_flow.h"
#include "np_count.h"
#include "np_event.h"
#include "np_endpoint.h"
#include "np_classify.h"
#include "np_conn.h"
#include "np_fragment.h"
#include "np_recent.h"

// -1 is TC_ACT_UNSPEC for clsact and TCX_NEXT for tcx: the next program decides. 2 is TC_ACT_SHOT and TCX_DROP.
#define NP_PASS (-1)
#define NP_DROP 2

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

// Whether the packet opened a flow that was allowed.
NP_INLINE int np_is_new_flow(int reason)
{
    return reason == NP_REASON_POLICY_ALLOW || reason == NP_REASON_HOST || reason == NP_REASON_SELF;
}

// Count, tell whoever wants to know, and say to the kernel what becomes of the packet.
NP_INLINE int np_conclude(struct np_flow *flow, int reason)
{
    struct np_decision *decision = &flow->decision;
    int dropped = reason >= NP_REASON_POLICY_DENY || reason == NP_REASON_NONE;
    if (np_has_rule(reason))
        np_count_rule(decision->rule, flow->frame_bytes);
    if (reason == NP_REASON_ESTABLISHED)
        return NP_PASS;
    np_count_reason(reason, flow->frame_bytes);
    if (decision->log_list)
        np_event_log(flow, reason);

    __u8 kind = 0;
    if (dropped) {
        kind = NP_EVENT_DENY;
        if (!np_has_rule(reason)) // not policy's doing, so not a staged policy's either
            decision->action = decision->staged_action = NP_ACTION_DENY;
    } else if (np_is_new_flow(reason) || reason == NP_REASON_CONTINUE) { // the latter opens none, and is told likewise
        __u32 wanted = flow->config->flags;
        if (wanted & NP_CONFIG_ALLOW_EVENTS ||
            (wanted & NP_CONFIG_STAGED_EVENTS && decision->staged_action != decision->action))
            kind = NP_EVENT_ALLOW;
    }
    if (kind)
        np_event_write(flow, kind, reason);
    return dropped ? NP_DROP : NP_PASS;
}

// Traffic that no policy applies to: of the node's own processes to its workload, and of a workload to itself through
// the node (whatever translated its addresses on the way).
NP_INLINE int np_exempt(const struct np_flow *flow, const int hook)
{
    if (hook != NP_HOOK_EGRESS || flow->endpoint_flags & NP_ENDPOINT_HOST)
        return NP_REASON_NONE;
    if (flow->ingress_ifindex == 0)
        return NP_REASON_HOST;
    return flow->ingress_ifindex == flow->ifindex ? NP_REASON_SELF : NP_REASON_NONE;
}

// A packet of a known connection.  One that was allowed under another generation takes the policy step once more, with
// the tuple of its first packet; what is no longer allowed is removed.
NP_INLINE int np_ip_known(struct np_flow *flow, union np_conn_key *key, const struct np_found *found, int related,
                          const int version)
{
    struct np_conn *conn = found->conn;
    struct np_decision *decision = &flow->decision;
    if (conn->generation != flow->config->generation) {
        int exempt = conn->flags & NP_CONN_EXEMPT;
        int allowed = exempt || decision->action == NP_ACTION_ALLOW;
        if (!allowed && !(flow->config->flags & NP_CONFIG_KEEP_REVOKED)) {
            np_conn_remove(key, found, version);
            return decision->reason == NP_REASON_POLICY_DENY ? NP_REASON_REVOKED : decision->reason;
        }
        if (allowed && !exempt)
            conn->rule = decision->rule;
        conn->generation = flow->config->generation;
        decision->log_list = 0; // Log rules speak of new flows
    }
    decision->rule = conn->rule;
    if (related)
        return NP_REASON_RELATED;
    int reason = np_conn_advance(flow, key, found, version);
    return reason ? reason : NP_REASON_ESTABLISHED;
}

// The first packet of a flow that was allowed.
NP_INLINE int np_ip_new(struct np_flow *flow, union np_conn_key *key, const struct np_found *found, const int version)
{
    const struct np_packet *packet = &flow->packet;
    int reason = flow->decision.reason;
    int exempt = reason != NP_REASON_POLICY_ALLOW;
    // A packet in the middle of a host's TCP connection opens none: it may be the tail of one that policy has just
    // closed.
    if (reason == NP_REASON_HOST && packet->protocol == NP_PROTOCOL_TCP && !(packet->tcp_flags & NP_TCP_SYN))
        return reason;
    if (!np_conn_opens(flow))
        return reason;
    int failed = np_conn_open(flow, key, found, exempt ? NP_CONN_EXEMPT : 0, version);
    return failed ? failed : reason;
}

// Everything but a packet in the middle of an open connection.  `open`: what np_conn holds under the packet's key.
NP_INLINE int np_ip_slow(struct __sk_buff *skb, struct np_flow *flow, union np_conn_key *key, struct np_conn *open,
                         const int hook, const int version)
{
    const struct np_packet *packet = &flow->packet;
    struct np_found found = {};
    int related = NP_REASON_NONE;
    int is_error = packet->icmp_kind == NP_ICMP_ERROR;

    if (np_is_spoofed(flow, version))
        return NP_REASON_SPOOFED;

    if (is_error) {
        related = np_conn_key_inner(skb, key, flow, version);
        if (related == NP_REASON_ICMP_UNRELATED)
            return related;
        if (related == NP_REASON_NONE)
            flow->packet.icmp_kind = NP_ICMP_PLAIN; // a message like any other
    }
    if (packet->special)
        open = np_conn_lookup(key, version);
    np_conn_find(&found, key, open, flow, version);
    if (related && !found.conn)
        return NP_REASON_ICMP_UNRELATED;

    struct np_question question = {
        .key = key,
        .direction = flow->direction,
        .icmp_type = packet->icmp_type,
        .icmp_code = packet->icmp_code,
    };
    int exempt = NP_REASON_NONE;
    int known = 0; // allowed under this generation
    if (found.conn) {
        question.direction = found.conn->direction;
        question.icmp_type = found.conn->icmp_type;
        question.icmp_code = found.conn->icmp_code;
        flow->reply = found.conn->direction != flow->direction;
        known = found.conn->generation == flow->config->generation || found.conn->flags & NP_CONN_EXEMPT;
    } else {
        exempt = np_exempt(flow, hook);
    }
    if (exempt) {
        flow->decision.action = flow->decision.staged_action = NP_ACTION_ALLOW;
        flow->decision.reason = exempt;
    } else if (!known) {
        np_decide(flow, &question, version);
    }

    int reason = flow->decision.reason;
    if (found.conn)
        reason = np_ip_known(flow, key, &found, related, version);
    else if (flow->decision.action == NP_ACTION_ALLOW)
        reason = np_ip_new(flow, key, &found, version);
    // Errors fit into one packet; the rest of one would be taken for its beginning.
    if (packet->fragment == NP_FRAGMENT_FIRST && reason < NP_REASON_POLICY_DENY && !is_error) {
        int failed = np_fragment_remember(flow, version);
        if (failed)
            return failed;
    }
    return reason;
}

NP_INLINE int np_ip(struct __sk_buff *skb, const struct np_bytes *bytes, struct np_flow *flow, const int hook,
                    const int version)
{
    struct np_packet *packet = &flow->packet;
    int reason = np_parse_ip(bytes, packet, version);
    if (NP_UNLIKELY(reason))
        return reason;
    struct np_recent *recent = 0;
    if (NP_LIKELY(!packet->special)) {
        recent = np_recent_slot(flow, version);
        if (NP_LIKELY(recent && np_recent_matches(recent, flow, hook, version))) {
            flow->decision.rule = recent->rule;
            return NP_REASON_ESTABLISHED;
        }
    }
    if (version == 6 && np_is_neighbour(packet))
        return NP_REASON_NEIGHBOUR;

    reason = np_endpoint_find(flow);
    if (NP_UNLIKELY(reason))
        return reason;
    flow->direction = np_direction_at(hook, flow->endpoint_flags);
    if (NP_UNLIKELY(packet->fragment == NP_FRAGMENT_LATER)) {
        reason = np_fragment_recall(flow, version);
        if (reason)
            return reason;
    }

    union np_conn_key key;
    struct np_conn *open = 0;
    np_conn_key_of(&key, flow, version);
    if (NP_LIKELY(!packet->special)) {
        open = np_conn_lookup(&key, version);
        if (NP_LIKELY(open && open->generation == flow->config->generation && np_conn_is_alive(open, flow))) {
            np_conn_touch(open, flow);
            if (recent)
                np_recent_fill(recent, flow, open->rule, hook, version);
            flow->decision.rule = open->rule;
            return NP_REASON_ESTABLISHED;
        }
    }
    return np_ip_slow(skb, flow, &key, open, hook, version);
}

// Neither IP nor ARP: nothing that a workload may send or get; a host interface may.
NP_INLINE int np_not_ip(struct np_flow *flow)
{
    int reason = np_endpoint_find(flow);
    if (reason)
        return reason;
    return flow->endpoint_flags & NP_ENDPOINT_HOST ? NP_REASON_HOST_NON_IP : NP_REASON_NON_IP;
}

NP_INLINE int np_frame(struct __sk_buff *skb, struct np_flow *flow, const int hook)
{
    struct np_bytes bytes;
    int reason = np_parse_frame(skb, &bytes, &flow->packet);
    if (NP_UNLIKELY(reason))
        return reason;
    switch (flow->packet.ethertype) {
    case NP_ETHERTYPE_IP4:
        return np_ip(skb, &bytes, flow, hook, 4);
    case NP_ETHERTYPE_IP6:
        return np_ip(skb, &bytes, flow, hook, 6);
    case NP_ETHERTYPE_ARP:
        return NP_REASON_ARP;
    default:
        return np_not_ip(flow);
    }
}

NP_INLINE int np_tc(struct __sk_buff *skb, const int hook)
{
    struct np_flow flow = {
        .config = np_config_lookup(),
        .now_jiffies = bpf_jiffies64(),
        .ifindex = skb->ifindex,
        .ingress_ifindex = skb->ingress_ifindex,
        .frame_bytes = skb->len,
        .direction = np_direction_at(hook, 0),
    };
    np_keep_in_memory(&flow);
    if (!flow.config) // the one row of an array: cannot happen
        return np_conclude(&flow, NP_REASON_NO_CONFIG);
    return np_conclude(&flow, np_frame(skb, &flow, hook));
}

int np_tc_ingress(struct __sk_buff *skb)
{
    return np_tc(skb, NP_HOOK_INGRESS);
}

int np_tc_egress(struct __sk_buff *skb)
{
    return np_tc(skb, NP_HOOK_EGRESS);
}
