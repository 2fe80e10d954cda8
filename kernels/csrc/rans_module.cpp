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

std::vector<std::pair<std::string, DecodeBlocks>> decoders() {
    std::vector<std::pair<std::string, DecodeBlocks>> found;
#ifdef RANS_X86
    if (isa::avx512()) found.emplace_back("avx512", &decode_avx512);
    if (isa::avx2()) found.emplace_back("avx2", &decode_avx2);
#endif
    found.emplace_back("generic", &decode_generic);
    return found;
}

DecodeBlocks decoder_named(const std::string &isa) {
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

// What encoding needs of the distributions, and room for what it writes.
struct Encoder {
    const uint16_t *frequencies;  // [distributions, count]
    std::vector<uint32_t> starts;
    int64_t count;
    std::vector<uint16_t> words;

    explicit Encoder(In<uint16_t, 2> of)
        : frequencies(of.data()), starts(of.shape(0) * of.shape(1)), count(static_cast<int64_t>(of.shape(1))) {
        for (size_t d = 0; d < of.shape(0); ++d)
            for (int64_t s = 0, at = 0; s < count; at += of(d, s++)) starts[d * count + s] = at;
    }

    // A stream of rows `from` to `to` of symbols [columns, rows].
    std::string encode(const In<int16_t, 2> &symbols, const uint8_t *distribution, int64_t from, int64_t to) {
        const int64_t columns = symbols.shape(0), largest = (count - 2) / 2;
        uint32_t states[kLanes];
        for (uint32_t &state : states) state = kLowest;
        words.clear();
        // Decoding runs forwards, so encoding runs backwards: words come out last first.
        for (int64_t row = from + (to - from - 1) / kLanes * kLanes; row >= from; row -= kLanes) {
            const int64_t lanes = std::min<int64_t>(kLanes, to - row);
            for (int64_t c = columns - 1; c >= 0; --c) {
                const uint16_t *frequency = frequencies + distribution[c] * count;
                const uint32_t *start = starts.data() + distribution[c] * count;
                const int16_t *values = &symbols(c, row);
                int64_t found[kLanes];
                for (int64_t lane = lanes - 1; lane >= 0; --lane) {
                    int64_t s = values[lane] + largest;
                    if (s < 0 || s >= count - 1 || frequency[s] == 0) {
                        s = count - 1;
                        words.push_back(static_cast<uint16_t>(values[lane]));
                    }
                    found[lane] = s;
                }
                for (int64_t lane = lanes - 1; lane >= 0; --lane) {
                    const uint32_t f = frequency[found[lane]];
                    uint32_t &x = states[lane];
                    if (static_cast<uint64_t>(x) >= static_cast<uint64_t>(f) << (32 - kProbBits)) {
                        words.push_back(static_cast<uint16_t>(x));
                        x >>= 16;
                    }
                    x = ((x / f) << kProbBits) + x % f + start[found[lane]];
                }
            }
        }
        const size_t header = sizeof(uint32_t) * std::min<int64_t>(kLanes, to - from);
        std::string stream(header + 2 * words.size(), '\0');
        std::memcpy(stream.data(), states, header);
        char *at = stream.data() + header;
        for (auto word = words.rbegin(); word != words.rend(); ++word, at += 2) std::memcpy(at, &*word, 2);
        return stream;
    }
};

nb::list encode(In<int16_t, 2> symbols, In<uint8_t, 1> distribution, In<uint16_t, 2> frequencies, int64_t group) {
    const int64_t columns = symbols.shape(0), rows = symbols.shape(1);
    check(distribution.shape(0) == symbols.shape(0), "distribution must have one element per column");
    for (int64_t c = 0; c < columns; ++c)
        check(distribution(c) < frequencies.shape(0), "distribution must name one of the distributions");
    check(group > 0, "a group has at least one row");
    check_frequencies(frequencies);
    std::vector<std::string> streams;
    {
        nb::gil_scoped_release unlocked;
        Encoder encoder(frequencies);
        for (int64_t row = 0; row < rows; row += group)
            streams.push_back(encoder.encode(symbols, distribution.data(), row, std::min(rows, row + group)));
    }
    nb::list written;
    for (const std::string &stream : streams) written.append(nb::bytes(stream.data(), stream.size()));
    return written;
}

bool decode(In<uint8_t, 1> data, In<uint8_t, 1> distribution, In<uint32_t, 2> slots, int64_t symbols, Out<float, 2> out,
            const std::string &isa) {
    check(distribution.shape(0) == out.shape(0), "distribution must have one element per column");
    check(slots.shape(1) == kSlots, "slots must be [distributions, 4096]");
    for (size_t c = 0; c < distribution.shape(0); ++c)
        check(distribution(c) < slots.shape(0), "distribution must name one of the distributions");
    const DecodeBlocks decode_blocks = decoder_named(isa);

    nb::gil_scoped_release unlocked;
    const int64_t rows = out.shape(1);
    OpenStream stream;
    if (!stream.open(data.data(), data.shape(0), rows)) return false;
    const Tables tables{distribution.data(), static_cast<int64_t>(distribution.shape(0)), slots.data(), symbols, 1.0f};
    for (int64_t row = 0; row < rows; row += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, rows - row));
        const Block block{&stream, &tables, lanes, out.data() + row, rows};
        if (!decode_blocks(&block, 1)) return false;
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
    m.def("encode", &rans::encode, "symbols"_a.noconvert(), "distribution"_a.noconvert(), "frequencies"_a.noconvert(),
          "group"_a);
    m.def("decode", &rans::decode, "data"_a.noconvert(), "distribution"_a.noconvert(), "slots"_a.noconvert(),
          "symbols"_a, "out"_a.noconvert(), nb::kw_only(), "isa"_a = "");
    m.def("instruction_sets", &rans::instruction_sets, "What `isa` may be on this machine, the default first.");
}
