// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// DNS messages: which packets the program reads, and what its four DNS programs share. The programs learn which
// addresses a name has, before the workload gets the answer (docs/adr/0024):
//
//     np_tc_question  a question leaves the endpoint: record it as pending           (np_dns_question.h)
//     np_tc_answer    an answer arrives: it must belong to a pending question        (np_dns_answer.h, np_dns_cut.h)
//     np_tc_records   read the answer section: the chain of names, and its addresses (np_dns_records.h)
//     np_tc_learn     write the addresses and report them                            (np_dns_learn.h)
//
// np_conclude calls the first or the second one for a packet that passes. Each program calls the next one, or itself.
// If a call fails, the packet passes and teaches nothing, which is counted.
//
// Invariants.
// 1. Nothing is written before the whole answer section was read: a message that the program does not understand
//    teaches nothing.
// 2. Only a pending question of the same endpoint to a trusted server lets an answer teach.
// 3. A packet uses at most NP_DNS_CALLS calls of DNS programs.
// 4. A DNS program drops only fragments of answers that it has cut, and unread answers if np_config.unread_dns says so.
//
// All state of the parser is in np_dns_scratch. The verifier does not track values in a map, so it checks each step of
// a loop in the same state, whatever the steps before it did.
#pragma once

#include "np_count.h"
#include "np_ctx.h"
#include "np_maps.h"

#define NP_DNS_PORT 53
#define NP_DNS_CALLS 20 // of the 32 tail calls of a packet (docs/adr/0012)
#define NP_DNS_MESSAGE_BYTES 4096 // longest message that the program reads
#define NP_DNS_HEADER_BYTES 12
#define NP_DNS_LABEL_BYTES 64 // longest label, with its length byte
#define NP_DNS_QUESTION_WORDS 40 // 64-bit words of the longest question, rounded up to whole blocks of eight
#define NP_DNS_QUESTION_TAIL 4 // bytes of type and class
#define NP_DNS_ADDRESSES 128 // addresses that one message may teach
#define NP_DNS_LABELS 128 // labels of the longest name, with the root
#define NP_DNS_PENDING_S 15 // how long a question waits for its answer: three times glibc's time-out

#define NP_DNS_FLAG_ANSWER 0x8000
#define NP_DNS_FLAG_TRUNCATED 0x0200
#define NP_DNS_OPCODE 0x7800
#define NP_DNS_RCODE 0x000f
#define NP_DNS_CLASS_IN 1
#define NP_DNS_TYPE_IP4 1 // A
#define NP_DNS_TYPE_CNAME 5
#define NP_DNS_TYPE_IP6 28 // AAAA

// The name that the parser reads.
enum np_dns_name {
    NP_DNS_NAME_QUESTION = 0, // the name of the question
    NP_DNS_NAME_OWNER = 1, // the owner of a record
    NP_DNS_NAME_TARGET = 2, // the name in a CNAME record
};

#define NP_DNS_RUNNING 0 // np_dns.result: the answer section has further records
#define NP_DNS_COMPLETE 1 // np_dns.result: the whole answer section was read; any other value is an enum np_reason

// An address of the answer.
struct np_dns_address {
    __u64 address[2]; // in network order, IPv4 in the first four bytes
    __u32 ttl_s;
    __u32 version; // 4 or 6
};

// Working memory of one DNS message. Offsets count from the beginning of the message, unless the name says otherwise.
struct np_dns {
    __u8 before_name[NP_DNS_LABEL_BYTES]; // np_dns_copy writes up to a label too much in front of a name
    __u8 name[NP_NAME_BYTES]; // the name that the parser reads; ends with the buffer, and grows towards its beginning
    __u8 after_name[NP_NAME_BYTES]; // always zero: a copy of NP_NAME_BYTES from the name's beginning reads into it
    __u32 pad;
    struct np_name_key current; // the last name of the chain: the question's name, then each CNAME's target
    __u32 more_pad;
    struct np_name_key asked; // the question's name
    __u64 question[64]; // the question as in the packet; the verifier assumes a length up to 512
    struct np_learned row; // the row of np_learned that np_tc_learn writes
    union np_learned_key row_key;
    union np_cidr_key range_key;
    __u64 pending; // content of the slot of np_asked in which the question was pending
    __u32 slot; // that slot
    __u32 next_at; // offset in the packet of what follows the message
    __u32 message_at; // offset in the packet of the message
    __u32 stated_bytes; // length of the message as its transport states it
    __u32 message_bytes; // bytes of the message in `message`
    __u32 question_bytes; // bytes of the question: name, type and class
    __u32 id; // header fields of the message, in host order
    __u32 flags;
    __u32 records_left; // records of the answer section that are not read yet
    __u32 result; // NP_DNS_RUNNING, NP_DNS_COMPLETE, or why the message teaches nothing

