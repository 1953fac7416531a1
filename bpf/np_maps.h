// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Every map, its facts, and the typed accessors through which the rest of the program reaches it.
//
// In the compiled program a map is its number, in the order of declaration; the loader, which makes the maps, puts the
// map itself there.  All maps but np_call are pinned in one directory, which carries NP_SCHEMA_VERSION in its name;
// they survive the agent and every program.  Sizes are defaults: the compiled program holds none of them (NP_MASK), so
// one file serves maps of any size on any number of processors. Above each map, in this order: what it maps; who
// writes, who reads; looked up per packet?; size, and what happens when it is full; byte order of the key; lifetime;
// its role, in a line of its own.  Loader, agent and tools derive from the roles which maps are which
// (scripts/generate_abi.py reads both lists and every role).
//
// Role: one for each map.
//   endpoint: rows of single endpoints
//   endpoint cache: per processor, rows of endpoints, for an epoch
//   node: the node's addresses, tunnels and services
//   table: the compiled policy, which endpoints share
//   flow cache: per processor, tuples of established connections, for a generation
//   connection: connections and first fragments
//   counter: packets and bytes
//   event: what the program reports to the agent
//   config: settings, and what the pins are
//   scratch: working memory of one packet
//   call: the called programs of one program set
//
// Trait: any number for each map.
//   private: no group may read it: it is the secret of the connections' hash, gives it away, or holds packets
//   masked: a hash chooses the slot, so the number of slots is a power of two
//   ranged: masked, and each processor has a range of slots of its own
//   cached: the endpoint cache has copies of rows, so a change needs a new epoch
//   referring: rows name ranges of rows in other maps
//   fixed: no option sets its size
//
// "overflow of MAP", "tags of MAP" name the bucketed table that a map belongs to; "views NAME" the name under which
// user space sees the unreplied connections of a connection table.
#pragma once

#include "np_abi.h"
#include "np_lang.h"

// The number of the first map in the order of declaration is 0, wherever the compiler's counter stands.
enum { NP_MAP_FIRST = __COUNTER__ + 1 };

// The loader and scripts/generate_abi.py read these declarations; the program needs the number alone.
#define NP_MAP(type, name, key_type, value_type, size, flags) enum { name = __COUNTER__ - NP_MAP_FIRST }
#define NP_MAP_RINGBUF(name, size) enum { name = __COUNTER__ - NP_MAP_FIRST } // its size is in bytes

// Interface to endpoint, with both policy sets.  The agent writes, the program reads.  Looked up per packet only when
// np_ep_cache misses.  When full: the agent refuses the endpoint, its packets are dropped as unknown.  Key: host order.
// Lives until the endpoint goes.  Every change needs a new epoch (np_ep_cache).
// Role: endpoint, cached, referring.
NP_MAP("hash", np_endpoint, struct np_endpoint_key, struct np_endpoint, 4096, BPF_F_NO_PREALLOC);

// A hash of the packet's tuple to its connection's verdict, direct-mapped, a range of slots for each CPU.  The program
// writes and reads.  Looked up per packet.  A collision overwrites.  Key: CPU times slots, and the hash.  Valid for one
// generation and one second.
// Role: flow cache, ranged.
NP_MAP("array", np_flow_cache4, __u32, struct np_flow_cache4, 262144, 0); // of all CPUs together
NP_MAP("array", np_flow_cache6, __u32, struct np_flow_cache6, 131072, 0); // of all CPUs together

// Interface to the endpoint's row, direct-mapped.  The program writes and reads.  Looked up per packet that
// np_flow_cache does not know.  A collision overwrites.  Key: ifindex modulo size.  Valid for one epoch.
// Role: endpoint cache, masked.
NP_MAP("percpu_array", np_ep_cache, __u32, struct np_ep_cache, 512, 0);

// Host endpoint's number to its policy sets.  The agent writes, the program reads.  Looked up for a new flow on a host
// interface, or on any while there is a wildcard host endpoint.  When full: the agent refuses the change.  Key: host
// order.  Lives as long as the endpoint has an interface.
// Role: endpoint, referring.
NP_MAP("hash", np_host, struct np_number_key, struct np_host, 64, BPF_F_NO_PREALLOC);

// Workload endpoint's number to its interface.  The agent writes, the program reads.  Looked up where a packet to a
// service leaves and its sender's verdict is not known.  When full: the agent refuses the endpoint.  Key: host order.
// Lives as long as the endpoint's row.
// Role: endpoint.
NP_MAP("hash", np_ifindex, struct np_number_key, struct np_ifindex, 4096, BPF_F_NO_PREALLOC);

