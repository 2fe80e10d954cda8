// Back to K and V from coded coordinates: what the parts of the kernel share.
#pragma once

#include <cstdint>

namespace restore {

constexpr int kBlock = 16;  // tokens at a time

// The inverse transform of a block of tokens, in one group of heads.
struct Product {
    const float *coordinates;  // [count, kBlock]
    int64_t count;
    const float *directions;   // [count, channels]
    const float *mean;         // [channels]
    int64_t channels;
    int tokens;
    float *out;                // [tokens, channels]: the mean, and the sum of coordinates times directions
    int64_t stride;            // of `out`: all channels of a token
};

using Multiply = void (*)(const Product &);

// The rotation of a token's heads; pair i is (i, i + half), and what is behind the pairs is copied.
struct Turn {
    const float *in;             // [heads, size]
    const float *cosine, *sine;  // [half]
    int64_t half, heads, size;
    float *out;                  // [heads, size]
};

using Rotate = void (*)(const Turn &);

// Rounds to the nearest, of two to the even one, as PyTorch does.
using Narrow = void (*)(const float *in, int64_t count, uint16_t *out);

#ifdef RESTORE_X86
void multiply_avx512(const Product &);
void rotate_avx512(const Turn &);
void multiply_avx2(const Product &);
void rotate_avx2(const Turn &);
void bfloat16_avx512(const float *, int64_t, uint16_t *);
void bfloat16_avx2(const float *, int64_t, uint16_t *);
void float16_avx512(const float *, int64_t, uint16_t *);
void float16_avx2(const float *, int64_t, uint16_t *);
#endif
void multiply_generic(const Product &);
void rotate_generic(const Turn &);
void bfloat16_generic(const float *, int64_t, uint16_t *);
void float16_generic(const float *, int64_t, uint16_t *);

}  // namespace restore