    __u32 kind; // enum np_dns_name
    __u32 at; // where the parser reads the next label
    __u32 start; // where the name started
    __u32 lowest; // where the labels after the last pointer started; a further pointer must lead before this
    __u32 limit; // labels must end here
    __u32 after; // end of the name in its record, where its first pointer ended
    __u32 name_at; // beginning of the name in `name`
    __u32 pointers; // number of pointers in the name
    __u32 is_over; // 1: the name is complete
    __u32 is_match; // 1: the owner is the last name of the chain
    __u32 current_at; // where the last name of the chain starts in the message
    __u32 target_end; // end of the CNAME record
    __u32 target_ttl_s; // time to live of the CNAME record
    __u32 targets; // number of CNAME records in the chain

    __u32 name_class[NP_LEARNED_CLASSES]; // classes of the names of the chain; 0: unused
    __u32 class_ttl_s[NP_LEARNED_CLASSES]; // least time to live of the CNAME records from a name of the class on
    __u32 asked_class; // class of the question's name
    __u32 is_full; // bit 0: the chain has too many classes; bit 1: the answer has too many addresses
    __u32 addresses; // number of addresses
    __u32 learned; // number of addresses that np_tc_learn is done with
    __u32 is_refused; // 1: the address is in a range whose addresses are never learned
    __u32 is_known; // 1: the address has a row
    __u32 way; // index in name_class of the next class to enter into `row`
    struct np_dns_address address[NP_DNS_ADDRESSES];
    __u8 before_message[NP_DNS_LABEL_BYTES]; // np_dns_copy reads up to a label too much in front of a label
    __u8 message[NP_DNS_MESSAGE_BYTES + 32]; // the last bytes are only read: a load of 16 bytes may begin at any offset
};
_Static_assert(sizeof(struct np_dns) <= sizeof(struct np_dns_words), "np_dns fits");
_Static_assert(__builtin_offsetof(struct np_dns, asked.labels) % 8 == 0, "np_copy_words copies it");

NP_INLINE int np_is_dns_port(const struct np_config *config, __u16 port)
{
    const __u64 ones = 0x0001000100010001ull;
    __u64 differs = config->dns_ports ^ port * ones;
    return port == NP_DNS_PORT || (differs - ones) & ~differs & ones << 15; // whether one of the four is zero
}

// Whether the packet is from or to a port of DNS servers, and the program learns names.
NP_INLINE int np_is_dns(const struct np_ctx *ctx)
{
    const struct np_packet *packet = ctx->packet;
    if (NP_LIKELY(!(ctx->config->flags & NP_CONFIG_NAMES)))
        return 0;
    __u16 port = ctx->ep->direction == NP_DIRECTION_EGRESS ? packet->destination_port : packet->source_port;
    return NP_UNLIKELY(np_is_dns_port(ctx->config, port)) &&
           (packet->protocol == NP_PROTOCOL_UDP || packet->protocol == NP_PROTOCOL_TCP);
}

NP_INLINE void np_dns_count(const struct np_ctx *ctx, __u32 reason)
{
    np_count_reason(reason, ctx->arrival->frame_bytes);
}

