// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The programs of bench/micro.py. np_vary writes another client and port into
// the frame and tail-calls the program that is measured. So many runs of one
// call have cold data and warm instructions, as on a busy link. Each other
// program makes one access with such a key, to a map of the product or to one
// of the same kind. Its cost is the lower limit of a figure. A program passes
// the packet (-1) only if the access found the expected row, so a measurement
// of misses has a wrong verdict.

#include "np_abi.h"
#include "np_count.h"
#include "np_ctx.h"
#include "np_lang.h"
#include "np_maps.h"
#include "np_table.h"

#define NP_BARE_ROWS 65536
#define NP_BARE_HASH_ROWS 262144
#define NP_BARE_FLOWS 262144
#define NP_BARE_NEW_FLOWS 65536

// The input by which frames vary. The benchmark writes it.
struct np_vary {
  __u32 mask;          // mask of the random number that is the flow
  __u32 clients;       // a hash of the flow, scaled to this, is the client
  __u32 client_base;   // host order; the last word of the client's address
  __u32 client_offset; // offset of that word in the frame
  __u32 port_offset;   // offset of the endpoint's own port in the frame
  __u32 own;           // for keys: the endpoint's address, as it is in memory
  __u32 service;       // for keys: the client's port
  __u32 endpoint;      // for keys: the endpoint's number
};

NP_MAP("prog_array", np_bench_target, int, int, 1, 0);
NP_MAP("array", np_bench_vary, __u32, struct np_vary, 1, 0);
NP_MAP("hash", np_bench_hash, struct np_addr4_key, struct np_addr,
       NP_BARE_HASH_ROWS, BPF_F_NO_PREALLOC);
NP_MAP("lru_hash", np_bench_lru, struct np_conn4_key, struct np_conn,
       NP_BARE_FLOWS, 0);
NP_MAP("lru_hash", np_bench_lru_new, struct np_conn4_key, struct np_conn,
       NP_BARE_NEW_FLOWS, 0);
NP_MAP("array", np_bench_array, __u32, struct np_verdict, NP_BARE_ROWS, 0);
NP_MAP("percpu_array", np_bench_cpu, __u32, struct np_count, NP_BARE_ROWS, 0);
NP_MAP("lpm_trie", np_bench_lpm_10, struct np_cidr4_key, struct np_cidr, 10,
       BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_bench_lpm_1000, struct np_cidr4_key, struct np_cidr, 1000,
       BPF_F_NO_PREALLOC);
NP_MAP("lpm_trie", np_bench_lpm_100000, struct np_cidr4_key, struct np_cidr,
       100000, BPF_F_NO_PREALLOC);

NP_INLINE const struct np_vary *np_vary_row(void) {
  __u32 only = 0;
  return np_lookup(NP_MAP_OF(np_bench_vary), &only);
}

NP_INLINE __u32 np_vary_flow(const struct np_vary *vary) {
  return bpf_get_prandom_u32() & vary->mask;
}

NP_INLINE __u32 np_vary_client(const struct np_vary *vary, __u32 ctx) {
  return __builtin_bswap32(
      vary->client_base +
      (__u32)(((__u64)(ctx * 2654435761u) * vary->clients) >> 32));
}

int np_vary(struct __sk_buff *skb) {
  const struct np_vary *vary = np_vary_row();
  if (!vary)
    return 2;
  void *start = (void *)(long)skb->data;
  void *end = (void *)(long)skb->data_end;
  __u32 ctx = np_vary_flow(vary);
  __u32 client = np_vary_client(vary, ctx);
  __u16 port = __builtin_bswap16((__u16)ctx);
  __u32 at = vary->client_offset & 127;
  __u32 port_at = vary->port_offset & 127;
  if (start + at + 4 > end || start + port_at + 2 > end)
    return 2;
  __builtin_memcpy(start + at, &client, 4);
  __builtin_memcpy(start + port_at, &port, 2);
  np_tail_call(skb, NP_MAP_OF(np_bench_target), 0);
  return 2;
}

