// Decoding of interleaved range asymmetric numeral systems (Duda 2013, https://arxiv.org/abs/1311.2540; interleaving:
// Giesen 2014, https://arxiv.org/abs/1402.3392).
//
// Sixteen decoders share one stream of 16-bit words. Decoder i has row i of a block of sixteen rows; a step decodes one
// column, so all sixteen read the same distribution's table and a step is a handful of vector instructions. A decoder
// whose state falls below 2^16 takes the stream's next word, and then one that found the escape takes its integer from
// there; among decoders, the order is that of their rows.
//
// This file is compiled once per instruction set. It must not use inline functions of the standard library: the linker
// keeps one copy of those, which could be the one with instructions that the machine lacks.

#include "rans.h"

#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace rans {
namespace {

// The integers of the decoders that found the escape; false where the stream is used up.
inline bool take_escapes(unsigned found, const uint16_t *&words, const uint16_t *end, float step, float *target) {
    for (; found != 0; found &= found - 1) {
        if (words >= end) return false;
        target[__builtin_ctz(found)] = step * static_cast<float>(static_cast<int16_t>(*words++));
    }
    return true;
}

// One stream's decoders, for a block: `step` decodes the next column; false where the stream is used up. A step takes
// no more words than there are of padding, so it is enough to look before each whether they are used up.
#if defined(__AVX512F__)
class Decoders {
public:
    explicit Decoders(const Block &block)
        : block_(block),
          words_(block.in->words),
          distribution_(block.tables->distribution),
          out_(block.out),
          active_(static_cast<__mmask16>((1u << block.rows) - 1)),
          state_(_mm512_loadu_si512(block.in->states)) {}

    bool step() {
        const Tables &tables = *block_.tables;
        const __m512i low12 = _mm512_set1_epi32(0xfff);
        const int32_t escape = static_cast<int32_t>(tables.symbols - 1), largest = (escape - 1) / 2;
        if (words_ > block_.in->words_end) return false;
        const uint32_t *slots = tables.slots + *distribution_++ * static_cast<int64_t>(kSlots);
        const __m512i entry = _mm512_i32gather_epi32(_mm512_and_si512(state_, low12), slots, 4);
        const __m512i symbol = _mm512_srli_epi32(entry, 24);
        const __m512i next = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_and_si512(_mm512_srli_epi32(entry, 12), low12),
                                                                 _mm512_srli_epi32(state_, kProbBits)),
                                              _mm512_and_si512(entry, low12));
        state_ = _mm512_mask_mov_epi32(state_, active_, next);
        const __mmask16 hungry = _mm512_mask_cmplt_epu32_mask(active_, state_, _mm512_set1_epi32(kLowest));
        const __m512i ahead = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(words_)));
        state_ = _mm512_mask_or_epi32(state_, hungry, _mm512_slli_epi32(state_, 16),
                                      _mm512_maskz_expand_epi32(hungry, ahead));
        words_ += __builtin_popcount(hungry);
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(symbol, _mm512_set1_epi32(largest))),
                                           _mm512_set1_ps(tables.step));
        _mm512_mask_storeu_ps(out_, active_, value);
        const __mmask16 found = _mm512_mask_cmpeq_epi32_mask(active_, symbol, _mm512_set1_epi32(escape));
        if (found != 0 && !take_escapes(found, words_, block_.in->words_end, tables.step, out_)) return false;
        out_ += block_.stride;
        return true;
    }

    bool finish() {
        _mm512_storeu_si512(block_.in->states, state_);
        block_.in->words = words_;
        return words_ <= block_.in->words_end;
    }

private:
    const Block &block_;
    const uint16_t *words_;
    const uint8_t *distribution_;
    float *out_;
    const __mmask16 active_;
    __m512i state_;
};
#elif defined(__AVX2__)
// For each set of hungry decoders among eight, which of the next words each of them takes.
struct Taken {
    int32_t of[256][8];
    constexpr Taken() : of() {
        for (int set = 0; set < 256; ++set)
            for (int lane = 0, word = 0; lane < 8; ++lane) of[set][lane] = set >> lane & 1 ? word++ : 0;
    }
};
constexpr Taken kTaken;

