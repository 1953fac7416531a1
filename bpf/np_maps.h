// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// All maps, the facts about each, and typed accessors.  No other file accesses a map.
//
// The compiled program names a map by its number, in the order of declaration; the loader makes the maps and replaces
// the numbers in the program by their descriptors. All maps but np_call are pinned in one directory, which has
// NP_SCHEMA_VERSION in its name.  Pinned maps survive the agent and every program.  Sizes are defaults.  The compiled
// program contains no size (NP_MASK), so one file serves maps of any size on any number of CPUs.
//
// Above each map are, in this order: what it maps; who writes, who reads; when a packet looks it up; its size, and what
// happens when it is full; the byte order of the key; its lifetime; and its role, on a line of its own.
// scripts/generate_abi.py reads the following lists and every role; loader, agent and tools derive from them which maps
// are which.
//
// Role: one for each map.
//   endpoint: rows of single endpoints
//   endpoint cache: per CPU, rows of endpoints, valid for an epoch
//   node: the node's addresses, tunnels and services
//   table: the compiled policy, which endpoints share
//   flow cache: per CPU, tuples of established connections, valid for a generation
//   connection: connections and first fragments
//   counter: packets and bytes
//   event: what the program reports to the agent
//   config: settings, and what the pin directory holds
//   scratch: working memory of one packet
//   call: the programs that one program set tail-calls
//
// Trait: any number for each map.
//   private: no group may read it: it is the secret of the conntrack hash, reveals it, or holds packets
//   masked: a hash chooses the slot, so the number of slots is a power of two
//   ranged: masked, and each CPU has its own range of slots
//   cached: the endpoint cache has copies of rows, so a change needs a new epoch
//   referring: rows name ranges of rows in other maps
//   fixed: no option sets its size
//
// A role line also names relations.  "overflow of MAP" and "tags of MAP": the bucketed table that the map belongs to.
// "views NAME": the name under which user space sees the unreplied connections of a connection table.
#pragma once

#include "np_abi.h"
#include "np_lang.h"

// The first map has the number 0, whatever the compiler's counter is.
enum { NP_MAP_FIRST = __COUNTER__ + 1 };

// The program needs only the number; the loader and scripts/generate_abi.py parse the other arguments.
#define NP_MAP(type, name, key_type, value_type, size, flags) enum { name = __COUNTER__ - NP_MAP_FIRST }
#define NP_MAP_RINGBUF(name, size) enum { name = __COUNTER__ - NP_MAP_FIRST } // size in bytes

// Maps an interface to its endpoint and both policy sets.  The agent writes, the program reads.  Looked up when
// np_ep_cache misses.  When full: the agent rejects the endpoint, and its packets are dropped as unknown-endpoint.
// Key: host order. Lives until the endpoint goes.  Every change needs a new epoch (np_ep_cache).
// Role: endpoint, cached, referring.
NP_MAP("hash", np_endpoint, struct np_endpoint_key, struct np_endpoint, 4096, BPF_F_NO_PREALLOC);

// Maps a hash of the tuple to the verdict of its connection; direct-mapped, with a range of slots for each CPU.  The
// program writes and reads.  Looked up for every packet.  A collision overwrites.  Key: the CPU's range and the hash.
// A row is valid for one generation and one second.
// Role: flow cache, ranged.
NP_MAP("array", np_flow_cache4, __u32, struct np_flow_cache4, 262144, 0); // for all CPUs together
NP_MAP("array", np_flow_cache6, __u32, struct np_flow_cache6, 131072, 0); // for all CPUs together

// Caches the endpoint of an interface; direct-mapped.  The program writes and reads.  Looked up for every packet on the
// slow path.  A collision overwrites.  Key: ifindex modulo size.  A row is valid for one epoch.
// Role: endpoint cache, masked.
NP_MAP("percpu_array", np_ep_cache, __u32, struct np_ep_cache, 512, 0);

// Maps a host endpoint's number to its policy sets.  The agent writes, the program reads.  Looked up for a new flow on
// a host interface, and on every interface if the node has a wildcard host endpoint.  When full: the agent rejects the
// change. Key: host order.  Lives as long as the endpoint has an interface.
// Role: endpoint, referring.
NP_MAP("hash", np_host, struct np_number_key, struct np_host, 64, BPF_F_NO_PREALLOC);

