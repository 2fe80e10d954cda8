// What the parts of the entropy coder share. See rans_kernel.cpp for the method.
#pragma once

#include <cstdint>
#include <vector>

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
};

// One coded matrix, decoded in groups of kLanes rows, each column by column.
struct Stream {
    bool open(const uint8_t *data, int64_t size);  // false where its lengths do not fit
    bool ended() const;  // whether it was decoded to its end: without words or escapes left, in the final state

    std::vector<uint16_t> body;  // aligned, which `data` need not be
    const uint16_t *words = nullptr, *words_end = nullptr;
    const int16_t *escapes = nullptr, *escapes_end = nullptr;
    uint32_t states[kLanes];
};

// Decodes the next group, of `rows` rows, to out[column * stride + row]; false where the stream is used up.
using DecodeGroup = bool (*)(Stream &, const Tables &, int rows, float *out, int64_t stride);

#ifdef RANS_X86
bool decode_avx512(Stream &, const Tables &, int rows, float *out, int64_t stride);
bool decode_avx2(Stream &, const Tables &, int rows, float *out, int64_t stride);
#endif
bool decode_generic(Stream &, const Tables &, int rows, float *out, int64_t stride);

// In a stream: states, number of words, number of escapes, words, escapes; all little-endian.
constexpr int64_t kHeader = 4 * (kLanes + 2);

}  // namespace rans
