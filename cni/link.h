// SPDX-License-Identifier: Apache-2.0
//
// Which interface of the node is the other end of a pod's: the kernel's word, asked through rtnetlink from outside the
// pod's network namespace.  What the plugins before this one said of names is not asked.
#pragma once

#include <net/if.h>
#include <stddef.h>

// The node's end of a pair.  peer_nsid, peer_ifindex: the pod's namespace, as the node's numbers it, and the
// interface's index there.
struct pod_link {
    int ifindex, peer_nsid, peer_ifindex;
    char name[IF_NAMESIZE];
};

enum link_outcome {
    LINK_FOUND,
    LINK_NO_NAMESPACE, // the path is none of a network namespace
    LINK_NO_INTERFACE, // the namespace has no interface of that name
    LINK_NO_PAIR, // the interface is not one end of a pair with one of this namespace: macvlan and its like
    LINK_FAILED, // the kernel refused; errno says why
};

// netns: the path of the pod's network namespace; inside: the interface's name there.
enum link_outcome link_find(const char *netns, const char *inside, struct pod_link *found);
