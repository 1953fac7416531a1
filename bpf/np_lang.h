// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The C dialect of this program: inlining (BCC supports no functions that are not inlined), branch hints, byte order,
// the kernel's helper functions, numbers that the loader fills in, and memory accesses with a fixed order or width.
// Nothing here knows packets or policy.
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

#include "np_abi.h"

#define NP_INLINE static inline __attribute__((always_inline))
#define NP_LIKELY(condition) __builtin_expect(!!(condition), 1)
#define NP_UNLIKELY(condition) __builtin_expect(!!(condition), 0)

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define np_host16(value) __builtin_bswap16(value)
#define np_host32(value) __builtin_bswap32(value)
#define np_host64(value) __builtin_bswap64(value)
#define np_net16(value) __builtin_bswap16(value) // for a constant, the compiler swaps the bytes
#else
#define np_host16(value) (value)
#define np_host32(value) (value)
#define np_host64(value) (value)
#define np_net16(value) (value)
#endif

// Compiler barrier: no memory access moves across it, and the compiler reuses no value that it loaded before. The
// verifier, too, then forgets the value that was loaded from a map.
#define np_barrier() __asm__ __volatile__("" ::: "memory")

// Force the object behind the pointer into memory, and act as a compiler barrier. Otherwise LLVM splits a large struct
// into more registers than there are, and the spilled registers overflow the 512 bytes of stack (seen with LLVM 19).
#define np_keep_in_memory(pointer) __asm__ __volatile__("" : : "r"(pointer) : "memory")

// Hide the value of a number from the compiler, which then cannot use what it knows about that value.
#define np_forget(number) __asm__ __volatile__("" : "+r"(number))

// A 64-bit constant that the loader fills in. This is LLVM's intrinsic for a load with the source register `kind`,
// which must be a constant that netpol_loader/kernel/relocation.py knows.
__u64 np_pseudo(__u64 kind, __u64 number) __asm__("llvm.bpf.pseudo");
#define NP_MAP_OF(name) ((void *)np_pseudo(1, name)) // address of a map; 1 is BPF_PSEUDO_MAP_FD
#define NP_MASK(name) np_pseudo(NP_LOADS_MASK, name) // number of slots that a hash chooses from in a map, minus one
#define NP_KERNEL(fact) np_pseudo(NP_LOADS_FACT, fact) // a fact of the running kernel, enum np_kernel_fact

// The kernel's helper functions. A helper is called by its number.
static void *(*const np_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const np_update)(void *map, const void *key, const void *value,
                               __u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*const np_tail_call)(void *context, void *map, __u32 slot) = (void *)BPF_FUNC_tail_call;
static struct bpf_sock *(*const np_socket_lookup)(void *context, struct bpf_sock_tuple *tuple, __u32 bytes, __u64 netns,
                                                  __u64 flags) = (void *)BPF_FUNC_skc_lookup_tcp;
static long (*const np_socket_release)(struct bpf_sock *socket) = (void *)BPF_FUNC_sk_release;
static long (*const np_outer_key)(void *context, void *key, __u32 bytes,
                                  __u64 flags) = (void *)BPF_FUNC_skb_get_tunnel_key;
static long (*const np_fib_lookup)(void *context, void *route, int bytes, __u32 flags) = (void *)BPF_FUNC_fib_lookup;
static long (*const np_probe_read_kernel)(void *to, __u32 bytes, const void *from) = (void *)BPF_FUNC_probe_read_kernel;
static long (*const np_store_bytes)(void *context, __u32 offset, const void *from, __u32 bytes,
                                    __u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*const np_ip4_checksum_replace)(void *context, __u32 offset, __u64 from, __u64 to,
                                             __u64 flags) = (void *)BPF_FUNC_l3_csum_replace;
static __s64 (*const np_checksum_diff)(const void *from, __u32 from_bytes, const void *to, __u32 to_bytes,
                                       __u32 seed) = (void *)BPF_FUNC_csum_diff;
static long (*const np_change_tail)(void *context, __u32 bytes, __u64 flags) = (void *)BPF_FUNC_skb_change_tail;
static void *(*const np_ringbuf_reserve)(void *map, __u64 bytes, __u64 flags) = (void *)BPF_FUNC_ringbuf_reserve;
static void (*const np_ringbuf_submit)(void *record, __u64 flags) = (void *)BPF_FUNC_ringbuf_submit;

// bpf_cast_to_kern_ctx: returns the sk_buff of a __sk_buff. BCC cannot emit a call of a kernel function, so the loader
// turns this call of a helper into such a call. If the kernel lacks the function, the program does not reach this call
// (NP_KERNEL_CAST is 0).
static void *(*const np_kernel_skb)(void *context) = (void *)NP_CALLS_CAST;

// Memory ordering on weakly ordered processors (docs/adr/0010, docs/adr/0011). np_store_last stores 8 bytes after all
// earlier stores. np_load_after returns its pointer in a form that depends on `loaded`, so that the CPU loads from the
// pointer after it has loaded that value.
#ifdef NP_WEAK_ORDER
#define np_store_last(place, value) ((void)__sync_lock_test_and_set(place, value))
#define np_load_after(pointer, loaded)                                                                                 \
    ({                                                                                                                 \
        __u64 nothing = (loaded);                                                                                      \
        __asm__ __volatile__("%0 &= 0" : "+r"(nothing));                                                               \
        (__typeof__(pointer))((void *)(pointer) + nothing);                                                            \
    })
#else
#define np_store_last(place, value)                                                                                    \
    ({                                                                                                                 \
        np_barrier();                                                                                                  \
        *(place) = (value);                                                                                            \
    })
#define np_load_after(pointer, loaded)                                                                                 \
    ({                                                                                                                 \
        (void)(loaded);                                                                                                \
        np_barrier();                                                                                                  \
        (pointer);                                                                                                     \
    })
#endif

// A 64-bit word for copies of any type. A copy of a struct of 32-bit fields then needs half the accesses.
typedef __u64 __attribute__((may_alias)) np_word;

// A 32-bit word for copies of any type. The type is aligned: the compiler copies unaligned memory byte by byte.
typedef __u32 __attribute__((may_alias)) np_half;

// Copy a multiple of eight bytes; both addresses must be aligned to eight bytes.
NP_INLINE void np_copy_words(void *to, const void *from, const int bytes)
{
#pragma unroll
    for (int word = 0; word < bytes / 8; word++)
        ((np_word *)to)[word] = ((const np_word *)from)[word];
}

NP_INLINE void np_zero_words(void *to, const int bytes)
{
#pragma unroll
    for (int word = 0; word < bytes / 8; word++)
        ((np_word *)to)[word] = 0;
}