// Single addresses that mean this node or another one, and how: own, broadcast, joined groups, other nodes'.  The agent
// writes, the program reads.  Looked up for a new flow from a workload or on a host interface.  When full: the agent
// refuses the change.  Key: network order.  Lives as long as the address.
// Role: node.
NP_MAP("hash", np_local4, struct np_addr4_key, struct np_local, 4096, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_local6, struct np_addr6_key, struct np_local, 4096, BPF_F_NO_PREALLOC);

// Longest prefix all of whose addresses are the node's own (local routes shorter than an address), but for 127.0.0.0/8.
// The agent writes, the program reads.  Looked up where np_local is, if the configuration says that there are rows.
// When full: the agent refuses the change.  Key: prefix length in host order, address in network order.  Lives as long
// as the route.
// Role: node.
NP_MAP("lpm_trie", np_local4_net, struct np_cidr4_key, struct np_local, 256, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_local6_net, struct np_cidr6_key, struct np_local, 256, BPF_F_NO_PREALLOC);

// Protocol and port to whether that is encapsulation which a node takes from anyone.  The agent writes, the program
// reads.  Looked up for a packet from a workload that may be that.  When full: the agent refuses the change.  Key: port
// in host order.  Lives as long as the device, or as the option that names it.
// Role: node.
NP_MAP("hash", np_tunnel, struct np_tunnel_key, struct np_tunnel, 64, BPF_F_NO_PREALLOC);

// Service address, protocol and port, to what else is known of it: packets there are judged where they leave.  The
// agent writes, the program reads.  Looked up for a new flow that enters the node.  When full: the agent refuses the
// change.  Key: address in network order, port in host order.  Lives as long as the service.
// Role: node.
NP_MAP("hash", np_vip4, struct np_vip4_key, struct np_vip, 65536, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_vip6, struct np_vip6_key, struct np_vip, 65536, BPF_F_NO_PREALLOC);

// Working memory, because the stack has 512 bytes.  The program writes and reads.  Looked up for every packet that is
// not part of an established connection.  One row per CPU.  Means nothing between two packets.
// Role: scratch, private.
NP_MAP("percpu_array", np_scratch, __u32, struct np_scratch_words, 1, 0);

// Hash of a node's or a service's address to a bit, set while there is such an address in np_local or np_vip: spares a
// new flow those look-ups.  The agent writes, the program reads.  Looked up for a new flow.  Fixed size; the more bits
// are set, the more often the tables are asked in vain.  Key: host order.  Set before the address's row, cleared after.
// Role: node, masked, fixed.
NP_MAP("array", np_vip_filter, __u32, struct np_vip_filter, 2048, 0); // of 64 bits each

// Known address to identity and owner, in buckets by hash (struct np_addr4_bucket).  The agent writes, the program
// reads.  Looked up for a new flow.  When a bucket is full: its further rows are in np_addr4_more, np_addr6_more.  Key:
// the address's hash.  Lives as long as the address is known.
// Role: table, cached.
NP_MAP("array", np_addr4, __u32, struct np_addr4_bucket, 65536, BPF_F_MMAPABLE); // buckets
NP_MAP("array", np_addr6, __u32, struct np_addr6_bucket, 65536, BPF_F_MMAPABLE); // buckets

// Known address to identity and owner, for rows whose bucket is full.  The agent writes, the program reads.  Looked up
// for a new flow whose address is not in its bucket, if the bucket says that there are such rows.  When full: the agent
// refuses the change.  Key: network order.  Lives as long as the address is known.
// Role: table, overflow of np_addr4, np_addr6.
NP_MAP("hash", np_addr4_more, struct np_addr4_key, struct np_addr, 262144, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_addr6_more, struct np_addr6_key, struct np_addr, 262144, BPF_F_NO_PREALLOC);

// Longest prefix to identity, for addresses not in np_addr.  The agent writes, the program reads.  Looked up for a new
// flow.  When full: the agent refuses the change.  Key: prefix length in host order, address in network order.  Lives
// as long as something names the prefix.
// Role: table.
NP_MAP("lpm_trie", np_cidr4, struct np_cidr4_key, struct np_cidr, 262144, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_cidr6, struct np_cidr6_key, struct np_cidr, 262144, BPF_F_NO_PREALLOC);

