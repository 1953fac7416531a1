// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Which policy lists judge the first packet of a flow, in which order, and how their results become one verdict.
//
// At a workload's interface the lists are the workload's own policy and, if the node has a wildcard host endpoint, that
// endpoint's policy for packets from or to a workload.  At a host's interface they are the lists of the host endpoint:
//
//     for a process of the node    failsafe ports of normal policy, then untracked, pre-DNAT (ingress), normal policy
//     for a forwarded packet       untracked, pre-DNAT (ingress), forward policy
//
// If a list decides nothing, the next list follows. A deny is final. If untracked or pre-DNAT policy allows the packet,
// no further list of the host endpoint follows. If no list of a host endpoint decides, the packet passes
// (NP_ACTION_CONTINUE).
//
// The program np_tc_judge evaluates one list, then tail-calls itself for the next list. The verifier therefore checks
// the code of an evaluation once, whatever the number of lists. If the verdict of a list depends on domain names,
// np_tc_judge tail-calls np_tc_names, which completes the verdict and goes on in the same way.
//
// Invariants: all lists that judge a packet are from one version of the host endpoint's row (np_judge_step starts again
// if the version changes). One packet costs at most NP_JUDGE_CALLS calls, calls of np_tc_names included.
#pragma once

#include "np_classify.h"
#include "np_conn.h"
#include "np_endpoint.h"
#include "np_ctx.h"
#include "np_maps.h"
#include "np_outside.h"

// The policy steps. Each evaluates one policy list; np_steps puts them in order.
enum np_step {
    NP_STEP_NONE = 0,
    NP_STEP_WORKLOAD = 1, // the policy of the workload
    NP_STEP_NORMAL = 2, // a list of the host endpoint, by enum np_stage; so are the next three
    NP_STEP_FORWARD = 3,
    NP_STEP_PRE_DNAT = 4,
    NP_STEP_UNTRACKED = 5,
    NP_STEP_SERVICE = 6, // the workload's policy for a service's own address; a deny only sets due_mark
    NP_STEP_FAILSAFE = 10, // the host endpoint's normal policy, but the result counts only if a failsafe port decides
};

#define NP_STEP_BITS 4 // bits of one step in np_scratch.steps
// A table from step to enum np_stage, for the steps NORMAL, FORWARD, PRE_DNAT and UNTRACKED: four bits for each, and
// step 2 in the lowest bits.
#define NP_STEP_STAGES 0x3210u
#define NP_EGRESS_STEPS_WORKLOAD (1u << NP_STEP_WORKLOAD | 1u << NP_STEP_SERVICE)
#define NP_EGRESS_STEPS_HOST                                                                                           \
    (1u << NP_STEP_NORMAL | 1u << NP_STEP_FORWARD | 1u << NP_STEP_PRE_DNAT | 1u << NP_STEP_UNTRACKED |                 \
     1u << NP_STEP_FAILSAFE)
#define NP_STEP_ORIGINAL 4u // bit of a step that judges the original tuple, before translation
// Most calls of np_tc_judge and np_tc_names for a packet. The lists of the sender need two, those of its own
// interface's endpoint four. One list of the sender and two of a host endpoint may need np_tc_names as well, but no
// packet needs all of these: seven are enough. The rest is in reserve for rows that change meanwhile. The kernel allows
// 33 tail calls; docs/adr/0012-program-set.md divides them.
#define NP_JUDGE_CALLS 10

// What follows after the evaluation of a policy list.
enum np_judged {
    NP_JUDGED_NEXT = 0, // the next list
    NP_JUDGED_FINAL = 1, // no further list: the decision is final
    NP_JUDGED_NAMES = 2, // np_tc_names, because the verdict has a domain list
};

// Working memory of np_tc_names.
struct np_names {
    __u32 step; // the step whose verdict has the domain list, enum np_step
    __u32 rank; // least rank of an enforced rule so far; NP_RANK_LAST: none
    __u32 staged_rank; // the same in the pending evaluation
    __u32 rule; // the rule with the least rank; the next three belong to it too
    __u32 staged_rule;
    __u32 log_list;
    __u32 name_class;
    __u32 classes[NP_LEARNED_CLASSES + 1]; // classes that the endpoint knows for the peer's address; 0: unused
};