// Maps a workload endpoint's number to its interface.  The agent writes, the program reads.  Looked up where a packet
// with a sender tag leaves, for the source of a packet from outside, and in link messages.  When full: the agent
// rejects the endpoint.  Key: host order.  Lives as long as the endpoint's row.
// Role: endpoint.
NP_MAP("hash", np_ifindex, struct np_number_key, struct np_ifindex, 4096, BPF_F_NO_PREALLOC);

// Maps an address to its role at this node: its own, broadcast, a joined group, another node's.  The agent writes,
// the program reads.  Looked up for a new flow from a workload or on a host interface.  When full: the agent rejects
// the change. Key: network order.  Lives as long as the address.
// Role: node.
NP_MAP("hash", np_local4, struct np_addr4_key, struct np_local, 4096, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_local6, struct np_addr6_key, struct np_local, 4096, BPF_F_NO_PREALLOC);

// Maps a prefix to np_local, if all its addresses are the node's own (local routes, except 127.0.0.0/8).  The agent
// writes, the program reads.  Looked up after np_local, if the configuration says that there are rows.  When full: the
// agent rejects the change.  Key: prefix length in host order, address in network order.  Lives as long as the route.
// Role: node.
NP_MAP("lpm_trie", np_local4_net, struct np_cidr4_key, struct np_local, 256, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_local6_net, struct np_cidr6_key, struct np_local, 256, BPF_F_NO_PREALLOC);

// Lists the encapsulation, as protocol and port, that a node accepts from any sender.  The agent writes, the program
// reads. Looked up for a packet from a workload with such a protocol.  When full: the agent rejects the change.  Key:
// port in host order.  Lives as long as the tunnel device, or as the option that names it.
// Role: node.
NP_MAP("hash", np_tunnel, struct np_tunnel_key, struct np_tunnel, 64, BPF_F_NO_PREALLOC);

// Maps a service's address, protocol and port to its backend on this node, if it has one; packets to the service are
// judged where they leave.  The agent writes, the program reads.  Looked up for a new flow that enters the node.  When
// full: the agent rejects the change.  Key: address in network order, port in host order.  Lives as long as the
// service.
// Role: node.
NP_MAP("hash", np_vip4, struct np_vip4_key, struct np_vip, 65536, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_vip6, struct np_vip6_key, struct np_vip, 65536, BPF_F_NO_PREALLOC);

// Holds the working memory of one packet, because the stack has only 512 bytes.  The program writes and reads.  Looked
// up for every packet on the slow path.  One row per CPU.  Lives for one packet.
// Role: scratch, private.
NP_MAP("percpu_array", np_scratch, __u32, struct np_scratch_words, 1, 0);

// Maps the hash of an address to a bit, which is set if np_local or np_vip has such an address; saves a new flow those
// look-ups.  The agent writes, the program reads.  Looked up for a new flow.  Fixed size; the more bits are set, the
// more look-ups find nothing.  Key: host order.  The agent sets a bit before it writes the row, and clears it after.
// Role: node, masked, fixed.
NP_MAP("array", np_vip_filter, __u32, struct np_vip_filter, 2048, 0); // of 64 bits each

// Maps a known address to its identity and holder, in buckets by hash (struct np_addr4_bucket).  The agent writes, the
// program reads.  Looked up for a new flow.  When a bucket is full: its other rows are in np_addr4_more, np_addr6_more.
// Key: the address's hash.  Lives as long as the address is known.
// Role: table, cached.
NP_MAP("array", np_addr4, __u32, struct np_addr4_bucket, 65536, BPF_F_MMAPABLE); // buckets
NP_MAP("array", np_addr6, __u32, struct np_addr6_bucket, 65536, BPF_F_MMAPABLE); // buckets

// Maps a known address to its identity and holder, if its bucket is full.  The agent writes, the program reads.  Looked
// up for a new flow if the bucket lacks the address and says that there are such rows.  When full: the agent rejects
// the change. Key: network order.  Lives as long as the address is known.
// Role: table, overflow of np_addr4, np_addr6.
NP_MAP("hash", np_addr4_more, struct np_addr4_key, struct np_addr, 262144, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_addr6_more, struct np_addr6_key, struct np_addr, 262144, BPF_F_NO_PREALLOC);

