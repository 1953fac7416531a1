// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// What BCC gives the program, as declarations that plain clang understands:
// maps with method pointers, and the helpers the program calls.  Only for
// scripts/check_c.sh; never loaded.
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

#define NP_PIN_DIR "/nowhere"

#define BPF_F_TABLE(table_type, key_type, leaf_type, name, size, table_flags)  \
  struct name##_table_t {                                                      \
    key_type key;                                                              \
    leaf_type leaf;                                                            \
    leaf_type *(*lookup)(key_type *);                                          \
    int (*update)(key_type *, leaf_type *);                                    \
    int (*delete)(key_type *);                                                 \
    __u32 max_entries;                                                         \
    int flags;                                                                 \
  };                                                                           \
  __attribute__((                                                              \
      section("maps/" table_type))) extern struct name##_table_t name;         \
  struct name##_table_t name = {.max_entries = (size), .flags = (table_flags)}

long bpf_skb_load_bytes(const void *skb, __u32 offset, void *to, __u32 bytes);
long bpf_skb_pull_data(struct __sk_buff *skb, __u32 bytes);
__u64 bpf_jiffies64(void);
__u32 bpf_get_smp_processor_id(void);

int np_tc_ingress(struct __sk_buff *skb);
int np_tc_egress(struct __sk_buff *skb);