// Call a DNS program. Returns only if the call fails: then the packet passes.
NP_INLINE void np_dns_call(struct __sk_buff *skb, const struct np_ctx *ctx, const __u32 slot)
{
    if (ctx->arrival->dns_calls >= NP_DNS_CALLS) {
        np_dns_count(ctx, NP_REASON_DNS_TOO_LONG);
        return;
    }
    ctx->arrival->dns_calls++;
    np_call_program(skb, slot);
    np_dns_count(ctx, NP_REASON_DNS_CALL_MISSING);
}

// Read the next message of the packet, if there is one.
NP_INLINE void np_dns_following(struct __sk_buff *skb, const struct np_ctx *ctx, const struct np_dns *dns,
                                const __u32 slot)
{
    if (dns->next_at + 2 < ctx->packet->end)
        np_dns_call(skb, ctx, slot);
}

// Whether the program believes the DNS server: the packet's source if `is_answer`, otherwise its destination.
NP_INLINE int np_dns_is_trusted(const struct np_ctx *ctx, const int is_answer)
{
    const struct np_packet *packet = ctx->packet;
    const __u32 *server = is_answer ? packet->source : packet->destination;
    __u16 port = is_answer ? packet->source_port : packet->destination_port;
    union np_resolver_key key = {};
    if (packet->version == 4) {
        key.v4.port = port;
        __builtin_memcpy(key.v4.address, server, sizeof(key.v4.address));
        return np_is_resolver(&key, 4);
    }
    key.v6.port = port;
    __builtin_memcpy(key.v6.address, server, sizeof(key.v6.address));
    return np_is_resolver(&key, 6);
}

// Find the bounds of the packet's next message, and copy the message. The first fragment of a message has only its
// beginning. Returns 0 if there is no further message, or if the bytes cannot be one.
NP_INLINE int np_dns_load(struct __sk_buff *skb, const struct np_ctx *ctx, struct np_dns *dns)
{
    const struct np_packet *packet = ctx->packet;
    __be16 stated_be = 0;
    if (ctx->arrival->dns_calls == 1)
        dns->next_at = packet->l4_offset + packet->l4_bytes;
    np_barrier();
    if (packet->protocol == NP_PROTOCOL_UDP) {
        if (bpf_skb_load_bytes(skb, packet->l4_offset + __builtin_offsetof(struct np_udp_header, bytes_be), &stated_be,
                               sizeof(stated_be)))
            return 0;
        dns->message_at = dns->next_at;
        dns->stated_bytes = np_host16(stated_be) - (__u32)sizeof(struct np_udp_header); // below 8: a huge number
        dns->next_at = packet->end;
    } else {
        if (dns->next_at + sizeof(stated_be) >= packet->end ||
            bpf_skb_load_bytes(skb, dns->next_at, &stated_be, sizeof(stated_be)))
            return 0;
        dns->message_at = dns->next_at + sizeof(stated_be);
        dns->stated_bytes = np_host16(stated_be);
        dns->next_at = dns->message_at + dns->stated_bytes;
    }
    np_barrier();
    __u32 bytes = packet->end - dns->message_at;
    if (bytes > dns->stated_bytes)
        bytes = dns->stated_bytes;
    if (bytes > NP_DNS_MESSAGE_BYTES)
        bytes = NP_DNS_MESSAGE_BYTES;
    dns->message_bytes = bytes;
    np_barrier();
    bytes = ((dns->message_bytes - 1) & (NP_DNS_MESSAGE_BYTES - 1)) + 1; // a bound that verifiers before 6.2 follow
    return dns->message_bytes > NP_DNS_HEADER_BYTES && dns->stated_bytes <= 65535 &&
           !bpf_skb_load_bytes(skb, dns->message_at, dns->message, bytes);
}