// Prefixes an endpoint may send from although it does not own them.  The agent writes, the program reads.  Looked up
// for a new flow whose source is not its own, if the endpoint has the flag.  When full: the agent refuses the change.
// Key: prefix length (32 + bits) and endpoint in host order, address in network order.  Lives as long as the endpoint.
// Role: endpoint.
NP_MAP("lpm_trie", np_source4, struct np_source4_key, struct np_source, 4096, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_source6, struct np_source6_key, struct np_source, 4096, BPF_F_NO_PREALLOC);

// (Policy set, identity) to peer class, where it is not the default of its family; sets that tell peers apart alike
// share a number.  In lines of neighbouring identities (struct np_class_line), two to a bucket.  The agent writes, the
// program reads.  Looked up for a new flow.  When a bucket is full: its further rows are in np_peer_more.  Key: hash of
// both.  Lives as long as one of the sets.
// Role: table.
NP_MAP("array", np_peer_class, __u32, struct np_peer_bucket, 65536, BPF_F_MMAPABLE); // buckets

// (Policy set, identity) to peer class, for rows whose bucket is full.  The agent writes, the program reads.  Looked up
// for a new flow whose identities are not in the bucket, if the bucket says that there are such rows.  When full: the
// agent refuses the change.  Key: host order.  Lives as long as one of the sets.
// Role: table, overflow of np_peer_class.
NP_MAP("hash", np_peer_more, struct np_peer_class_key, struct np_peer_class, 1048576, BPF_F_NO_PREALLOC);

// (Protocol, port or ICMP type and code) to atom, in blocks.  The agent writes, the program reads.  Looked up for a new
// flow.  Fixed size.  Key: host order.  Lives always; atoms are renumbered only when nothing refers to the old number.
// Role: table.
NP_MAP("array", np_l4_atom, __u32, struct np_l4_atom, NP_ATOM_BLOCKS, 0);

// (Policy set's base + atom / 64, atom % 64) to L4 class.  The agent writes, the program reads.  Looked up for a new
// flow.  When full: the agent refuses the change.  Key: host order.  A row is reused only after a grace period.
// Role: table.
NP_MAP("array", np_l4_col, __u32, struct np_l4_col, 16384, 0);

// Index made of the classes to verdict.  The agent writes, the program reads.  Looked up for a new flow.  When full:
// the agent refuses the change.  Key: host order.  A range is reused only after a grace period; 0 denies.
// Role: table.
NP_MAP("array", np_verdict, __u32, struct np_verdict, 1048576, 0);

// Rule number to readable name.  The agent writes, people and tools read.  Never looked up for a packet.  When full:
// the agent refuses the change.  Key: host order.  Lives as long as a verdict or a connection may name the rule.
// Role: table.
NP_MAP("hash", np_rule, struct np_rule_key, struct np_rule, 65536, BPF_F_NO_PREALLOC);

// Rule number to packets and bytes it decided, per CPU; slot 0 counts exempt traffic.  The program writes, the agent
// reads.  Looked up per packet.  A number beyond its size is counted as NP_REASON_RULE_RANGE.  Key: host order.  Lives
// across agents and programs; the agent zeroes a slot before it gives the number away again.
// Role: counter.
NP_MAP("percpu_array", np_rule_count, __u32, struct np_count, 65536, 0);

// Rule number to packets and bytes it would decide if staged policies were enforced, per CPU.  The program writes, the
// agent reads.  Looked up for each packet that policy judges, so packets of established connections are not in it.  A
// number beyond its size is counted as NP_REASON_RULE_RANGE.  Key: host order.  Lives as np_rule_count.
// Role: counter.
NP_MAP("percpu_array", np_staged_count, __u32, struct np_count, 65536, 0);

// enum np_reason to packets and bytes, per CPU.  The program writes, the agent reads.  Looked up for every packet that
// is not part of an established connection.  Fixed size.  Key: host order.  Lives across agents and programs.
// Role: counter.
NP_MAP("percpu_array", np_reason_count, __u32, struct np_count, NP_REASON_COUNT, 0);