NP_INLINE int np_bare_key(struct np_conn4_key *key) {
  const struct np_vary *vary = np_vary_row();
  if (!vary)
    return 0;
  __u32 ctx = np_vary_flow(vary);
  __u32 client = np_vary_client(vary, ctx);
  __builtin_memset(key, 0, sizeof(*key));
  key->endpoint = vary->endpoint;
  __builtin_memcpy(key->local, &vary->own, 4);
  __builtin_memcpy(key->remote, &client, 4);
  key->local_port = (__u16)ctx;
  key->remote_port = vary->service;
  key->protocol = 6;
  return 1;
}

#define NP_BARE_BEGIN                                                          \
  struct np_conn4_key key;                                                     \
  if (!np_bare_key(&key))                                                      \
    return 2;                                                                  \
  np_keep_in_memory(&key)

// Does nothing. It is the target of np_vary in the runs whose cost is subtracted.
int np_bare_empty(struct __sk_buff *skb) { return -1; }

// Only makes the key. Its cost is subtracted from the other bare cases.
int np_bare_nothing(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  return -1;
}

int np_bare_lru(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  return np_lookup(NP_MAP_OF(np_bench_lru), &key) ? -1 : 2;
}

int np_bare_lru_insert(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  struct np_conn conn = {
      .seen_jiffies = bpf_jiffies64(), .generation = 1, .rule = 1};
  return np_update(NP_MAP_OF(np_bench_lru_new), &key, &conn, BPF_ANY) ? 2 : -1;
}

// The product's own table, without the rest of the program.
int np_bare_table_insert(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  struct np_endpoint_ctx ep = {};
  struct np_arrival arrival = {.now_jiffies = bpf_jiffies64()};
  struct np_ctx ctx = {.ep = &ep,
                         .arrival = &arrival,
                         .config = np_config_lookup()};
  if (!ctx.config)
    return 2;
  np_ct_probe(&ctx, (union np_conn_key *)&key, 4);
  struct np_ct_slot slot = np_ct_reserve(&ctx, 4);
  if (!slot.conn)
    return 2;
  __builtin_memcpy(np_ct_slot_key(&slot, 4), &key, sizeof(key));
  *slot.conn = (struct np_conn){
      .seen_jiffies = arrival.now_jiffies, .generation = 1, .rule = 1};
  np_ct_commit(&slot, &ctx);
  return -1;
}

int np_bare_hash(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  return np_lookup(NP_MAP_OF(np_bench_hash), (struct np_addr4_key *)&key.remote) ? -1 : 2;
}

int np_bare_lpm_10(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  struct np_cidr4_key cidr = {.prefix_bits = 32};
  __builtin_memcpy(cidr.address, key.remote, 4);
  return np_lookup(NP_MAP_OF(np_bench_lpm_10), &cidr) ? -1 : 2;
}

int np_bare_lpm_1000(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  struct np_cidr4_key cidr = {.prefix_bits = 32};
  __builtin_memcpy(cidr.address, key.remote, 4);
  return np_lookup(NP_MAP_OF(np_bench_lpm_1000), &cidr) ? -1 : 2;
}

int np_bare_lpm_100000(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  struct np_cidr4_key cidr = {.prefix_bits = 32};
  __builtin_memcpy(cidr.address, key.remote, 4);
  return np_lookup(NP_MAP_OF(np_bench_lpm_100000), &cidr) ? -1 : 2;
}

int np_bare_array(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  __u32 index = (key.local_port ^ key.remote[3]) & (NP_BARE_ROWS - 1);
  struct np_verdict *row = np_lookup(NP_MAP_OF(np_bench_array), &index);
  return row && row->rule == 0 ? -1 : 2;
}

int np_bare_percpu(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  __u32 index = (key.local_port ^ key.remote[3]) & (NP_BARE_ROWS - 1);
  struct np_count *row = np_lookup(NP_MAP_OF(np_bench_cpu), &index);
  return row && row->packets == 0 ? -1 : 2;
}

int np_bare_event(struct __sk_buff *skb) {
  NP_BARE_BEGIN;
  struct np_event *event = np_event_reserve();
  if (!event)
    return 2;
  __builtin_memset(event, 0, sizeof(*event));
  event->kind = NP_EVENT_DENY;
  np_event_submit(event);
  return -1;
}
