// What the machine can run, for the extensions' choice among versions of a kernel that are compiled for several
// instruction sets. Each name says which -m options of CMakeLists.txt it allows.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace isa {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows it.
inline bool f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

inline bool avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c();
}

inline bool avx512() {
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Tiles of bfloat16, with AVX-512's conversions to it. Linux gives a process the tiles' registers when it asks.
inline bool amx() {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!avx512() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
    if ((d & bfloat16) == 0 || (d & tiles) == 0) return false;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & 1u << 5) == 0) return false;
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace isa
