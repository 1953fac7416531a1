// SPDX-License-Identifier: Apache-2.0
#include "agent.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    AGAIN_MS = 100, // between two attempts; arbitrary
    GRACE_MS = 1000, // beyond the deadline, for the agent's word on why it could not; arbitrary
};

int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

// Wait until the channel is ready; false at the deadline.
static bool await(int channel, short events, int64_t deadline_ms)
{
    struct pollfd one = {.fd = channel, .events = events};
    for (;;) {
        const int64_t left_ms = deadline_ms - now_ms();
        const int ready = left_ms > 0 ? poll(&one, 1, left_ms > INT32_MAX ? INT32_MAX : (int)left_ms) : 0;
        if (ready > 0)
            return true;
        if (ready == 0) {
            errno = ETIMEDOUT;
            return false;
        }
        if (errno != EINTR)
            return false;
    }
}

static bool send_line(int channel, const char *line, int64_t deadline_ms)
{
    for (size_t left = strlen(line); left;) {
        const ssize_t sent = send(channel, line, left, MSG_NOSIGNAL);
        if (sent >= 0) {
            line += sent;
            left -= (size_t)sent;
        } else if (errno != EAGAIN && errno != EINTR) {
            return false;
        } else if (!await(channel, POLLOUT, deadline_ms)) {
            return false;
        }
    }
    return true;
}

// The bytes of a line without its end, or -1: errno says why.
static ssize_t receive_line(int channel, char *line, int64_t deadline_ms)
{
    size_t used = 0;
    while (await(channel, POLLIN, deadline_ms)) {
        const ssize_t count = recv(channel, line + used, AGENT_LINE - used, 0);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            continue;
        if (count <= 0) {
            errno = count ? errno : ECONNRESET;
            return -1;
        }
        used += (size_t)count;
        const char *end = memchr(line, '\n', used);
        if (end)
            return end - line;
        if (used == AGENT_LINE) {
            errno = EMSGSIZE;
            return -1;
        }
    }
    return -1;
}

// What an answer says.  may_pass: whether the same question may be answered otherwise in a moment.
static enum agent_outcome judge(const char *line, size_t length, char *why, bool *may_pass)
{
    static struct json json;
    char slug[32];
    bool is_twice = false;
    *may_pass = false;
    snprintf(why, AGENT_LINE, "the agent's answer is not one");
    if (!json_parse(&json, line, length))
        return AGENT_GARBLED;
    const json_ref answer = &json.values[0];
    const json_ref in_force = json_member(&json, answer, "in_force", &is_twice);
    const json_ref error = json_member(&json, answer, "error", &is_twice);
    const json_ref kind = json_member(&json, answer, "slug", &is_twice);
    if (is_twice || !in_force == !error)
        return AGENT_GARBLED;
    if (in_force)
        return in_force->type == JSON_TRUE ? AGENT_YES : AGENT_GARBLED;
    if (!json_copy(&json, error, why, AGENT_LINE))
        return AGENT_GARBLED;
    *may_pass = kind && json_copy(&json, kind, slug, sizeof(slug)) && !strcmp(slug, "unreachable");
    return AGENT_NO;
}

static enum agent_outcome ask_once(const char *path, const char *request, int64_t deadline_ms, char *why,
                                   bool *may_pass)
{
    static char line[AGENT_LINE];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    enum agent_outcome outcome = AGENT_ABSENT;
    ssize_t length = -1;
    *may_pass = true;
    memcpy(address.sun_path, path, strlen(path) + 1); // the configuration's reader has seen that it fits
    const int channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    const bool is_there = channel >= 0 && connect(channel, (struct sockaddr *)&address, sizeof(address)) == 0;
    // Who is turned away is told so before the question arrives: the answer counts, whatever became of the question.
    if (is_there && (send_line(channel, request, deadline_ms) || errno == EPIPE))
        length = receive_line(channel, line, deadline_ms + GRACE_MS);
    if (length >= 0) {
        outcome = judge(line, (size_t)length, why, may_pass);
    } else {
        *may_pass = errno != EMSGSIZE; // an answer that is too long is so the next time
        snprintf(why, AGENT_LINE, "no agent answers at %s: %s", path, strerror(errno));
    }
    if (channel >= 0)
        close(channel);
    return outcome;
}

enum agent_outcome agent_ask(const char *path, const char *request, int64_t deadline_ms, char *why)
{
    for (;;) {
        bool may_pass;
        const enum agent_outcome outcome = ask_once(path, request, deadline_ms, why, &may_pass);
        const int64_t left_ms = deadline_ms - now_ms();
        if (outcome == AGENT_YES || !may_pass || left_ms <= 0)
            return outcome;
        poll(NULL, 0, left_ms < AGAIN_MS ? (int)left_ms : AGAIN_MS);
    }
}