class Decoders {
public:
    explicit Decoders(const Block &block)
        : block_(block), words_(block.in->words), distribution_(block.tables->distribution), out_(block.out) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), count = _mm256_set1_epi32(block.rows);
        active_[0] = _mm256_cmpgt_epi32(count, lane);
        active_[1] = _mm256_cmpgt_epi32(count, _mm256_add_epi32(lane, _mm256_set1_epi32(8)));
        for (int half = 0; half < 2; ++half)
            state_[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(block.in->states + 8 * half));
    }

    bool step() {
        const Tables &tables = *block_.tables;
        const int32_t escape = static_cast<int32_t>(tables.symbols - 1), largest = (escape - 1) / 2;
        if (words_ > block_.in->words_end) return false;
        const uint32_t *slots = tables.slots + *distribution_++ * static_cast<int64_t>(kSlots);
        unsigned found = 0;
        for (int half = 0; half < 2; ++half) {
            const __m256i symbol = step_of_eight(slots, active_[half], state_[half]);
            const __m256 value =
                _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(symbol, _mm256_set1_epi32(largest))),
                              _mm256_set1_ps(tables.step));
            _mm256_maskstore_ps(out_ + 8 * half, active_[half], value);
            const __m256i escaped =
                _mm256_and_si256(active_[half], _mm256_cmpeq_epi32(symbol, _mm256_set1_epi32(escape)));
            found |= static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(escaped))) << 8 * half;
        }
        if (found != 0 && !take_escapes(found, words_, block_.in->words_end, tables.step, out_)) return false;
        out_ += block_.stride;
        return true;
    }

    bool finish() {
        for (int half = 0; half < 2; ++half)
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(block_.in->states + 8 * half), state_[half]);
        block_.in->words = words_;
        return words_ <= block_.in->words_end;
    }

private:
    // A step of eight decoders: their symbols.
    inline __m256i step_of_eight(const uint32_t *slots, __m256i active, __m256i &state) {
        const __m256i low12 = _mm256_set1_epi32(0xfff);
        const __m256i entry =
            _mm256_i32gather_epi32(reinterpret_cast<const int *>(slots), _mm256_and_si256(state, low12), 4);
        const __m256i next =
            _mm256_add_epi32(_mm256_mullo_epi32(_mm256_and_si256(_mm256_srli_epi32(entry, 12), low12),
                                                _mm256_srli_epi32(state, kProbBits)),
                             _mm256_and_si256(entry, low12));
        state = _mm256_blendv_epi8(state, next, active);
        const __m256i hungry =
            _mm256_and_si256(active, _mm256_cmpeq_epi32(_mm256_srli_epi32(state, 16), _mm256_setzero_si256()));
        const int set = _mm256_movemask_ps(_mm256_castsi256_ps(hungry));
        const __m256i ahead = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(words_)));
        const __m256i taken =
            _mm256_permutevar8x32_epi32(ahead, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(kTaken.of[set])));
        state = _mm256_blendv_epi8(state, _mm256_or_si256(_mm256_slli_epi32(state, 16), taken), hungry);
        words_ += __builtin_popcount(set);
        return _mm256_srli_epi32(entry, 24);
    }

    const Block &block_;
    const uint16_t *words_;
    const uint8_t *distribution_;
    float *out_;
    __m256i active_[2], state_[2];
};
#else
class Decoders {
public:
    explicit Decoders(const Block &block)
        : block_(block), words_(block.in->words), distribution_(block.tables->distribution), out_(block.out) {}

    bool step() {
        const Tables &tables = *block_.tables;
        const int32_t escape = static_cast<int32_t>(tables.symbols - 1), largest = (escape - 1) / 2;
        const uint32_t *slots = tables.slots + *distribution_++ * static_cast<int64_t>(kSlots);
        unsigned found = 0;
        for (int row = 0; row < block_.rows; ++row) {
            uint32_t &state = block_.in->states[row];
            const uint32_t entry = slots[state & (kSlots - 1)];
            const int32_t symbol = static_cast<int32_t>(entry >> 24);
            state = (entry >> 12 & 0xfff) * (state >> kProbBits) + (entry & 0xfff);
            if (state < kLowest) {
                if (words_ >= block_.in->words_end) return false;
                state = state << 16 | *words_++;
            }
            out_[row] = tables.step * static_cast<float>(symbol - largest);
            if (symbol == escape) found |= 1u << row;
        }
        if (found != 0 && !take_escapes(found, words_, block_.in->words_end, tables.step, out_)) return false;
        out_ += block_.stride;
        return true;
    }

    bool finish() {
        block_.in->words = words_;
        return words_ <= block_.in->words_end;
    }

private:
    const Block &block_;
    const uint16_t *words_;
    const uint8_t *distribution_;
    float *out_;
};
#endif

bool decode_one(const Block &block) {
    Decoders own(block);
    for (int64_t left = block.tables->columns; left > 0; --left)
        if (!own.step()) return false;
    return own.finish();
}

bool decode_two(const Block &one, const Block &other) {
    Decoders first(one), second(other);
    const int64_t columns = one.tables->columns, others = other.tables->columns;
    const int64_t both = columns < others ? columns : others;
    for (int64_t column = 0; column < both; ++column) {
        if (!first.step()) return false;
        if (!second.step()) return false;
    }
    for (int64_t column = both; column < columns; ++column)
        if (!first.step()) return false;
    for (int64_t column = both; column < others; ++column)
        if (!second.step()) return false;
    return first.finish() && second.finish();
}

}  // namespace

bool RANS_DECODE(const Block *blocks, int count) {
    for (; count >= 2; count -= 2, blocks += 2)
        if (!decode_two(blocks[0], blocks[1])) return false;
    return count == 0 || decode_one(*blocks);
}

}  // namespace rans
