// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The layout that the packet path and the control plane share: limits, numbers, and the key and value of every map. No
// other file declares any part of it. scripts/generate_abi.py generates loader/netpol_loader/abi.py from this text,
// comments included. When the loader makes the maps, it compares the sizes in abi.py with those that the kernel
// reports.
//
// Rules of this file.
// 1. Types have fixed widths. Padding is explicit and zero. Each struct has a size assert.
// 2. Field names are user interface: `bpftool map dump` prints them.
// 3. Numbers are in host byte order unless the name ends in _be.  Addresses are byte arrays in network order, so that a
//    dump reads 10, 0, 0, 1.
// 4. A number that users may store outside this machine (reason, kind, state) is never reused.
// 5. Every change of a layout raises NP_SCHEMA_VERSION.
#pragma once

#include <linux/types.h>

#define NP_SCHEMA_VERSION 10 // part of the pin directory's name

// --- limits ----------------------------------------------------------------------------------------------------------

#define NP_RULE_NAME_BYTES 120 // longest readable rule name, with its terminating zero
#define NP_ATOM_BLOCK 256 // atoms in a row of np_l4_atom
#define NP_ATOM_BLOCKS 1537 // rows of np_l4_atom: 6 slots of 256, and NP_OTHER_BLOCK
#define NP_COLUMN_BLOCK 64 // L4 classes in a row of np_l4_col
#define NP_IP6_HEADERS 8 // the parser reads this many IPv6 extension headers; a packet with more is dropped
#define NP_VLAN_TAGS 2 // the parser skips this many VLAN tags; a frame with more counts as non-IP
#define NP_PULL_BYTES 256 // the program makes this many bytes of the frame linear before it parses them

// A block is a row of np_l4_atom: NP_ATOM_BLOCK atoms. The blocks are in slots of 256, one slot for each of the
// following.
//   a port                  is in block slot * 256 + (port >> 8), at index port & 255
//   an ICMP type and code   are in block slot * 256 + type, at index code
#define NP_SLOT_TCP 0 // by destination port
#define NP_SLOT_UDP 1 // by destination port
#define NP_SLOT_SCTP 2 // by destination port
#define NP_SLOT_ICMP 3 // by type and code
#define NP_SLOT_ICMPV6 4 // by type and code
#define NP_SLOT_SOURCE 5 // by source port, for all protocols
#define NP_OTHER_BLOCK 1536 // the block of all other protocols; its index is the protocol number

#define NP_BUCKET_ROWS 5 // rows of a bucket: as many as fit into one cache line (IPv4) or two (IPv6)
#define NP_BUCKET_LINES 2 // lines of a bucket of np_peer_class
#define NP_BUCKET_MORE 128 // flag of a bucket: further rows of the bucket are in the overflow map
#define NP_LINE_CLASSES 24 // identities of a line (struct np_class_line)
#define NP_CLASS_NONE 65535 // the line has no class for this identity

#define NP_HASH_MULTIPLIER 0x9e3779b97f4a7c15ull // 2^64 divided by the golden ratio: adjacent keys get distant hashes

#define NP_CONN_WAYS 8 // slots of a conntrack bucket; the tags of the slots fill a cache line
#define NP_HASH_WORDS 12 // random numbers of the conntrack hash: one a 32-bit word of the longest key, one to add
#define NP_HASH_BIT 0x80000000u // set in every conntrack hash, so that no hash is 0

// Fields of a tag (struct np_conn_tags).
#define NP_TAG_HASH_SHIFT 32
#define NP_TAG_UNREPLIED 0x80000000ull // the connection is unreplied
#define NP_TAG_TIME_SHIFT 2
#define NP_TAG_TIME_BITS 29
#define NP_TAG_RANK_MASK 3 // enum np_rank
#define NP_TAG_JIFFIES 64 // jiffies in one unit of a tag's time
#define NP_TAG_OWNED_UNITS 64 // units for which a slot stays reserved: longer than a CPU needs to write the entry

#define NP_NAME_BYTES 256 // bytes of a domain name in the key of np_name: 255 of the longest name, and one to align
#define NP_LEARNED_CLASSES 4 // name classes of one address of one endpoint; a further one replaces the first to expire
#define NP_LEARNED_JIFFIES 64 // jiffies in one unit of the expiry of a learned address
#define NP_ASKED_SLOTS 256 // pending questions of an endpoint
#define NP_ASKED_WAYS 4 // slots in which one question may be pending
#define NP_RANK_LAST 65535 // np_domain.rank: no rule of the domain list matches the names of the class

#define NP_HOST_SETS 8 // policy sets of a host endpoint; the index is stage * 2 + direction
#define NP_SCRATCH_WORDS 76 // 64-bit words of np_scratch
#define NP_DNS_WORDS 1152 // 64-bit words of np_dns_scratch

#define NP_KERNEL_BYTES 96 // bytes that the program copies from sk_buff if it cannot read the fields in place

#define NP_FLOW_CACHE_DUE 2 // flag in np_flow_cache_fact.hook: packets of the connection carry np_config.due_mark

// Verdicts that the program returns to TC.
#define NP_PASS (-1) // TC_ACT_UNSPEC of clsact, TCX_NEXT of tcx: the next program at this hook decides
#define NP_PASS_ALONE 0 // TC_ACT_OK, TCX_PASS: no further program at this hook runs
#define NP_DROP 2 // TC_ACT_SHOT, TCX_DROP

// Markers in the compiled program, where the loader fills in a number. A marker is the source register of a load
// instruction, or the number of a helper call. All values are arbitrary.
#define NP_LOADS_MASK 15 // the load gets the number of slots that a hash chooses from, minus one
#define NP_LOADS_FACT 14 // the load gets a fact of the kernel, enum np_kernel_fact
#define NP_CALLS_CAST 0x4e50 // the loader replaces this call of a helper by one of the function bpf_cast_to_kern_ctx