// Maps an address that np_addr lacks to the identity of its longest prefix.  The agent writes, the program reads.
// Looked up for a new flow.  When full: the agent rejects the change.  Key: prefix length in host order, address in
// network order. Lives as long as a policy or network set names the prefix.
// Role: table.
NP_MAP("lpm_trie", np_cidr4, struct np_cidr4_key, struct np_cidr, 262144, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_cidr6, struct np_cidr6_key, struct np_cidr, 262144, BPF_F_NO_PREALLOC);

// Lists the prefixes that an endpoint may send from without owning them.  The agent writes, the program reads.  Looked
// up for a new flow with a source that is not the endpoint's own, if the endpoint has the flag.  When full: the agent
// rejects the change.  Key: prefix length (32 + bits) and endpoint in host order, address in network order.  Lives as
// long as the endpoint.
// Role: endpoint.
NP_MAP("lpm_trie", np_source4, struct np_source4_key, struct np_source, 4096, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_source6, struct np_source6_key, struct np_source, 4096, BPF_F_NO_PREALLOC);

// Maps policy set and identity to the peer class, unless it is the set's default; sets with equal class tables share a
// number.  A bucket has two lines, each with the classes of consecutive identities (struct np_class_line).  The agent
// writes, the program reads.  Looked up for a new flow.  When a bucket is full: its other rows are in np_peer_more.
// Key: hash of set and block of identities.  Lives as long as one of the sets.
// Role: table.
NP_MAP("array", np_peer_class, __u32, struct np_peer_bucket, 65536, BPF_F_MMAPABLE); // buckets

// Maps policy set and identity to the peer class, if the bucket is full.  The agent writes, the program reads.  Looked
// up for a new flow if the bucket lacks the identity and says that there are such rows.  When full: the agent rejects
// the change. Key: host order.  Lives as long as one of the sets.
// Role: table, overflow of np_peer_class.
NP_MAP("hash", np_peer_more, struct np_peer_class_key, struct np_peer_class, 1048576, BPF_F_NO_PREALLOC);

// Maps protocol and port, or ICMP type and code, to the atom, in blocks.  The agent writes, the program reads.  Looked
// up for a new flow.  Fixed size.  Key: host order.  Lives always; the agent reuses an atom's number only when nothing
// refers to it.
// Role: table.
NP_MAP("array", np_l4_atom, __u32, struct np_l4_atom, NP_ATOM_BLOCKS, 0);

// Maps an atom to the L4 class of a policy set: row l4_base + atom / 64, column atom % 64.  The agent writes, the
// program reads.  Looked up for a new flow.  When full: the agent rejects the change.  Key: host order.  The agent
// reuses a row only after a grace period.
// Role: table.
NP_MAP("array", np_l4_col, __u32, struct np_l4_col, 16384, 0);

// Maps the classes of a packet to the verdict (struct np_set has the formula).  The agent writes, the program reads.
// Looked up for a new flow.  When full: the agent rejects the change.  Key: host order.  The agent reuses a range only
// after a grace period; a row of zeros denies.
// Role: table.
NP_MAP("array", np_verdict, __u32, struct np_verdict, 1048576, 0);

// Maps a rule's number to its readable name.  The agent writes, people and tools read.  Never looked up for a packet.
// When full: the agent rejects the change.  Key: host order.  Lives as long as a verdict or a connection may name the
// rule.
// Role: table.
NP_MAP("hash", np_rule, struct np_rule_key, struct np_rule, 65536, BPF_F_NO_PREALLOC);

// Counts packets and bytes that a rule decided, by rule number, per CPU; row 0 counts exempt traffic.  The program
// writes, the agent reads.  Looked up for every packet that a rule decided.  A number beyond its size is counted as
// NP_REASON_RULE_RANGE. Key: host order.  Lives across agents and programs; the agent zeroes a row before it reuses the
// number.
// Role: counter.
NP_MAP("percpu_array", np_rule_count, __u32, struct np_count, 65536, 0);

// Counts packets and bytes that a rule would decide if staged policies were enforced, by rule number, per CPU.  The
// program writes, the agent reads.  Looked up for each packet that policy judges, so packets of established connections
// are not counted.  A number beyond its size is counted as NP_REASON_RULE_RANGE.  Key: host order.  Lives as
// np_rule_count.
// Role: counter.
NP_MAP("percpu_array", np_staged_count, __u32, struct np_count, 65536, 0);

