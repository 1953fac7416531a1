// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The program np_tc_records: reads the name of the question and the answer section, in steps. A step reads one label,
// one pointer, or the end of a name. After the end of a record's owner, the same step reads the fixed part of the
// record. The program calls itself for further steps.
//
// A record counts if its owner is the last name of the chain. The chain begins with the name of the question; a CNAME
// record adds its target. So the records must be in order, as resolvers send them. All names of the chain have the
// addresses at its end, each name with the least time to live of the records from that name on.
//
// A name is copied label by label into a buffer, from the end of the buffer towards its beginning. So the buffer has
// the labels in reverse order, as struct np_name_key needs them.
#pragma once

#include "np_dns.h"
#include "np_dns_answer.h"
#include "np_table.h"

#define NP_DNS_STEPS 48 // steps of one call
#define NP_DNS_LEARN_CALLS 2 // calls that np_tc_learn needs for NP_DNS_ADDRESSES of one class
#define NP_DNS_POINTERS 16 // pointers in one name
#define NP_DNS_TARGETS 16 // CNAME records in the chain
#define NP_DNS_SHORT_LABEL 16 // a label up to this length, with its length byte, is copied as two words

#define NP_DNS_TTL_UNLIMITED (~0u)

// Turn upper case into lower case in each of eight bytes. A length byte of a label is below 'A', so it stays.
NP_INLINE __u64 np_dns_lower(__u64 word)
{
    const __u64 ones = 0x0101010101010101ull;
    __u64 low = word & 0x7f * ones;
    __u64 from_a = low + (0x80 - 'A') * ones; // bit 7 of a byte: 'A' or beyond
    __u64 beyond_z = low + (0x7f - 'Z') * ones; // bit 7 of a byte: beyond 'Z'
    return word | (from_a & ~beyond_z & ~word & 0x80 * ones) >> 2;
}

// Copy the words that end at `from` to where `to` is the end, in lower case. What is too much is in front of the label,
// where the next label overwrites it.
NP_INLINE void np_dns_copy(__u8 *to, const __u8 *from, const int bytes)
{
#pragma unroll
    for (int at = 8; at <= bytes; at += 8)
        *(np_word *)(to - at) = np_dns_lower(*(const np_word *)(from - at));
}

NP_INLINE void np_dns_label(struct np_dns *dns, __u32 at, __u32 bytes)
{
    __u32 end = at + 1 + bytes;
    __u32 name_at = dns->name_at;
    if (end > dns->limit || name_at < bytes + 2) { // too long: at most 255 bytes, and the first byte stays free
        dns->result = NP_REASON_DNS_MALFORMED;
        return;
    }
    dns->at = end;
    dns->name_at = name_at - 1 - bytes;
    __u8 *to = dns->name + (name_at & (NP_NAME_BYTES - 1));
    const __u8 *from = dns->message + (end & (NP_DNS_MESSAGE_BYTES - 1));
    if (bytes < NP_DNS_SHORT_LABEL)
        np_dns_copy(to, from, NP_DNS_SHORT_LABEL);
    else
        np_dns_copy(to, from, NP_DNS_LABEL_BYTES);
}

// Follow a pointer. It must lead strictly backwards, before everything that was read of the name, and what it leads to
// must end before that too.
NP_INLINE void np_dns_pointer(struct np_dns *dns, __u32 at, __u32 high, __u32 low)
{
    __u32 target = (high & 63) << 8 | low;
    if (!dns->pointers)
        dns->after = at + 2;
    if (dns->kind == NP_DNS_NAME_OWNER && at == dns->start && target == dns->current_at) {
        dns->is_match = dns->is_over = 1; // the owner is where the last name of the chain is
        return;
    }
    if (at + 2 > dns->limit || target >= dns->lowest || target < NP_DNS_HEADER_BYTES ||
        dns->pointers >= NP_DNS_POINTERS) {
        dns->result = NP_REASON_DNS_MALFORMED;
        return;
    }
    dns->pointers++;
    dns->limit = dns->lowest;
    dns->lowest = dns->at = target;
}

NP_INLINE void np_dns_piece(struct np_dns *dns)
{
    __u32 at = dns->at;
    const __u8 *here = dns->message + (at & (NP_DNS_MESSAGE_BYTES - 1));
    __u32 first = here[0];
    if (at >= dns->limit || (first >= NP_DNS_LABEL_BYTES && first < 0xc0)) {
        dns->result = NP_REASON_DNS_MALFORMED;
    } else if (first >= 0xc0) {
        np_dns_pointer(dns, at, first, here[1]);
    } else if (first) {
        np_dns_label(dns, at, first);
    } else {
        if (!dns->pointers)
            dns->after = at + 1;
        dns->is_over = 1;
    }
}