#define NP_CHECK_SEED 2166136261 // FNV-1a's 32-bit offset basis; NP_CHECK_PRIME is FNV-1a's prime
#define NP_CHECK_PRIME 16777619

#define NP_NODE_FIRST 1048576 // first number of another node in np_addr.holder; endpoints have lower numbers; arbitrary

#define NP_IDENTITY_UNKNOWN 0 // never the identity of a packet
#define NP_IDENTITY_WORLD_V4 1 // an IPv4 address that no table describes
#define NP_IDENTITY_WORLD_V6 2 // an IPv6 address that no table describes

// --- numbers ---------------------------------------------------------------------------------------------------------

// The direction of policy, from the endpoint's view. It is not the same as the hook, where a program is attached.
enum np_direction {
    NP_DIRECTION_INGRESS = 0, // towards the endpoint
    NP_DIRECTION_EGRESS = 1, // from the endpoint
};

// The action of a verdict row. A row of zeros was never written; it denies.
enum np_action {
    NP_ACTION_NONE = 0, // the row was never written
    NP_ACTION_ALLOW = 1, // the packet passes, and the program records its connection
    NP_ACTION_DENY = 2, // the packet is dropped
    NP_ACTION_CONTINUE = 3, // the list decides nothing, so the next one follows (only in policy of host endpoints)
};

// The policy lists of a host endpoint. Workloads have only the normal one.
enum np_stage {
    NP_STAGE_NORMAL = 0, // packets from or to processes of the node
    NP_STAGE_FORWARD = 1, // packets that the node forwards from one interface to another
    NP_STAGE_PRE_DNAT = 2, // all incoming packets, before netfilter translates their destination
    NP_STAGE_UNTRACKED = 3, // all packets, before every other stage; a packet allowed here records no connection
};

// Flags of an endpoint.
enum np_endpoint_flag {
    NP_ENDPOINT_HOST = 1, // a host interface: TC ingress is ingress policy, non-IP passes, np_host has the policy
    NP_ENDPOINT_SOURCES = 2, // the endpoint has rows in np_source4 or np_source6
    NP_ENDPOINT_UPLINK = 4, // a host interface without policy: the program judges only packets with a sender tag
    NP_ENDPOINT_ROUTES = 8, // the workload is a router: it may receive packets for addresses that it does not own
    NP_ENDPOINT_LAYER3 = 16, // packets begin with the network header (tun, WireGuard, IPIP, PPP devices)
    NP_ENDPOINT_UNREADABLE = 32, // packets begin with a link header that the parser does not support
    NP_ENDPOINT_OUTSIDE = 64, // a host interface that leads out of the node, to no local workload
    NP_ENDPOINT_EXTERNAL = 128, // as OUTSIDE, and a tunnel device in metadata mode (external, collect_md)
};

// Flags of the configuration (np_config.flags).
enum np_config_flag {
    NP_CONFIG_ALLOW_EVENTS = 1, // write an event for each new allowed flow
    NP_CONFIG_STAGED_EVENTS = 2, // write an event for each new allowed flow whose staged action differs from its action
    NP_CONFIG_KEEP_REVOKED = 4, // established connections that policy no longer allows are not cut
    NP_CONFIG_DEFER = 8, // the program is on every interface by which a packet to a service can leave the node
    NP_CONFIG_TO_HOST_DENY = 16, // packets of workloads to their own node are dropped
    NP_CONFIG_TO_HOST_PASS = 32, // the wildcard host endpoint's normal policy judges workloads' packets to their node
    NP_CONFIG_LOCAL_NETS = 64, // np_local4_net or np_local6_net has rows
    NP_CONFIG_HAIRPIN = 128, // packets from outside the node may have a source address of this node
    NP_CONFIG_NAMES = 256, // the program learns the addresses of domain names from DNS answers
};

// The state of a connection. Each state has its own time-out, np_config.timeout_jiffies[state].
enum np_conn_state {
    NP_CONN_TCP_NEW = 0, // TCP, unreplied
    NP_CONN_TCP_OPEN = 1, // TCP, established
    NP_CONN_TCP_CLOSING = 2, // TCP, both sides have sent FIN
    NP_CONN_TCP_RESET = 3, // TCP, one side has sent RST
    NP_CONN_UDP = 4, // UDP
    NP_CONN_ICMP = 5, // ICMP echo and other queries
    NP_CONN_OTHER = 6, // any other protocol
    NP_CONN_FRAGMENT = 7, // not a connection: only the time-out of rows in np_frag4 and np_frag6
    NP_CONN_STATES = 8, // number of states above
};

// Flags of a connection.
enum np_conn_flag {
    NP_CONN_FIN_ORIGINAL = 1, // the side that opened the connection has sent FIN
    NP_CONN_FIN_REPLY = 2, // the other side has sent FIN
    NP_CONN_EXEMPT = 4, // from the host to its workload, or from a workload to itself: no policy applies
    NP_CONN_DEFERRED = 8, // to a service: policy judges where the packet leaves the node or enters a workload
    NP_CONN_FORWARDED = 16, // at a host endpoint: a forwarded packet opened the connection
    NP_CONN_TAGGED = 32, // as DEFERRED, and the packets carry the sender tag: a later hook must judge them
    NP_CONN_DUE = 64, // as DEFERRED, and the packets carry due_mark: policy denies packets to the service's own address
};

// The rank of a connection, in the low bits of its tag. When a bucket is full, the connection of the lowest rank is
// evicted.
enum np_rank {
    NP_RANK_NONE = 0, // a CPU has reserved the slot to write the entry; the slot is free after the tag's time
    NP_RANK_CLOSED = 1, // both sides have sent FIN, or one side RST
    NP_RANK_UNREPLIED = 2, // the other side has not replied yet
    NP_RANK_ESTABLISHED = 3, // both sides have sent packets
};

