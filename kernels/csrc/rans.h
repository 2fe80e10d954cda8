// What the parts of the entropy coder share. See rans_kernel.cpp for the method.
#pragma once

#include <cstdint>

namespace rans {

constexpr int kLanes = 16;
constexpr int kProbBits = 12;
constexpr int kSlots = 1 << kProbBits;
constexpr uint32_t kLowest = 1u << 16;  // a state is at least this

// What the columns are coded with.
struct Tables {
    const uint8_t *distribution;     // [columns]
    int64_t columns;
    const uint32_t *slots;           // [distributions, kSlots]: symbol 8 bits, frequency 12, offset 12, from the top
    int64_t symbols;                 // of a distribution: -largest ... largest, and the escape
    float step;                      // what a symbol is multiplied by
};

// What is left of one coded matrix, decoded in blocks of kLanes rows, each column by column. Behind `words_end` there
// are kPadding words more, which may be read, though not used.
struct Stream {
    const uint16_t *words, *words_end;
    uint32_t states[kLanes];
};

constexpr int kPadding = kLanes;

// Decodes the next block, of `rows` rows, to out[column * stride + row]; false where the stream is used up.
using DecodeBlock = bool (*)(Stream &, const Tables &, int rows, float *out, int64_t stride);

#ifdef RANS_X86
bool decode_avx512(Stream &, const Tables &, int rows, float *out, int64_t stride);
bool decode_avx2(Stream &, const Tables &, int rows, float *out, int64_t stride);
#endif
bool decode_generic(Stream &, const Tables &, int rows, float *out, int64_t stride);

}  // namespace rans