// Read header and question of the message. Returns 0 unless the message has one question, without pointers.
// `is_answer`: whether the message must be an answer, otherwise it must be a question.
NP_INLINE int np_dns_question_find(struct np_dns *dns, const int is_answer)
{
    __u64 header = np_host64(*(const np_word *)dns->message);
    dns->id = header >> 48;
    dns->flags = header >> 32 & 0xffff;
    dns->records_left = header & 0xffff;
    if ((dns->flags & (NP_DNS_FLAG_ANSWER | NP_DNS_OPCODE)) != (is_answer ? NP_DNS_FLAG_ANSWER : 0) ||
        (header >> 16 & 0xffff) != 1)
        return 0;
    dns->at = NP_DNS_HEADER_BYTES;
    dns->is_over = 0;
    np_barrier();
#pragma clang loop unroll(disable)
    for (__u32 label = 0; label < NP_DNS_LABELS; label++) {
        np_forget(label); // otherwise the compiler counts by the offset, which has no bound
        __u32 at = dns->at;
        __u32 bytes = dns->message[at & (NP_DNS_MESSAGE_BYTES - 1)];
        if (at >= dns->message_bytes || bytes >= NP_DNS_LABEL_BYTES)
            break;
        dns->at = at + 1 + bytes;
        dns->is_over = !bytes;
        np_barrier();
        if (!bytes)
            break;
    }
    np_barrier();
    dns->question_bytes = dns->at + NP_DNS_QUESTION_TAIL - NP_DNS_HEADER_BYTES;
    return dns->is_over && dns->at <= NP_DNS_HEADER_BYTES + NP_NAME_BYTES - 1 &&
           dns->at + NP_DNS_QUESTION_TAIL <= dns->message_bytes;
}

NP_INLINE __u64 np_dns_mix(__u64 hash, __u64 word, __u64 factor)
{
    hash = (hash ^ word) * factor;
    return hash ^ hash >> 32;
}

// The content of a slot of np_asked for the message's question at this moment: a keyed hash, and the time. Without the
// numbers of np_secret, nobody can choose questions that collide. Precondition: np_dns_question_find succeeded.
NP_INLINE __u64 np_dns_pending(struct __sk_buff *skb, const struct np_ctx *ctx, struct np_dns *dns, const int is_answer)
{
    const struct np_packet *packet = ctx->packet;
    const __u32 *server = is_answer ? packet->source : packet->destination;
    __u64 server_port = is_answer ? packet->source_port : packet->destination_port;
    __u64 client_port = is_answer ? packet->destination_port : packet->source_port;
    const struct np_secret *secret = np_secret_lookup();
    __u32 bytes = dns->question_bytes;
#pragma unroll
    for (__u32 block = 0; block < NP_DNS_QUESTION_WORDS; block += 8) {
        if (block * 8 < bytes)
            np_zero_words(dns->question + block, 64);
    }
    if (!secret || // cannot happen: an array always has its row
        bpf_skb_load_bytes(skb, dns->message_at + NP_DNS_HEADER_BYTES, dns->question, ((bytes - 1) & 511) + 1))
        return 0;
    __u64 factor = secret->number[0] | 1;
    __u64 hash = secret->number[NP_HASH_WORDS - 1];
    hash = np_dns_mix(hash, (__u64)server[1] << 32 | server[0], factor);
    hash = np_dns_mix(hash, (__u64)server[3] << 32 | server[2], factor);
    hash = np_dns_mix(hash, server_port << 48 | client_port << 32 | dns->id << 16 | packet->protocol, factor);
#pragma unroll
    for (__u32 block = 0; block < NP_DNS_QUESTION_WORDS; block += 8) {
        if (block * 8 < bytes) {
#pragma unroll
            for (__u32 word = block; word < block + 8; word++)
                hash = np_dns_mix(hash, dns->question[word], factor);
        }
    }
    __u64 now = ctx->arrival->now_jiffies / NP_LEARNED_JIFFIES;
    return ((hash | 1ull << 63) & ~0xffffull) | (now & 0xffff); // bit 63: never 0, which means a free slot
}

// The first of the slots of np_asked in which a question may be pending.
NP_INLINE __u32 np_dns_slots_of(__u64 pending)
{
    return (pending >> 16 & (NP_ASKED_SLOTS / NP_ASKED_WAYS - 1)) * NP_ASKED_WAYS;
}

// The age of a pending question in units of NP_LEARNED_JIFFIES, from the times in two contents of slots.
NP_INLINE __u64 np_dns_age(__u64 now, __u64 pending)
{
    return (now - pending) & 0xffff;
}