// Flags of a verdict.
enum np_verdict_flag {
    NP_VERDICT_FAILSAFE = 1, // the packet is to a failsafe port: no list before normal policy may drop it
};
#define NP_VERDICT_DOMAIN_SHIFT 1 // the other 15 bits of np_verdict.flags are the number of a domain list; 0: none

// What an address is at this node.
enum np_local_flag {
    NP_LOCAL_OWN = 1, // an own address of this node
    NP_LOCAL_MANY = 2, // a broadcast address of this node's links
    NP_LOCAL_GROUP = 4, // a multicast group that this node has joined
    NP_LOCAL_NODE = 8, // an address of another node of the cluster
};

// Flags of a service address.
enum np_vip_flag {
    NP_VIP_LOCAL = 1, // the backend `local` is a process of this node; if it is chosen, no later hook sees the packet
    NP_VIP_MANY = 2, // several backends are processes of this node; the program cannot tell which one gets the packet
};

// Slots of np_call, which has the programs that are tail-called. A tail call never returns.
enum np_call {
    NP_CALL_JUDGE = 0, // evaluates one policy list, then calls itself for the next; at the end applies the verdict
    NP_CALL_SENDER = 1, // applies the verdict for the sender, which is the endpoint that the sender tag names
    NP_CALL_NAMES = 2, // completes a verdict that has a domain list, then goes on as np_tc_judge
    NP_CALL_QUESTION = 3, // records a question that a workload sends to a trusted DNS server
    NP_CALL_ANSWER = 4, // reads the header and the question of a DNS answer, and finds the name's class
    NP_CALL_RECORDS = 5, // reads the records of the answer, then calls itself for further ones
    NP_CALL_LEARN = 6, // writes the addresses of the answer to np_learned4 or np_learned6
    NP_CALLS = 7, // number of slots
};

// What happens to a DNS answer of a trusted server that the program cannot read.
enum np_unread_dns {
    NP_UNREAD_DNS_PASS = 0, // the workload gets the answer, and the program learns nothing from it
    NP_UNREAD_DNS_DROP = 1, // the answer is dropped
};

// Facts of the running kernel. The loader writes them into the program (NP_KERNEL).
enum np_kernel_fact {
    NP_KERNEL_CAST = 0, // 1: the kernel has bpf_cast_to_kern_ctx
    NP_KERNEL_FIRST = 1, // lowest offset in sk_buff of the fields below; all are in the NP_KERNEL_BYTES bytes from it
    NP_KERNEL_SUMMED = 2, // offset of the byte with ip_summed; this and all later offsets count from NP_KERNEL_FIRST
    NP_KERNEL_SUMMED_SHIFT = 3, // lowest bit of ip_summed in that byte; ip_summed has two bits
    NP_KERNEL_CSUM_START = 4, // offset of csum_start; this field and the next two have 16 bits
    NP_KERNEL_CSUM_OFFSET = 5,
    NP_KERNEL_MAC_HEADER = 6,
};

// Kinds of events.
enum np_event_kind {
    NP_EVENT_DENY = 1, // a packet was dropped
    NP_EVENT_ALLOW = 2, // a new flow was allowed
    NP_EVENT_LOG = 3, // Log rules matched a new flow; `action` has the verdict
};

