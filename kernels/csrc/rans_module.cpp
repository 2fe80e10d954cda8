// The Python extension `_rans`: checks, encoding, and the choice of the instruction set for decoding.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "rans_stream.h"

namespace nb = nanobind;

namespace rans {
namespace {

std::vector<std::pair<std::string, DecodeGroup>> decoders() {
    std::vector<std::pair<std::string, DecodeGroup>> found;
#ifdef RANS_X86
    if (isa::avx512()) found.emplace_back("avx512", &decode_avx512);
    if (isa::avx2()) found.emplace_back("avx2", &decode_avx2);
#endif
    found.emplace_back("generic", &decode_generic);
    return found;
}

DecodeGroup decoder_named(const std::string &isa) {
    static const auto found = decoders();
    for (const auto &[name, decode] : found)
        if (isa.empty() || isa == name) return decode;
    throw std::invalid_argument("isa: this machine cannot run '" + isa + "'");
}

void check(bool ok, const char *message) {
    if (!ok) throw std::invalid_argument(message);
}

template <typename T, int D>
using In = nb::ndarray<nb::ro, const T, nb::device::cpu, nb::ndim<D>, nb::c_contig>;
template <typename T, int D>
using Out = nb::ndarray<T, nb::device::cpu, nb::ndim<D>, nb::c_contig>;

void check_frequencies(In<uint16_t, 2> frequencies) {
    const size_t count = frequencies.shape(1);
    check(count >= 2 && count <= 256 && count % 2 == 0, "a distribution has an even number of symbols, at most 256");
    for (size_t d = 0; d < frequencies.shape(0); ++d) {
        uint32_t sum = 0;
        for (size_t s = 0; s < count; ++s) sum += frequencies(d, s);
        check(sum == kSlots && frequencies(d, count - 1) > 0 && frequencies(d, count - 1) < kSlots,
              "frequencies must add up to 4096, and the escape's must be neither 0 nor 4096");
    }
}

nb::bytes encode(In<int16_t, 2> symbols, In<uint8_t, 1> distribution, In<uint16_t, 2> frequencies) {
    const int64_t columns = symbols.shape(0), rows = symbols.shape(1), count = frequencies.shape(1);
    check(distribution.shape(0) == symbols.shape(0), "distribution must have one element per column");
    for (int64_t c = 0; c < columns; ++c)
        check(distribution(c) < frequencies.shape(0), "distribution must name one of the distributions");
    check_frequencies(frequencies);
    std::vector<uint8_t> stream;
    {
        nb::gil_scoped_release unlocked;
        const int64_t largest = (count - 2) / 2;
        std::vector<uint32_t> starts(frequencies.shape(0) * count);
        for (size_t d = 0; d < frequencies.shape(0); ++d)
            for (int64_t s = 0, at = 0; s < count; at += frequencies(d, s++)) starts[d * count + s] = at;
        // Decoding runs forwards, so encoding runs backwards: words and escapes come out last first.
        std::vector<uint16_t> words;
        std::vector<int16_t> escapes;
        words.reserve(rows * columns / 8 + 64);
        uint32_t states[kLanes];
        for (uint32_t &state : states) state = kLowest;
        for (int64_t row = (rows - 1) / kLanes * kLanes; row >= 0; row -= kLanes) {
            const int64_t lanes = std::min<int64_t>(kLanes, rows - row);
            for (int64_t c = columns - 1; c >= 0; --c) {
                const uint16_t *frequency = &frequencies(distribution(c), 0);
                const uint32_t *start = starts.data() + distribution(c) * count;
                for (int64_t lane = lanes - 1; lane >= 0; --lane) {
                    const int16_t value = symbols(c, row + lane);
                    int64_t s = value + largest;
                    if (s < 0 || s >= count - 1 || frequency[s] == 0) {
                        s = count - 1;
                        escapes.push_back(value);
                    }
                    const uint32_t f = frequency[s];
                    uint32_t &x = states[lane];
                    if (static_cast<uint64_t>(x) >= static_cast<uint64_t>(f) << (32 - kProbBits)) {
                        words.push_back(static_cast<uint16_t>(x));
                        x >>= 16;
                    }
                    x = ((x / f) << kProbBits) + x % f + start[s];
                }
            }
        }
        stream.resize(kHeader + 2 * (words.size() + escapes.size()));
        std::memcpy(stream.data(), states, sizeof states);
        const uint32_t sizes[2] = {static_cast<uint32_t>(words.size()), static_cast<uint32_t>(escapes.size())};
        std::memcpy(stream.data() + sizeof states, sizes, sizeof sizes);
        uint8_t *at = stream.data() + kHeader;
        for (auto word = words.rbegin(); word != words.rend(); ++word, at += 2) std::memcpy(at, &*word, 2);
        for (auto value = escapes.rbegin(); value != escapes.rend(); ++value, at += 2) std::memcpy(at, &*value, 2);
    }
    return nb::bytes(reinterpret_cast<const char *>(stream.data()), stream.size());
}

bool decode(In<uint8_t, 1> data, In<uint8_t, 1> distribution, In<uint32_t, 2> slots, int64_t symbols, Out<float, 2> out,
            const std::string &isa) {
    check(distribution.shape(0) == out.shape(0), "distribution must have one element per column");
    check(slots.shape(1) == kSlots, "slots must be [distributions, 4096]");
    for (size_t c = 0; c < distribution.shape(0); ++c)
        check(distribution(c) < slots.shape(0), "distribution must name one of the distributions");
    const DecodeGroup decode_group = decoder_named(isa);

    nb::gil_scoped_release unlocked;
    OpenStream stream;
    if (!stream.open(data.data(), data.shape(0))) return false;
    const Tables tables{distribution.data(), static_cast<int64_t>(distribution.shape(0)), slots.data(), symbols};
    const int64_t rows = out.shape(1);
    for (int64_t row = 0; row < rows; row += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, rows - row));
        if (!decode_group(stream, tables, lanes, out.data() + row, rows)) return false;
    }
    return stream.ended();
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto &[name, decode] : decoders()) names.push_back(name);
    return names;
}

}  // namespace
}  // namespace rans

NB_MODULE(_rans, m) {
    using namespace nb::literals;
    // No conversions: a converted `out` would be a copy, and converted symbols other symbols.
    m.def("encode", &rans::encode, "symbols"_a.noconvert(), "distribution"_a.noconvert(), "frequencies"_a.noconvert());
    m.def("decode", &rans::decode, "data"_a.noconvert(), "distribution"_a.noconvert(), "slots"_a.noconvert(),
          "symbols"_a, "out"_a.noconvert(), nb::kw_only(), "isa"_a = "");
    m.def("instruction_sets", &rans::instruction_sets, "What `isa` may be on this machine, the default first.");
}
