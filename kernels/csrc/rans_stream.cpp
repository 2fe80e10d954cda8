// Opening and ending a coded stream: what is the same on all instruction sets.

#include <cstring>

#include "rans.h"

namespace rans {

bool Stream::open(const uint8_t *data, int64_t size) {
    if (size < kHeader || size % 2 != 0) return false;
    uint32_t counts[2];
    std::memcpy(states, data, sizeof states);
    std::memcpy(counts, data + sizeof states, sizeof counts);
    const int64_t word_count = counts[0], escape_count = counts[1];
    if (kHeader + 2 * (word_count + escape_count) != size) return false;
    body.resize(word_count + escape_count);
    if (!body.empty()) std::memcpy(body.data(), data + kHeader, size - kHeader);
    words = body.data();
    words_end = words + word_count;
    escapes = reinterpret_cast<const int16_t *>(words_end);
    escapes_end = escapes + escape_count;
    return true;
}

bool Stream::ended() const {
    for (const uint32_t state : states)
        if (state != kLowest) return false;
    return words == words_end && escapes == escapes_end;
}

}  // namespace rans
