// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// All maps, the facts about each map, and typed accessors. No other file accesses a map.
//
// The compiled program names a map by its number, which counts the declarations below. The loader makes the maps, and
// replaces the numbers in the program by the maps' descriptors. All maps but np_call are pinned in one directory, which
// has NP_SCHEMA_VERSION in its name. Pinned maps survive the agent and every program. The sizes below are defaults. The
// compiled program contains no size (NP_MASK), so the same compiled file serves maps of any size on any number of CPUs.
//
// The comment above each map has, in this order: what the map is for; who writes it and who reads it; when the program
// looks it up for a packet; its size, or what happens when it is full; the byte order of the key; the lifetime; and the
// role, on a line of its own. scripts/generate_abi.py reads the following lists and every role; loader, agent and tools
// derive from them which maps are which.
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
//   private: only the owner may read the map: it has or reveals the secret of the conntrack hash, or holds packets
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

// The first map has the number 0, wherever the compiler's counter begins.
enum { NP_MAP_FIRST = __COUNTER__ + 1 };

// The compiled program needs only the number. The loader and scripts/generate_abi.py parse the other arguments.
#define NP_MAP(type, name, key_type, value_type, size, flags) enum { name = __COUNTER__ - NP_MAP_FIRST }
#define NP_MAP_RINGBUF(name, size) enum { name = __COUNTER__ - NP_MAP_FIRST } // size in bytes

// Maps an interface to its endpoint and to the policy sets of both directions. The agent writes, the program reads.
// Looked up when np_ep_cache has no valid row. When full: the agent rejects the endpoint, and its packets are dropped
// as unknown-endpoint. Key: host order. A row lives until the interface loses its endpoint. The agent raises the epoch
// with every change, because np_ep_cache has copies.
// Role: endpoint, cached, referring.
NP_MAP("hash", np_endpoint, struct np_endpoint_key, struct np_endpoint, 4096, BPF_F_NO_PREALLOC);

// Maps the hash of a packet's tuple to the verdict of its connection, in a range of slots for each CPU. The program
// writes and reads. Looked up for every packet. A collision overwrites the older row. Key: the CPU's range and the
// hash. A row is valid for one second and one generation.
// Role: flow cache, ranged.
NP_MAP("array", np_flow_cache4, __u32, struct np_flow_cache4, 262144, 0); // size for all CPUs together
NP_MAP("array", np_flow_cache6, __u32, struct np_flow_cache6, 131072, 0); // size for all CPUs together

// Caches the np_endpoint row of an interface. The program writes and reads. Looked up for every packet on the slow
// path. A collision overwrites the older row. Key: ifindex modulo size. A row is valid for one epoch.
// Role: endpoint cache, masked.
NP_MAP("percpu_array", np_ep_cache, __u32, struct np_ep_cache, 512, 0);

// Maps a host endpoint's number to its policy sets.  The agent writes, the program reads.  Looked up for a new flow on
// a host interface; if the node has a wildcard host endpoint, on every interface.  When full: the agent rejects the
// change. Key: host order. A row lives as long as the endpoint has an interface.
// Role: endpoint, referring.
NP_MAP("hash", np_host, struct np_number_key, struct np_host, 64, BPF_F_NO_PREALLOC);

// Maps a workload endpoint's number to its interface.  The agent writes, the program reads.  Looked up for the sender
// of a packet with a sender tag, for the source of a packet from outside, and for link messages.  When full: the agent
// rejects the endpoint.  Key: host order.  A row lives as long as the endpoint has a row in np_endpoint.
// Role: endpoint.
NP_MAP("hash", np_ifindex, struct np_number_key, struct np_ifindex, 4096, BPF_F_NO_PREALLOC);

// Maps an address to what it is at this node: an own address, a broadcast address, a joined multicast group, or an
// address of another node. The agent writes, the program reads. Looked up for a new flow from a workload or on a host
// interface. When full: the agent rejects the change. Key: network order. A row lives as long as the address is one of
// these.
// Role: node.
NP_MAP("hash", np_local4, struct np_addr4_key, struct np_local, 16384, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_local6, struct np_addr6_key, struct np_local, 16384, BPF_F_NO_PREALLOC);

// Maps a prefix whose addresses are all the node's own to an np_local row (local routes, except 127.0.0.0/8). The agent
// writes, the program reads. Looked up for an address that np_local lacks, if NP_CONFIG_LOCAL_NETS is set. When full:
// the agent rejects the change. Key: prefix length in host order, address in network order. A row lives as long as the
// route.
// Role: node.
NP_MAP("lpm_trie", np_local4_net, struct np_cidr4_key, struct np_local, 256, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_local6_net, struct np_cidr6_key, struct np_local, 256, BPF_F_NO_PREALLOC);

