// SPDX-License-Identifier: Apache-2.0
#include "link.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/net_namespace.h>
#include <linux/rtnetlink.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { MESSAGE_BYTES = 32768, NOBODY = -1 }; // the former is what iproute2 takes for one link
_Static_assert(NETNSA_NSID_NOT_ASSIGNED == NOBODY, "a namespace without a number");

// A message with its attributes behind; requests and answers.
struct message {
    struct nlmsghdr header;
    char body[MESSAGE_BYTES - sizeof(struct nlmsghdr)];
};

// What an answer says of an interface.  link, link_nsid: index and namespace of what it is paired with, or stands on.
struct link_facts {
    int ifindex, link, link_nsid;
    char name[IF_NAMESIZE];
};

static void begin(struct message *message, uint16_t type, const void *head, size_t size)
{
    memset(message, 0, NLMSG_SPACE(size));
    message->header.nlmsg_type = type;
    message->header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
    message->header.nlmsg_len = (uint32_t)NLMSG_LENGTH(size);
    memcpy(NLMSG_DATA(&message->header), head, size);
}

// The callers' attributes are a name and two numbers: they fit.
static void add(struct message *message, uint16_t type, const void *value, size_t size)
{
    const uint32_t at = NLMSG_ALIGN(message->header.nlmsg_len);
    struct rtattr *attribute = (struct rtattr *)((char *)message + at);
    memset(attribute, 0, RTA_SPACE(size));
    attribute->rta_type = type;
    attribute->rta_len = (uint16_t)RTA_LENGTH(size);
    memcpy(RTA_DATA(attribute), value, size);
    message->header.nlmsg_len = at + (uint32_t)RTA_LENGTH(size);
}

// Send a request and wait for its acknowledgement; an answer before it is kept in *answer, else *answer stays empty.
// False: errno says what the kernel refused.
static bool ask(int channel, struct message *request, struct message *answer)
{
    static struct message heard;
    answer->header.nlmsg_len = 0;
    if (send(channel, request, request->header.nlmsg_len, 0) < 0)
        return false;
    for (;;) {
        const ssize_t length = recv(channel, &heard, sizeof(heard), 0);
        if (length < 0)
            return false;
        for (size_t at = 0; at < (size_t)length;) {
            const struct nlmsghdr *one = (const struct nlmsghdr *)((const char *)&heard + at);
            const size_t left = (size_t)length - at;
            if (left < sizeof(*one) || one->nlmsg_len < sizeof(*one) || one->nlmsg_len > left) {
                errno = EPROTO;
                return false;
            }
            at += NLMSG_ALIGN(one->nlmsg_len);
            if (one->nlmsg_type != NLMSG_ERROR) {
                memcpy(answer, one, one->nlmsg_len);
                continue;
            }
            const struct nlmsgerr *refused = NLMSG_DATA(one);
            errno = one->nlmsg_len < NLMSG_LENGTH(sizeof(*refused)) ? EPROTO : -refused->error;
            return errno == 0;
        }
    }
}

// An attribute of an answer that has at least `size` bytes, or NULL.
static const struct rtattr *find(struct message *answer, size_t head, uint16_t type, size_t size)
{
    if (answer->header.nlmsg_len < NLMSG_LENGTH(head))
        return NULL;
    int left = (int)(answer->header.nlmsg_len - NLMSG_SPACE(head));
    struct rtattr *one = (struct rtattr *)((char *)&answer->header + NLMSG_SPACE(head));
    for (; RTA_OK(one, left); one = RTA_NEXT(one, left))
        if (one->rta_type == type && RTA_PAYLOAD(one) >= size)
            return one;
    return NULL;
}

static int number_of(struct message *answer, size_t head, uint16_t type)
{
    int number = NOBODY;
    const struct rtattr *attribute = find(answer, head, type, sizeof(number));
    if (attribute)
        memcpy(&number, RTA_DATA(attribute), sizeof(number));
    return number;
}

