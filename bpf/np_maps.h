// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Every map, its facts, and the typed accessors through which the rest of the program reaches it.  This is the one file
// in BCC's dialect (a method call on a map); BCC rewrites such calls only outside macros, hence one accessor per
// family.
//
// All maps are pinned in one directory whose name carries NP_SCHEMA_VERSION; they survive the agent and every program.
// Sizes: the second part of each declaration's default; the loader overrides NP_MAX_* at compile time.
// Above each map, in this order: what it maps; who writes, who reads; looked up per packet?; size, and what happens
// when it is full; byte order of the key; lifetime.
#pragma once

#include "np_abi.h"
#include "np_lang.h"

#ifndef NP_MAX_ENDPOINT
#define NP_MAX_ENDPOINT 4096
#endif
#ifndef NP_CPUS
#define NP_CPUS 1 // that can ever be; the loader says how many
#endif
#ifndef NP_MAX_RECENT4
#define NP_MAX_RECENT4 262144 // of all CPUs together
#endif
#ifndef NP_MAX_RECENT6
#define NP_MAX_RECENT6 131072 // of all CPUs together
#endif
#ifndef NP_MAX_NEAR
#define NP_MAX_NEAR 512 // a power of two
#endif
#ifndef NP_MAX_SPECIAL
#define NP_MAX_SPECIAL 2048 // a power of two; of 64 bits each
#endif
#ifndef NP_MAX_HOST
#define NP_MAX_HOST 64
#endif
#ifndef NP_MAX_PLACE
#define NP_MAX_PLACE 4096
#endif
#ifndef NP_MAX_LOCAL4
#define NP_MAX_LOCAL4 4096
#endif
#ifndef NP_MAX_LOCAL6
#define NP_MAX_LOCAL6 4096
#endif
#ifndef NP_MAX_VIP4
#define NP_MAX_VIP4 65536
#endif
#ifndef NP_MAX_VIP6
#define NP_MAX_VIP6 65536
#endif
#ifndef NP_MAX_SCRATCH
#define NP_MAX_SCRATCH 1
#endif
#ifndef NP_MAX_ADDR4
#define NP_MAX_ADDR4 65536 // buckets, a power of two
#endif
#ifndef NP_MAX_ADDR4_MORE
#define NP_MAX_ADDR4_MORE 262144
#endif
#ifndef NP_MAX_ADDR6
#define NP_MAX_ADDR6 65536 // buckets, a power of two
#endif
#ifndef NP_MAX_ADDR6_MORE
#define NP_MAX_ADDR6_MORE 262144
#endif
#ifndef NP_MAX_CIDR4
#define NP_MAX_CIDR4 262144
#endif
#ifndef NP_MAX_CIDR6
#define NP_MAX_CIDR6 262144
#endif
#ifndef NP_MAX_SOURCE4
#define NP_MAX_SOURCE4 4096
#endif
#ifndef NP_MAX_SOURCE6
#define NP_MAX_SOURCE6 4096
#endif
#ifndef NP_MAX_PEER_CLASS
#define NP_MAX_PEER_CLASS 65536 // buckets, a power of two
#endif
#ifndef NP_MAX_PEER_MORE
#define NP_MAX_PEER_MORE 1048576
#endif
#ifndef NP_MAX_L4_ATOM
#define NP_MAX_L4_ATOM 1537 // NP_ATOM_BLOCKS
#endif
#ifndef NP_MAX_L4_COL
#define NP_MAX_L4_COL 16384
#endif
#ifndef NP_MAX_VERDICT
#define NP_MAX_VERDICT 1048576
#endif
#ifndef NP_MAX_RULE
#define NP_MAX_RULE 65536
#endif
#ifndef NP_MAX_RULE_COUNT
#define NP_MAX_RULE_COUNT 65536
#endif
#ifndef NP_MAX_STAGED_COUNT
#define NP_MAX_STAGED_COUNT 65536
#endif
#ifndef NP_MAX_REASON_COUNT
#define NP_MAX_REASON_COUNT 128 // NP_REASON_COUNT
#endif
#ifndef NP_MAX_CONN4
#define NP_MAX_CONN4 524288 // places: NP_CONN_WAYS for each bucket
#endif
#ifndef NP_MAX_CONN4_TAG
#define NP_MAX_CONN4_TAG 65536 // buckets, a power of two
#endif
#ifndef NP_MAX_CONN6
#define NP_MAX_CONN6 262144 // places: NP_CONN_WAYS for each bucket
#endif
#ifndef NP_MAX_CONN6_TAG
#define NP_MAX_CONN6_TAG 32768 // buckets, a power of two
#endif
#ifndef NP_MAX_SECRET
#define NP_MAX_SECRET 1
#endif
#ifndef NP_MAX_FRAG4
#define NP_MAX_FRAG4 4096
#endif
#ifndef NP_MAX_FRAG6
#define NP_MAX_FRAG6 4096
#endif
#ifndef NP_MAX_LOG_LIMIT
#define NP_MAX_LOG_LIMIT 4096
#endif
#ifndef NP_MAX_EVENT
#define NP_MAX_EVENT 1048576 // bytes; a power of two
#endif
#ifndef NP_MAX_CONFIG
#define NP_MAX_CONFIG 1
#endif
#ifndef NP_MAX_SCHEMA
#define NP_MAX_SCHEMA 1
#endif

