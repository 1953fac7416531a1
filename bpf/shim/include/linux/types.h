// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
#pragma once
typedef unsigned char __u8, u8, uint8_t;
typedef unsigned short __u16, u16, uint16_t, __be16, __sum16;
typedef unsigned int __u32, u32, uint32_t, __be32, __wsum;
typedef unsigned long long __u64, u64, uint64_t, __be64;
typedef signed char __s8, s8;
typedef short __s16, s16;
typedef int __s32, s32;
typedef long long __s64, s64;
typedef unsigned long uintptr_t, size_t;
typedef _Bool bool;
#define __aligned_u64 __u64 __attribute__((aligned(8)))
