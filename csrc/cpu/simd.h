// GDD_FAST_SIMD before a function: the compiler also makes an AVX2 and an AVX-512 version of it, and the loader picks
// the best one for this processor. So one binary serves all x86-64 machines.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define GDD_FAST_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define GDD_FAST_SIMD
#endif