// Lists the encapsulations, by protocol and port, that a tunnel device of a node accepts from any sender. The agent
// writes, the program reads. Looked up for a workload's packet with a protocol that tunnels use. When full: the agent
// rejects the change. Key: port in host order. A row lives as long as the tunnel device, or as the option that names
// the encapsulation.
// Role: node.
NP_MAP("hash", np_tunnel, struct np_tunnel_key, struct np_tunnel, 64, BPF_F_NO_PREALLOC);

// Maps a service's address, protocol and port to the service's backend on this node, if there is one. The agent writes,
// the program reads. Looked up for a new flow that enters the node, because a packet to a service is judged where it
// leaves the node. When full: the agent rejects the change. Key: address in network order, port in host order. A row
// lives as long as the service.
// Role: node.
NP_MAP("hash", np_vip4, struct np_vip4_key, struct np_vip, 65536, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_vip6, struct np_vip6_key, struct np_vip, 65536, BPF_F_NO_PREALLOC);

// Holds the working memory of one packet, because the stack has only 512 bytes.  The program writes and reads.  Looked
// up for every packet on the slow path.  One row per CPU.  The content is valid for one packet.
// Role: scratch, private.
NP_MAP("percpu_array", np_scratch, __u32, struct np_scratch_words, 1, 0);

// Holds the working memory of one DNS message.  The program writes and reads.  Looked up for a packet from or to a DNS
// server.  One row per CPU.  The content is valid for one packet.
// Role: scratch, private.
NP_MAP("percpu_array", np_dns_scratch, __u32, struct np_dns_words, 1, 0);

// Maps the hash of an address to a bit, which is 0 if neither np_local nor np_vip has the address. The agent writes,
// the program reads. Looked up for a new flow, which is spared two other look-ups if the bit is 0. Fixed size; the more
// addresses there are, the more flows find their bit set in vain. Key: host order. The agent sets a bit before it
// writes a row in np_local or np_vip, and clears the bit after it removed the last row with an address of this bit.
// Role: node, masked, fixed.
NP_MAP("array", np_vip_filter, __u32, struct np_vip_filter, 2048, 0); // size in words of 64 bits

// Maps a known address to its identity and holder, in buckets by hash (struct np_addr4_bucket).  The agent writes, the
// program reads.  Looked up for a new flow.  When a bucket is full: the map np_addr4_more or np_addr6_more has the
// bucket's further rows. Key: the hash of the address. A row lives as long as the agent knows the address.
// Role: table, cached.
NP_MAP("array", np_addr4, __u32, struct np_addr4_bucket, 65536, BPF_F_MMAPABLE); // size in buckets
NP_MAP("array", np_addr6, __u32, struct np_addr6_bucket, 65536, BPF_F_MMAPABLE); // size in buckets

// Maps a known address to its identity and holder, if the bucket of the address is full. The agent writes, the program
// reads. Looked up for a new flow, if the bucket lacks the address and has the flag NP_BUCKET_MORE. When full: the
// agent rejects the change. Key: network order. A row lives as long as the agent knows the address.
// Role: table, overflow of np_addr4, np_addr6.
NP_MAP("hash", np_addr4_more, struct np_addr4_key, struct np_addr, 262144, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_addr6_more, struct np_addr6_key, struct np_addr, 262144, BPF_F_NO_PREALLOC);

// Maps a prefix to the identity of its addresses that are neither in np_addr nor in a longer prefix.  The agent writes,
// the program reads. Looked up for a new flow whose peer is not in np_addr.  When full: the agent rejects the change.
// Key: prefix length in host order, address in network order. A row lives as long as a policy or network set names the
// prefix.
// Role: table.
NP_MAP("lpm_trie", np_cidr4, struct np_cidr4_key, struct np_cidr, 262144, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_cidr6, struct np_cidr6_key, struct np_cidr, 262144, BPF_F_NO_PREALLOC);

// Lists the prefixes that an endpoint may send from without owning their addresses. The agent writes, the program
// reads. Looked up for an address that is not the endpoint's own, if the endpoint has the flag NP_ENDPOINT_SOURCES.
// When full: the agent rejects the change. Key: prefix length (32 + bits) and endpoint in host order, address in
// network order. A row lives as long as the endpoint.
// Role: endpoint.
NP_MAP("lpm_trie", np_source4, struct np_source4_key, struct np_source, 4096, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_source6, struct np_source6_key, struct np_source, 4096, BPF_F_NO_PREALLOC);

