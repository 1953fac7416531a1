// SPDX-License-Identifier: Apache-2.0
//
// The agent on this node, asked through its control socket: one line of JSON each way.
#pragma once

#include "json.h"

#include <stdint.h>

enum { AGENT_LINE = 4096 }; // the agent takes no longer request; its answers to this plugin are shorter

// What came of a question.
enum agent_outcome {
    AGENT_YES, // {"in_force": true}
    AGENT_NO, // the agent says why not
    AGENT_ABSENT, // no agent answered in time
    AGENT_GARBLED, // the answer is none of an agent's
};

// Milliseconds of a clock that nobody sets.
int64_t now_ms(void);

// Ask until the deadline, again and again while there is no agent or it has no room.  request: with its end of line.
// why: what the agent or the system said, for people, in at most AGENT_LINE bytes with a NUL behind.
enum agent_outcome agent_ask(const char *path, const char *request, int64_t deadline_ms, char *why);
