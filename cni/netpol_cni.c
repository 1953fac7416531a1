// SPDX-License-Identifier: Apache-2.0
//
// The chained CNI plugin: no pod starts before its policy is in force on its node.
//
// It runs behind the plugins that made the pod's interface, hands that interface to the agent, and returns when the
// agent says that policy for it is in force.  It makes nothing and keeps nothing, so DEL and GC have nothing to undo:
// what the agent knows of an interface ends with the interface.
//
// Invariants: ADD and CHECK succeed only when the agent has said yes, or where the configuration says
// `"posture": "open"`, which is said on standard error.  What ADD prints is the result of the plugin before, byte for
// byte.  Every failure is a CNI error object and exit code 1, whatever the input is.
#include "agent.h"
#include "json.h"
#include "link.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    INPUT_BYTES = 1 << 20, // arbitrary: real configurations have some kilobytes
    DETAIL_BYTES = 1024, // of text from outside in an error; arbitrary
    TIMEOUT_S = 30, // when the configuration has none; arbitrary
    LONGEST_S = 600, // longer than any runtime waits
    STATUS_MS = 1000, // how long STATUS waits for a word of the agent; arbitrary
};
#define SOCKET_PATH "/run/netpol-ebpf/agent.sock"
#define NEWEST "1.1.0"

// Of the specification, "Error"; from 100 on a plugin's own.
enum cni_error {
    BAD_VERSION = 1,
    BAD_FIELD = 2,
    NO_CONTAINER = 3,
    BAD_ENVIRONMENT = 4,
    IO_FAILED = 5,
    BAD_JSON = 6,
    BAD_CONFIG = 7,
    TRY_AGAIN = 11,
    NOT_AVAILABLE = 50,
    NO_INTERFACE = 100, // no interface of the node is the pod's alone: no program can see its packets
};

// Versions of the specification, oldest first: those that hand a plugin the result of the one before it.
static const char *const VERSIONS[] = {"0.3.0", "0.3.1", "0.4.0", "1.0.0", NEWEST};
enum { V0_3_0, V0_4_0 = 2, V1_1_0 = 4, VERSION_COUNT };

// A command.  since: the CNI version that introduced it.  is_attached: it concerns an interface that exists.
struct command {
    const char *name;
    int since;
    bool is_attached;
    void (*run)(void);
};

// Arguments that every command has, and the configuration of those that use it.
static struct {
    const struct command *command;
    const char *container, *netns, *inside, *arguments;
} call;

static struct {
    const char *version;
    bool is_open;
    uint32_t timeout_s;
    char socket[sizeof(((struct sockaddr_un *)0)->sun_path)];
    json_ref previous;
} config = {.version = NEWEST, .timeout_s = TIMEOUT_S, .socket = SOCKET_PATH};

static char input[INPUT_BYTES];
static size_t input_bytes;
static struct json json;

// Text that is being put together; what does not fit is cut, and is_full says so.
struct text {
    char *at;
    size_t size, used;
    bool is_full;
};

static void put_bytes(struct text *text, const char *bytes, size_t count)
{
    if (count > text->size - text->used) {
        text->is_full = true;
        return;
    }
    memcpy(text->at + text->used, bytes, count);
    text->used += count;
}

static void put(struct text *text, const char *more)
{
    put_bytes(text, more, strlen(more));
}

// A string of JSON, in ASCII.  What is outside comes from outside: its bytes are shown as characters of their number.
static void put_string(struct text *text, const char *value)
{
    put(text, "\"");
    for (; *value; value++) {
        char escape[8];
        const unsigned char c = (unsigned char)*value;
        if (c >= ' ' && c < 0x7F && c != '"' && c != '\\')
            put_bytes(text, value, 1);
        else {
            snprintf(escape, sizeof(escape), "\\u%04x", c);
            put(text, escape);
        }
    }
    put(text, "\"");
}

static bool write_all(const char *bytes, size_t left)
{
    while (left) {
        const ssize_t written = write(STDOUT_FILENO, bytes, left);
        if (written < 0 && errno != EINTR)
            return false;
        if (written > 0) {
            bytes += written;
            left -= (size_t)written;
        }
    }
    return true;
}

// End with an error object.  details: for people, may be NULL.
static _Noreturn void fail(enum cni_error code, const char *message, const char *details)
{
    static char room[8 * DETAIL_BYTES]; // an escape has six bytes, and the rest is short
    char shown[DETAIL_BYTES], number[32];
    struct text out = {.at = room, .size = sizeof(room)};
    put(&out, "{\"cniVersion\":");
    put_string(&out, config.version);
    snprintf(number, sizeof(number), ",\"code\":%d,\"msg\":", code);
    put(&out, number);
    put_string(&out, message);
    if (details) {
        snprintf(shown, sizeof(shown), "%s", details);
        put(&out, ",\"details\":");
        put_string(&out, shown);
    }
    put(&out, "}\n");
    write_all(out.at, out.used);
    exit(EXIT_FAILURE);
}