// Maps policy set and identity to the peer class, unless the class is the set's default; policy sets with equal class
// tables share rows.  A bucket has two lines, each with the classes of consecutive identities (struct np_class_line).
// The agent writes, the program reads.  Looked up for a new flow.  When a bucket is full: np_peer_more has the bucket's
// further rows. Key: hash of set and block of identities.  A row lives as long as one of the sets.
// Role: table.
NP_MAP("array", np_peer_class, __u32, struct np_peer_bucket, 65536, BPF_F_MMAPABLE); // size in buckets

// Maps policy set and identity to the peer class, if the bucket of the identity is full. The agent writes, the program
// reads. Looked up for a new flow, if the bucket lacks the identity and has the flag NP_BUCKET_MORE. When full: the
// agent rejects the change. Key: host order. A row lives as long as one of the sets.
// Role: table, overflow of np_peer_class.
NP_MAP("hash", np_peer_more, struct np_peer_class_key, struct np_peer_class, 1048576, BPF_F_NO_PREALLOC);

// Maps protocol and port, or ICMP type and code, to an atom, in blocks of 256. The agent writes, the program reads.
// Looked up for a new flow. Fixed size. Key: number of the block, in host order. All rows exist always; the agent
// reuses an atom's number only when nothing refers to the number.
// Role: table.
NP_MAP("array", np_l4_atom, __u32, struct np_l4_atom, NP_ATOM_BLOCKS, 0);

// Maps an atom to the L4 class of a policy set: row l4_base + atom / 64, column atom % 64.  The agent writes, the
// program reads.  Looked up for a new flow.  When full: the agent rejects the change.  Key: number of the row, in host
// order.  The agent reuses a row only after a grace period.
// Role: table.
NP_MAP("array", np_l4_col, __u32, struct np_l4_col, 16384, 0);

// Maps the classes of a packet to the verdict (struct np_set has the formula of the row).  The agent writes, the
// program reads. Looked up for a new flow.  When full: the agent rejects the change.  Key: number of the row, in host
// order. The agent reuses a range of rows only after a grace period. A row of zeros denies.
// Role: table.
NP_MAP("array", np_verdict, __u32, struct np_verdict, 1048576, 0);

// Maps a domain list and a name class to the first rule of the list that matches the names of the class. The agent
// writes, the program reads. Looked up for a new flow whose verdict has a domain list. When full: the agent rejects the
// change. Key: host order. A row lives as long as its list and its class.
// Role: table.
NP_MAP("hash", np_domain, struct np_domain_key, struct np_domain, 262144, BPF_F_NO_PREALLOC);

// Maps a domain name, or the end of a domain name, to its name class. The agent writes, the program reads. Looked up
// for each DNS answer. When full: the agent rejects the change. Key: prefix length in host order, labels in reverse
// order. A row lives as long as a rule or a network set has the pattern.
// Role: table.
NP_MAP("lpm_trie", np_name, struct np_name_key, struct np_name, 65536, BPF_F_NO_PREALLOC);

// Maps a rule's number to its readable name.  The agent writes; people and tools read.  Never looked up for a
// packet. When full: the agent rejects the change.  Key: host order.  A row lives as long as a verdict or a connection
// may name the rule.
// Role: table.
NP_MAP("hash", np_rule, struct np_rule_key, struct np_rule, 65536, BPF_F_NO_PREALLOC);

// Counts packets and bytes that a rule decided, by rule number, per CPU; row 0 counts exempt traffic.  The program
// writes, the agent reads.  Looked up for every packet that a rule decided.  When a rule's number is beyond the size:
// the packet is counted as NP_REASON_RULE_RANGE. Key: host order.  The map outlives agents and programs; the agent
// zeroes a row before it reuses the rule's number.
// Role: counter.
NP_MAP("percpu_array", np_rule_count, __u32, struct np_count, 65536, 0);

// Counts packets and bytes that a rule would decide if staged policies were enforced, by rule number, per CPU.  The
// program writes, the agent reads.  Looked up for each packet that policy judges; packets of established connections
// are not counted here.  When a rule's number is beyond the size: the packet is counted as NP_REASON_RULE_RANGE.  Key:
// host order.  Lifetime: as np_rule_count.
// Role: counter.
NP_MAP("percpu_array", np_staged_count, __u32, struct np_count, 65536, 0);