// Whether the name is the last one of the chain. A name has a zero byte only at its end, so names of different lengths
// differ.
NP_INLINE int np_dns_is_current(const struct np_dns *dns)
{
    const __u8 *name = dns->name + (dns->name_at & (NP_NAME_BYTES - 1));
    __u64 differs = 0;
#pragma unroll
    for (int at = 0; at < NP_NAME_BYTES; at += 8)
        differs |= *(const np_word *)(name + at) ^ *(const np_word *)(dns->current.labels + at);
    return !differs;
}

// Add a class to those of the chain. Each class has the time to live of its name that lives longest. The classes fill
// the array from its beginning.
NP_INLINE void np_dns_class_add(struct np_dns *dns, __u32 name_class)
{
    __u64 least = ~0ull >> 1;
#pragma unroll
    for (__u32 way = 0; way < NP_LEARNED_CLASSES; way++) {
        __u64 is_other = np_is_nonzero(dns->name_class[way] ^ name_class);
        __u64 worth = 1 + (-np_is_nonzero(dns->name_class[way]) & (1ull + dns->class_ttl_s[way]));
        least = np_lesser(least, (-is_other & worth) << 2 | way);
        np_barrier();
    }
    dns->is_full |= np_is_nonzero(least >> 3); // the worth is above 1: another class is replaced
    dns->way = (__u32)least;
    np_barrier();
    __u32 way = dns->way & (NP_LEARNED_CLASSES - 1);
    dns->name_class[way] = name_class;
    dns->class_ttl_s[way] = NP_DNS_TTL_UNLIMITED;
}

// Make the name the last one of the chain, and look up its class.
NP_INLINE void np_dns_current_set(struct np_dns *dns)
{
    const __u8 *name = dns->name + (dns->name_at & (NP_NAME_BYTES - 1));
#pragma unroll
    for (int at = 0; at < NP_NAME_BYTES; at += 8)
        *(np_word *)(dns->current.labels + at) = *(const np_word *)(name + at);
    dns->current.prefix_bits = (NP_NAME_BYTES - dns->name_at) * 8;
    dns->current_at = dns->start;
    np_barrier();
    const struct np_name *found = np_name_lookup(&dns->current);
    __u32 name_class = found ? found->name_class : 0;
    if (dns->kind == NP_DNS_NAME_QUESTION) {
        np_copy_words(dns->asked.labels, dns->current.labels, NP_NAME_BYTES);
        dns->asked_class = name_class;
    }
    np_barrier();
    if (name_class)
        np_dns_class_add(dns, name_class);
}

// Begin to read a name at `at`.
NP_INLINE void np_dns_name_begin(struct np_dns *dns, __u32 kind, __u32 at, __u32 limit)
{
    dns->kind = kind;
    dns->at = dns->start = dns->lowest = at;
    dns->limit = limit;
    dns->name_at = NP_NAME_BYTES - 1;
    dns->pointers = dns->is_match = 0;
}

// Go on behind a record, or behind the question.
NP_INLINE void np_dns_record_next(struct np_dns *dns, __u32 at)
{
    if (!dns->records_left) {
        dns->result = NP_DNS_COMPLETE;
        return;
    }
    dns->records_left--;
    np_dns_name_begin(dns, NP_DNS_NAME_OWNER, at, dns->message_bytes);
}

NP_INLINE void np_dns_address_add(struct np_dns *dns, __u32 at, __u32 ttl_s, __u32 version)
{
    const __u8 *data = dns->message + (at & (NP_DNS_MESSAGE_BYTES - 1));
    struct np_dns_address *one = &dns->address[dns->addresses & (NP_DNS_ADDRESSES - 1)];
    if (dns->addresses >= NP_DNS_ADDRESSES) {
        dns->is_full |= 2;
        return;
    }
    dns->addresses++;
    one->address[0] = version == 4 ? *(const np_half *)data : *(const np_word *)data;
    one->address[1] = version == 4 ? 0 : *(const np_word *)(data + 8);
    one->ttl_s = ttl_s;
    one->version = version;
}