// Counts packets and bytes by enum np_reason, per CPU.  The program writes, the agent reads.  Looked up for every
// packet that is not of an established connection.  Fixed size.  Key: host order.  Lives across agents and programs.
// Role: counter.
NP_MAP("percpu_array", np_reason_count, __u32, struct np_count, NP_REASON_COUNT, 0);

// Holds the connections, in buckets by the hash of the conntrack key (np_table.h).  The program writes and reads; the
// agent adds connections older than the program.  Looked up for every packet on the slow path but denied initial SYNs.
// When a bucket is full: the connection of the lowest worth is evicted, and its next packet is judged as a new flow.
// Key: bucket times NP_CONN_WAYS plus slot, in host order; ports in the entry are in host order, addresses in network
// order.  Lives across agents and programs; the program checks expiry when a packet meets the entry.
// Role: connection, private, views np_unreplied4, np_unreplied6.
NP_MAP("array", np_conn4, __u32, struct np_conn4_entry, 524288, BPF_F_MMAPABLE); // slots: NP_CONN_WAYS for each bucket
NP_MAP("array", np_conn6, __u32, struct np_conn6_entry, 262144, BPF_F_MMAPABLE); // slots: NP_CONN_WAYS for each bucket

// Maps the hash of a conntrack key to the tags of its bucket (struct np_conn_tags): which slot has which connection.
// The program writes and reads; the agent adds connections older than the program.  Looked up with np_conn.  Fixed by
// the size of np_conn.  Key: host order.  Lives as np_conn.
// Role: connection, private, tags of np_conn4, np_conn6.
NP_MAP("array", np_conn4_tag, __u32, struct np_conn_tags, 65536, BPF_F_MMAPABLE); // buckets
NP_MAP("array", np_conn6_tag, __u32, struct np_conn_tags, 32768, BPF_F_MMAPABLE); // buckets

// Holds the random numbers of the conntrack hash.  The loader writes it once, when it makes the map; the program reads.
// Looked up with np_conn.  One row.  Lives as long as the connections.
// Role: connection, private, fixed.
NP_MAP("array", np_secret, __u32, struct np_secret, 1, 0);

// Maps the identification of a fragmented packet to its ports.  The program writes (first fragments that pass) and
// reads. Looked up for each later fragment.  When full: the least recently used row is evicted, and its later fragments
// are dropped.  Key: as on the wire.  Lives for the time-out of NP_CONN_FRAGMENT.
// Role: connection.
NP_MAP("lru_hash", np_frag4, struct np_frag4_key, struct np_frag, 4096, 0);
NP_MAP("lru_hash", np_frag6, struct np_frag6_key, struct np_frag, 4096, 0);

// Maps a log list (modulo size) to the time of its last event.  The program writes and reads.  Looked up for a new flow
// with a log list in its verdict.  Fixed size; lists that share a row share the limit.  Key: host order.  Lives always.
// Role: event, masked.
NP_MAP("array", np_log_limit, __u32, struct np_log_limit, 4096, 0);

// Holds generation, epoch, flags and time-outs.  The agent writes, the program reads.  Looked up for every packet.  One
// row. Lives always.
// Role: config.
NP_MAP("array", np_config, __u32, struct np_config, 1, 0);

// Says what the pin directory holds.  The loader writes and reads.  Never looked up for a packet.  One row.  Lives
// always.
// Role: config.
NP_MAP("array", np_schema, __u32, struct np_schema, 1, 0);

// Carries events to the agent: every drop, and what np_config enables.  The program writes, one reader consumes.
// Written for each such event.  When full: the event is lost and counted as NP_REASON_EVENT_LOST.  An event wakes
// nobody up: the reader polls.  Lives across agents.
// Role: event.
NP_MAP_RINGBUF(np_event, 1048576); // bytes

// Maps enum np_call to the program that is tail-called.  The loader writes, once, before the hooks' programs are
// attached; the kernel reads.  Looked up by tail calls.  Fixed size; an empty slot drops the packet
// (NP_REASON_CALL_MISSING).  Key: host order.  Lives as long as its program set, which alone uses it.
// Role: call.
NP_MAP("prog_array", np_call, __u32, __u32, NP_CALLS, 0);

// --- accessors -------------------------------------------------------------------------------------------------------
// `version` is the constant 4 or 6.  A look-up returns NULL if there is no such row.

union np_addr_key {
    struct np_addr4_key v4;
    struct np_addr6_key v6;
};

union np_vip_key {
    struct np_vip4_key v4;
    struct np_vip6_key v6;
};