// Counts packets and bytes by enum np_reason, per CPU.  The program writes, the agent reads.  Looked up for every
// packet but those of established connections.  Fixed size.  Key: host order.  The map outlives agents and programs.
// Role: counter.
NP_MAP("percpu_array", np_reason_count, __u32, struct np_count, NP_REASON_COUNT, 0);

// Holds the connections, in buckets by the hash of the conntrack key (np_table.h).  The program writes and reads; the
// agent adds connections older than the program.  Looked up for every packet on the slow path, except an initial SYN
// that policy denies. When a bucket is full: the connection of the lowest worth (np_table.h) is evicted, and policy
// judges its next packet as a new flow. Key: bucket * NP_CONN_WAYS + slot, in host order; in the entry, ports are in
// host order, addresses in network order.  The map outlives agents and programs. A connection ends when a packet finds
// it expired.
// Role: connection, private, views np_unreplied4, np_unreplied6.
NP_MAP("array", np_conn4, __u32, struct np_conn4_entry, 524288, BPF_F_MMAPABLE); // size in slots of all buckets
NP_MAP("array", np_conn6, __u32, struct np_conn6_entry, 262144, BPF_F_MMAPABLE); // size in slots of all buckets

// Maps the hash of a conntrack key to the tags of its bucket, which say what connection each slot has (struct
// np_conn_tags). The program writes and reads; the agent adds connections older than the program.  Looked up before
// np_conn4 or np_conn6.  Fixed size: one row for NP_CONN_WAYS slots of np_conn4 or np_conn6.  Key: host order.
// Lifetime: as np_conn4 and np_conn6.
// Role: connection, private, tags of np_conn4, np_conn6.
NP_MAP("array", np_conn4_tag, __u32, struct np_conn_tags, 65536, BPF_F_MMAPABLE); // size in buckets
NP_MAP("array", np_conn6_tag, __u32, struct np_conn_tags, 32768, BPF_F_MMAPABLE); // size in buckets

// Holds the random numbers of the conntrack hash. The loader writes them once, when it makes the map; the program
// reads. Looked up with every conntrack hash. One row. The map lives as long as np_conn4 and np_conn6.
// Role: connection, private, fixed.
NP_MAP("array", np_secret, __u32, struct np_secret, 1, 0);

// Maps the identification of a fragmented packet to the packet's ports. The program writes for a first fragment that
// passes, and reads for the later ones. Looked up for each later fragment. When full: the least recently used row is
// evicted, and the later fragments of its packet are dropped. Key: as on the wire. A row lives for the time-out of
// NP_CONN_FRAGMENT.
// Role: connection.
NP_MAP("lru_hash", np_frag4, struct np_frag4_key, struct np_frag, 4096, 0);
NP_MAP("lru_hash", np_frag6, struct np_frag6_key, struct np_frag, 4096, 0);

// Maps an endpoint and an address to the classes of the names for which the endpoint learned the address. The program
// writes and reads; the agent adds classes of patterns that are newer than the answer.  Looked up for a new flow whose
// verdict has a domain list. When full: the least recently used row is evicted, and the endpoint must ask for the name
// again. Key: endpoint in host order, address in network order. The map outlives agents and programs. A row is valid
// until its classes expire.
// Role: connection.
NP_MAP("lru_hash", np_learned4, struct np_learned4_key, struct np_learned, 65536, 0);
NP_MAP("lru_hash", np_learned6, struct np_learned6_key, struct np_learned, 65536, 0);

// Maps an endpoint to its pending DNS questions. The agent makes the row of an endpoint that has rules with domain
// names; the program writes and reads. Looked up for a question to a DNS server and for its answer. When full: the
// agent reports it, and the endpoint learns nothing. Key: host order. The map outlives agents and programs. A row lives
// as long as the endpoint has such rules.
// Role: connection, private.
NP_MAP("hash", np_asked, struct np_number_key, struct np_asked, 4096, BPF_F_NO_PREALLOC);

// Lists the DNS servers whose answers the program believes. The agent writes, the program reads. Looked up for a
// question to a DNS server and for its answer. When full: the agent rejects the change. Key: address in network order,
// port in host order. A row lives as long as the server is configured, or is an address of a configured service.
// Role: node.
NP_MAP("hash", np_resolver4, struct np_resolver4_key, struct np_resolver, 1024, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_resolver6, struct np_resolver6_key, struct np_resolver, 1024, BPF_F_NO_PREALLOC);

// Lists the prefixes whose addresses are never learned from DNS answers. The agent writes, the program reads. Looked up
// for each address of a DNS answer. When full: the agent rejects the change. Key: prefix length in host order, address
// in network order. A row lives as long as the address or the range.
// Role: node.
NP_MAP("lpm_trie", np_unlearned4, struct np_cidr4_key, struct np_unlearned, 65536, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_unlearned6, struct np_cidr6_key, struct np_unlearned, 65536, BPF_F_NO_PREALLOC);

