// What the parts of the entropy coder share. See rans_kernel.cpp for the method.
#pragma once

#include <cstdint>

namespace rans {

constexpr int kLanes = 16;
constexpr int kProbBits = 12;
constexpr int kSlots = 1 << kProbBits;
constexpr uint32_t kLowest = 1u << 16;  // a state is at least this

// One matrix to decode: `rows` in groups of kLanes, each group column by column.
struct Stream {
    const uint16_t *words;
    int64_t word_count;
    const int16_t *escapes;
    int64_t escape_count;
    const uint32_t *states;          // [kLanes], as the encoder left them
    int64_t rows, columns;
    const uint8_t *distribution;     // [columns]
    const uint32_t *slots;           // [distributions, kSlots]: symbol 8 bits, frequency 12, offset 12, from the top
    int64_t symbols;                 // of a distribution: -largest ... largest, and the escape
    float *out;                      // [columns, rows]
};

// Decodes; false where the stream does not fit: too few or too many words or escapes, or another final state.
using Decode = bool (*)(const Stream &);

#ifdef RANS_X86
bool decode_avx512(const Stream &);
#endif
bool decode_generic(const Stream &);

}  // namespace rans