union np_cidr_key {
    struct np_cidr4_key v4;
    struct np_cidr6_key v6;
};

union np_source_key {
    struct np_source4_key v4;
    struct np_source6_key v6;
};

union np_conn_key {
    struct np_conn4_key v4;
    struct np_conn6_key v6;
};

union np_frag_key {
    struct np_frag4_key v4;
    struct np_frag6_key v6;
};

NP_INLINE struct np_endpoint *np_endpoint_lookup(__u32 ifindex)
{
    struct np_endpoint_key key = {.ifindex = ifindex};
    return np_lookup(NP_MAP_OF(np_endpoint), &key);
}

// The row for a hash in this CPU's range; the size of a range is a power of two.
NP_INLINE struct np_flow_cache4 *np_flow_cache4_lookup(__u32 hash)
{
    __u64 mask = NP_MASK(np_flow_cache4);
    __u32 slot = (__u32)(bpf_get_smp_processor_id() * (mask + 1) + (hash & mask));
    return np_lookup(NP_MAP_OF(np_flow_cache4), &slot);
}

NP_INLINE struct np_flow_cache6 *np_flow_cache6_lookup(__u32 hash)
{
    __u64 mask = NP_MASK(np_flow_cache6);
    __u32 slot = (__u32)(bpf_get_smp_processor_id() * (mask + 1) + (hash & mask));
    return np_lookup(NP_MAP_OF(np_flow_cache6), &slot);
}

NP_INLINE struct np_ep_cache *np_ep_cache_lookup(__u32 ifindex)
{
    __u32 slot = ifindex & NP_MASK(np_ep_cache);
    return np_lookup(NP_MAP_OF(np_ep_cache), &slot);
}

NP_INLINE struct np_vip_filter *np_vip_filter_lookup(__u32 hash)
{
    __u32 row = hash / 64 & NP_MASK(np_vip_filter);
    return np_lookup(NP_MAP_OF(np_vip_filter), &row);
}

NP_INLINE const struct np_addr4_bucket *np_addr4_bucket_lookup(__u32 hash)
{
    __u32 bucket = hash & NP_MASK(np_addr4);
    return np_lookup(NP_MAP_OF(np_addr4), &bucket);
}

NP_INLINE const struct np_addr6_bucket *np_addr6_bucket_lookup(__u32 hash)
{
    __u32 bucket = hash & NP_MASK(np_addr6);
    return np_lookup(NP_MAP_OF(np_addr6), &bucket);
}

NP_INLINE const struct np_addr *np_addr_more_lookup(union np_addr_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_addr4_more), &key->v4);
    return np_lookup(NP_MAP_OF(np_addr6_more), &key->v6);
}

NP_INLINE struct np_host *np_host_lookup(__u32 number)
{
    struct np_number_key key = {.number = number};
    return np_lookup(NP_MAP_OF(np_host), &key);
}

NP_INLINE struct np_ifindex *np_ifindex_lookup(__u32 number)
{
    struct np_number_key key = {.number = number};
    return np_lookup(NP_MAP_OF(np_ifindex), &key);
}

NP_INLINE struct np_local *np_local_lookup(union np_addr_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_local4), &key->v4);
    return np_lookup(NP_MAP_OF(np_local6), &key->v6);
}

NP_INLINE struct np_local *np_local_net_lookup(union np_cidr_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_local4_net), &key->v4);
    return np_lookup(NP_MAP_OF(np_local6_net), &key->v6);
}

NP_INLINE int np_is_tunnel(__u8 protocol, __u16 port)
{
    struct np_tunnel_key key = {.port = port, .protocol = protocol};
    return np_lookup(NP_MAP_OF(np_tunnel), &key) != 0;
}

NP_INLINE struct np_vip *np_vip_lookup(union np_vip_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_vip4), &key->v4);
    return np_lookup(NP_MAP_OF(np_vip6), &key->v6);
}

NP_INLINE struct np_scratch_words *np_scratch_lookup(void)
{
    __u32 only = 0;
    return np_lookup(NP_MAP_OF(np_scratch), &only);
}

NP_INLINE struct np_cidr *np_cidr_lookup(union np_cidr_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_cidr4), &key->v4);
    return np_lookup(NP_MAP_OF(np_cidr6), &key->v6);
}