// Policy is not known to be in force.  Ends with an error, or says so in one line and returns where the configuration
// lets pods start.
static void give_up(enum cni_error code, const char *message, const char *details)
{
    static char room[8 * DETAIL_BYTES];
    char shown[DETAIL_BYTES];
    struct text out = {.at = room, .size = sizeof(room) - 1};
    if (!config.is_open)
        fail(code, message, details);
    snprintf(shown, sizeof(shown), "%s", details);
    put_string(&out, shown);
    fprintf(stderr, "netpol-cni: %s %s: policy is NOT known to be in force, and \"posture\" is open: %s: %s\n",
            call.command->name, call.container, message, room);
}

// --- the environment ------------------------------------------------------------------------------------------------

static const char *variable(const char *name, bool is_needed)
{
    const char *value = getenv(name);
    if (value && *value)
        return value;
    if (is_needed)
        fail(BAD_ENVIRONMENT, "an environment variable is missing", name);
    return "";
}

static bool is_container(const char *name)
{
    if (!isalnum((unsigned char)*name))
        return false;
    for (; *name; name++)
        if (!isalnum((unsigned char)*name) && !strchr("_.-", *name))
            return false;
    return true;
}

// As the kernel's dev_valid_name has it.
static bool is_interface(const char *name)
{
    if (strlen(name) >= IF_NAMESIZE || !strcmp(name, ".") || !strcmp(name, ".."))
        return false;
    for (; *name; name++)
        if (*name == '/' || *name == ':' || isspace((unsigned char)*name))
            return false;
    return true;
}

static void read_environment(void)
{
    const bool is_attached = call.command->is_attached;
    const bool is_named = is_attached || !strcmp(call.command->name, "DEL");
    call.container = variable("CNI_CONTAINERID", is_named);
    call.inside = variable("CNI_IFNAME", is_named);
    call.netns = variable("CNI_NETNS", is_attached);
    call.arguments = variable("CNI_ARGS", false);
    if (is_named && !is_container(call.container))
        fail(BAD_ENVIRONMENT, "CNI_CONTAINERID is none", call.container);
    if (is_named && !is_interface(call.inside))
        fail(BAD_ENVIRONMENT, "CNI_IFNAME is no interface's name", call.inside);
}

// The value of one of CNI_ARGS' pairs, KEY=VALUE;KEY=VALUE, in `out`; empty where there is none.
static void read_argument(const char *key, char *out, size_t size)
{
    const size_t length = strlen(key);
    bool is_found = false;
    out[0] = '\0';
    for (const char *pair = call.arguments; *pair;) {
        const size_t pair_length = strcspn(pair, ";");
        if (pair_length > length && !memcmp(pair, key, length) && pair[length] == '=') {
            const size_t value_length = pair_length - length - 1;
            if (is_found || value_length >= size)
                fail(BAD_ENVIRONMENT, is_found ? "CNI_ARGS has it twice" : "CNI_ARGS has too long a value", key);
            memcpy(out, pair + length + 1, value_length);
            out[value_length] = '\0';
            is_found = true;
        }
        pair += pair_length + (pair[pair_length] == ';');
    }
}

// --- the configuration ----------------------------------------------------------------------------------------------

static void read_input(void)
{
    for (;;) {
        const ssize_t count = read(STDIN_FILENO, input + input_bytes, sizeof(input) - input_bytes);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            fail(IO_FAILED, "standard input cannot be read", strerror(errno));
        input_bytes += (size_t)count;
        if (count == 0)
            return;
        if (input_bytes == sizeof(input))
            fail(BAD_JSON, "the network configuration is too long", "longer than 1048575 bytes");
    }
}

static void parse_input(void)
{
    char details[128];
    if (json_parse(&json, input, input_bytes) && json.values[0].type == JSON_OBJECT)
        return;
    snprintf(details, sizeof(details), "%s, at byte %u", json.why ? json.why : "not an object", json.wrong);
    fail(BAD_JSON, "the network configuration cannot be read", details);
}

// A member of an object of the configuration; NULL where there is none, or null.
static json_ref member(json_ref object, const char *name)
{
    bool is_twice = false;
    const json_ref found = json_member(&json, object, name, &is_twice);
    if (is_twice)
        fail(BAD_CONFIG, "the network configuration has a field twice", name);
    return found && found->type != JSON_NULL ? found : NULL;
}

