// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Events for the agent.  Written for drops, and for new flows when asked for; never for packets of established
// connections. A full ring buffer loses the event, which is counted; it never changes a verdict.
#pragma once

#include "np_count.h"
#include "np_ctx.h"

// One event about the packet and the decision in `ctx`.
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
    np_copy_words(&event->rule, &decision->rule, 24); // to peer_class
    event->endpoint = ctx->ep->endpoint;
    event->ifindex = ctx->arrival->ifindex;
    event->own_identity = ctx->ep->own_identity;
    event->frame_bytes = ctx->arrival->frame_bytes;
    if (NP_LIKELY(!ctx->ep->reply)) {
        np_copy_words(event->source, packet->source, 32); // and the destination
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

// The Log rules that matched: one event a second for each list of them.
NP_INLINE void np_event_log(const struct np_ctx *ctx, __u16 reason)
{
    struct np_log_limit *limit = np_log_limit_lookup(ctx->decision->log_list);
    if (limit && ctx->arrival->now_jiffies - limit->last_jiffies < ctx->config->jiffies_per_second) {
        np_count_reason(NP_REASON_LOG_LIMITED, ctx->arrival->frame_bytes);
        return;
    }
    if (limit)
        limit->last_jiffies = ctx->arrival->now_jiffies; // two CPUs may both pass: one event more, no harm
    np_event_write(ctx, NP_EVENT_LOG, reason);
}