// Why a packet passed or was dropped; the index of np_reason_count. Reasons below 32: the packet passed. 32 to 95: the
// packet was dropped. From 96 on: the number only counts an event, and is no verdict. Numbers are never reused.
enum np_reason {
    NP_REASON_NONE = 0, // never counted
    NP_REASON_POLICY_ALLOW = 1, // a new flow that policy allows
    NP_REASON_ESTABLISHED = 2, // a packet of an allowed connection (counted under its rule, not here)
    NP_REASON_RELATED = 3, // an ICMP error about an allowed connection
    NP_REASON_HOST = 4, // a packet from the host itself to its workload
    NP_REASON_SELF = 5, // a packet from a workload to itself
    NP_REASON_ARP = 6, // an ARP packet
    NP_REASON_NEIGHBOUR = 7, // IPv6 neighbour discovery or multicast listener discovery
    NP_REASON_CONTINUE = 8, // a packet for which no stage of the host endpoint's policy decided
    NP_REASON_HOST_NON_IP = 9, // a packet that is not IP, on a host interface
    NP_REASON_DEFERRED = 10, // a packet to a service: policy judges it where it leaves the node or enters a workload
    NP_REASON_UPLINK = 11, // a packet on a host interface without policy
    NP_REASON_DHCP = 12, // a workload's DHCP request for an address
    NP_REASON_POLICY_DENY = 32, // policy denies the flow
    NP_REASON_REVOKED = 33, // policy no longer allows an established connection
    NP_REASON_UNKNOWN_ENDPOINT = 34, // the interface has no endpoint row
    NP_REASON_SPOOFED = 35, // the workload may not use the source address
    NP_REASON_NON_IP = 36, // a packet that is neither IP nor ARP, on a workload's interface
    NP_REASON_SHORT = 37, // the frame ends inside a header
    NP_REASON_BAD_IP = 38, // the IP header contradicts itself
    NP_REASON_BAD_L4 = 39, // the transport header ends early or contradicts itself
    NP_REASON_IP6_HEADERS = 40, // an IPv6 packet with more extension headers than the parser supports
    NP_REASON_NO_NEXT_HEADER = 41, // an IPv6 packet without a payload protocol (next header 59)
    NP_REASON_FRAGMENT = 42, // a later fragment, but its first fragment was not seen or not allowed
    NP_REASON_ICMP_UNRELATED = 43, // an ICMP error about an unknown connection
    NP_REASON_CONN_FULL = 44, // the connection table had no room for the connection
    NP_REASON_FRAGMENT_FULL = 45, // the fragment table had no room for the first fragment
    NP_REASON_TORN_ENDPOINT = 46, // the agent replaced the endpoint row during each attempt to read it
    NP_REASON_CLASS_RANGE = 47, // the peer class is beyond the policy set's verdicts
    NP_REASON_L4_RANGE = 48, // the atom or the L4 class is outside its table
    NP_REASON_VERDICT_RANGE = 49, // the row of the verdict is outside np_verdict
    NP_REASON_VERDICT_EMPTY = 50, // the row of the verdict was never written
    NP_REASON_NO_CONFIG = 51, // the configuration is missing (cannot happen)
    NP_REASON_TO_HOST = 52, // a packet from a workload to its own node, which the configuration forbids
    NP_REASON_NO_EXIT = 53, // a packet to a service, but some interface by which it could leave lacks the program
    NP_REASON_LOST_SENDER = 54, // a packet to a service, but the endpoint that its sender tag names is gone
    NP_REASON_HIDDEN_SOURCE = 55, // a packet to a service: policy depends on its source, but the source was translated
    NP_REASON_LOCAL_BACKENDS = 56, // a packet to a service with several backends that are processes of this node
    NP_REASON_CALL_MISSING = 57, // np_call lacks the program of a tail call
    NP_REASON_CALL_BUDGET = 58, // policy changed each time it was read, until all tail calls of the packet were used
    NP_REASON_CHECKSUM_AIM = 59, // a device would write the packet's checksum over bytes that policy judged
    NP_REASON_LINK_FORGED = 60, // ARP, neighbour discovery or DHCP message in the name of another host or of a router
    NP_REASON_MISDELIVERED = 61, // a packet to a workload's interface, but to none of the workload's addresses
    NP_REASON_TUNNEL = 62, // a workload's packet in an encapsulation that a node's tunnel accepts from any sender
    NP_REASON_FOREIGN_SOURCE = 63, // a packet from outside with a source address of this node or of a local workload
    NP_REASON_LINK_TYPE = 64, // a packet with a link header that the parser does not support
    NP_REASON_TUNNEL_SOURCE = 65, // a tunnelled packet that was not sent by the node that has its inner source
    NP_REASON_DNS_UNREAD = 66, // a DNS answer of a trusted server that the program cannot read, if unread_dns is DROP
    NP_REASON_DNS_FRAGMENT = 67, // a later fragment of a DNS answer; the first one was cut to a truncated answer
    NP_REASON_EVENT_LOST = 96, // the ring buffer had no room for an event
    NP_REASON_LOG_LIMITED = 97, // the rate limit suppressed a log event
    NP_REASON_RULE_RANGE = 98, // a rule number beyond np_rule_count or np_staged_count; counted for each of the two
    NP_REASON_CONN_EVICTED = 99, // an established connection was evicted, because a new one needed room in its bucket
    NP_REASON_DNS_LEARNED = 100, // a DNS answer taught an address of a name in a rule; counted for each address
    NP_REASON_DNS_NOT_ASKED = 101, // a DNS answer of a trusted server without a pending question of the endpoint
    NP_REASON_DNS_REFUSED = 102, // an address in a DNS answer is in a range whose addresses are never learned
    NP_REASON_DNS_MALFORMED = 103, // a DNS answer that the program did not understand, so that it taught nothing
    NP_REASON_DNS_TOO_LONG = 104, // a DNS answer beyond the limits of the program, so that it taught nothing or a part
    NP_REASON_DNS_TRUNCATED = 105, // a DNS answer in fragments was cut, so that the workload asks again by TCP
    NP_REASON_DNS_LIMITED = 106, // an endpoint learned addresses too fast, or the map was full: this one is not learned
    NP_REASON_DNS_FULL = 107, // a DNS answer for addresses with more name classes than a row has room for; one is lost
    NP_REASON_DNS_EVENT_LOST = 108, // the ring buffer had no room for an np_dns_event
    NP_REASON_DNS_CALL_MISSING = 109, // np_call lacks a program for DNS, so the packet passed and taught nothing
    NP_REASON_COUNT = 128, // number of rows of np_reason_count
};

// --- policy tables ---------------------------------------------------------------------------------------------------

// A compiled policy set: all policies and profiles of an endpoint in one direction. The row of the verdict in
// np_verdict is verdict_base + ((peer class * own_classes + own class) * l4_classes + L4 class) * source_classes +
// source port class.
struct np_set {
    __u32 number; // part of the key of np_peer_class; policy sets with equal class tables have the same number
    __u16 default_class4; // peer class of an IPv4 identity that has no row in np_peer_class
    __u16 default_class6; // the same for IPv6; the two differ if a rule matches only one family, such as 0.0.0.0/0
    __u32 peer_classes; // number of peer classes
    __u32 own_set; // `number` of the class table of the own side; 0: no rule of the set constrains the own side
    __u16 own_default_class4;
    __u16 own_default_class6;
    __u32 own_classes; // number of classes of the own side; 1 if own_set is 0
    __u32 l4_base; // row of np_l4_col with the L4 classes of the first destination port atoms
    __u16 l4_classes; // number of L4 classes; 1: no rule matches on protocol or destination port
    __u16 asks_source; // 1: an enforced rule matches on the owner of the source address, or on the source port
    __u32 source_base; // row of np_l4_col with the source port classes of the first source port atoms
    __u32 source_classes; // number of source port classes; 1: no rule matches on source ports
    __u32 verdict_base;
    __u32 check; // detects a torn read; see struct np_endpoint
};
_Static_assert(sizeof(struct np_set) == 48, "np_set");

struct np_endpoint_key {
    __u32 ifindex;
};
_Static_assert(sizeof(struct np_endpoint_key) == 4, "np_endpoint_key");