// Working memory of one packet. All programs that handle the packet share it.
struct np_scratch {
    struct np_packet packet;
    struct np_decision decision;
    struct np_endpoint_ctx ep;
    struct np_arrival arrival;
    struct np_owner owner; // copy of the host endpoint's policy set for the current step
    struct np_tuple tuples[2]; // the original tuple and the translated tuple
    __u32 reason; // result of the last step or program part, enum np_reason
    struct np_decision workload_decision; // verdict of the workload's policy, saved while the host's lists follow
    struct np_found found;
    struct np_found sender_found;
    union {
        union np_conn_key key; // conntrack key of the packet at the interface's endpoint
        struct np_outer outer; // tunnel key of the packet; valid only until `key` is set
    };
    union np_conn_key sender_key; // conntrack key of the packet at its sender's endpoint
    struct np_names names;
    __u32 steps; // all policy steps of the packet, in the format of np_steps
    __u32 number; // number of the workload whose policy the workload's steps evaluate
    __u32 ifindex; // interface of that workload
    __u32 host; // number of the host endpoint whose policy the host's steps evaluate
    __u32 self; // number of the workload that may send to itself without policy; 0: none
    __u32 steps_left;
    __u32 egress_steps; // bit i: step i (enum np_step) evaluates egress policy, otherwise ingress policy
    __u32 host_version; // version of the host endpoint's row at its first list; 0: no list was evaluated yet
    __u32 asked_tuple; // which of `tuples` the steps without the bit NP_STEP_ORIGINAL judge
    __u32 own_endpoint; // number of the interface's endpoint, saved while policy of the sender judges
    __u8 has_workload_decision; // 1: workload_decision is set
    __u8 is_source_hidden; // 1: the node has replaced the source address that the sender wrote
    __u8 default_drop; // reason to drop the packet if no list denies it: NP_REASON_TO_HOST; 0: none
    __u8 is_sender; // 1: the steps judge for the packet's sender, not for the interface's endpoint
    __u8 calls_left; // number of calls of np_tc_judge that the packet may still use
    __u8 is_error; // 1: the packet arrived as an ICMP error
    __u8 is_first_leg; // 1: the connection found for the sender is the deferred one that the ingress hook recorded
    __u8 is_due; // 1: the sender may not send to the service's own address
};
#define NP_TUPLE_ORIGINAL 0
#define NP_TUPLE_TRANSLATED 1
_Static_assert(sizeof(struct np_scratch) <= sizeof(struct np_scratch_words), "np_scratch fits");

// Put policy steps into one number, the first step in the lowest bits. The first NP_STEP_NONE ends the steps.
NP_INLINE __u32 np_steps(__u32 first, __u32 second, __u32 third, __u32 fourth)
{
    return first | second << NP_STEP_BITS | third << 2 * NP_STEP_BITS | fourth << 3 * NP_STEP_BITS;
}

// Rebuild the tuple of a flow's first packet from the conntrack key. `direction`: direction of that first packet. The
// caller sets the ICMP fields.
NP_INLINE void np_tuple_of_key(struct np_tuple *tuple, const union np_conn_key *key, __u8 direction, const int version)
{
    const __u8 *local = version == 4 ? key->v4.local : key->v6.local;
    const __u8 *remote = version == 4 ? key->v4.remote : key->v6.remote;
    __u16 local_port = version == 4 ? key->v4.local_port : key->v6.local_port;
    __u16 remote_port = version == 4 ? key->v4.remote_port : key->v6.remote_port;
    int is_egress = direction == NP_DIRECTION_EGRESS;
#pragma unroll
    for (int word = 0; word < (version == 4 ? 1 : 4); word++) {
        __u32 ours;
        __u32 theirs;
        __builtin_memcpy(&ours, local + word * 4, 4);
        __builtin_memcpy(&theirs, remote + word * 4, 4);
        tuple->source[word] = is_egress ? ours : theirs;
        tuple->destination[word] = is_egress ? theirs : ours;
    }
    tuple->source_port = is_egress ? local_port : remote_port;
    tuple->destination_port = is_egress ? remote_port : local_port;
    tuple->protocol = version == 4 ? key->v4.protocol : key->v6.protocol;
    tuple->to_node = NP_TO_NODE_UNASKED;
}