// Read the fixed part of a record, behind its owner. A CNAME record of the last name of the chain has a further name.
NP_INLINE void np_dns_record(struct np_dns *dns)
{
    __u32 at = dns->after;
    const __u8 *fixed = dns->message + (at & (NP_DNS_MESSAGE_BYTES - 1));
    __u64 head = np_host64(*(const np_word *)fixed);
    __u32 data_at = at + 10;
    __u32 bytes = fixed[8] << 8 | fixed[9];
    __u32 end = data_at + bytes;
    __u32 type = dns->is_match && (head >> 32 & 0xffff) == NP_DNS_CLASS_IN ? head >> 48 : 0;
    __u32 ttl_s = (__u32)head;
    if (ttl_s >> 31) // negative: counts as 0 (RFC 2181)
        ttl_s = 0;
    np_barrier();
    if (end > dns->message_bytes || (type == NP_DNS_TYPE_IP4 && bytes != 4) ||
        (type == NP_DNS_TYPE_IP6 && bytes != 16) ||
        (type == NP_DNS_TYPE_CNAME && dns->addresses)) { // a name with a CNAME record has no other records
        dns->result = NP_REASON_DNS_MALFORMED;
        return;
    }
    if (type == NP_DNS_TYPE_CNAME) {
        dns->target_end = end;
        dns->target_ttl_s = ttl_s;
        np_dns_name_begin(dns, NP_DNS_NAME_TARGET, data_at, end);
        return;
    }
    if (type == NP_DNS_TYPE_IP4)
        np_dns_address_add(dns, data_at, ttl_s, 4);
    else if (type == NP_DNS_TYPE_IP6)
        np_dns_address_add(dns, data_at, ttl_s, 6);
    np_barrier();
    np_dns_record_next(dns, end);
}

// The target of a CNAME record becomes the last name of the chain. Its time to live limits those of all names before.
NP_INLINE void np_dns_target(struct np_dns *dns)
{
    if (dns->after != dns->target_end) {
        dns->result = NP_REASON_DNS_MALFORMED;
        return;
    }
    if (dns->targets >= NP_DNS_TARGETS) {
        dns->result = NP_REASON_DNS_TOO_LONG;
        return;
    }
    dns->targets++;
#pragma unroll
    for (int way = 0; way < NP_LEARNED_CLASSES; way++)
        dns->class_ttl_s[way] = (__u32)np_lesser(dns->class_ttl_s[way], dns->target_ttl_s);
}

NP_INLINE void np_dns_step(struct np_dns *dns)
{
    dns->is_over = 0;
    np_dns_piece(dns);
    np_barrier();
    if (!dns->is_over)
        return;
    if (dns->kind == NP_DNS_NAME_OWNER) {
        if (!dns->is_match)
            dns->is_match = np_dns_is_current(dns);
        np_barrier();
        np_dns_record(dns);
        return;
    }
    if (dns->kind == NP_DNS_NAME_TARGET)
        np_dns_target(dns);
    np_barrier();
    if (dns->result != NP_DNS_RUNNING)
        return;
    np_dns_current_set(dns);
    np_barrier();
    np_dns_record_next(dns, dns->kind == NP_DNS_NAME_TARGET ? dns->target_end : dns->after + NP_DNS_QUESTION_TAIL);
}

// Returns NP_REASON_NONE, or the reason to drop the packet.
NP_INLINE int np_dns_records(struct __sk_buff *skb, const struct np_ctx *ctx, struct np_dns *dns)
{
#pragma clang loop unroll(disable)
    for (__u32 step = 0; step < NP_DNS_STEPS; step++) {
        np_forget(step); // otherwise the compiler counts by something else, which has no bound
        np_dns_step(dns);
        np_barrier();
        if (dns->result != NP_DNS_RUNNING)
            break;
    }
    np_barrier();
    __u32 result = dns->result;
    if (result == NP_DNS_RUNNING && ctx->arrival->dns_calls < NP_DNS_CALLS - NP_DNS_LEARN_CALLS) {
        np_dns_call(skb, ctx, NP_CALL_RECORDS);
        return NP_REASON_NONE;
    }
    if (result != NP_DNS_COMPLETE)
        return np_dns_unread(ctx, dns, result == NP_DNS_RUNNING ? NP_REASON_DNS_TOO_LONG : result);
    dns->way = 0;
    if (dns->addresses)
        np_dns_call(skb, ctx, NP_CALL_LEARN);
    else
        np_dns_following(skb, ctx, dns, NP_CALL_ANSWER);
    return NP_REASON_NONE;
}