// Carries learned addresses and the names to the agent. The program writes; one reader consumes. Written for each
// address that an endpoint learns. When full: the event is lost, and counted as NP_REASON_DNS_EVENT_LOST. An event does
// not wake the reader, which polls instead. The map outlives agents.
// Role: event.
NP_MAP_RINGBUF(np_dns_event, 1048576); // size in bytes

// Maps a log list to the time of its last event. The program writes and reads. Looked up for a new flow whose verdict
// has a log list. Fixed size; log lists that share a row also share the rate limit. Key: number of the log list modulo
// size, in host order. All rows exist always.
// Role: event, masked.
NP_MAP("array", np_log_limit, __u32, struct np_log_limit, 4096, 0);

// Holds generation, epoch, flags and time-outs. The agent writes, the program reads. Looked up for every packet. One
// row. The map outlives agents and programs.
// Role: config.
NP_MAP("array", np_config, __u32, struct np_config, 1, 0);

// Holds the schema and the digest of the pinned program. The loader writes and reads. Never looked up for a packet. One
// row. The map lives as long as the pin directory.
// Role: config.
NP_MAP("array", np_schema, __u32, struct np_schema, 1, 0);

// Carries events to the agent: every drop, and what np_config enables. The program writes; one reader consumes. Written
// for every such event. When full: the event is lost, and counted as NP_REASON_EVENT_LOST. An event does not wake the
// reader, which polls instead. The map outlives agents.
// Role: event.
NP_MAP_RINGBUF(np_event, 1048576); // size in bytes

// Maps enum np_call to the program that is tail-called. The loader writes once, before it attaches the hooks' programs;
// the kernel reads. Looked up by tail calls. Fixed size; an empty slot drops the packet (NP_REASON_CALL_MISSING). Key:
// host order. The map lives as long as its program set, the only user of the map.
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

union np_learned_key {
    struct np_learned4_key v4;
    struct np_learned6_key v6;
};

union np_resolver_key {
    struct np_resolver4_key v4;
    struct np_resolver6_key v6;
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

// The slot for a hash in the range of this CPU. The size of a range is a power of two.
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

NP_INLINE struct np_dns_words *np_dns_scratch_lookup(void)
{
    __u32 only = 0;
    return np_lookup(NP_MAP_OF(np_dns_scratch), &only);
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

NP_INLINE struct np_domain *np_domain_lookup(struct np_domain_key *key)
{
    return np_lookup(NP_MAP_OF(np_domain), key);
}

NP_INLINE struct np_name *np_name_lookup(struct np_name_key *key)
{
    return np_lookup(NP_MAP_OF(np_name), key);
}

NP_INLINE struct np_learned *np_learned_lookup(union np_learned_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_learned4), &key->v4);
    return np_lookup(NP_MAP_OF(np_learned6), &key->v6);
}

NP_INLINE long np_learned_update(union np_learned_key *key, struct np_learned *learned, const int version)
{
    if (version == 4)
        return np_update(NP_MAP_OF(np_learned4), &key->v4, learned, BPF_ANY);
    return np_update(NP_MAP_OF(np_learned6), &key->v6, learned, BPF_ANY);
}

NP_INLINE struct np_asked *np_asked_lookup(__u32 endpoint)
{
    struct np_number_key key = {.number = endpoint};
    return np_lookup(NP_MAP_OF(np_asked), &key);
}

NP_INLINE int np_is_resolver(union np_resolver_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_resolver4), &key->v4) != 0;
    return np_lookup(NP_MAP_OF(np_resolver6), &key->v6) != 0;
}

NP_INLINE int np_is_unlearned(union np_cidr_key *key, const int version)
{
    if (version == 4)
        return np_lookup(NP_MAP_OF(np_unlearned4), &key->v4) != 0;
    return np_lookup(NP_MAP_OF(np_unlearned6), &key->v6) != 0;
}

NP_INLINE struct np_dns_event *np_dns_event_reserve(void)
{
    return np_ringbuf_reserve(NP_MAP_OF(np_dns_event), sizeof(struct np_dns_event), 0);
}

NP_INLINE void np_dns_event_submit(struct np_dns_event *event)
{
    np_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
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

// The connection in slot `way` of the bucket for a hash. Its key precedes it in the entry.
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

// Tail-call a program. Returns only if the slot is empty; then the caller must count and drop the packet.
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
