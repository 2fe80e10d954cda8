// What the machine can run, for the extensions' choice among versions of a kernel that are compiled for several
// instruction sets. Each name says which -m options of CMakeLists.txt it allows.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
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
#endif

}  // namespace isa
