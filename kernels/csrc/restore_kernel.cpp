// The inverse transform of a few tokens, the rotation of K, and the narrower types that they may be written in. A tile
// of tokens times channels is held in registers while all coordinates are gone through, so that each coordinate and
// each direction is read once per tile.
//
// This file is compiled once per instruction set. It must not use inline functions of the standard library: the linker
// keeps one copy of those, which could be the one with instructions that the machine lacks.

#include "restore.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace restore {
namespace {

constexpr int kWidth = RESTORE_LANES;
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

constexpr int kTokens = RESTORE_TOKENS;  // times kVectors: the tile, which must fit the registers
constexpr int kVectors = 2;

template <int Tokens>
inline void tile(const Product &p, int64_t channel, int token) {
    const float *coordinates = p.coordinates + token, *directions = p.directions + channel;
    float *out = p.out + token * p.stride + channel;
    Vector sums[Tokens][kVectors];
    for (int v = 0; v < kVectors; ++v) {
        const Vector start = *reinterpret_cast<const Vector *>(p.mean + channel + v * kWidth);
        for (int t = 0; t < Tokens; ++t) sums[t][v] = start;
    }
    for (int64_t i = 0; i < p.count; ++i) {
        Vector direction[kVectors];
        for (int v = 0; v < kVectors; ++v)
            direction[v] = *reinterpret_cast<const Vector *>(directions + i * p.channels + v * kWidth);
        for (int t = 0; t < Tokens; ++t)
            for (int v = 0; v < kVectors; ++v) sums[t][v] += direction[v] * coordinates[i * kBlock + t];
    }
    for (int t = 0; t < Tokens; ++t)
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector *>(out + t * p.stride + v * kWidth) = sums[t][v];
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Adding half of what is cut off, less one where the last bit kept is even, rounds; the carry may reach the exponent.
inline uint16_t to_float16(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // no number
    if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and more
    if (magnitude < 0x38800000) {
        // Less than 2^-14: added to 0.5, whose last bit is the smallest float16, the sum's last bits are the result.
        float small;
        __builtin_memcpy(&small, &magnitude, sizeof small);
        return static_cast<uint16_t>(sign | (bits_of(small + 0.5f) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

}  // namespace

void RESTORE_BFLOAT16(const float *in, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = bits_of(in[i]);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        out[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

void RESTORE_FLOAT16(const float *in, int64_t count, uint16_t *out) {
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; ++i) out[i] = to_float16(in[i]);
}

void RESTORE_ROTATE(const Turn &turn) {
    const float *in = turn.in;
    float *__restrict out = turn.out;
    const int64_t half = turn.half;
    for (int64_t head = 0; head < turn.heads; ++head, in += turn.size, out += turn.size) {
        for (int64_t i = 0; i < half; ++i) {
            out[i] = in[i] * turn.cosine[i] - in[i + half] * turn.sine[i];
            out[i + half] = in[i + half] * turn.cosine[i] + in[i] * turn.sine[i];
        }
        for (int64_t i = 2 * half; i < turn.size; ++i) out[i] = in[i];
    }
}

void RESTORE_MULTIPLY(const Product &p) {
    const int64_t whole = p.channels / (kVectors * kWidth) * (kVectors * kWidth);
    for (int64_t channel = 0; channel < whole; channel += kVectors * kWidth) {
        int token = 0;
        for (; token + kTokens <= p.tokens; token += kTokens) tile<kTokens>(p, channel, token);
        for (; token < p.tokens; ++token) tile<1>(p, channel, token);
    }
    for (int token = 0; token < p.tokens; ++token)
        for (int64_t channel = whole; channel < p.channels; ++channel) {
            float sum = p.mean[channel];
            for (int64_t i = 0; i < p.count; ++i)
                sum += p.coordinates[i * kBlock + token] * p.directions[i * p.channels + channel];
            p.out[token * p.stride + channel] = sum;
        }
}

}  // namespace restore