// The policy of an interface: its endpoint, and the policy sets of both directions. One map element has both sets, so
// that one update replaces both. The kernel may reuse the memory of a replaced element while a packet still reads that
// element. The `check` of each set detects such a read. `check` is the FNV-1a hash, word by word, of number, ifindex,
// flags, link and all other words of the set. The loader's seal_endpoint() computes it.
struct np_endpoint {
    __u32 number; // number of the endpoint: stable, unique on the node, never 0
    __u32 ifindex; // the same as in the key
    __u32 flags; // enum np_endpoint_flag
    __u32 link; // interface that has the IP addresses of this link: the bridge of this interface, or itself
    struct np_set ingress;
    struct np_set egress;
};
_Static_assert(sizeof(struct np_endpoint) == 112, "np_endpoint");

struct np_number_key {
    __u32 number; // number of an endpoint
};
_Static_assert(sizeof(struct np_number_key) == 4, "np_number_key");

// All policy sets of a host endpoint in one map element, so that one update replaces them all. The `check` of a set is
// as in struct np_endpoint, with three replacements: index | present << 8 for the ifindex, `version` for the flags, and
// 0 for the link.
struct np_host {
    __u32 number;
    __u32 version; // version of the row: all look-ups for one packet must see the same version
    __u32 present; // bit i: sets[i] exists; a set that does not exist decides nothing
    __u32 pad;
    struct np_set sets[NP_HOST_SETS]; // the index is stage * 2 + direction
};
_Static_assert(sizeof(struct np_host) == 400, "np_host");

struct np_ifindex {
    __u32 ifindex; // interface of the endpoint; key of np_endpoint
};
_Static_assert(sizeof(struct np_ifindex) == 4, "np_ifindex");

struct np_local {
    __u32 flags; // enum np_local_flag
    __u32 ifindex; // the only interface that has the address; 0: none or several
    __u32 node; // number of the other node that has the address, at least NP_NODE_FIRST; 0: unknown
};
_Static_assert(sizeof(struct np_local) == 12, "np_local");

// The key of an encapsulation that a tunnel device of the node accepts from any sender.
struct np_tunnel_key {
    __u16 port; // destination port of UDP; 0 for other protocols
    __u8 protocol;
    __u8 pad;
};
_Static_assert(sizeof(struct np_tunnel_key) == 4, "np_tunnel_key");

struct np_tunnel {
    __u32 taken; // always 1
};
_Static_assert(sizeof(struct np_tunnel) == 4, "np_tunnel");

struct np_vip4_key {
    __u8 address[4]; // 0.0.0.0: the row holds for all addresses of the node (node ports)
    __u16 port;
    __u8 protocol;
    __u8 pad;
};
_Static_assert(sizeof(struct np_vip4_key) == 8, "np_vip4_key");

struct np_vip6_key {
    __u8 address[16]; // :: (all zeros): the row holds for all addresses of the node (node ports)
    __u16 port;
    __u8 protocol;
    __u8 pad;
};
_Static_assert(sizeof(struct np_vip6_key) == 20, "np_vip6_key");

struct np_vip {
    __u32 flags; // enum np_vip_flag
    __u16 local_port;
    __u16 pad;
    __u8 local[16]; // address of the backend; IPv4 in the first four bytes
};
_Static_assert(sizeof(struct np_vip) == 24, "np_vip");

struct np_addr4_key {
    __u8 address[4];
};
_Static_assert(sizeof(struct np_addr4_key) == 4, "np_addr4_key");

struct np_addr6_key {
    __u8 address[16];
};
_Static_assert(sizeof(struct np_addr6_key) == 16, "np_addr6_key");

struct np_addr {
    __u32 identity; // identity of the address; never 0
    __u32 holder; // number of the local endpoint that owns the address, or of the other node that has it; 0: neither
};
_Static_assert(sizeof(struct np_addr) == 8, "np_addr");

// A bucket of addresses with the same hash, in one or two cache lines. A kernel hash table would need three memory
// fetches for a look-up. A row is in its bucket, or in the overflow map if the bucket is full, never in both. The agent
// writes the key, then the row, then the bit in `used`, so that no packet sees half a row. The agent overwrites a
// removed row only after a grace period.
struct np_addr4_bucket {
    __u32 used; // bit i: row i is valid; and the flag NP_BUCKET_MORE
    struct np_addr4_key key[NP_BUCKET_ROWS];
    struct np_addr row[NP_BUCKET_ROWS];
};
_Static_assert(sizeof(struct np_addr4_bucket) == 64, "np_addr4_bucket is a cache line");

struct np_addr6_bucket {
    __u32 used; // bit i: row i is valid; and the flag NP_BUCKET_MORE
    __u32 pad;
    struct np_addr6_key key[NP_BUCKET_ROWS];
    struct np_addr row[NP_BUCKET_ROWS];
};
_Static_assert(sizeof(struct np_addr6_bucket) == 128, "np_addr6_bucket is two cache lines");

// A bit for each hash of an address of the node or of a service. If the bit of an address is 0, neither np_local nor
// np_vip has that address.
struct np_vip_filter {
    __u64 bits;
};
_Static_assert(sizeof(struct np_vip_filter) == 8, "np_vip_filter");

struct np_cidr4_key {
    __u32 prefix_bits;
    __u8 address[4];
};
_Static_assert(sizeof(struct np_cidr4_key) == 8, "np_cidr4_key");

struct np_cidr6_key {
    __u32 prefix_bits;
    __u8 address[16];
};
_Static_assert(sizeof(struct np_cidr6_key) == 20, "np_cidr6_key");

struct np_cidr {
    __u32 identity;
};
_Static_assert(sizeof(struct np_cidr) == 4, "np_cidr");

struct np_source4_key {
    __u32 prefix_bits; // length of the prefix, plus 32 for `endpoint`
    __u32 endpoint;
    __u8 address[4];
};
_Static_assert(sizeof(struct np_source4_key) == 12, "np_source4_key");

