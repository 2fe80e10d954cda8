// The Python extension `_carry`: what changed in a chunk's taught tokens is added to its other tokens, weighed. The
// product is the inverse transform's of restoring, with weights for coordinates and changes for directions.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "restore_versions.h"

namespace nb = nanobind;

namespace carry {
namespace {

using restore::check;
using restore::kBlock;
using restore::Version;

template <typename T, int D>
using In = nb::ndarray<nb::ro, const T, nb::device::cpu, nb::ndim<D>, nb::c_contig>;
using Rows = nb::ndarray<nb::device::cpu, nb::ndim<3>>;

// A chunk: its rows' begin and end, and weights [rows, taught].
using Lesson = std::tuple<int64_t, int64_t, In<float, 2>>;

// K or V: rows of `channels` float32s, or bfloat16s where it is narrow.
struct Values {
    uint8_t *data;
    int64_t row_bytes;
    bool narrow;

    Values(const Rows &rows, bool narrow)
        : data(static_cast<uint8_t *>(rows.data())), row_bytes(rows.stride(0) * rows.itemsize()), narrow(narrow) {}

    uint8_t *row(int64_t i) const { return data + i * row_bytes; }

    void add_to(int64_t i, int64_t channels, float *sum, float sign) const {
        if (!narrow) {
            const float *from = reinterpret_cast<const float *>(row(i));
            for (int64_t c = 0; c < channels; ++c) sum[c] += sign * from[c];
            return;
        }
        const uint16_t *from = reinterpret_cast<const uint16_t *>(row(i));
        for (int64_t c = 0; c < channels; ++c) {
            const uint32_t bits = static_cast<uint32_t>(from[c]) << 16;
            float x;
            std::memcpy(&x, &bits, 4);
            sum[c] += sign * x;
        }
    }
};

// K's rotation: rows of cosines and sines, by position; no columns where K is not rotated.
struct Angles {
    In<float, 2> cosine, sine;

