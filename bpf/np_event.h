// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Events for the agent. The program writes an event for each drop, and for a new flow if the configuration asks for
// one. It writes no event for a packet of an established connection. If the ring buffer is full, the event is lost and
// counted; the verdict stays the same.
#pragma once

#include "np_count.h"
#include "np_ctx.h"

// Write one event about the packet and its decision in `ctx`.
NP_INLINE void np_event_write(const struct np_ctx *ctx, __u8 kind, __u16 reason)
{
    const struct np_packet *packet = ctx->packet;
    const struct np_decision *decision = ctx->decision;
    struct np_event *event = np_event_reserve();
    if (!event) {
        np_count_reason(NP_REASON_EVENT_LOST, ctx->arrival->frame_bytes);
        return;
    }
    event->time_jiffies = ctx->arrival->now_jiffies;
    np_copy_words(&event->rule, &decision->rule, 24); // copies the fields from rule to peer_class
    event->endpoint = ctx->ep->endpoint;
    event->ifindex = ctx->arrival->ifindex;
    event->own_identity = ctx->ep->own_identity;
    event->frame_bytes = ctx->arrival->frame_bytes;
    if (NP_LIKELY(!ctx->ep->reply)) {
        np_copy_words(event->source, packet->source, 32); // copies source and destination
        event->source_port = packet->source_port;
        event->destination_port = packet->destination_port;
        event->direction = ctx->ep->direction;
    } else {
        np_copy_words(event->source, packet->destination, 16);
        np_copy_words(event->destination, packet->source, 16);
        event->source_port = packet->destination_port;
        event->destination_port = packet->source_port;
        event->direction = !ctx->ep->direction;
    }
    event->reason = reason;
    event->ethertype = packet->ethertype;
    event->kind = kind;
    event->action = decision->action;
    event->staged_action = decision->staged_action;
    event->ip_version = packet->version;
    event->protocol = packet->protocol;
    event->icmp_type = packet->icmp_type;
    event->icmp_code = packet->icmp_code;
    np_event_submit(event);
}

// Write an event for the Log rules that matched, but at most one event a second for each log list.
NP_INLINE void np_event_log(const struct np_ctx *ctx, __u16 reason)
{
    struct np_log_limit *limit = np_log_limit_lookup(ctx->decision->log_list);
    if (limit && ctx->arrival->now_jiffies - limit->last_jiffies < ctx->config->jiffies_per_second) {
        np_count_reason(NP_REASON_LOG_LIMITED, ctx->arrival->frame_bytes);
        return;
    }
    if (limit)
        limit->last_jiffies = ctx->arrival->now_jiffies; // if two CPUs are here at once, both write an event
    np_event_write(ctx, NP_EVENT_LOG, reason);
}
