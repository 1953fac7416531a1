// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Declarations, for plain clang, of the helpers that BCC provides and the
// program calls. Only scripts/check_c.sh uses this file; it is never loaded.
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

long bpf_skb_load_bytes(const void *skb, __u32 offset, void *to, __u32 bytes);
long bpf_skb_pull_data(struct __sk_buff *skb, __u32 bytes);
__u64 bpf_jiffies64(void);
__u32 bpf_get_smp_processor_id(void);

int np_tc_ingress(struct __sk_buff *skb);
int np_tc_egress(struct __sk_buff *skb);
int np_tc_judge(struct __sk_buff *skb);
int np_tc_sender(struct __sk_buff *skb);
int np_tc_names(struct __sk_buff *skb);
int np_tc_question(struct __sk_buff *skb);
int np_tc_answer(struct __sk_buff *skb);
int np_tc_records(struct __sk_buff *skb);
int np_tc_learn(struct __sk_buff *skb);