// Pinned by declaration: BCC opens NP_PIN_DIR/<name> when it exists, else creates the map and pins it there.
#define NP_MAP(type, name, key_type, value_type, size, flags)                                                          \
    BPF_F_TABLE(type ":" NP_PIN_DIR "/" #name, key_type, value_type, name, size, flags)

// The same for the ring buffer, for which BCC has no pinned form. Its size is in bytes.
#define NP_MAP_RINGBUF(name, size)                                                                                     \
    struct name##_table_t {                                                                                            \
        int key;                                                                                                       \
        __u32 leaf;                                                                                                    \
        int (*ringbuf_output)(void *, __u64, __u64);                                                                   \
        void *(*ringbuf_reserve)(__u64);                                                                               \
        void (*ringbuf_discard)(void *, __u64);                                                                        \
        void (*ringbuf_submit)(void *, __u64);                                                                         \
        __u32 max_entries;                                                                                             \
    };                                                                                                                 \
    __attribute__((section("maps/ringbuf:" NP_PIN_DIR "/" #name))) struct name##_table_t name = {.max_entries = (size)}

// Interface to endpoint, with both policy sets.  The agent writes, the program reads.  Looked up per packet only when
// np_near misses.  When full: the agent refuses the endpoint, its packets are dropped as unknown.  Key: host order.
// Lives until the endpoint goes.  Every change needs a new epoch (np_near).
NP_MAP("hash", np_endpoint, struct np_endpoint_key, struct np_endpoint, NP_MAX_ENDPOINT, BPF_F_NO_PREALLOC);

// A hash of the packet's tuple to its connection's verdict, direct-mapped, a range of slots for each CPU.  The program
// writes and reads.  Looked up per packet.  A collision overwrites.  Key: CPU times slots, and the hash.  Valid for one
// generation and one second.
NP_MAP("array", np_recent4, __u32, struct np_recent4, NP_MAX_RECENT4, 0);
NP_MAP("array", np_recent6, __u32, struct np_recent6, NP_MAX_RECENT6, 0);

// Interface to the endpoint's row, direct-mapped.  The program writes and reads.  Looked up per packet that np_recent
// does not know.  A collision overwrites.  Key: ifindex modulo size.  Valid for one epoch.
NP_MAP("percpu_array", np_near, __u32, struct np_near, NP_MAX_NEAR, 0);

// Host endpoint's number to its policy sets.  The agent writes, the program reads.  Looked up for a new flow on a host
// interface, or on any while there is a wildcard host endpoint.  When full: the agent refuses the change.  Key: host
// order.  Lives as long as the endpoint has an interface.
NP_MAP("hash", np_host, struct np_number_key, struct np_host, NP_MAX_HOST, BPF_F_NO_PREALLOC);

// Workload endpoint's number to its interface.  The agent writes, the program reads.  Looked up where a packet to a
// service leaves and its sender's verdict is not known.  When full: the agent refuses the endpoint.  Key: host order.
// Lives as long as the endpoint's row.
NP_MAP("hash", np_place, struct np_number_key, struct np_place, NP_MAX_PLACE, BPF_F_NO_PREALLOC);

// The node's own addresses, broadcast ones included.  The agent writes, the program reads.  Looked up for a new flow
// from a workload or on a host interface.  When full: the agent refuses the change.  Key: network order.  Lives as long
// as the address.
NP_MAP("hash", np_local4, struct np_addr4_key, struct np_local, NP_MAX_LOCAL4, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_local6, struct np_addr6_key, struct np_local, NP_MAX_LOCAL6, BPF_F_NO_PREALLOC);

// Service address, protocol and port, to what else is known of it: packets there are judged where they leave.  The
// agent writes, the program reads.  Looked up for a new flow that enters the node.  When full: the agent refuses the
// change.  Key: address in network order, port in host order.  Lives as long as the service.
NP_MAP("hash", np_vip4, struct np_vip4_key, struct np_vip, NP_MAX_VIP4, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_vip6, struct np_vip6_key, struct np_vip, NP_MAX_VIP6, BPF_F_NO_PREALLOC);

// Working memory, because the stack has 512 bytes.  The program writes and reads.  Looked up for every packet that is
// not part of an open connection.  One row per CPU.  Means nothing between two packets.
NP_MAP("percpu_array", np_scratch, __u32, struct np_scratch, NP_MAX_SCRATCH, 0);

// Hash of a node's or a service's address to a bit, set while there is such an address in np_local or np_vip: spares a
// new flow those look-ups.  The agent writes, the program reads.  Looked up for a new flow.  Fixed size; the more bits
// are set, the more often the tables are asked in vain.  Key: host order.  Set before the address's row, cleared after.
NP_MAP("array", np_special, __u32, struct np_special, NP_MAX_SPECIAL, 0);

// Known address to identity and owner, in buckets by hash (struct np_addr4_bucket); rows that found their bucket full
// are in _more.  The agent writes, the program reads.  Looked up for a new flow.  When full: the agent refuses the
// change.  Key: the address's hash; of _more: network order.  Lives as long as the address is known.
NP_MAP("array", np_addr4, __u32, struct np_addr4_bucket, NP_MAX_ADDR4, BPF_F_MMAPABLE);
NP_MAP("array", np_addr6, __u32, struct np_addr6_bucket, NP_MAX_ADDR6, BPF_F_MMAPABLE);
NP_MAP("hash", np_addr4_more, struct np_addr4_key, struct np_addr, NP_MAX_ADDR4_MORE, BPF_F_NO_PREALLOC);
NP_MAP("hash", np_addr6_more, struct np_addr6_key, struct np_addr, NP_MAX_ADDR6_MORE, BPF_F_NO_PREALLOC);

// Longest prefix to identity, for addresses not in np_addr.  The agent writes, the program reads.  Looked up for a new
// flow.  When full: the agent refuses the change.  Key: prefix length in host order, address in network order.  Lives
// as long as something names the prefix.
NP_MAP("lpm_trie", np_cidr4, struct np_cidr4_key, struct np_cidr, NP_MAX_CIDR4, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_cidr6, struct np_cidr6_key, struct np_cidr, NP_MAX_CIDR6, BPF_F_NO_PREALLOC);

// Prefixes an endpoint may send from although it does not own them.  The agent writes, the program reads.  Looked up
// for a new flow whose source is not its own, if the endpoint has the flag.  When full: the agent refuses the change.
// Key: prefix length (32 + bits) and endpoint in host order, address in network order.  Lives as long as the endpoint.
NP_MAP("lpm_trie", np_source4, struct np_source4_key, struct np_source, NP_MAX_SOURCE4, BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_source6, struct np_source6_key, struct np_source, NP_MAX_SOURCE6, BPF_F_NO_PREALLOC);

// (Policy set, identity) to peer class, where it is not the default of its family; sets that tell peers apart alike
// share a number.  In lines of neighbouring identities (struct np_class_line), two to a bucket.  The agent writes, the
// program reads.  Looked up for a new flow.  When full: the agent refuses the change.  Key: hash of both; of _more:
// host order.  Lives as long as one of the sets.
NP_MAP("array", np_peer_class, __u32, struct np_peer_bucket, NP_MAX_PEER_CLASS, BPF_F_MMAPABLE);
NP_MAP("hash", np_peer_more, struct np_peer_class_key, struct np_peer_class, NP_MAX_PEER_MORE, BPF_F_NO_PREALLOC);

// (Protocol, port or ICMP type and code) to atom, in blocks.  The agent writes, the program reads.  Looked up for a new
// flow.  Fixed size.  Key: host order.  Lives always; atoms are renumbered only when nothing refers to the old number.
NP_MAP("array", np_l4_atom, __u32, struct np_l4_atom, NP_MAX_L4_ATOM, 0);

// (Policy set's base + atom / 64, atom % 64) to L4 class.  The agent writes, the program reads.  Looked up for a new
// flow.  When full: the agent refuses the change.  Key: host order.  A row is reused only after a grace period.
NP_MAP("array", np_l4_col, __u32, struct np_l4_col, NP_MAX_L4_COL, 0);

// Index made of the classes to verdict.  The agent writes, the program reads.  Looked up for a new flow.  When full:
// the agent refuses the change.  Key: host order.  A range is reused only after a grace period; 0 denies.
NP_MAP("array", np_verdict, __u32, struct np_verdict, NP_MAX_VERDICT, 0);

// Rule number to readable name.  The agent writes, people and tools read.  Never looked up for a packet.  When full:
// the agent refuses the change.  Key: host order.  Lives as long as a verdict or a connection may name the rule.
NP_MAP("hash", np_rule, struct np_rule_key, struct np_rule, NP_MAX_RULE, BPF_F_NO_PREALLOC);

// Rule number to packets and bytes it decided, per CPU; slot 0 counts exempt traffic.  The program writes, the agent
// reads.  Looked up per packet.  A number beyond its size is counted as NP_REASON_RULE_RANGE.  Key: host order.  Lives
// across agents and programs; the agent zeroes a slot before it gives the number away again.
NP_MAP("percpu_array", np_rule_count, __u32, struct np_count, NP_MAX_RULE_COUNT, 0);

// Rule number to packets and bytes it would decide if staged policies were enforced, per CPU.  The program writes, the
// agent reads.  Looked up for each packet that policy judges, so packets of open connections are not in it.  A number
// beyond its size is counted as NP_REASON_RULE_RANGE.  Key: host order.  Lives as np_rule_count.
NP_MAP("percpu_array", np_staged_count, __u32, struct np_count, NP_MAX_STAGED_COUNT, 0);

// enum np_reason to packets and bytes, per CPU.  The program writes, the agent reads.  Looked up for every packet that
// is not part of an open connection.  Fixed size.  Key: host order.  Lives across agents and programs.
NP_MAP("percpu_array", np_reason_count, __u32, struct np_count, NP_MAX_REASON_COUNT, 0);

// A leg's canonical tuple to its connection, in buckets by hash (np_table.h): the connections, and what is where.  The
// program writes and reads; the agent adds what is older than it.  Looked up per packet that np_recent does not know.
// When a bucket is full: the connection of the lowest rank that would expire first goes, and its flow is judged as a
// new one.  Key: the hash, and of np_conn times NP_CONN_WAYS and the place; in the entry ports in host order, addresses
// in network order.  Lives across agents and programs; expiry is checked when a packet meets the entry.
NP_MAP("array", np_conn4, __u32, struct np_conn4_entry, NP_MAX_CONN4, BPF_F_MMAPABLE);
NP_MAP("array", np_conn6, __u32, struct np_conn6_entry, NP_MAX_CONN6, BPF_F_MMAPABLE);
NP_MAP("array", np_conn4_tag, __u32, struct np_conn_tags, NP_MAX_CONN4_TAG, BPF_F_MMAPABLE);
NP_MAP("array", np_conn6_tag, __u32, struct np_conn_tags, NP_MAX_CONN6_TAG, BPF_F_MMAPABLE);

// The numbers of the connections' hash.  Written once, by the loader, when the map is made.  Looked up with np_conn.
// One row.  Lives as long as the connections.
NP_MAP("array", np_secret, __u32, struct np_secret, NP_MAX_SECRET, 0);

// Identification of a fragmented packet to its ports.  The program writes (allowed first fragments) and reads.  Looked
// up per later fragment.  When full: the least recently used goes, and its later fragments are dropped.  Key: as on the
// wire. Lives for the time-out of NP_CONN_FRAGMENT.
NP_MAP("lru_hash", np_frag4, struct np_frag4_key, struct np_frag, NP_MAX_FRAG4, 0);
NP_MAP("lru_hash", np_frag6, struct np_frag6_key, struct np_frag, NP_MAX_FRAG6, 0);

// Log list (modulo size) to the time of its last event.  The program writes and reads.  Looked up for a new flow whose
// verdict has a log list.  Fixed size; lists that share a slot share the limit.  Key: host order.  Lives always.
NP_MAP("array", np_log_limit, __u32, struct np_log_limit, NP_MAX_LOG_LIMIT, 0);

// Generation, flags, time-outs.  The agent writes, the program reads.  Looked up per packet.  One row.  Lives always.
NP_MAP("array", np_config, __u32, struct np_config, NP_MAX_CONFIG, 0);

// What the pin directory holds.  The loader writes and reads; never looked up for a packet.  One row.  Lives always.
NP_MAP("array", np_schema, __u32, struct np_schema, NP_MAX_SCHEMA, 0);

// Events for the agent: denies always, the rest as np_config says.  The program writes, one reader consumes.  Written
// for a drop and where asked for.  When full: the event is lost and counted as NP_REASON_EVENT_LOST.  No wake-up per
// event: the reader looks by itself.  Lives across agents.
NP_MAP_RINGBUF(np_event, NP_MAX_EVENT);

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
    return np_endpoint.lookup(&key);
}

// The slot of a hash in this CPU's range, which is a power of two.
NP_INLINE struct np_recent4 *np_recent4_lookup(__u32 hash)
{
    const __u32 slots = 1u << (31 - __builtin_clz(NP_MAX_RECENT4 / NP_CPUS));
    __u32 slot = bpf_get_smp_processor_id() * slots + (hash & (slots - 1));
    return np_recent4.lookup(&slot);
}

NP_INLINE struct np_recent6 *np_recent6_lookup(__u32 hash)
{
    const __u32 slots = 1u << (31 - __builtin_clz(NP_MAX_RECENT6 / NP_CPUS));
    __u32 slot = bpf_get_smp_processor_id() * slots + (hash & (slots - 1));
    return np_recent6.lookup(&slot);
}

NP_INLINE struct np_near *np_near_lookup(__u32 ifindex)
{
    __u32 slot = ifindex & (NP_MAX_NEAR - 1);
    return np_near.lookup(&slot);
}

NP_INLINE struct np_special *np_special_lookup(__u32 hash)
{
    __u32 row = hash / 64 & (NP_MAX_SPECIAL - 1);
    return np_special.lookup(&row);
}

NP_INLINE const struct np_addr4_bucket *np_addr4_bucket_lookup(__u32 hash)
{
    __u32 bucket = hash & (NP_MAX_ADDR4 - 1);
    return np_addr4.lookup(&bucket);
}

NP_INLINE const struct np_addr6_bucket *np_addr6_bucket_lookup(__u32 hash)
{
    __u32 bucket = hash & (NP_MAX_ADDR6 - 1);
    return np_addr6.lookup(&bucket);
}

NP_INLINE const struct np_addr *np_addr_more_lookup(union np_addr_key *key, const int version)
{
    if (version == 4)
        return np_addr4_more.lookup(&key->v4);
    return np_addr6_more.lookup(&key->v6);
}

NP_INLINE struct np_host *np_host_lookup(__u32 number)
{
    struct np_number_key key = {.number = number};
    return np_host.lookup(&key);
}

NP_INLINE struct np_place *np_place_lookup(__u32 number)
{
    struct np_number_key key = {.number = number};
    return np_place.lookup(&key);
}

NP_INLINE struct np_local *np_local_lookup(union np_addr_key *key, const int version)
{
    if (version == 4)
        return np_local4.lookup(&key->v4);
    return np_local6.lookup(&key->v6);
}

NP_INLINE struct np_vip *np_vip_lookup(union np_vip_key *key, const int version)
{
    if (version == 4)
        return np_vip4.lookup(&key->v4);
    return np_vip6.lookup(&key->v6);
}

NP_INLINE struct np_scratch *np_scratch_lookup(void)
{
    __u32 only = 0;
    return np_scratch.lookup(&only);
}

NP_INLINE struct np_cidr *np_cidr_lookup(union np_cidr_key *key, const int version)
{
    if (version == 4)
        return np_cidr4.lookup(&key->v4);
    return np_cidr6.lookup(&key->v6);
}

NP_INLINE struct np_source *np_source_lookup(union np_source_key *key, const int version)
{
    if (version == 4)
        return np_source4.lookup(&key->v4);
    return np_source6.lookup(&key->v6);
}

NP_INLINE const struct np_peer_bucket *np_peer_bucket_lookup(__u32 hash)
{
    __u32 bucket = hash & (NP_MAX_PEER_CLASS - 1);
    return np_peer_class.lookup(&bucket);
}

NP_INLINE const struct np_peer_class *np_peer_more_lookup(struct np_peer_class_key *key)
{
    return np_peer_more.lookup(key);
}

NP_INLINE struct np_l4_atom *np_l4_atom_lookup(__u32 block)
{
    return np_l4_atom.lookup(&block);
}

NP_INLINE struct np_l4_col *np_l4_col_lookup(__u32 block)
{
    return np_l4_col.lookup(&block);
}

NP_INLINE struct np_verdict *np_verdict_lookup(__u32 index)
{
    return np_verdict.lookup(&index);
}

NP_INLINE struct np_count *np_rule_count_lookup(__u32 rule)
{
    return np_rule_count.lookup(&rule);
}

NP_INLINE struct np_count *np_staged_count_lookup(__u32 rule)
{
    return np_staged_count.lookup(&rule);
}

NP_INLINE struct np_count *np_reason_count_lookup(__u32 reason)
{
    return np_reason_count.lookup(&reason);
}

NP_INLINE const struct np_secret *np_secret_lookup(void)
{
    __u32 only = 0;
    return np_secret.lookup(&only);
}

NP_INLINE struct np_conn_tags *np_conn_tags_lookup(__u32 hash, const int version)
{
    __u32 bucket = hash & ((version == 4 ? NP_MAX_CONN4_TAG : NP_MAX_CONN6_TAG) - 1);
    if (version == 4)
        return np_conn4_tag.lookup(&bucket);
    return np_conn6_tag.lookup(&bucket);
}

// The connection at a place of the hash's bucket; its key is before it.
NP_INLINE struct np_conn *np_conn_lookup(__u32 hash, __u32 place, const int version)
{
    __u32 bucket = hash & ((version == 4 ? NP_MAX_CONN4_TAG : NP_MAX_CONN6_TAG) - 1);
    __u32 entry = bucket * NP_CONN_WAYS + place;
    if (version == 4) {
        struct np_conn4_entry *found = np_conn4.lookup(&entry);
        return found ? &found->conn : 0;
    }
    struct np_conn6_entry *found = np_conn6.lookup(&entry);
    return found ? &found->conn : 0;
}

NP_INLINE struct np_frag *np_frag_lookup(union np_frag_key *key, const int version)
{
    if (version == 4)
        return np_frag4.lookup(&key->v4);
    return np_frag6.lookup(&key->v6);
}

NP_INLINE long np_frag_update(union np_frag_key *key, struct np_frag *fragment, const int version)
{
    if (version == 4)
        return np_frag4.update(&key->v4, fragment);
    return np_frag6.update(&key->v6, fragment);
}

NP_INLINE struct np_log_limit *np_log_limit_lookup(__u32 log_list)
{
    __u32 slot = log_list % NP_MAX_LOG_LIMIT;
    return np_log_limit.lookup(&slot);
}

NP_INLINE const struct np_config *np_config_lookup(void)
{
    __u32 only = 0;
    return np_config.lookup(&only);
}

NP_INLINE struct np_event *np_event_reserve(void)
{
    return np_event.ringbuf_reserve(sizeof(struct np_event));
}

NP_INLINE void np_event_submit(struct np_event *event)
{
    np_event.ringbuf_submit(event, BPF_RB_NO_WAKEUP);
}