// Find the version among those that are known, or end; returns its place.
static int read_version(void)
{
    char version[32] = "(none)";
    const json_ref given = member(&json.values[0], "cniVersion");
    for (int i = 0; given && i < VERSION_COUNT; i++)
        if (json_is(&json, given, VERSIONS[i])) {
            config.version = VERSIONS[i];
            return i;
        }
    if (given && !json_copy(&json, given, version, sizeof(version)))
        snprintf(version, sizeof(version), "(not a version)");
    fail(BAD_VERSION, "this version of the CNI specification is not supported; 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0 are",
         version);
}

// A misspelt field would be one that is not obeyed.
static void reject_unknown_fields(void)
{
    static const char *const fields[] = {
        "cniVersion", "cniVersions",  "name",    "type",    "disableCheck",           "disableGC",
        "prevResult", "capabilities", "args",    "ipMasq",  "loadOnlyInlinedPlugins", "ipam",
        "dns",        "socket",       "timeout", "posture", "runtimeConfig",
    };
    const json_ref object = &json.values[0];
    for (json_ref key = json_first(&json, object); key; key = json_next(&json, json_next(&json, key))) {
        bool is_known = json_begins(&json, key, "cni.dev/");
        for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++)
            is_known = is_known || json_is(&json, key, fields[i]);
        char name[128] = "(long)";
        if (!is_known) {
            json_copy(&json, key, name, sizeof(name));
            fail(BAD_FIELD, "the network configuration has a field that this plugin does not know", name);
        }
    }
}

static void read_config(void)
{
    const json_ref object = &json.values[0];
    const json_ref path = member(object, "socket"), timeout = member(object, "timeout");
    const json_ref posture = member(object, "posture");
    reject_unknown_fields();
    if (path && (!json_copy(&json, path, config.socket, sizeof(config.socket)) || config.socket[0] != '/'))
        fail(BAD_CONFIG, "\"socket\" is no absolute path that a socket can have", NULL);
    if (timeout && (!json_count(&json, timeout, &config.timeout_s) || config.timeout_s - 1 >= LONGEST_S))
        fail(BAD_CONFIG, "\"timeout\" is no number of seconds from 1 to 600", NULL);
    if (posture && !json_is(&json, posture, "closed") && !json_is(&json, posture, "open"))
        fail(BAD_CONFIG, "\"posture\" is neither \"closed\" nor \"open\"", NULL);
    config.is_open = posture && json_is(&json, posture, "open");
}

static void read_previous(void)
{
    config.previous = member(&json.values[0], "prevResult");
    if (!config.previous || config.previous->type != JSON_OBJECT)
        fail(BAD_CONFIG, "there is no prevResult: this plugin stands behind another one in a list of plugins", NULL);
}

// --- commands -------------------------------------------------------------------------------------------------------

// Whether an address of the previous result is one of the interface that this is about.
static bool is_ours(json_ref address)
{
    const json_ref place = member(address, "interface"), interfaces = member(config.previous, "interfaces");
    uint32_t number;
    if (!place)
        return true;
    if (!json_count(&json, place, &number) || !interfaces)
        fail(BAD_CONFIG, "prevResult has an address of no interface", NULL);
    json_ref one = json_first(&json, interfaces);
    while (one && number--)
        one = json_next(&json, one);
    if (!one)
        fail(BAD_CONFIG, "prevResult has an address of no interface", NULL);
    const json_ref name = member(one, "name"), sandbox = member(one, "sandbox");
    return name && json_is(&json, name, call.inside) && sandbox && !json_is(&json, sandbox, "");
}

// The pod's addresses as the previous result has them: prefixes, as strings of JSON.
static void put_addresses(struct text *out)
{
    const json_ref addresses = member(config.previous, "ips");
    const char *between = "";
    for (json_ref one = addresses ? json_first(&json, addresses) : NULL; one; one = json_next(&json, one)) {
        const json_ref address = member(one, "address");
        if (!address || address->type != JSON_STRING)
            fail(BAD_CONFIG, "prevResult has an address that is none", NULL);
        if (!is_ours(one))
            continue;
        put(out, between);
        put_bytes(out, json.text + address->begin, address->end - address->begin);
        between = ",";
    }
    if (!*between)
        fail(BAD_CONFIG, "prevResult has no address of the interface: policy knows a pod by its addresses",
             call.inside);
}

static void put_member(struct text *out, const char *name, const char *value)
{
    put(out, ",\"");
    put(out, name);
    put(out, "\":");
    put_string(out, value);
}