struct np_source6_key {
    __u32 prefix_bits; // length of the prefix, plus 32 for `endpoint`
    __u32 endpoint;
    __u8 address[16];
};
_Static_assert(sizeof(struct np_source6_key) == 24, "np_source6_key");

struct np_source {
    __u32 allowed; // always 1
};
_Static_assert(sizeof(struct np_source) == 4, "np_source");

struct np_peer_class_key {
    __u32 set;
    __u32 identity;
};
_Static_assert(sizeof(struct np_peer_class_key) == 8, "np_peer_class_key");

struct np_peer_class {
    __u32 peer_class;
};
_Static_assert(sizeof(struct np_peer_class) == 4, "np_peer_class");

// The peer classes of 24 consecutive identities in one class table. Identities are assigned densely, so that the lines
// of a whole cluster fit into the CPU's cache.
struct np_class_line {
    __u16 peer_class[NP_LINE_CLASSES]; // NP_CLASS_NONE: the set's default class applies to the identity
    __u32 set; // np_set.number; 0: the line is unused
    __u32 block; // number of the first identity, divided by NP_LINE_CLASSES
    __u32 flags; // NP_BUCKET_MORE; only the first line of a bucket has flags
    __u32 pad;
};
_Static_assert(sizeof(struct np_class_line) == 64, "np_class_line is a cache line");

// A bucket of lines with the same hash of set and block. The rows of a block that has no line are in np_peer_more.
struct np_peer_bucket {
    struct np_class_line line[NP_BUCKET_LINES];
};
_Static_assert(sizeof(struct np_peer_bucket) == 128, "np_peer_bucket");

struct np_l4_atom {
    __u16 atom[NP_ATOM_BLOCK];
};
_Static_assert(sizeof(struct np_l4_atom) == 512, "np_l4_atom");

struct np_l4_col {
    __u16 l4_class[NP_COLUMN_BLOCK];
};
_Static_assert(sizeof(struct np_l4_col) == 128, "np_l4_col");

struct np_verdict {
    __u32 rule; // the deciding rule, key of np_rule
    __u32 staged_rule; // the rule that would decide if staged policies were enforced, key of np_rule
    __u32 log_list; // number of the list of Log rules that matched before the verdict; 0: none matched
    __u8 action; // enum np_action
    __u8 staged_action; // enum np_action
    __u16 flags; // enum np_verdict_flag, and from NP_VERDICT_DOMAIN_SHIFT on the number of a domain list
};
_Static_assert(sizeof(struct np_verdict) == 16, "np_verdict");

// The verdict of a row in np_verdict holds if no rule with domain names matches. A domain list has the rules with
// domain names that may match instead, in the order of evaluation. The rank of a rule is its position in the list. For
// a name class, this row has the first rule of the list that matches the names of the class.
struct np_domain_key {
    __u32 list; // number of the domain list
    __u32 name_class;
};
_Static_assert(sizeof(struct np_domain_key) == 8, "np_domain_key");

struct np_domain {
    __u16 rank; // rank of the first enforced rule that matches; NP_RANK_LAST: none
    __u16 staged_rank; // the same in the pending evaluation
    __u32 rule; // the enforced rule, key of np_rule; its action is allow
    __u32 staged_rule; // the rule of the pending evaluation, key of np_rule; its action is allow
    __u32 log_list; // number of the list of Log rules that matched before the enforced rule; 0: none
};
_Static_assert(sizeof(struct np_domain) == 16, "np_domain");

// A pattern of domain names. The labels are in reverse order, each after its length in one byte, in lower case:
// www.example.com is "3com" "7example" "3www" and a zero byte. The key of a name ends with the zero byte; the key of a
// wildcard has the labels after the "*." and no zero byte, so that the longest prefix finds the most specific pattern.
// The bare name of a wildcard has a row of its own, because the wildcard does not match the bare name.
struct np_name_key {
    __u32 prefix_bits;
    __u8 labels[NP_NAME_BYTES];
};
_Static_assert(sizeof(struct np_name_key) == 260, "np_name_key has the longest key that a trie may have");

struct np_name {
    __u32 name_class; // number of the set of patterns of rules that match the name; 0: none
};
_Static_assert(sizeof(struct np_name) == 4, "np_name");

// An address that an endpoint learned from a DNS answer.
struct np_learned4_key {
    __u32 endpoint; // number of the endpoint
    __u8 address[4];
};
_Static_assert(sizeof(struct np_learned4_key) == 8, "np_learned4_key");

struct np_learned6_key {
    __u32 endpoint; // number of the endpoint
    __u8 address[16];
};
_Static_assert(sizeof(struct np_learned6_key) == 20, "np_learned6_key");

struct np_learned {
    __u32 name_class[NP_LEARNED_CLASSES]; // classes of the names that had this address; 0: unused
    __u32 until[NP_LEARNED_CLASSES]; // when the class expires, in units of NP_LEARNED_JIFFIES jiffies; the low 32 bits
};
_Static_assert(sizeof(struct np_learned) == 32, "np_learned");

// The pending questions of one endpoint: questions to a trusted DNS server that have no answer yet. A slot has a keyed
// hash of the question and of the addresses and ports (bits 63 to 16), and the time of the question in units of
// NP_LEARNED_JIFFIES (bits 15 to 0). 0: the slot is free.
struct np_asked {
    __u64 slot[NP_ASKED_SLOTS];
    __u64 refilled_jiffies; // when `tokens` was last filled up
    __u32 tokens; // how many new addresses the endpoint may still learn until the next refill
    __u32 pad;
};
_Static_assert(sizeof(struct np_asked) == 2064, "np_asked");

// A DNS server whose answers the program believes.
struct np_resolver4_key {
    __u8 address[4];
    __u16 port;
    __u16 pad;
};
_Static_assert(sizeof(struct np_resolver4_key) == 8, "np_resolver4_key");