NP_INLINE int np_is_workload_step(__u32 step)
{
    return step == NP_STEP_WORKLOAD || step == NP_STEP_SERVICE;
}

// The direction of the policy that the step evaluates.
NP_INLINE __u8 np_step_direction(const struct np_scratch *scratch, __u32 step)
{
    return scratch->egress_steps >> step & 1; // 1 is NP_DIRECTION_EGRESS, 0 is NP_DIRECTION_INGRESS
}

// The tuple that the step judges.
NP_INLINE const struct np_tuple *np_step_tuple(const struct np_scratch *scratch, __u32 step)
{
    __u32 which = step & NP_STEP_ORIGINAL ? NP_TUPLE_ORIGINAL : scratch->asked_tuple & 1;
    return (const void *)scratch->tuples + which * sizeof(struct np_tuple);
}

// Find the policy set of a step. A workload's set is in the endpoint cache; a host endpoint's is copied from the
// endpoint's row. Returns NP_REASON_CONTINUE if the host endpoint has no policy for this step.
NP_INLINE int np_step_set(const struct np_ctx *ctx, struct np_scratch *scratch, __u32 step, __u8 direction,
                          const struct np_set **set)
{
    *set = &scratch->owner.set;
    if (np_is_workload_step(step)) {
        int reason;
        const struct np_ep_cache *cached = np_ep_cache_find(scratch->ifindex, ctx->arrival->epoch, &reason);
        if (!cached)
            return reason;
        *set = direction == NP_DIRECTION_EGRESS ? &cached->egress : &cached->ingress;
        return cached->number == scratch->number ? NP_REASON_NONE : NP_REASON_LOST_SENDER;
    }
    __u32 stage = NP_STEP_STAGES >> ((step & 7) - 2) * 4 & 3;
    return np_host_read(scratch->host, stage * 2 + direction, &scratch->owner);
}

// Apply the result of a policy list to the decision. `reason`: why the packet is denied without a verdict, or
// NP_REASON_NONE. Returns what follows.
NP_INLINE int np_judge_apply(struct np_ctx *ctx, struct np_scratch *scratch, __u32 step, int reason)
{
    struct np_decision *decision = ctx->decision;
    int is_workload = np_is_workload_step(step);
    if (NP_UNLIKELY(step == NP_STEP_SERVICE)) { // no verdict here: the hook where the packet leaves judges it
        scratch->is_due = reason || decision->action != NP_ACTION_ALLOW;
        decision->action = decision->staged_action = NP_ACTION_CONTINUE;
        decision->reason = NP_REASON_CONTINUE;
        decision->rule = decision->staged_rule = decision->log_list = 0;
        return NP_JUDGED_NEXT;
    }
    if (NP_UNLIKELY(reason == NP_REASON_SELF)) {
        decision->action = decision->staged_action = NP_ACTION_ALLOW;
        decision->reason = reason;
        return NP_JUDGED_FINAL;
    }
    if (NP_UNLIKELY(reason)) {
        decision->action = decision->staged_action = NP_ACTION_DENY;
        decision->reason = reason;
    } else if (step == NP_STEP_FAILSAFE && !(decision->flags & NP_VERDICT_FAILSAFE)) {
        decision->action = NP_ACTION_CONTINUE;
    }
    if (decision->action == NP_ACTION_DENY) {
        if (!reason)
            decision->reason = NP_REASON_POLICY_DENY;
        if (!is_workload && scratch->host != ctx->ep->endpoint) {
            ctx->ep->endpoint = scratch->host; // the event and the counters then name the endpoint that denies
            __u8 direction = np_step_direction(scratch, step);
            ctx->ep->direction = ctx->ep->reply ? !direction : direction;
        }
        return NP_JUDGED_FINAL;
    }
    if (decision->action == NP_ACTION_CONTINUE)
        return NP_JUDGED_NEXT;
    decision->reason = NP_REASON_POLICY_ALLOW;
    if (step == NP_STEP_WORKLOAD) {
        if (NP_LIKELY(!scratch->steps_left))
            return NP_JUDGED_FINAL;
        scratch->workload_decision = *decision;
        scratch->has_workload_decision = 1;
        return NP_JUDGED_NEXT;
    }
    if (step == NP_STEP_UNTRACKED)
        ctx->ep->untracked = 1;
    return step == NP_STEP_UNTRACKED || step == NP_STEP_PRE_DNAT || step == NP_STEP_FAILSAFE ? NP_JUDGED_FINAL
                                                                                             : NP_JUDGED_NEXT;
}

