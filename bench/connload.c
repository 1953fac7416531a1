// SPDX-License-Identifier: Apache-2.0
//
// Open and close TCP connections one after another: connect, send one byte,
// receive one byte, and the server closes.
//
// netperf calls this TCP_CRR. No packaged tool of Debian's main archive does
// only this: netperf is non-free, wrk and ab also measure an HTTP server, and
// iperf, qperf and sockperf keep their connections open.
//
//     connload serve ADDRESS PORT              until it is killed
//     connload load  ADDRESS PORT SECONDS      prints one line of JSON
//
// The server closes first. So the state TIME_WAIT is at the server, and the
// client's ports are free at once.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

// Most latencies that are kept; further ones are only counted. The number is
// arbitrary: the connections of some minutes on a fast machine.
enum { MAX_KEPT = 4 << 20, TIMEOUT_S = 5 };

static void fail(const char *what) {
  fprintf(stderr, "connload: %s: %s\n", what, strerror(errno));
  exit(1);
}

static int64_t now_ns(void) {
  struct timespec at;

  clock_gettime(CLOCK_MONOTONIC, &at);
  return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
}

static int make_socket(void) {
  struct timeval timeout = {.tv_sec = TIMEOUT_S};
  int fd = socket(AF_INET, SOCK_STREAM, 0);

  if (fd < 0)
    fail("socket");
  if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)))
    fail("SO_RCVTIMEO");
  if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)))
    fail("SO_SNDTIMEO");
  return fd;
}

static void serve(const struct sockaddr_in *address) {
  int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
  char byte;

  if (listener < 0)
    fail("socket");
  if (setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)))
    fail("SO_REUSEADDR");
  if (bind(listener, (const struct sockaddr *)address, sizeof(*address)))
    fail("bind");
  if (listen(listener, 1024))
    fail("listen");
  for (;;) {
    int fd = accept(listener, NULL, NULL);

    if (fd < 0) {
      if (errno == EINTR || errno == ECONNABORTED)
        continue;
      fail("accept");
    }
    // A client that has closed its connection is no error of the server.
    if (read(fd, &byte, 1) == 1 && write(fd, &byte, 1) < 0 && errno != EPIPE &&
        errno != ECONNRESET)
      fail("write");
    close(fd);
  }
}

static int compare(const void *left, const void *right) {
  uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

  return (a > b) - (a < b);
}

static double percentile_us(const uint32_t *sorted, uint64_t count,
                            double share) {
  return sorted[(uint64_t)(share * (double)(count - 1))] / 1e3;
}

static void load(const struct sockaddr_in *address, double seconds) {
  uint32_t *kept = malloc(MAX_KEPT * sizeof(*kept));
  uint64_t count = 0;
  int64_t began, at, end;

  if (!kept)
    fail("malloc");
  began = at = now_ns();
  end = began + (int64_t)(seconds * 1e9);
  while (at < end) {
    char byte = 'x';
    int fd = make_socket();
    int64_t after;

    if (connect(fd, (const struct sockaddr *)address, sizeof(*address)))
      fail("connect");
    if (write(fd, &byte, 1) != 1)
      fail("write");
    if (read(fd, &byte, 1) != 1)
      fail("read");
    if (read(fd, &byte, 1) != 0)
      fail("waiting for the end of the stream");
    close(fd);
    after = now_ns();
    if (count < MAX_KEPT)
      kept[count] =
          after - at > UINT32_MAX ? UINT32_MAX : (uint32_t)(after - at);
    count++;
    at = after;
  }
  uint64_t usable = count < MAX_KEPT ? count : MAX_KEPT;

  qsort(kept, usable, sizeof(*kept), compare);
  printf("{\"connections\": %llu, \"seconds\": %.6f, \"p50_us\": %.2f, "
         "\"p90_us\": %.2f, \"p99_us\": %.2f}\n",
         (unsigned long long)count, (double)(at - began) / 1e9,
         percentile_us(kept, usable, 0.5), percentile_us(kept, usable, 0.9),
         percentile_us(kept, usable, 0.99));
}

int main(int argc, char **argv) {
  struct sockaddr_in address = {.sin_family = AF_INET};

  if (argc < 4 || inet_pton(AF_INET, argv[2], &address.sin_addr) != 1) {
    fprintf(stderr, "usage: connload serve ADDRESS PORT | connload load "
                    "ADDRESS PORT SECONDS\n");
    return 2;
  }
  address.sin_port = htons((uint16_t)atoi(argv[3]));
  signal(SIGPIPE, SIG_IGN); // a write to a closed connection then returns EPIPE
  if (!strcmp(argv[1], "serve") && argc == 4)
    serve(&address);
  else if (!strcmp(argv[1], "load") && argc == 5)
    load(&address, atof(argv[4]));
  else
    return 2;
  return 0;
}
