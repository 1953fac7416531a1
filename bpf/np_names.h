// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Domain names in the verdict of a policy list. A verdict may have a domain list: the rules with domain names that
// match instead, if the endpoint learned the peer's address for one of their names (np_learned4, np_learned6). Each
// name has a class, and np_domain has the first rule of a list that matches the names of a class.
//
// The rule of the least rank decides. The enforced and the pending evaluation have ranks of their own. If no class of
// the address has a rule in the list, the verdict stays as it is.
//
// Invariants: the rows of a domain list do not change while a verdict has the list. A class counts only until it
// expires. The class by which policy allowed a connection counts for that connection as long as the connection lives.
// So after a change of policy an open connection stays open although its name has expired, and ends if the rule is
// gone.
#pragma once

#include "np_judge.h"

// All ones if `one` is less than `other`, otherwise 0. The computation has no branch, because the verifier would follow
// both branches for each name class.
NP_INLINE __u32 np_if_less(__u32 one, __u32 other)
{
    long long less = (long long)one - other;
    np_forget(less);
    return less >> 63;
}

// `other` where `mask` has ones, otherwise `one`.
NP_INLINE __u32 np_choose(__u32 one, __u32 other, __u32 mask)
{
    return one ^ ((one ^ other) & mask);
}

// All ones if a class that expires at `until` is valid at `now`, otherwise 0. Both are the low 32 bits of times in
// units of NP_LEARNED_JIFFIES, so only their difference says which one is later.
NP_INLINE __u32 np_if_valid(__u32 until, __u32 now)
{
    __u32 over = now - until; // negative as a signed number: the class has not expired
    np_forget(over);
    return (__s32)over >> 31;
}

// The class by which policy allowed the packet's connection; 0: there is none.
NP_INLINE __u32 np_names_of_conn(const struct np_ctx *ctx, const struct np_scratch *scratch, const int version)
{
    struct np_ct_slot slot = {};
    if (scratch->is_sender) {
        if (scratch->sender_found.is_known)
            slot = np_conn_again(ctx, &scratch->sender_found, &scratch->sender_key, version);
    } else if (scratch->found.is_known) {
        slot = np_conn_again(ctx, &scratch->found, &scratch->key, version);
    }
    return slot.conn ? *np_ct_slot_name_class(&slot, version) : 0;
}

// Copy the valid classes of a row of learned addresses to names->classes. The kernel may give the memory of a row to
// another key at any time, so the copy counts only if the key still has the row after it was made. Returns whether it
// has.
NP_INLINE int np_names_read(struct np_names *names, union np_learned_key *key, __u32 now, const int version)
{
    const struct np_learned *learned = np_learned_lookup(key, version);
#pragma unroll
    for (int slot = 0; slot < NP_LEARNED_CLASSES; slot++)
        names->classes[slot] = learned ? learned->name_class[slot] & np_if_valid(learned->until[slot], now) : 0;
    np_barrier();
    if (!learned || np_learned_lookup(key, version) == learned)
        return 1;
#pragma unroll
    for (int slot = 0; slot < NP_LEARNED_CLASSES; slot++)
        names->classes[slot] = 0;
    return 0;
}

// Find the classes that the endpoint of the step knows for the peer's address.
NP_INLINE void np_names_find(const struct np_ctx *ctx, struct np_scratch *scratch, const int version)
{
    struct np_names *names = &scratch->names;
    __u32 step = names->step;
    const struct np_tuple *tuple = np_step_tuple(scratch, step);
    // the direction is the peer's side, as in np_classify
    const void *peer = (const void *)tuple->source + np_step_direction(scratch, step) * sizeof(tuple->source);
    __u32 endpoint = np_is_workload_step(step) ? scratch->number : scratch->host;
    union np_learned_key key;
    if (version == 4) {
        key.v4.endpoint = endpoint;
        __builtin_memcpy(key.v4.address, peer, sizeof(key.v4.address));
    } else {
        key.v6.endpoint = endpoint;
        __builtin_memcpy(key.v6.address, peer, sizeof(key.v6.address));
    }
    __u32 now = (__u32)(ctx->arrival->now_jiffies / NP_LEARNED_JIFFIES);
    if (NP_UNLIKELY(!np_names_read(names, &key, now, version))) // the row was replaced, most likely by a newer answer
        np_names_read(names, &key, now, version);
    np_barrier();
    names->classes[NP_LEARNED_CLASSES] = np_names_of_conn(ctx, scratch, version);
    np_barrier();
}

// Take the rules of a row of np_domain, if they have a lower rank than those found so far.
NP_INLINE void np_names_take(struct np_names *names, const struct np_domain *row, __u32 name_class)
{
    __u32 is_first = np_if_less(row->rank, names->rank);
    names->rank = np_choose(names->rank, row->rank, is_first);
    names->rule = np_choose(names->rule, row->rule, is_first);
    names->log_list = np_choose(names->log_list, row->log_list, is_first);
    names->name_class = np_choose(names->name_class, name_class, is_first);
    is_first = np_if_less(row->staged_rank, names->staged_rank);
    names->staged_rank = np_choose(names->staged_rank, row->staged_rank, is_first);
    names->staged_rule = np_choose(names->staged_rule, row->staged_rule, is_first);
}

// Complete the decision of a step whose verdict has a domain list.
NP_INLINE void np_names(struct np_ctx *ctx, struct np_scratch *scratch, const int version)
{
    struct np_decision *decision = ctx->decision;
    struct np_names *names = &scratch->names;
    np_names_find(ctx, scratch, version);
    names->rank = names->staged_rank = NP_RANK_LAST;
    names->name_class = 0;
    np_barrier();
#pragma unroll
    for (int slot = 0; slot < NP_LEARNED_CLASSES + 1; slot++) {
        struct np_domain_key key = {.list = decision->flags >> NP_VERDICT_DOMAIN_SHIFT,
                                    .name_class = names->classes[slot]};
        if (key.name_class) {
            const struct np_domain *row = np_domain_lookup(&key);
            if (row)
                np_names_take(names, row, key.name_class);
        }
        np_barrier();
    }
    // A list that judges the packet later may need no name. The class stays all the same, because it stands for the
    // verdict of this list, which the connection keeps.
    if (names->rank < NP_RANK_LAST) {
        decision->action = NP_ACTION_ALLOW;
        decision->rule = names->rule;
        decision->log_list = names->log_list;
        decision->name_class = names->name_class;
    }
    if (names->staged_rank < NP_RANK_LAST) {
        decision->staged_action = NP_ACTION_ALLOW;
        decision->staged_rule = names->staged_rule;
    }
}
