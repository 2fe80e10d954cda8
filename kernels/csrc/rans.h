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

// The next `rows` rows of a stream, to out[column * stride + row].
struct Block {
    Stream *in;
    const Tables *tables;
    int rows;
    float *out;
    int64_t stride;
};

// Decodes blocks of as many streams, two of them side by side: a stream alone waits for itself most of the time. False
// where a stream is used up.
using DecodeBlocks = bool (*)(const Block *blocks, int count);

#ifdef RANS_X86
bool decode_avx512(const Block *blocks, int count);
bool decode_avx2(const Block *blocks, int count);
#endif
bool decode_generic(const Block *blocks, int count);

}  // namespace rans