// The question to the agent; ends when the environment or the configuration has not what it takes.
static void put_question(struct text *out, const struct pod_link *link)
{
    char namespace[256], name[256], uid[256], numbers[160];
    read_argument("K8S_POD_NAMESPACE", namespace, sizeof(namespace));
    read_argument("K8S_POD_NAME", name, sizeof(name));
    read_argument("K8S_POD_UID", uid, sizeof(uid));
    if (!*namespace || !*name)
        fail(BAD_ENVIRONMENT, "CNI_ARGS names no pod: K8S_POD_NAMESPACE and K8S_POD_NAME are needed", call.arguments);
    put(out, "{\"op\":\"attach\"");
    put_member(out, "namespace", namespace);
    put_member(out, "name", name);
    if (*uid)
        put_member(out, "uid", uid);
    put_member(out, "inside", call.inside);
    put_member(out, "interface", link->name);
    snprintf(numbers, sizeof(numbers), ",\"ifindex\":%d,\"peer\":[%d,%d],\"timeout_s\":%u,\"addresses\":[",
             link->ifindex, link->peer_nsid, link->peer_ifindex, config.timeout_s);
    put(out, numbers);
    put_addresses(out);
    put(out, "]}\n");
}

// Hand the interface over and wait until policy for it is in force.
static void attach(void)
{
    static char question[AGENT_LINE], why[AGENT_LINE];
    struct text out = {.at = question, .size = sizeof(question) - 1};
    const int64_t deadline_ms = now_ms() + (int64_t)config.timeout_s * 1000;
    struct pod_link link = {0};
    const enum link_outcome found = link_find(call.netns, call.inside, &link);
    const char *reason = strerror(errno);
    put_question(&out, &link);
    if (out.is_full)
        fail(BAD_CONFIG, "the pod has more addresses than the agent takes", NULL);
    switch (found) {
    case LINK_FOUND:
        break;
    case LINK_NO_NAMESPACE:
        fail(NO_CONTAINER, "CNI_NETNS is no network namespace", call.netns);
    case LINK_NO_INTERFACE:
        fail(NO_CONTAINER, "the pod's network namespace has no such interface", call.inside);
    case LINK_NO_PAIR:
        give_up(NO_INTERFACE, "no interface of the node is the other end of the pod's: no policy reaches it",
                call.inside);
        return;
    case LINK_FAILED:
        fail(IO_FAILED, "the kernel does not say which interface of the node is the pod's", reason);
    }
    if (agent_ask(config.socket, question, deadline_ms, why) != AGENT_YES)
        give_up(TRY_AGAIN, "policy for the pod is not in force on this node", why);
}

static void run_add(void)
{
    read_config();
    read_previous();
    attach();
    const json_ref result = config.previous;
    if (!write_all(json.text + result->begin, result->end - result->begin))
        exit(EXIT_FAILURE);
}

static void run_check(void)
{
    read_config();
    read_previous();
    attach();
}

// Nothing to undo: see above.
static void run_nothing(void)
{
}

static void run_status(void)
{
    static char why[AGENT_LINE];
    read_config();
    if (agent_ask(config.socket, "{\"op\":\"ready\"}\n", now_ms() + STATUS_MS, why) != AGENT_YES)
        give_up(NOT_AVAILABLE, "no policy can be put in force on this node", why);
}

static void run_version(void)
{
    static char room[256];
    struct text out = {.at = room, .size = sizeof(room)};
    put(&out, "{\"cniVersion\":");
    put_string(&out, config.version);
    put(&out, ",\"supportedVersions\":[");
    for (int i = 0; i < VERSION_COUNT; i++) {
        put(&out, i ? "," : "");
        put_string(&out, VERSIONS[i]);
    }
    put(&out, "]}\n");
    if (!write_all(out.at, out.used))
        exit(EXIT_FAILURE);
}

static const struct command COMMANDS[] = {
    {"ADD", V0_3_0, true, run_add},     {"DEL", V0_3_0, false, run_nothing},   {"CHECK", V0_4_0, true, run_check},
    {"GC", V1_1_0, false, run_nothing}, {"STATUS", V1_1_0, false, run_status}, {"VERSION", V0_3_0, false, run_version},
};

int main(void)
{
    const char *name = variable("CNI_COMMAND", true);
    for (size_t i = 0; i < sizeof(COMMANDS) / sizeof(*COMMANDS); i++)
        if (!strcmp(name, COMMANDS[i].name))
            call.command = &COMMANDS[i];
    if (!call.command)
        fail(BAD_ENVIRONMENT, "CNI_COMMAND is none of ADD, CHECK, DEL, GC, STATUS, VERSION", name);
    read_environment();
    read_input();
    // Who asks for the versions need not know one yet.
    if (call.command->run != run_version || input_bytes) {
        parse_input();
        if (read_version() < call.command->since)
            fail(BAD_VERSION, "this version of the CNI specification has no such command", name);
    }
    call.command->run();
    return EXIT_SUCCESS;
}
