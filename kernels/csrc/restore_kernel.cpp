// The inverse transform of a few tokens. A tile of tokens times channels is held in registers while all coordinates are
// gone through, so that each coordinate and each direction is read once per tile.
//
// This file is compiled once per instruction set. It must not use inline functions of the standard library: the linker
// keeps one copy of those, which could be the one with instructions that the machine lacks.

#include "restore.h"

namespace restore {
namespace {

constexpr int kWidth = RESTORE_LANES;
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

constexpr int kTokens = RESTORE_TOKENS;  // times kVectors: the tile, which must fit the registers
constexpr int kVectors = 2;

template <int Tokens>
inline void tile(const Product &p, int64_t channel, int token) {
    const float *coordinates = p.coordinates + token, *directions = p.directions + channel;
    float *out = p.out + token * p.channels + channel;
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
            for (int v = 0; v < kVectors; ++v) sums[t][v] += direction[v] * coordinates[i * kGroup + t];
    }
    for (int t = 0; t < Tokens; ++t)
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector *>(out + t * p.channels + v * kWidth) = sums[t][v];
}

}  // namespace

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
                sum += p.coordinates[i * kGroup + token] * p.directions[i * p.channels + channel];
            p.out[token * p.channels + channel] = sum;
        }
}

}  // namespace restore
