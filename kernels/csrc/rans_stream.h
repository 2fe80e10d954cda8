// Opening and ending a coded stream: what is the same on all instruction sets, and so may use the standard library.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "rans.h"

namespace rans {

// In a stream: states, number of words, number of escapes, words, escapes; all little-endian.
constexpr int64_t kHeader = 4 * (kLanes + 2);

class OpenStream : public Stream {
public:
    // False where the lengths do not fit.
    bool open(const uint8_t *data, int64_t size) {
        if (size < kHeader || size % 2 != 0) return false;
        uint32_t counts[2];
        std::memcpy(states, data, sizeof states);
        std::memcpy(counts, data + sizeof states, sizeof counts);
        const int64_t word_count = counts[0], escape_count = counts[1];
        if (kHeader + 2 * (word_count + escape_count) != size) return false;
        body_.resize(word_count + escape_count);
        if (!body_.empty()) std::memcpy(body_.data(), data + kHeader, size - kHeader);
        words = body_.data();
        words_end = words + word_count;
        escapes = reinterpret_cast<const int16_t *>(words_end);
        escapes_end = escapes + escape_count;
        return true;
    }

    // Whether it was decoded to its end: without words or escapes left, in the final state.
    bool ended() const {
        for (const uint32_t state : states)
            if (state != kLowest) return false;
        return words == words_end && escapes == escapes_end;
    }

private:
    std::vector<uint16_t> body_;  // aligned, which `data` need not be
};

}  // namespace rans
