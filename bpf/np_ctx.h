// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The context of one packet, which all steps share: the packet, its endpoint, the policy decision, and when and where
// the packet arrived.
#pragma once

#include "np_abi.h"
#include "np_parse.h"

// Where the program is attached. A hook is not a direction: TC ingress is egress policy at a workload's interface, and
// ingress policy at a host's.
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
    __u32 flags; // as in struct np_verdict
    __u32 name_class; // class of the domain name by which a list allowed the packet; 0: no name was needed
    __u32 pad;
};
_Static_assert(sizeof(struct np_decision) == 40, "np_decision is whole words");

// The endpoint whose policy this hook enforces for the packet.
struct np_endpoint_ctx {
    __u32 endpoint; // number of the endpoint
    __u32 endpoint_flags;
    __u32 own_identity; // identity of the endpoint's own address; 0: not looked up yet
    __u32 sender; // sender tag: number of the endpoint whose policy must also allow the packet here; 0: none
    __u32 link; // interface that has the IP addresses of this link; 0: unknown
    struct np_addr addr; // result of the last np_addr_find
    __u32 class; // result of the last np_class_of
    __u8 direction; // direction of this packet, enum np_direction
    __u8 reply; // 1: the packet's direction is opposite to that of the connection's first packet
    __u8 untracked; // 1: the packet records no connection: its source is borrowed, or untracked policy allowed it
    __u8 end_chain; // 1: no later program at this hook may run, because it could overwrite the sender tag
    __u8 first_direction; // direction of the flow's first packet
    __u8 kind; // kind of the flow: NP_CONN_DEFERRED, NP_CONN_FORWARDED, or 0
    __u8 related; // NP_REASON_RELATED: the packet is an ICMP error about the connection; 0: it is not
    __u8 missing; // enum np_reason: why the interface has no valid endpoint row; 0: it has one
    __u32 hash; // conntrack hash of the packet's key; np_ct_probe sets this field and the next two
    __u32 established_slot; // slot of an established connection with this hash; NP_CONN_WAYS or more: there is none
    __u32 unreplied_slot; // slot of an unreplied connection with this hash; NP_CONN_WAYS or more: there is none
    __u32 pad;
};
_Static_assert(sizeof(struct np_endpoint_ctx) == 56, "np_endpoint_ctx is whole words");

// When and where the packet arrived.
struct np_arrival {
    __u64 now_jiffies;
    __u32 generation; // generation, read before any row: a verdict from older rows must not carry a newer generation
    __u32 epoch;
    __u32 ifindex;
    __u32 ingress_ifindex; // interface by which the packet entered the node; 0: unknown, or the node sent the packet
    __u32 frame_bytes;
    __u32 hook; // enum np_hook
    __u32 is_from_node; // 1: a process or the kernel of the node sent the packet
    __u32 dns_calls; // number of tail calls of DNS programs that the packet has used
};

// The context. Its pointers refer to parts of np_scratch, which is a map, for three reasons. The stack has only 512
// bytes. A tail-called program has a new stack. The verifier does not track values in a map, so it checks the code that
// follows once, and not once for each way in which a value came about.
struct np_ctx {
    struct np_packet *packet;
    struct np_decision *decision;
    struct np_endpoint_ctx *ep;
    struct np_arrival *arrival;
    const struct np_config *config;
};