// Canonical tuple of one side of a connection to the connection, in buckets by hash (np_table.h).  The program writes
// and reads; the agent adds what is older than it.  Looked up per packet that np_flow_cache does not know.  When a
// bucket is full: the connection of the lowest rank that would expire first goes, and its flow is judged as a new one.
// Key: the hash's bucket times NP_CONN_WAYS, and the slot; in the entry ports in host order, addresses in network
// order.  Lives across agents and programs; expiry is checked when a packet meets the entry.
// Role: connection, private, views np_unreplied4, np_unreplied6.
NP_MAP("array", np_conn4, __u32, struct np_conn4_entry, 524288, BPF_F_MMAPABLE); // slots: NP_CONN_WAYS for each bucket
NP_MAP("array", np_conn6, __u32, struct np_conn6_entry, 262144, BPF_F_MMAPABLE); // slots: NP_CONN_WAYS for each bucket

// Hash of a connection's tuple to the tags of its bucket (struct np_conn_tags): which slot has which connection.  The
// program writes and reads; the agent adds what is older than it.  Looked up with np_conn.  Fixed by the size of
// np_conn.  Key: host order.  Lives as np_conn.
// Role: connection, private, tags of np_conn4, np_conn6.
NP_MAP("array", np_conn4_tag, __u32, struct np_conn_tags, 65536, BPF_F_MMAPABLE); // buckets
NP_MAP("array", np_conn6_tag, __u32, struct np_conn_tags, 32768, BPF_F_MMAPABLE); // buckets

// The numbers of the connections' hash.  Written once, by the loader, when the map is made.  Looked up with np_conn.
// One row.  Lives as long as the connections.
// Role: connection, private, fixed.
NP_MAP("array", np_secret, __u32, struct np_secret, 1, 0);

// Identification of a fragmented packet to its ports.  The program writes (allowed first fragments) and reads.  Looked
// up per later fragment.  When full: the least recently used goes, and its later fragments are dropped.  Key: as on the
// wire. Lives for the time-out of NP_CONN_FRAGMENT.
// Role: connection.
NP_MAP("lru_hash", np_frag4, struct np_frag4_key, struct np_frag, 4096, 0);
NP_MAP("lru_hash", np_frag6, struct np_frag6_key, struct np_frag, 4096, 0);

// Log list (modulo size) to the time of its last event.  The program writes and reads.  Looked up for a new flow whose
// verdict has a log list.  Fixed size; lists that share a slot share the limit.  Key: host order.  Lives always.
// Role: event, masked.
NP_MAP("array", np_log_limit, __u32, struct np_log_limit, 4096, 0);

// Generation, flags, time-outs.  The agent writes, the program reads.  Looked up per packet.  One row.  Lives always.
// Role: config.
NP_MAP("array", np_config, __u32, struct np_config, 1, 0);

// What the pin directory holds.  The loader writes and reads; never looked up for a packet.  One row.  Lives always.
// Role: config.
NP_MAP("array", np_schema, __u32, struct np_schema, 1, 0);

// Events for the agent: denies always, the rest as np_config says.  The program writes, one reader consumes.  Written
// for a drop and where asked for.  When full: the event is lost and counted as NP_REASON_EVENT_LOST.  No wake-up per
// event: the reader looks by itself.  Lives across agents.
// Role: event.
NP_MAP_RINGBUF(np_event, 1048576); // bytes

// enum np_call to the called program.  The loader writes, once, before the hooks' programs are attached; the kernel
// reads.  Looked up by tail calls.  Fixed size; an empty slot drops the packet (NP_REASON_CALL_MISSING).  Key: host
// order.  Lives as long as its program set, which alone uses it.
// Role: call.
NP_MAP("prog_array", np_call, __u32, __u32, NP_CALLS, 0);

// --- accessors -------------------------------------------------------------------------------------------------------
// `version` is 4 or 6 and always a constant. A look-up returns NULL when there is no such row.

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

// The slot of a hash in this CPU's range, which is a power of two.
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

// The connection in one slot of the hash's bucket; the key is before it in the entry.
NP_INLINE struct np_conn *np_conn_lookup(__u32 hash, __u32 way, const int version)
{
    __u32 bucket = hash & (version == 4 ? NP_MASK(np_conn4_tag) : NP_MASK(np_conn6_tag));
    __u32 entry = bucket * NP_CONN_WAYS + way;
    if (version == 4) {
        struct np_conn4_entry *found = np_lookup(NP_MAP_OF(np_conn4), &entry);
        np_forget(found); // else the compiler adds to it before it compares it with NULL (LLVM 14 on arm64)
        return found ? &found->conn : 0;
    }
    struct np_conn6_entry *found = np_lookup(NP_MAP_OF(np_conn6), &entry);
    return found ? &found->conn : 0;
}

// Does not return, unless the slot is empty: every call is followed by a counted drop.
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