struct np_resolver6_key {
    __u8 address[16];
    __u16 port;
    __u16 pad;
};
_Static_assert(sizeof(struct np_resolver6_key) == 20, "np_resolver6_key");

struct np_resolver {
    __u32 trusted; // always 1
};
_Static_assert(sizeof(struct np_resolver) == 4, "np_resolver");

// A prefix whose addresses the program never learns: of nodes, pods and services, loopback, link-local, multicast.
struct np_unlearned {
    __u32 refused; // always 1
};
_Static_assert(sizeof(struct np_unlearned) == 4, "np_unlearned");

struct np_rule_key {
    __u32 rule;
};
_Static_assert(sizeof(struct np_rule_key) == 4, "np_rule_key");

struct np_rule {
    char name[NP_RULE_NAME_BYTES]; // in the form tier|policy|direction|index|action
};
_Static_assert(sizeof(struct np_rule) == 120, "np_rule");

// --- counters --------------------------------------------------------------------------------------------------------

struct np_count {
    __u64 packets;
    __u64 bytes; // bytes of the frames, Ethernet header included
};
_Static_assert(sizeof(struct np_count) == 16, "np_count");

// --- connections -----------------------------------------------------------------------------------------------------

// The conntrack key of a connection at one endpoint, the same for the packets of both directions. Local is the
// endpoint's side. An ICMP query has its identifier as the port of the querying side, and 0 as the other port. Both
// ports of a protocol without ports are 0.
struct np_conn4_key {
    __u32 endpoint; // number of the endpoint, not ifindex: the interface may be replaced
    __u8 local[4];
    __u8 remote[4];
    __u16 local_port;
    __u16 remote_port;
    __u8 protocol;
    __u8 pad[3];
};
_Static_assert(sizeof(struct np_conn4_key) == 20, "np_conn4_key");

struct np_conn6_key {
    __u32 endpoint; // number of the endpoint, not ifindex: the interface may be replaced
    __u8 local[16];
    __u8 remote[16];
    __u16 local_port;
    __u16 remote_port;
    __u8 protocol;
    __u8 pad[3];
};
_Static_assert(sizeof(struct np_conn6_key) == 44, "np_conn6_key");

struct np_conn {
    __u64 seen_jiffies; // when a packet was last seen; updated at most once a second
    __u32 generation; // the generation under which policy last allowed the connection
    __u32 rule; // the rule that allowed the connection; 0: no policy applies, or another hook judges it
    __u8 direction; // direction of the first packet, enum np_direction
    __u8 state; // enum np_conn_state
    __u8 flags; // enum np_conn_flag
    __u8 icmp_type; // ICMP type of the first packet
    __u8 icmp_code; // ICMP code of the first packet
    __u8 pad[3];
};
_Static_assert(sizeof(struct np_conn) == 24, "np_conn");

struct np_conn4_entry {
    struct np_conn4_key key;
    __u32 name_class; // class of the domain name by which policy allowed the connection; 0: no name was needed
    struct np_conn conn;
    __u64 more_pad[2];
};
_Static_assert(sizeof(struct np_conn4_entry) == 64, "np_conn4_entry is a cache line");

struct np_conn6_entry {
    struct np_conn6_key key;
    __u32 name_class; // class of the domain name by which policy allowed the connection; 0: no name was needed
    struct np_conn conn;
};
_Static_assert(sizeof(struct np_conn6_entry) == 72, "np_conn6_entry");

// The tags of a conntrack bucket. A tag has what look-up and eviction need: the hash of the key (bits 63 to 32);
// whether the connection is unreplied (31); when it expires, in units of 64 jiffies (30 to 2); and enum np_rank (1 and
// 0). A slot with the tag 0 is free. The entry of a slot is valid only if the rank in the tag is not NP_RANK_NONE.
struct np_conn_tags {
    __u64 tag[NP_CONN_WAYS];
};
_Static_assert(sizeof(struct np_conn_tags) == 64, "np_conn_tags is a cache line");

// The random numbers of the conntrack hash, secret and different on each node. Without them, nobody can choose
// connections that collide in one bucket.
struct np_secret {
    __u64 number[NP_HASH_WORDS];
};
_Static_assert(sizeof(struct np_secret) == 96, "np_secret");

struct np_frag4_key {
    __u32 endpoint;
    __u8 source[4];
    __u8 destination[4];
    __u32 id; // identification field of the fragmented packet, as on the wire
    __u8 protocol;
    __u8 pad[3];
};
_Static_assert(sizeof(struct np_frag4_key) == 20, "np_frag4_key");

struct np_frag6_key {
    __u32 endpoint;
    __u8 source[16];
    __u8 destination[16];
    __u32 id; // identification field of the fragmented packet, as on the wire
};
_Static_assert(sizeof(struct np_frag6_key) == 40, "np_frag6_key");

struct np_frag {
    __u64 seen_jiffies;
    __u16 source_port;
    __u16 destination_port;
    __u8 protocol; // protocol of the payload, after all IPv6 extension headers
    __u8 icmp_type;
    __u8 icmp_code;
    __u8 header_units; // end of the headers in units of 8 bytes; later fragments may not overlap the headers
};
_Static_assert(sizeof(struct np_frag) == 16, "np_frag");

// --- events ----------------------------------------------------------------------------------------------------------