NP_INLINE struct np_source *np_source_lookup(union np_source_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_source4), &key->v4);
    return np_lookup(NP_MAP_OF(np_source6), &key->v6);
}

NP_INLINE const struct np_peer_bucket *np_peer_bucket_lookup(__u32 hash)
{
    __u32 bucket = hash & NP_MASK(np_peer_class);
    return np_lookup(NP_MAP_OF(np_peer_class), &bucket);
}

NP_INLINE const struct np_peer_class *np_peer_more_lookup(struct np_peer_class_key *key)
{
    return np_lookup(NP_MAP_OF(np_peer_more), key);
}

NP_INLINE struct np_l4_atom *np_l4_atom_lookup(__u32 block)
{
    return np_lookup(NP_MAP_OF(np_l4_atom), &block);
}

NP_INLINE struct np_l4_col *np_l4_col_lookup(__u32 block)
{
    return np_lookup(NP_MAP_OF(np_l4_col), &block);
}

NP_INLINE struct np_verdict *np_verdict_lookup(__u32 index)
{
    return np_lookup(NP_MAP_OF(np_verdict), &index);
}

NP_INLINE struct np_count *np_rule_count_lookup(__u32 rule)
{
    return np_lookup(NP_MAP_OF(np_rule_count), &rule);
}

NP_INLINE struct np_count *np_staged_count_lookup(__u32 rule)
{
    return np_lookup(NP_MAP_OF(np_staged_count), &rule);
}

NP_INLINE struct np_count *np_reason_count_lookup(__u32 reason)
{
    return np_lookup(NP_MAP_OF(np_reason_count), &reason);
}

NP_INLINE const struct np_secret *np_secret_lookup(void)
{
    __u32 only = 0;
    return np_lookup(NP_MAP_OF(np_secret), &only);
}

NP_INLINE struct np_conn_tags *np_conn_tags_lookup(__u32 hash, const int version)
{
    __u32 bucket = hash & (version == 4 ? NP_MASK(np_conn4_tag) : NP_MASK(np_conn6_tag));
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_conn4_tag), &bucket);
    return np_lookup(NP_MAP_OF(np_conn6_tag), &bucket);
}

// The connection in slot `way` of the hash's bucket; its key is before it in the entry.
NP_INLINE struct np_conn *np_conn_lookup(__u32 hash, __u32 way, const int version)
{
    __u32 bucket = hash & (version == 4 ? NP_MASK(np_conn4_tag) : NP_MASK(np_conn6_tag));
    __u32 entry = bucket * NP_CONN_WAYS + way;
    if (version == 4) {
        struct np_conn4_entry *found = np_lookup(NP_MAP_OF(np_conn4), &entry);
        np_forget(found); // otherwise the compiler adds to the pointer before the NULL check (LLVM 14 on arm64)
        return found ? &found->conn : 0;
    }
    struct np_conn6_entry *found = np_lookup(NP_MAP_OF(np_conn6), &entry);
    return found ? &found->conn : 0;
}

// Tail-call a program.  Returns only if the slot is empty; the caller then drops and counts the packet.
NP_INLINE void np_call_program(struct __sk_buff *skb, const __u32 slot)
{
    np_tail_call(skb, NP_MAP_OF(np_call), slot);
}

NP_INLINE struct np_frag *np_frag_lookup(union np_frag_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_frag4), &key->v4);
    return np_lookup(NP_MAP_OF(np_frag6), &key->v6);
}

NP_INLINE long np_frag_update(union np_frag_key *key, struct np_frag *fragment, const int version)
{
    if (version == 4)
        return np_update(NP_MAP_OF(np_frag4), &key->v4, fragment, BPF_ANY);
    return np_update(NP_MAP_OF(np_frag6), &key->v6, fragment, BPF_ANY);
}

NP_INLINE struct np_log_limit *np_log_limit_lookup(__u32 log_list)
{
    __u32 slot = log_list & NP_MASK(np_log_limit);
    return np_lookup(NP_MAP_OF(np_log_limit), &slot);
}

NP_INLINE const struct np_config *np_config_lookup(void)
{
    __u32 only = 0;
    return np_lookup(NP_MAP_OF(np_config), &only);
}

NP_INLINE struct np_event *np_event_reserve(void)
{
    return np_ringbuf_reserve(NP_MAP_OF(np_event), sizeof(struct np_event), 0);
}

NP_INLINE void np_event_submit(struct np_event *event)
{
    np_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}