// Evaluate the next policy list, and fill in the decision. Returns what follows.
NP_INLINE int np_judge_step(struct np_ctx *ctx, struct np_scratch *scratch, const int version)
{
    struct np_decision *decision = ctx->decision;
    __u32 step = scratch->steps_left & ((1u << NP_STEP_BITS) - 1);
    if (step == NP_STEP_NONE)
        return NP_JUDGED_FINAL;
    __u8 direction = np_step_direction(scratch, step);
    const struct np_set *set;
    scratch->reason = np_step_set(ctx, scratch, step, direction, &set);
    np_barrier();
    int reason = scratch->reason;
    if (reason == NP_REASON_TORN_ENDPOINT)
        return NP_JUDGED_NEXT; // the next call of np_tc_judge reads the row again
    scratch->steps_left >>= NP_STEP_BITS;
    int is_workload = np_is_workload_step(step);
    if (!is_workload && (reason == NP_REASON_NONE || reason == NP_REASON_CONTINUE)) {
        if (scratch->host_version &&
            scratch->owner.flags != scratch->host_version) { // the row changed between two lists
            scratch->steps_left = scratch->steps;
            scratch->host_version = 0;
            return NP_JUDGED_NEXT;
        }
        scratch->host_version = scratch->owner.flags;
    }
    if (reason == NP_REASON_CONTINUE)
        return NP_JUDGED_NEXT;
    if (!reason) {
        const struct np_tuple *tuple = np_step_tuple(scratch, step);
        __u32 self = step == NP_STEP_WORKLOAD ? scratch->self : 0;
        reason = np_classify(ctx, tuple, set, direction, self, version);
        if (!reason && scratch->is_source_hidden && set->asks_source)
            reason = NP_REASON_HIDDEN_SOURCE;
        scratch->reason = reason;
        np_barrier();
        reason = scratch->reason;
        // The rules with domain names of the host endpoint's normal policy are evaluated in NP_STEP_NORMAL.
        if (NP_UNLIKELY(!reason && decision->flags >> NP_VERDICT_DOMAIN_SHIFT) && step != NP_STEP_FAILSAFE) {
            scratch->names.step = step;
            return NP_JUDGED_NAMES;
        }
    }
    return np_judge_apply(ctx, scratch, step, reason);
}

// Complete the decision after the last list: its action is now NP_ACTION_ALLOW, _DENY or _CONTINUE, and its reason is
// set.
NP_INLINE void np_judge_end(struct np_ctx *ctx, struct np_scratch *scratch)
{
    struct np_decision *decision = ctx->decision;
    if (decision->action == NP_ACTION_DENY)
        return;
    if (scratch->default_drop) {
        decision->action = decision->staged_action = NP_ACTION_DENY;
        decision->reason = scratch->default_drop;
    } else if (scratch->has_workload_decision) {
        *decision = scratch->workload_decision;
    }
}

// Tail-call np_tc_judge or np_tc_names, which is in slot `program` of np_call. Returns only if the call fails, with the
// reason to drop the packet.
NP_INLINE int np_judge_call(struct __sk_buff *skb, struct np_scratch *scratch, __u32 program)
{
    if (!scratch->calls_left)
        return NP_REASON_CALL_BUDGET;
    scratch->calls_left--;
    np_call_program(skb, program);
    return NP_REASON_CALL_MISSING;
}

// Evaluate all lists of `scratch->steps`. Returns only if the tail call fails, with the reason to drop the packet.
NP_INLINE int np_judge(struct __sk_buff *skb, struct np_ctx *ctx, struct np_scratch *scratch)
{
    struct np_decision *decision = ctx->decision;
    decision->action = decision->staged_action = NP_ACTION_CONTINUE;
    decision->reason = NP_REASON_CONTINUE;
    scratch->steps_left = scratch->steps;
    scratch->host_version = 0;
    scratch->has_workload_decision = 0;
    scratch->is_due = 0;
    return np_judge_call(skb, scratch, NP_CALL_JUDGE);
}