    int64_t half() const { return cosine.shape(1); }
};

// What changed in taught token `j`, at `position`: [2, channels], K's rotated back.
void difference(const Values now[2], const Values before[2], int64_t j, int64_t position, const Angles &angles,
                int64_t heads, int64_t size, const Version &version, std::vector<float> &scratch, float *out) {
    const int64_t channels = heads * size, half = angles.half();
    float *key = scratch.data(), *sine = key + channels;
    std::fill(key, key + channels, 0.0f);
    now[0].add_to(position, channels, key, 1.0f);
    before[0].add_to(j, channels, key, -1.0f);
    for (int64_t i = 0; i < half; ++i) sine[i] = -angles.sine.data()[position * half + i];
    version.rotate({key, angles.cosine.data() + position * half, sine, half, heads, size, out});
    std::fill(out + channels, out + 2 * channels, 0.0f);
    now[1].add_to(position, channels, out + channels, 1.0f);
    before[1].add_to(j, channels, out + channels, -1.0f);
}

void add_row(const Values &into, int64_t row, int64_t channels, const Version &version, float *carried) {
    into.add_to(row, channels, carried, 1.0f);
    if (into.narrow)
        version.bfloat16(carried, channels, reinterpret_cast<uint16_t *>(into.row(row)));
    else
        std::memcpy(into.row(row), carried, sizeof(float) * channels);
}

void take(const Rows &rows, const Rows &like, int64_t itemsize, const char *message) {
    check(static_cast<int64_t>(rows.itemsize()) == itemsize && rows.shape(1) == like.shape(1) &&
              rows.shape(2) == like.shape(2) && rows.stride(2) == 1 &&
              rows.stride(1) == static_cast<int64_t>(rows.shape(2)),
          message);
}

void carry(Rows key, Rows value, Rows key_before, Rows value_before, In<int64_t, 1> taught,
           const std::vector<Lesson> &lessons, In<float, 2> cosine, In<float, 2> sine, bool narrow, int threads,
           const std::string &isa) {
    const Version &version = restore::version_named(isa);
    const int64_t tokens = key.shape(0), heads = key.shape(1), size = key.shape(2), channels = heads * size;
    for (const Rows *rows : {&key, &value, &key_before, &value_before})
        take(*rows, key, narrow ? 2 : 4, "K and V must be of one type, a token's channels in a row");
    check(static_cast<int64_t>(value.shape(0)) == tokens, "key and value must have as many rows");
    const int64_t known = taught.shape(0);
    check(static_cast<int64_t>(key_before.shape(0)) == known && static_cast<int64_t>(value_before.shape(0)) == known,
          "there must be a row from before for each taught token");
    const Angles angles{cosine, sine};
    check(2 * angles.half() <= size && sine.shape(0) == cosine.shape(0) && sine.shape(1) == cosine.shape(1),
          "no more than a head's dimensions can be rotated");
    const int64_t positions = angles.half() > 0 ? std::min<int64_t>(tokens, cosine.shape(0)) : tokens;
    for (int64_t j = 0; j < known; ++j)
        check(taught(j) >= 0 && taught(j) < positions, "taught tokens must have a row, and an angle");

    struct Item {
        int64_t row, rows, first, count;  // of changes
        const float *weights;             // [rows, count]
    };
    std::vector<Item> items;
    int64_t first = 0;
    for (const auto &[start, stop, weights] : lessons) {
        const int64_t rows = weights.shape(0), count = weights.shape(1);
        check(0 <= start && start <= stop && stop <= positions && rows == stop - start,
              "a chunk must have rows, angles, and as many weights");
        check(count <= known - first, "there must be as many taught tokens as weights");
        for (int64_t row = start; row < stop; row += kBlock)
            items.push_back({row, std::min<int64_t>(kBlock, stop - row), first, count,
                             weights.data() + (row - start) * count});
        first += count;
    }
    check(first == known, "there must be as many taught tokens as weights");

    nb::gil_scoped_release unlocked;
    const Values now[2] = {{key, narrow}, {value, narrow}}, before[2] = {{key_before, narrow}, {value_before, narrow}};
    std::vector<float> changed(known * 2 * channels), nothing(2 * channels, 0.0f);
    std::atomic<int64_t> next_taught{0}, next_item{0};
    attend::parallel(threads, [&](int) {
        std::vector<float> scratch(channels + angles.half());
        for (int64_t j; (j = next_taught++) < known;)
            difference(now, before, j, taught(j), angles, heads, size, version, scratch,
                       changed.data() + j * 2 * channels);
    });
    attend::parallel(threads, [&](int) {
        std::vector<float> weights, carried(kBlock * 2 * channels), turned(channels);
        for (int64_t i; (i = next_item++) < static_cast<int64_t>(items.size());) {
            const Item &item = items[i];
            weights.resize(item.count * kBlock);
            for (int64_t r = 0; r < item.rows; ++r)
                for (int64_t j = 0; j < item.count; ++j) weights[j * kBlock + r] = item.weights[r * item.count + j];
            version.multiply({weights.data(), item.count, changed.data() + item.first * 2 * channels, nothing.data(),
                              2 * channels, static_cast<int>(item.rows), carried.data(), 2 * channels});
            for (int64_t r = 0; r < item.rows; ++r) {
                const int64_t row = item.row + r, at = row * angles.half();
                float *own = carried.data() + r * 2 * channels;
                version.rotate({own, angles.cosine.data() + at, angles.sine.data() + at, angles.half(), heads, size,
                                turned.data()});
                add_row(now[0], row, channels, version, turned.data());
                add_row(now[1], row, channels, version, own + channels);
            }
        }
    });
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Version &version : restore::versions()) names.push_back(version.name);
    return names;
}

}  // namespace
}  // namespace carry

NB_MODULE(_carry, m) {
    using namespace nb::literals;
    // No conversions of what is written: a copy would be.
    m.def("carry", &carry::carry, "key"_a.noconvert(), "value"_a.noconvert(), "key_before"_a, "value_before"_a,
          "taught"_a, "lessons"_a, "cosine"_a, "sine"_a, "narrow"_a, "threads"_a, nb::kw_only(), "isa"_a = "");
    m.def("instruction_sets", &carry::instruction_sets, "What `isa` may be on this machine, the default first.");
}
