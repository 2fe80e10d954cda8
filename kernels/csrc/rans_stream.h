// Opening and ending a coded stream: what is the same on all instruction sets, and so may use the standard library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rans.h"

namespace rans {

// In a stream: a state for each lane that has rows, and the words; all little-endian.
class OpenStream : public Stream {
public:
    // Opens a matrix of so many rows; false where it is too short. It may be opened again, for another one.
    bool open(const uint8_t *data, int64_t size, int64_t rows) {
        const int64_t header = sizeof(uint32_t) * std::min<int64_t>(rows, kLanes);
        if (size < header || size % 2 != 0) return false;
        std::fill(states, states + kLanes, kLowest);
        if (header > 0) std::memcpy(states, data, header);
        const int64_t count = (size - header) / 2;
        if (static_cast<int64_t>(body_.size()) < count + kPadding) body_.resize(count + kPadding);
        if (count > 0) std::memcpy(body_.data(), data + header, 2 * count);
        words = body_.data();
        words_end = words + count;
        return true;
    }

    // Whether it was decoded to its end: without words left, in the final state.
    bool ended() const {
        for (const uint32_t state : states)
            if (state != kLowest) return false;
        return words == words_end;
    }

private:
    std::vector<uint16_t> body_;  // aligned, which `data` need not be
};

}  // namespace rans
