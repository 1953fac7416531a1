# SPDX-License-Identifier: Apache-2.0
"""Which line keeps which packets out, and the tests that notice when it is gone.

Invariant: a removal changes a text that occurs exactly once in its file, and what is left still compiles and loads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Guard:
    """A guard. ``removal``: its text in ``file`` and what takes its place; ``tests``: node ids that must fail then.

    A node id without parameters stands for all of them: one that fails is enough.
    """

    name: str
    says: str
    file: str
    removal: tuple[str, str]
    tests: tuple[str, ...]


LINKS = "tests/netns/test_border_links.py::"
HEADERS = "tests/netns/test_border_headers.py::"
ORIGIN = "tests/netns/test_border_origin.py::"
TUNNELS = "tests/netns/test_border_tunnels.py::"
NODE = "tests/netns/test_border_node.py::"
LIFETIMES = "tests/netns/test_border_lifetimes.py::"

DNS = "tests/kernel/test_dns.py::"
BONDS = "tests/unit/test_agent_assignments.py::"
SETTLED = "tests/unit/test_agent_settled.py::"
IDENTITY = "tests/netns/test_identity.py::"
NAMES = "tests/kernel/test_domain_lists.py::"
HANDOVER = "tests/unit/test_agent_handover.py::"

ANNOUNCED = " and route.protocol not in ANNOUNCED:"
IS_FROM_NODE = "!skb->ingress_ifindex && (skb->sk || skb->mark & config->node_mark)"

GUARDS = (
    # --- who sent it
    Guard(
        "sender-interface",
        "a packet that came in by an interface is not the node's, although it has a socket",
        "bpf/netpol.c",
        (IS_FROM_NODE, "(skb->sk || skb->mark & config->node_mark)"),
        (f"{ORIGIN}test_socket_that_a_bridge_leaves_is_no_sign_of_the_node",),
    ),
    Guard(
        "sender-evidence",
        "a packet of which nothing is known is not the node's",
        "bpf/netpol.c",
        (IS_FROM_NODE, "!skb->ingress_ifindex"),
        (
            f"{ORIGIN}test_fragments_of_a_pod_to_a_closed_pod",
            f"{ORIGIN}test_fragments_of_the_world_to_a_closed_pod",
            f"{ORIGIN}test_fragments_over_a_bridge_to_a_closed_pod",
            f"{ORIGIN}test_fragments_out_of_a_host_endpoint",
        ),
    ),
    Guard(
        "sender-mark",
        "what a bridge floods for its node is the node's by its mark",
        "bpf/netpol.c",
        (IS_FROM_NODE, "!skb->ingress_ifindex && skb->sk"),
        (f"{ORIGIN}test_node_speaks_to_groups_on_a_bridge",),
    ),
    # --- answers of DNS servers
    Guard(
        "dns-server",
        "an answer of a server that is not trusted teaches nothing",
        "bpf/np_dns_answer.h",
        ("if (!asked || !np_dns_is_trusted(ctx, 1))", "if (!asked)"),
        (f"{DNS}test_servers_of_both_families_are_trusted_by_address",),
    ),
    Guard(
        "dns-asked",
        "nor does one that the endpoint has not asked for",
        "bpf/np_dns_answer.h",
        ("if (!now || !np_dns_settle(asked, dns, ctx, now))", "if (!now || (np_dns_settle(asked, dns, ctx, now), 0))"),
        (f"{DNS}test_hostile_answers_teach_nothing",),
    ),
    Guard(
        "dns-once",
        "nor a second one",
        "bpf/np_dns_answer.h",
        ("    asked->slot[dns->slot & (NP_ASKED_SLOTS - 1)] = 0;\n", ""),
        (f"{DNS}test_a_question_is_answered_once",),
    ),
    Guard(
        "dns-late",
        "nor a late one",
        "bpf/np_dns_answer.h",
        (" && np_dns_age(now, slot) <= longest)", ")"),
        (f"{DNS}test_a_late_answer_teaches_nothing",),
    ),
    Guard(
        "dns-code",
        "nor one with an error",
        "bpf/np_dns_answer.h",
        ("if (dns->flags & NP_DNS_RCODE || !dns->records_left)", "if (!dns->records_left)"),
        (f"{DNS}test_hostile_answers_teach_nothing",),
    ),
    Guard(
        "dns-whole",
        "nor one of which a part is missing",
        "bpf/np_dns_answer.h",
        ("if (dns->stated_bytes > dns->message_bytes)", "if (0)"),
        (f"{DNS}test_a_stream_answer_in_two_segments_is_not_read",),
    ),
    Guard(
        "dns-owner",
        "a record counts for the last name of the chain alone",
        "bpf/np_dns_records.h",
        ("dns->is_match = np_dns_is_current(dns);", "dns->is_match = 1;"),
        (f"{DNS}test_hostile_answers_teach_nothing",),
    ),
    Guard(
        "dns-class",
        "and in the class IN",
        "bpf/np_dns_records.h",
        ("dns->is_match && (head >> 32 & 0xffff) == NP_DNS_CLASS_IN ?", "dns->is_match ?"),
        (f"{DNS}test_records_of_other_names_are_skipped",),
    ),
    Guard(
        "dns-overlap",
        "what a pointer leads to ends before the name that has the pointer",
        "bpf/np_dns_records.h",
        ("    dns->limit = dns->lowest;\n", ""),
        (f"{DNS}test_hostile_answers_teach_nothing",),
    ),
    Guard(
        "dns-header",
        "and not into the header",
        "bpf/np_dns_records.h",
        ("target < NP_DNS_HEADER_BYTES ||", ""),
        (f"{DNS}test_hostile_answers_teach_nothing",),
    ),
    Guard(
        "dns-target",
        "the target of a CNAME record fills the record",
        "bpf/np_dns_records.h",
        ("if (dns->after != dns->target_end)", "if (0)"),
        (f"{DNS}test_hostile_answers_teach_nothing",),
    ),
    Guard(
        "dns-refused",
        "addresses of refused ranges are not learned",
        "bpf/np_dns_learn.h",
        (
            "    if (dns->is_refused) {\n        np_dns_count(ctx, NP_REASON_DNS_REFUSED);",
            "    if (0) {\n        np_dns_count(ctx, NP_REASON_DNS_REFUSED);",
        ),
        (f"{DNS}test_hostile_answers_teach_nothing",),
    ),
    Guard(
        "dns-mapped",
        "nor IPv4-mapped ones",
        "bpf/np_dns_learn.h",
        ("if (!one->address[0] && (__u32)one->address[1] == np_host32(0x0000ffff))", "if (0)"),
        (f"{DNS}test_hostile_answers_teach_nothing",),
    ),
    Guard(
        "dns-tokens",
        "an endpoint learns new addresses at a limited rate",
        "bpf/np_dns_learn.h",
        ("    if (!asked->tokens)\n        return 0;\n", ""),
        (f"{DNS}test_a_limited_endpoint_learns_no_new_address",),
    ),
    Guard(
        "dns-fragment",
        "the rest of an answer that was cut does not pass",
        "bpf/np_dns_answer.h",
        ("return np_dns_is_cut(packet) ? NP_REASON_DNS_FRAGMENT : NP_REASON_NONE;", "return NP_REASON_NONE;"),
        (f"{DNS}test_an_answer_in_fragments_is_cut",),
    ),
    Guard(
        "dns-denied",
        "what policy drops teaches nothing",
        "bpf/netpol.c",
        ("if (np_is_dns(ctx) && verdict != NP_DROP)", "if (np_is_dns(ctx))"),
        (f"{DNS}test_a_denied_packet_teaches_nothing",),
    ),
    # --- messages of the link
    Guard(
        "link-hop-limit",
        "neighbour discovery has the hop limit that only its own link can give",
        "bpf/np_link.h",
        (" ||\n        packet->hop_limit != NP_LINK_HOP_LIMIT)", ")"),
        (f"{LINKS}test_one_condition_is_enough_for_policy_to_decide",),
    ),
    Guard(
        "link-code",
        "and the code 0",
        "bpf/np_link.h",
        ("if (packet->icmp_code || packet->fragment", "if (packet->fragment"),
        (f"{LINKS}test_one_condition_is_enough_for_policy_to_decide",),
    ),
    Guard(
        "link-source",
        "and a source of the sender's own",
        "bpf/np_link.h",
        ("    if (!is_nobody && !np_may_claim(ctx, source, 6))\n        return NP_REASON_NONE;\n", ""),
        (f"{LINKS}test_one_condition_is_enough_for_policy_to_decide",),
    ),
    Guard(
        "link-destination",
        "and a destination on the very link",
        "bpf/np_link.h",
        ("if (!np_is_link_group(destination) && !np_is_on_link(skb, ctx, destination))", "if (0)"),
        (f"{LINKS}test_link_ends_at_the_router",),
    ),
    Guard(
        "link-target",
        "and asks about an address of the link",
        "bpf/np_link.h",
        ("!ctx->ep->missing && !np_is_on_link(skb, ctx, target)", "0"),
        (f"{LINKS}test_one_condition_is_enough_for_policy_to_decide",),
    ),
    Guard(
        "link-claim",
        "or claims one of the sender's own",
        "bpf/np_link.h",
        ("packet->icmp_type == NP_NEIGHBOUR_ADVERTISEMENT && !np_may_claim(ctx, target, 6)", "0"),
        (f"{LINKS}test_nobody_speaks_for_another", f"{LINKS}test_gateway_of_another_pod_is_not_taken_over[6]"),
    ),
    Guard(
        "link-options",
        "and carries nothing but the sender's hardware address, or a nonce",
        "bpf/np_link.h",
        (
            "return np_link_options_fit(skb, ctx, offset) ? NP_REASON_NEIGHBOUR : NP_REASON_NONE;",
            "return NP_REASON_NEIGHBOUR;",
        ),
        (
            f"{LINKS}test_one_condition_is_enough_for_policy_to_decide",
            f"{LINKS}test_link_types_carry_nothing_to_a_pod_of_the_same_link",
        ),
    ),
    Guard(
        "listener-hop-limit",
        "listener discovery has a hop limit that no router passes",
        "bpf/np_link.h",
        ("packet->hop_limit != NP_MLD_HOP_LIMIT || ", ""),
        (f"{LINKS}test_listeners_report_to_the_link_alone[64]",),
    ),
    Guard(
        "listener-source",
        "and a link-local source",
        "bpf/np_link.h",
        ("return np_is_link_local(source) && (!is_workloads_own || np_may_claim(ctx, source, 6));", "return 1;"),
        (f"{LINKS}test_link_types_carry_nothing_to_a_pod_of_the_same_link",),
    ),
    Guard(
        "link-router",
        "no workload advertises as a router, or redirects",
        "bpf/np_link.h",
        ("if (is_workloads_own && (type == NP_ROUTER_ADVERTISEMENT || type == NP_REDIRECT6))", "if (0)"),
        (f"{LINKS}test_nobody_speaks_for_another",),
    ),
    Guard(
        "link-arp",
        "ARP is in the sender's own name",
        "bpf/np_link.h",
        (
            "return is_own && np_may_claim(ctx, claimed, 4) ? NP_REASON_ARP : NP_REASON_LINK_FORGED;",
            "return NP_REASON_ARP;",
        ),
        (f"{LINKS}test_nobody_speaks_for_another", f"{LINKS}test_gateway_of_another_pod_is_not_taken_over[4]"),
    ),
    Guard(
        "link-server",
        "no workload answers as a DHCP server, or redirects by ICMP",
        "bpf/netpol.c",
        ("if (NP_UNLIKELY(np_is_forged(ctx, hook, version)))", "if (0)"),
        (f"{LINKS}test_nobody_speaks_for_another",),
    ),
    Guard(
        "link-local-source",
        "a link-local source is an address that a workload must own, like any other",
        "bpf/np_endpoint.h",
        (
            "        return 0;\n    if (np_may_borrow(ctx, source, version)) {",
            "        return 0;\n    if (version == 6 && np_is_link_local(source))\n        return 0;\n"
            "    if (np_may_borrow(ctx, source, version)) {",
        ),
        (f"{LINKS}test_link_local_source_evades_no_label",),
    ),
    Guard(
        "delivery",
        "a workload's interface gets what is for the workload",
        "bpf/netpol.c",
        ("if (np_is_misdelivered(ctx, version))", "if (0)"),
        (f"{LINKS}test_what_is_for_another_is_not_delivered",),
    ),
    # --- headers that are not final
    Guard(
        "checksum-aim",
        "a checksum that a device is yet to write changes nothing that was judged",
        "bpf/netpol.c",
        ("if (NP_UNLIKELY(np_checksum_misaims(skb, packet)))", "if (0)"),
        (f"{HEADERS}test_checksum_changes_nothing_that_was_judged",),
    ),
    Guard(
        "checksum-aim-short",
        "nor in the middle of an open connection",
        "bpf/np_flow_cache.h",
        ("if (NP_UNLIKELY(checksum != NP_NO_CHECKSUM &&", "if (NP_UNLIKELY(0 && checksum != NP_NO_CHECKSUM &&"),
        (f"{HEADERS}test_checksum_changes_nothing_that_was_judged",),
    ),
    Guard(
        "mobility-header",
        "a mobility header is no extension header",
        "bpf/np_parse.h",
        ("protocol == NP_PROTOCOL_DESTINATION;", "protocol == NP_PROTOCOL_DESTINATION || protocol == 135;"),
        (f"{HEADERS}test_mobility_header_is_no_extension_header",),
    ),
    Guard(
        "fragment-options",
        "a later fragment does not overwrite the options of TCP",
        "bpf/np_parse.h",
        ("header_bytes = (tcp->words >> 4) * 4u;", "header_bytes = sizeof(*tcp);"),
        (f"{HEADERS}test_later_fragment_overwrites_no_options",),
    ),
    # --- tunnels and devices
    Guard(
        "tunnel",
        "a workload sends its node nothing that the node's tunnels unpack",
        "bpf/netpol.c",
        ("if (np_is_workloads_own(ctx, hook) && np_is_tunnelled(ctx, version))", "if (0)"),
        (
            f"{TUNNELS}test_pod_speaks_as_no_other_through_the_nodes_tunnel[scene]",
            f"{TUNNELS}test_pod_speaks_as_no_other_through_the_nodes_tunnel[bridged]",
            f"{TUNNELS}test_fragments_hide_no_tunnel",
            f"{TUNNELS}test_tunnel_that_comes_later_takes_no_open_connection",
        ),
    ),
    Guard(
        "tunnel-other-nodes",
        "nor other nodes",
        "netpol_ebpf/agent/own_interfaces.py",
        (
            "others = {address: Meaning(LocalFlag.NODE, node=number) for address, number in inputs.nodes.items()}",
            "others: dict[IPAddress, Meaning] = {}",
        ),
        (f"{TUNNELS}test_pod_sends_no_tunnel_packets_to_another_node",),
    ),
    Guard(
        "foreign-source",
        "what comes from outside has no source of a workload of this node",
        "bpf/np_outside.h",
        ("if (np_ifindex_of(ctx, source, version))", "if (np_ifindex_of(ctx, source, version) && 0)"),
        (f"{TUNNELS}test_nobody_outside_is_a_pod_of_this_node",),
    ),
    Guard(
        "tunnel-source",
        "what comes out of a tunnel with a source that is on another node was sent by that node, if the device tells",
        "bpf/np_outside.h",
        ("&& !np_is_sent_by(skb, outer, node))", "&& 0)"),
        (
            f"{TUNNELS}test_nobody_speaks_for_a_pod_of_another_node",
            f"{TUNNELS}test_nobody_speaks_for_another_node",
            f"{TUNNELS}test_pod_that_moved_speaks_from_its_new_node",
            f"{TUNNELS}test_node_that_changed_its_address_speaks_from_that",
        ),
    ),
    Guard(
        "tunnel-source-short",
        "nor in the middle of an open connection of that node's",
        "bpf/np_flow_cache.h",
        ("NP_ENDPOINT_LAYER3 | NP_ENDPOINT_EXTERNAL", "NP_ENDPOINT_LAYER3"),
        (f"{TUNNELS}test_nobody_speaks_in_an_open_connection_of_another_node",),
    ),
    Guard(
        "layer-3",
        "packets of a device without a link header are read from the network header on",
        "bpf/netpol.c",
        ("!(flags & NP_ENDPOINT_LAYER3)", "1"),
        (
            f"{TUNNELS}test_host_endpoint_on_a_tun_device",
            f"{TUNNELS}test_deferred_verdict_at_a_tun_device",
            f"{TUNNELS}test_workload_behind_a_tun_device",
        ),
    ),
    Guard(
        "link-type",
        "what has a link header that nothing here reads is closed where policy applies",
        "bpf/netpol.c",
        ("if (NP_UNLIKELY(flags & NP_ENDPOINT_UNREADABLE))", "if (0)"),
        (f"{TUNNELS}test_unknown_link_header_is_closed_where_policy_applies",),
    ),
    # --- what is the node
    Guard(
        "node-prefixes",
        "local prefixes are the node",
        "bpf/np_endpoint.h",
        ("!found && ctx->config->flags & NP_CONFIG_LOCAL_NETS", "0"),
        (f"{NODE}test_closed_node_has_no_other_door[prefix-4]", f"{NODE}test_closed_node_has_no_other_door[prefix-6]"),
    ),
    Guard(
        "node-loopback",
        "127.0.0.0/8 is the node",
        "bpf/np_endpoint.h",
        ("return version == 4 && (address[0] & np_host32(0xff000000)) == np_host32(0x7f000000);", "return 0;"),
        (f"{NODE}test_closed_node_has_no_other_door[loopback-4]",),
    ),
    Guard(
        "node-broadcast",
        "broadcast and anycast addresses of any of its links are the node",
        "loader/netpol_loader/host/routes.py",
        ("_OF_THE_NODE = frozenset({LOCAL, BROADCAST, ANYCAST})", "_OF_THE_NODE = frozenset({LOCAL})"),
        (
            f"{NODE}test_closed_node_has_no_other_door[broadcast of another link-4]",
            f"{NODE}test_closed_node_has_no_other_door[anycast of the routers-6]",
        ),
    ),
    Guard(
        "node-all",
        "the broadcast address of all links is the node",
        "bpf/np_endpoint.h",
        ("    if (version == 4 && address[0] == 0xffffffff)\n        return 1;\n", ""),
        (f"{NODE}test_closed_node_has_no_other_door[all-4]",),
    ),
    Guard(
        "node-groups",
        "groups that the node has joined are the node",
        "netpol_ebpf/agent/kernel_network.py",
        (
            "found = dict.fromkeys(groups, GROUP)",
            "found: dict[IPAddress, Meaning] = {}",
        ),
        (f"{NODE}test_closed_node_has_no_other_door[all-6]",),
    ),
    Guard(
        "node-tables",
        "local routes of other tables do not make everything the node",
        "loader/netpol_loader/host/routes.py",
        ("[one for one in routes if one.table in self._local_tables]", "list(routes)"),
        (f"{NODE}test_transparent_proxy_does_not_make_the_world_the_node",),
    ),
    # --- verdicts that were put off, and connections at their ends
    Guard(
        "first-leg",
        "a verdict that was put off is no verdict where the packet leaves as it came",
        "bpf/np_service.h",
        ("scratch->is_first_leg = conn && found->flags & NP_CONN_DEFERRED;", "scratch->is_first_leg = 0;"),
        (f"{ORIGIN}test_untranslated_service_is_judged_where_it_leaves",),
    ),
    Guard(
        "closed-lives-on",
        "a connection that looks ended speaks for its packets as long as an open one",
        "bpf/np_conn.h",
        ("__u32 state = np_conn_is_closed(conn) ? NP_CONN_TCP_OPEN : conn->state;", "__u32 state = conn->state;"),
        (f"{LIFETIMES}test_forged_end_cuts_no_connection",),
    ),
    Guard(
        "keep-alive",
        "an idle connection is remembered until Linux's keep-alive gives it up",
        "loader/netpol_loader/pins/dataplane.py",
        ("abi.NP_CONN_TCP_OPEN: 8100,", "abi.NP_CONN_TCP_OPEN: 7200,"),
        (f"{LIFETIMES}test_time_outs_outlast_keep_alive",),
    ),
    # --- whose interface it is
    Guard(
        "first-address",
        "addresses that are added later behind an interface do not count",
        "netpol_ebpf/agent/assignments.py",
        ("if not first and link.peer is not None:", "if link.peer is not None:"),
        (
            f"{BONDS}test_address_that_comes_later_makes_nobody_of_a_pod_that_is_to_come[in its place]",
            f"{IDENTITY}test_stranger_becomes_no_pod_that_is_to_come",
        ),
    ),
    Guard(
        "leading-address",
        "of several interfaces with an address it is that one whose first it is",
        "netpol_ebpf/agent/assignments.py",
        ("return (*found[0][:1], *found[1][-1:])", "return (*found[0], *found[1])"),
        (f"{BONDS}test_of_several_with_an_address_it_is_the_one_whose_first_it_is",),
    ),
    Guard(
        "leading-addresses",
        "and only if the first ones of no family contradict",
        "netpol_ebpf/agent/assignments.py",
        ("for ifindex in candidates if self._speaks_for(ifindex, endpoint)}", "for ifindex in candidates}"),
        (
            f"{BONDS}test_first_address_that_contradicts_makes_nobody_of_a_pod_that_is_to_come",
            f"{IDENTITY}test_first_address_that_contradicts_makes_nobody_of_a_pod_that_is_to_come",
        ),
    ),
    Guard(
        "prefix-of-a-pair",
        "a prefix on the node's end of a pair is no route to whoever takes an address in it",
        "netpol_ebpf/agent/assignments.py",
        ("return ifindex if link is None or link.peer is None else None", "return ifindex"),
        (
            f"{BONDS}test_later_address_in_the_node_s_prefix_makes_nobody_of_a_pod_that_is_to_come",
            f"{IDENTITY}test_later_address_in_the_node_s_prefix_makes_nobody_of_a_pod_that_is_to_come",
        ),
    ),
    Guard(
        "bound-no-trace",
        "a bound interface is no trace of another endpoint that has one",
        "netpol_ebpf/agent/assignments.py",
        ("return free or found", "return found"),
        (f"{BONDS}test_bound_pod_closes_no_pod_that_is_to_come",),
    ),
    Guard(
        "number-of-several",
        "a number that the ledger gives to several endpoints is none's",
        "netpol_ebpf/apply/ledger.py",
        ("        if holder is not None:", "        if False:"),
        ("tests/unit/test_apply_ledger.py::test_number_of_several_is_nobody_s",),
    ),
    Guard(
        "number-kept-once",
        "two endpoints keep no number that both had",
        "netpol_ebpf/compiler/numbers.py",
        (" and users[number] == 1", ""),
        ("tests/unit/test_compiler_numbers.py::test_number_of_several_or_out_of_range_is_not_kept",),
    ),
    Guard(
        "number-of-several-rows",
        "a number that the rows of several interfaces have tells nothing",
        "netpol_ebpf/agent/enforcement.py",
        (" if users[number] == 1}", "}"),
        ("tests/unit/test_agent_core.py::test_number_that_the_rows_give_to_several_is_nobody_s",),
    ),
    Guard(
        "bond-kept",
        "an address at another interface moves no bond",
        "netpol_ebpf/agent/assignments.py",
        ("(not found or evidence is Evidence.ADDRESS):", "not found:"),
        (f"{BONDS}test_address_at_another_interface_moves_no_bond",),
    ),
    Guard(
        "bond-inherited",
        "the interface of a pod that went is no other's by an address",
        "netpol_ebpf/agent/assignments.py",
        ("elif assignment is not None and holder is None and best is Evidence.ADDRESS:", "elif False:"),
        (f"{BONDS}test_interface_of_a_pod_that_went_is_no_other_s_by_an_address",),
    ),
    Guard(
        "bound-is-a-workload",
        "a bound interface is never taken for the node's own",
        "netpol_ebpf/agent/assignments.py",
        ("if seen.assignment is not None or is_claimed:", "if is_claimed:"),
        (f"{BONDS}test_bound_interface_is_never_let_go",),
    ),
    Guard(
        "announced-routes",
        "a route that a router announced makes no interface the node's own",
        "loader/netpol_loader/host/routes.py",
        (ANNOUNCED, ":"),
        (f"{IDENTITY}test_unknown_pod_s_router_opens_nothing",),
    ),
    Guard(
        "doubt-closed",
        "what was closed at its birth stays closed in doubt",
        "netpol_ebpf/agent/assignments.py",
        (
            "            return seen.side\n        return InterfaceRole.WORKLOAD",
            "            return InterfaceRole.OWN\n        return InterfaceRole.WORKLOAD",
        ),
        (
            f"{BONDS}test_doubt_is_told_and_changes_nothing",
            f"{IDENTITY}test_node_s_end_with_a_prefix_leaves_no_pod_open",
        ),
    ),
    # --- which assignments stay without a new decision
    Guard(
        "settled-uplinks",
        "no assignment stays settled while the node's uplinks change",
        "netpol_ebpf/agent/settled.py",
        ("(old.uplinks | before.stated, old.subnets) !=", "(new.uplinks | before.stated, old.subnets) !="),
        (f"{SETTLED}test_change_that_leads_a_settled_pod_elsewhere[an uplink is none any more]",),
    ),
    Guard(
        "settled-stated",
        "or the addresses that its object states",
        "netpol_ebpf/agent/settled.py",
        ("(old.uplinks | before.stated, old.subnets) !=", "(old.uplinks | now.stated, old.subnets) !="),
        (f"{SETTLED}test_address_of_the_node_object",),
    ),
    Guard(
        "settled-prefixes",
        "or its prefixes",
        "netpol_ebpf/agent/settled.py",
        ("before.stated, old.subnets) !=", "before.stated, new.subnets) !="),
        (f"{SETTLED}test_change_that_leads_a_settled_pod_elsewhere[a prefix came]",),
    ),
    Guard(
        "settled-prefix-interface",
        "or an interface of a prefix",
        "netpol_ebpf/agent/settled.py",
        ("if changed and any(", "if False and any("),
        (f"{SETTLED}test_change_that_leads_a_settled_pod_elsewhere[the interface of a prefix came]",),
    ),
    Guard(
        "settled-endpoint",
        "nor where the endpoint changed",
        "netpol_ebpf/agent/settled.py",
        ("now.endpoints.get(endpoint.key) is endpoint", "True"),
        (f"{SETTLED}test_endpoint_that_went_or_changed",),
    ),
    Guard(
        "settled-record",
        "or what is recorded of its interface",
        "netpol_ebpf/agent/settled.py",
        ("and records.get(ifindex) is record", ""),
        (f"{SETTLED}test_interface_that_got_another_s_index",),
    ),
    Guard(
        "settled-interface",
        "or the interface",
        "netpol_ebpf/agent/settled.py",
        ("            and ifindex not in changed\n", ""),
        (f"{SETTLED}test_interface_that_got_another_name",),
    ),
    Guard(
        "settled-names",
        "or an interface that evidence by name leads to",
        "netpol_ebpf/agent/settled.py",
        ("            and endpoint.key not in concerned\n", ""),
        (f"{SETTLED}test_change_that_leads_a_settled_pod_elsewhere[an interface with the pod's name came]",),
    ),
    Guard(
        "settled-derived-name",
        "by a name made of the pod's",
        "netpol_ebpf/agent/settled.py",
        ("    if hashes:\n", "    if False:\n"),
        (f"{SETTLED}test_change_that_leads_a_settled_pod_elsewhere[an interface got the pod's name]",),
    ),
    Guard(
        "settled-result",
        "by a plugin's result that changed",
        "netpol_ebpf/agent/settled.py",
        ("if made != made_before or", "if"),
        (f"{SETTLED}test_result_of_a_plugin[came]",),
    ),
    Guard(
        "settled-result-name",
        "by the name in a plugin's result",
        "netpol_ebpf/agent/settled.py",
        (" or not set(names).isdisjoint(made or ()):", ":"),
        (f"{SETTLED}test_result_of_a_plugin[names an interface that came later]",),
    ),
    Guard(
        "settled-route",
        "or a route to the endpoint came, or changed",
        "netpol_ebpf/agent/settled.py",
        ("found = {one for one, ifindex in now.items() if before.get(one) != ifindex}", "found = set()"),
        (f"{SETTLED}test_change_that_leads_a_settled_pod_elsewhere[its route leads elsewhere]",),
    ),
    Guard(
        "settled-route-gone",
        "or went",
        "netpol_ebpf/agent/settled.py",
        ("        found |= before.keys() - now.keys()\n", "        pass\n"),
        (f"{SETTLED}test_change_that_leads_a_settled_pod_elsewhere[its route went, a prefix leads on]",),
    ),
    Guard(
        "settled-first-address",
        "or its first address was seen",
        "netpol_ebpf/agent/settled.py",
        ("and (record.first or not behind or new.links[ifindex].peer not in behind)", ""),
        (f"{SETTLED}test_first_address_behind_a_settled_interface",),
    ),
    Guard(
        "settled-named",
        "what an object names is decided in each look",
        "netpol_ebpf/agent/settled.py",
        ("endpoint.interface is None and {routes", "{routes"),
        (f"{SETTLED}test_named_interface_does_not_settle",),
    ),
    Guard(
        "settled-routes-apart",
        "as is an endpoint with routes to several interfaces",
        "netpol_ebpf/agent/settled.py",
        (" and {routes.get(one, ifindex) for one in endpoint.addresses} <= {ifindex}", ""),
        (f"{SETTLED}test_second_route_to_an_interface_that_comes_later",),
    ),
    Guard(
        "settled-one-interface",
        "or with evidence of several",
        "netpol_ebpf/agent/assignments.py",
        (" and traces[key][1] <= {ifindex}", ""),
        (f"{SETTLED}test_further_interface_of_a_plugin_s_result_stays_a_workload_s",),
    ),
    Guard(
        "settled-held",
        "or with an older interface",
        "netpol_ebpf/agent/assignments.py",
        (" and held.get(key) == ifindex", ""),
        (f"{SETTLED}test_contested_endpoint_with_a_former_interface",),
    ),
    Guard(
        "settled-fixed",
        "or on an interface that the look changed",
        "netpol_ebpf/agent/assignments.py",
        ("before.get(ifindex) is record and ", ""),
        (f"{SETTLED}test_interface_whose_record_changes_in_each_look_does_not_settle",),
    ),
    Guard(
        "settled-claims",
        "and one whose interface another endpoint leads to",
        "netpol_ebpf/agent/assignments.py",
        ("for ifindex in wanted.keys() & settled.keys():", "for ifindex in ():"),
        (f"{SETTLED}test_other_endpoint_that_leads_to_a_settled_interface",),
    ),
    Guard(
        "settled-lost",
        "an endpoint that stays settled has lost no interface",
        "netpol_ebpf/agent/assignments.py",
        ("        self._lost.difference_update(interfaces)\n", ""),
        (f"{SETTLED}test_former_interface_that_goes",),
    ),
    Guard(
        "settled-restored",
        "what an earlier agent assigned unsettles all",
        "netpol_ebpf/agent/assignments.py",
        ("            self._settled = {}\n            self._release", "            self._release"),
        (f"{SETTLED}test_assignment_of_an_earlier_agent_that_is_restored_later",),
    ),
    Guard(
        "traits-link",
        "the traits of an interface are those of its present name",
        "netpol_ebpf/agent/assignments.py",
        ("known.link is link", "True"),
        (f"{SETTLED}test_interface_with_a_new_name_has_the_traits_of_that_name",),
    ),
    # --- domain names
    Guard(
        "name-expiry",
        "a learned name counts until it expires",
        "bpf/np_names.h",
        ("learned->name_class[slot] & np_if_valid(learned->until[slot], now)", "learned->name_class[slot] + now * 0"),
        (
            f"{NAMES}test_class_counts_until_it_expires",
            f"{NAMES}test_open_connection_outlives_its_name_but_not_its_rule",
        ),
    ),
    Guard(
        "name-class",
        "a name that no pattern matches allows nothing",
        "bpf/np_names.h",
        ("if (key.name_class) {", "if (1) {"),
        (f"{NAMES}test_names_of_no_rule_of_the_list_do_not_count",),
    ),
    Guard(
        "name-rank",
        "of the names of an address, the first rule in the order of evaluation decides",
        "bpf/np_names.h",
        ("np_if_less(row->rank, names->rank)", "np_if_less(row->rank, NP_RANK_LAST)"),
        (f"{NAMES}test_least_rank_of_all_names_decides",),
    ),
    Guard(
        "name-staged",
        "a staged rule with a name allows nothing",
        "bpf/np_names.h",
        ("if (names->rank < NP_RANK_LAST) {", "if (names->staged_rank < NP_RANK_LAST) {"),
        (f"{NAMES}test_staged_rule_with_a_name_changes_the_pending_evaluation_alone",),
    ),
    Guard(
        "name-connection",
        "a connection has the class of its own verdict, not that of an earlier connection in its slot",
        "bpf/np_conn.h",
        (
            "*np_ct_slot_name_class(&slot, version) = ctx->decision->name_class;",
            "if (ctx->decision->name_class)\n        *np_ct_slot_name_class(&slot, version) = ctx->decision->name_class;",
        ),
        (f"{NAMES}test_slot_of_a_connection_does_not_keep_the_class_of_an_earlier_one",),
    ),
    Guard(
        "name-list",
        "a verdict with a domain list is not final before its names are asked",
        "bpf/np_judge.h",
        ("decision->flags >> NP_VERDICT_DOMAIN_SHIFT) &&", "decision->flags >> 16) &&"),
        (f"{NAMES}test_learned_address_is_allowed_by_the_rule_of_its_name",),
    ),
    # --- what the CNI plugin hands over
    Guard(
        "handover-root",
        "only root may hand an interface over",
        "netpol_ebpf/agent/control_socket.py",
        ("elif operation in self.waits and client.user != 0:", "elif operation in self.waits and client.user < 0:"),
        ("tests/unit/test_agent_control_socket.py::test_an_operation_of_root_alone",),
    ),
    Guard(
        "handover-uid",
        "an interface is not that of a pod before, of the same name",
        "netpol_ebpf/agent/handover.py",
        ("return not self.uid or not uid or self.uid == uid", "return True"),
        (f"{HANDOVER}test_an_older_pod_of_that_name",),
    ),
    Guard(
        "handover-peer",
        "the interface's other end is where the plugin saw it",
        "netpol_ebpf/agent/local_interfaces.py",
        ("(link.name, link.peer) == (handed.name, handed.peer)", "link.name == handed.name"),
        (f"{HANDOVER}test_an_interface_that_is_not_as_handed_over",),
    ),
    Guard(
        "handover-in-force",
        "a pod does not start before its rows are in the kernel and bound to its interface",
        "netpol_ebpf/agent/core.py",
        ("if not self.binder.is_bound(handed.pod, handed.ifindex):", "if False:"),
        (f"{HANDOVER}test_the_pod_is_there_first", f"{HANDOVER}test_a_change_that_was_refused"),
    ),
    Guard(
        "handover-programs",
        "a pod does not start before its interface has the programs",
        "netpol_ebpf/agent/core.py",
        ("is_attached = handed.ifindex in self.attachments.interfaces", "is_attached = True"),
        (f"{HANDOVER}test_programs_that_cannot_be_put_on",),
    ),
    Guard(
        "plugin-pair",
        "the plugin takes an interface of the node for the pod's only if that one says so too",
        "cni/link.c",
        ("if (node.link != pod.ifindex || node.link_nsid != nsid)", "if (node.link_nsid == nsid + 1)"),
        ("tests/netns/test_cni_plugin.py::test_another_namespace",),
    ),
)
