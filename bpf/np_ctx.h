// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The context of one packet, which all steps share: the packet, its endpoint and the decision.  No behaviour.
#pragma once

#include "np_abi.h"
#include "np_parse.h"

// Where the program sits. Not a direction: for a workload the two are opposite.
enum np_hook {
    NP_HOOK_INGRESS = 0, // TC ingress of the host-side interface
    NP_HOOK_EGRESS = 1, // TC egress of it
};

// The decision of policy, and what it was made of.
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

// The endpoint whose packet it is at this hook.
struct np_endpoint_ctx {
    __u32 endpoint; // number
    __u32 endpoint_flags;
    __u32 own_identity; // 0: not looked up
    __u32 sender; // number of the endpoint whose policy is to judge the packet here, 0: none
    __u32 link; // interface that has the addresses of this link; 0: not known
    struct np_addr addr; // found last (np_bucket.h)
    __u32 class; // found last (np_bucket.h)
    __u8 direction; // of this packet, enum np_direction
    __u8 reply; // goes against its connection's first packet
    __u8 untracked; // from a borrowed source address, or allowed by untracked policy: policy applies to every packet
    __u8 end_chain; // programs behind this one could overwrite the sender tag
    __u8 first_direction; // of the flow's first packet
    __u8 kind; // of the flow: NP_CONN_DEFERRED, NP_CONN_FORWARDED
    __u8 related; // an ICMP error, about the flow
    __u8 missing; // enum np_reason: why the interface has no endpoint
    __u32 hash; // of the connection's key (np_table.h), as the next two
    __u32 established_slot; // of the established connection with the key
    __u32 unreplied_slot; // of the unreplied one
    __u32 pad;
};
_Static_assert(sizeof(struct np_endpoint_ctx) == 56, "np_endpoint_ctx is whole words");

// When and where the packet was met.
struct np_arrival {
    __u64 now_jiffies;
    __u32 generation; // what is decided under older rows must not bear a newer number
    __u32 epoch;
    __u32 ifindex;
    __u32 ingress_ifindex; // 0: nothing is known of where it came in
    __u32 frame_bytes;
    __u32 hook; // enum np_hook
    __u32 is_from_node; // sent by a process of the node, or by its kernel
    __u32 pad;
};

// What the pointers point to lives in np_scratch: the stack has 512 bytes, a called program has a stack of its own, and
// what is in a map the verifier does not remember, which spares it to walk all that follows once for each way in which
// it came about.
struct np_ctx {
    struct np_packet *packet;
    struct np_decision *decision;
    struct np_endpoint_ctx *ep;
    struct np_arrival *arrival;
    const struct np_config *config;
};
