// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// A program for bench/micro.py that only parses. Its result depends on every
// field, so that the compiler removes none of them.

#include "np_abi.h"
#include "np_lang.h"
#include "np_parse.h"

int np_parse_only(struct __sk_buff *skb) {
  struct np_bytes bytes;
  struct np_packet packet = {};
  int reason = np_parse_frame(skb, &bytes, &packet, 1);
  if (reason)
    return 2;
  if (packet.ethertype == NP_ETHERTYPE_IP4)
    reason = np_parse_ip(&bytes, &packet, 4);
  else if (packet.ethertype == NP_ETHERTYPE_IP6)
    reason = np_parse_ip(&bytes, &packet, 6);
  if (reason)
    return 2;
  __u32 all = packet.protocol ^ packet.tcp_flags ^ packet.fragment ^
              packet.slow_only ^ packet.source_port ^ packet.destination_port;
#pragma unroll
  for (int word = 0; word < 4; word++)
    all ^= packet.source[word] ^ packet.destination[word];
  return all == 0x6e702121 ? 2 : -1; // always -1 with the measured frames
}