// The number of a namespace in this one, which it is given when it has none; NOBODY: errno says why.
static int load_nsid(int channel, int netns)
{
    static struct message request, answer;
    const struct rtgenmsg head = {.rtgen_family = AF_UNSPEC};
    const int any = NOBODY;
    begin(&request, RTM_NEWNSID, &head, sizeof(head));
    add(&request, NETNSA_NSID, &any, sizeof(any));
    add(&request, NETNSA_FD, &netns, sizeof(netns));
    if (!ask(channel, &request, &answer) && errno != EEXIST)
        return NOBODY;
    begin(&request, RTM_GETNSID, &head, sizeof(head));
    add(&request, NETNSA_FD, &netns, sizeof(netns));
    return ask(channel, &request, &answer) ? number_of(&answer, sizeof(head), NETNSA_NSID) : NOBODY;
}

static bool load_link(int channel, struct message *request, struct link_facts *found)
{
    static struct message answer;
    struct ifinfomsg head;
    if (!ask(channel, request, &answer))
        return false;
    const struct rtattr *name = find(&answer, sizeof(head), IFLA_IFNAME, 1);
    if (!name || answer.header.nlmsg_type != RTM_NEWLINK || RTA_PAYLOAD(name) > sizeof(found->name)) {
        errno = EPROTO;
        return false;
    }
    memcpy(&head, NLMSG_DATA(&answer.header), sizeof(head));
    *found = (struct link_facts){
        .ifindex = head.ifi_index,
        .link = number_of(&answer, sizeof(head), IFLA_LINK),
        .link_nsid = number_of(&answer, sizeof(head), IFLA_LINK_NETNSID),
    };
    memcpy(found->name, RTA_DATA(name), RTA_PAYLOAD(name));
    found->name[sizeof(found->name) - 1] = '\0';
    return true;
}

// Pairs refer to each other; what stands on an interface of the node does not have it refer back.
static enum link_outcome find_pair(int channel, int nsid, const char *inside, struct pod_link *found)
{
    static struct message request;
    struct ifinfomsg head = {.ifi_family = AF_UNSPEC};
    struct link_facts pod, node;
    begin(&request, RTM_GETLINK, &head, sizeof(head));
    add(&request, IFLA_TARGET_NETNSID, &nsid, sizeof(nsid));
    add(&request, IFLA_IFNAME, inside, strlen(inside) + 1);
    if (!load_link(channel, &request, &pod))
        return errno == ENODEV ? LINK_NO_INTERFACE : LINK_FAILED;
    if (pod.link <= 0 || pod.link_nsid == NOBODY)
        return LINK_NO_PAIR;
    head.ifi_index = pod.link;
    begin(&request, RTM_GETLINK, &head, sizeof(head));
    if (!load_link(channel, &request, &node))
        return errno == ENODEV ? LINK_NO_PAIR : LINK_FAILED;
    if (node.link != pod.ifindex || node.link_nsid != nsid)
        return LINK_NO_PAIR;
    *found = (struct pod_link){.ifindex = node.ifindex, .peer_nsid = nsid, .peer_ifindex = pod.ifindex};
    memcpy(found->name, node.name, sizeof(found->name));
    return LINK_FOUND;
}

enum link_outcome link_find(const char *netns, const char *inside, struct pod_link *found)
{
    struct statfs system;
    enum link_outcome outcome = LINK_FAILED;
    const int namespace = open(netns, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (namespace < 0)
        return LINK_NO_NAMESPACE;
    const int channel = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fstatfs(namespace, &system) < 0 || system.f_type != NSFS_MAGIC) {
        outcome = LINK_NO_NAMESPACE;
    } else if (channel >= 0) {
        const int nsid = load_nsid(channel, namespace);
        if (nsid != NOBODY)
            outcome = find_pair(channel, nsid, inside, found);
        else if (errno == EINVAL) // a namespace of another kind
            outcome = LINK_NO_NAMESPACE;
    }
    const int why = errno;
    if (channel >= 0)
        close(channel);
    close(namespace);
    errno = why;
    return outcome;
}
