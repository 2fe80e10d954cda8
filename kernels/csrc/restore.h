// Back to K and V from coded coordinates: what the parts of the kernel share.
#pragma once

#include <cstdint>

namespace restore {

constexpr int kGroup = 16;  // tokens at a time

// The inverse transform of a group of tokens.
struct Product {
    const float *coordinates;  // [count, kGroup]
    int64_t count;
    const float *directions;   // [count, channels]
    const float *mean;         // [channels]
    int64_t channels;
    int tokens;
    float *out;                // [tokens, channels]: the mean, and the sum of coordinates times directions
};

using Multiply = void (*)(const Product &);

#ifdef RESTORE_X86
void multiply_avx512(const Product &);
void multiply_avx2(const Product &);
#endif
void multiply_generic(const Product &);

}  // namespace restore
