// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The context of one packet, which all steps share: the packet, its endpoint, the policy decision and the arrival.
#pragma once

#include "np_abi.h"
#include "np_parse.h"

// Where the program is attached.  Not a direction: at a workload's interface the two are opposite.
enum np_hook {
    NP_HOOK_INGRESS = 0, // TC ingress of the interface
    NP_HOOK_EGRESS = 1, // TC egress of the interface
};

// The decision of policy, with the rule and the classes that led to it.
struct np_decision {
    __u32 rule;
    __u32 staged_rule;
    __u32 log_list;
    __u32 set;
    __u32 peer_identity;
    __u32 peer_class;
    __u16 reason; // enum np_reason
    __u8 action; // enum np_action
    __u8 staged_action; // enum np_action
    __u32 flags; // enum np_verdict_flag
};
_Static_assert(sizeof(struct np_decision) == 32, "np_decision is whole words");

// The endpoint that this hook enforces policy for.
struct np_endpoint_ctx {
    __u32 endpoint; // number of the endpoint
    __u32 endpoint_flags;
    __u32 own_identity; // 0: not looked up yet
    __u32 sender; // sender tag: the endpoint that must also allow the packet here; 0: none
    __u32 link; // interface that has the addresses of this link; 0: unknown
    struct np_addr addr; // result of np_addr_find
    __u32 class; // result of np_class_of
    __u8 direction; // of this packet, enum np_direction
    __u8 reply; // the packet goes against its connection's first packet
    __u8 untracked; // records no connection: borrowed source, or allowed by untracked policy
    __u8 end_chain; // no program may run after this one: it could overwrite the sender tag
    __u8 first_direction; // direction of the flow's first packet
    __u8 kind; // of the flow: NP_CONN_DEFERRED, NP_CONN_FORWARDED
    __u8 related; // NP_REASON_RELATED: the packet is an ICMP error about the connection
    __u8 missing; // enum np_reason: why the interface has no endpoint; 0: it has one
    __u32 hash; // conntrack hash of the packet's key; this and the next two are results of np_ct_probe
    __u32 established_slot; // of an established connection with this hash; NP_CONN_WAYS or more: none
    __u32 unreplied_slot; // of an unreplied connection with this hash; the same
    __u32 pad;
};
_Static_assert(sizeof(struct np_endpoint_ctx) == 56, "np_endpoint_ctx is whole words");

// When and where the packet arrived.
struct np_arrival {
    __u64 now_jiffies;
    __u32 generation; // read before any row: a verdict from older rows must not carry a newer generation
    __u32 epoch;
    __u32 ifindex;
    __u32 ingress_ifindex; // 0: unknown, or sent by the node
    __u32 frame_bytes;
    __u32 hook; // enum np_hook
    __u32 is_from_node; // a process or the kernel of the node sent it
    __u32 pad;
};

// Everything that the pointers refer to is in np_scratch, for three reasons.  The stack has only 512 bytes.  A
// tail-called program has a new stack.  The verifier does not track values in a map, so it does not walk the rest of
// the program once for each way in which a value came about.
struct np_ctx {
    struct np_packet *packet;
    struct np_decision *decision;
    struct np_endpoint_ctx *ep;
    struct np_arrival *arrival;
    const struct np_config *config;
};