// An event that the program reports. It has two actions: the enforced one, and the one that would hold if staged
// policies were enforced. IPv4 addresses are in the first four bytes. Source and destination are those of the flow's
// first packet, as policy sees it.
struct np_event {
    __u64 time_jiffies;
    __u32 rule;
    __u32 staged_rule;
    __u32 log_list;
    __u32 set; // np_set.number; 0 if no policy set was evaluated
    __u32 peer_identity; // 0: not looked up
    __u32 peer_class;
    __u32 endpoint;
    __u32 ifindex;
    __u32 own_identity; // 0: not looked up
    __u32 frame_bytes; // length of the frame, Ethernet header included
    __u8 source[16];
    __u8 destination[16];
    __u16 source_port;
    __u16 destination_port;
    __u16 reason; // enum np_reason
    __u16 ethertype;
    __u8 kind; // enum np_event_kind
    __u8 direction; // enum np_direction
    __u8 action; // enum np_action
    __u8 staged_action; // enum np_action
    __u8 ip_version; // 4 or 6; 0: the packet is not IP, or malformed
    __u8 protocol;
    __u8 icmp_type;
    __u8 icmp_code;
};
_Static_assert(sizeof(struct np_event) == 96, "np_event");

// An address that an endpoint learned, and the name for which it asked. The program reports it also for names that
// match no pattern, so that a policy that is added later knows the addresses.
struct np_dns_event {
    __u64 time_jiffies;
    __u32 endpoint;
    __u32 ttl_s; // time to live as the answer has it, before floor and extra time
    __u32 name_class; // 0: no pattern matches the name
    __u8 ip_version; // 4 or 6
    __u8 pad[3];
    __u8 address[16]; // IPv4 in the first four bytes
    __u8 server[16]; // the DNS server; IPv4 in the first four bytes
    __u8 labels[NP_NAME_BYTES]; // the name of the question, as in struct np_name_key
};
_Static_assert(sizeof(struct np_dns_event) == 312, "np_dns_event");

struct np_log_limit {
    __u64 last_jiffies; // when the program wrote the last event of the log list
};
_Static_assert(sizeof(struct np_log_limit) == 8, "np_log_limit");

// --- configuration ---------------------------------------------------------------------------------------------------

struct np_config {
    __u32 generation; // raised by the agent when an allow may have become a deny; never 0
    __u32 epoch; // raised by the agent when an endpoint's row or address changed; ends the validity of np_ep_cache
    __u32 flags; // enum np_config_flag
    __u32 jiffies_per_second;
    __u32 wildcard; // number of the wildcard host endpoint; 0: the node has none
    __u32 mark_shift; // lowest bit of the 16-bit sender tag in skb->mark; 0: the tag is in skb->tc_index
    __u32 seen_mark; // bit of skb->mark by which the second barrier knows that the program saw the packet; 0: unused
    __u32 node_mark; // bit of skb->mark that the node sets on its own processes' packets; 0: it sets none
    __u32 due_mark; // bit of skb->mark that keeps the packet from every process of the node; 0: nothing checks the bit
    __u32 unread_dns; // enum np_unread_dns
    __u32 name_floor_s; // shortest life of a learned address, in seconds
    __u32 name_extra_s; // seconds added to the life of every learned address
    __u64 dns_ports; // up to four ports of DNS servers besides 53, of 16 bits each; 0: unused
    __u64 timeout_jiffies[NP_CONN_STATES];
};
_Static_assert(sizeof(struct np_config) == 120, "np_config");

struct np_schema {
    __u32 version; // NP_SCHEMA_VERSION
    __u32 jiffies_per_second; // jiffies per second as the loader measured them when it made the maps
    __u8 source_digest[32]; // SHA-256 of the sources and options of the pinned program
};
_Static_assert(sizeof(struct np_schema) == 40, "np_schema");

// What the flow cache of one CPU has about one direction of a connection. Valid for one generation, and until
// `until_jiffies`.
struct np_flow_cache_fact {
    __u32 ports_be; // source and destination port, as in the packet
    __u32 ifindex;
    __u32 generation; // 0: the slot is unused
    __u32 until_jiffies; // one second after the connection table was read; the low 32 bits
    __u32 rule;
    __u16 sender_tag; // sender tag for packets of the connection; 0: none
    __u8 protocol;
    __u8 hook; // enum np_hook, and the flag NP_FLOW_CACHE_DUE
};
_Static_assert(sizeof(struct np_flow_cache_fact) == 24, "np_flow_cache_fact");

struct np_flow_cache4 {
    __u8 source[4];
    __u8 destination[4];
    struct np_flow_cache_fact fact;
};
_Static_assert(sizeof(struct np_flow_cache4) == 32, "two np_flow_cache4 are one cache line");

struct np_flow_cache6 {
    __u8 source[16];
    __u8 destination[16];
    struct np_flow_cache_fact fact;
    __u64 pad;
};
_Static_assert(sizeof(struct np_flow_cache6) == 64, "np_flow_cache6 is one cache line");

// Memory for struct np_scratch (np_judge.h).
struct np_scratch_words {
    __u64 words[NP_SCRATCH_WORDS];
};
_Static_assert(sizeof(struct np_scratch_words) == 608, "np_scratch_words");

// Memory for struct np_dns (np_dns.h).
struct np_dns_words {
    __u64 words[NP_DNS_WORDS];
};
_Static_assert(sizeof(struct np_dns_words) == 9216, "np_dns_words");

// A checked copy of an interface's np_endpoint row, per CPU. The slot is the ifindex modulo the size. The copy also has
// the last IPv4 and IPv6 source address that proved to be the workload's own. A copy is valid for one epoch.
struct np_ep_cache {
    __u32 ifindex;
    __u32 epoch; // 0: the slot is unused
    __u32 number;
    __u32 flags;
    __u32 own4[1]; // the workload's last own IPv4 source address, in network order
    __u32 identity4; // identity of own4; 0: own4 is unset
    __u32 own6[4]; // the workload's last own IPv6 source address, in network order
    __u32 identity6; // identity of own6; 0: own6 is unset
    __u32 link; // as np_endpoint.link
    struct np_set ingress;
    struct np_set egress;
};
_Static_assert(sizeof(struct np_ep_cache) == 144, "np_ep_cache");
