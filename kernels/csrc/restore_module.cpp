// The Python extension `_restore`: checks, the choice of the instruction set, and the order of work. Layers are
// independent, so each is one thread's.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "rans_stream.h"
#include "restore.h"

namespace nb = nanobind;

namespace restore {
namespace {

struct Version {
    std::string name;
    rans::DecodeGroup decode;
    Multiply multiply;
};

std::vector<Version> versions() {
    std::vector<Version> found;
#ifdef RESTORE_X86
    if (isa::avx512()) found.push_back({"avx512", &rans::decode_avx512, &multiply_avx512});
    if (isa::avx2()) found.push_back({"avx2", &rans::decode_avx2, &multiply_avx2});
#endif
    found.push_back({"generic", &rans::decode_generic, &multiply_generic});
    return found;
}

const Version &version_named(const std::string &isa) {
    static const auto found = versions();
    for (const Version &version : found)
        if (isa.empty() || isa == version.name) return version;
    throw std::invalid_argument("isa: this machine cannot run '" + isa + "'");
}

void check(bool ok, const char *message) {
    if (!ok) throw std::invalid_argument(message);
}

template <typename T, int D>
using In = nb::ndarray<nb::ro, const T, nb::device::cpu, nb::ndim<D>, nb::c_contig>;
using Rows = nb::ndarray<float, nb::device::cpu, nb::ndim<4>>;

static_assert(kGroup == rans::kLanes);

struct Layer {
    const uint8_t *data;
    int64_t size;
    rans::Tables tables;
    int64_t counts[2];           // coordinates of K and of V
    const float *directions[2];  // [count, channels]
    const float *mean[2];        // [channels]
    const float *cosine, *sine;  // [tokens restored, half of the dimensions that are rotated]
    int64_t half;
    float *out[2];  // K and V, a token's channels in a row
};

struct Shape {
    int64_t tokens, offset, length, heads, size;
    int64_t token_stride[2];
};

// Rotates the heads of one token; pair i is (i, i + half).
void rotate(const float *in, const Layer &layer, const Shape &shape, int64_t token, float *out) {
    const float *cosine = layer.cosine + token * layer.half, *sine = layer.sine + token * layer.half;
    for (int64_t head = 0; head < shape.heads; ++head, in += shape.size, out += shape.size) {
        for (int64_t i = 0; i < layer.half; ++i) {
            out[i] = in[i] * cosine[i] - in[i + layer.half] * sine[i];
            out[i + layer.half] = in[i + layer.half] * cosine[i] + in[i] * sine[i];
        }
        std::memcpy(out + 2 * layer.half, in + 2 * layer.half, sizeof(float) * (shape.size - 2 * layer.half));
    }
}

struct Scratch {
    std::vector<float> coordinates, values;
};

bool restore_layer(const Layer &layer, const Shape &shape, const Version &version, Scratch &scratch) {
    rans::OpenStream stream;
    if (!stream.open(layer.data, layer.size)) return false;
    const int64_t channels = shape.heads * shape.size, end = shape.offset + shape.length;
    scratch.coordinates.resize(kGroup * layer.tables.columns);
    scratch.values.resize(kGroup * channels);
    float *coordinates = scratch.coordinates.data(), *values = scratch.values.data();
    for (int64_t token = 0; token < shape.tokens; token += kGroup) {
        const int rows = static_cast<int>(std::min<int64_t>(kGroup, shape.tokens - token));
        if (!version.decode(stream, layer.tables, rows, coordinates, kGroup)) return false;
        const int64_t first = std::max(token, shape.offset), last = std::min(token + rows, end);
        if (first >= last) continue;
        for (int part = 0; part < 2; ++part) {
            const float *own = coordinates + (part == 0 ? 0 : layer.counts[0] * kGroup);
            version.multiply({own, layer.counts[part], layer.directions[part], layer.mean[part], channels, rows, values});
            for (int64_t t = first; t < last; ++t) {
                const float *from = values + (t - token) * channels;
                float *to = layer.out[part] + (t - shape.offset) * shape.token_stride[part];
                if (part == 0 && layer.half > 0)
                    rotate(from, layer, shape, t - shape.offset, to);
                else
                    std::memcpy(to, from, sizeof(float) * channels);
            }
        }
    }
    return stream.ended();
}

int64_t restore(const std::vector<In<uint8_t, 1>> &streams, In<uint8_t, 1> distribution, In<int64_t, 2> counts,
                In<uint32_t, 2> slots, int64_t symbols, In<float, 2> directions, In<float, 3> mean,
                const std::vector<In<float, 2>> &cosines, const std::vector<In<float, 2>> &sines, Rows key, Rows value,
                int64_t tokens, int64_t offset, int threads, const std::string &isa) {
    const int64_t layers = streams.size(), length = key.shape(1), channels = directions.shape(1);
    const Shape shape{tokens,        offset, length, static_cast<int64_t>(key.shape(2)), static_cast<int64_t>(key.shape(3)),
                      {key.stride(1), value.stride(1)}};
    check(counts.shape(0) == streams.size() && counts.shape(1) == 2, "counts must be [layers, 2]");
    check(mean.shape(0) == streams.size() && mean.shape(1) == 2 && mean.shape(2) == directions.shape(1),
          "mean must be [layers, 2, channels]");
    check(cosines.size() == streams.size() && sines.size() == streams.size(), "cosines and sines: one for each layer");
    for (const Rows *rows : {&key, &value}) {
        check(rows->shape(0) == streams.size() && rows->shape(1) == key.shape(1) && rows->shape(2) == key.shape(2) &&
                  rows->shape(3) == key.shape(3),
              "key and value must be [layers, tokens, heads, size]");
        check(rows->stride(3) == 1 && rows->stride(2) == shape.size, "a token's channels must lie in a row");
    }
    check(shape.heads * shape.size == channels, "directions must be [coordinates, heads * size]");
    check(tokens >= 0 && offset >= 0 && length <= tokens - offset, "the tokens restored must be among those stored");
    check(slots.shape(1) == rans::kSlots, "slots must be [distributions, 4096]");
    for (size_t i = 0; i < distribution.shape(0); ++i)
        check(distribution(i) < slots.shape(0), "distribution must name one of the distributions");
    const Version &version = version_named(isa);

    std::vector<Layer> all(layers);
    int64_t at = 0;
    for (int64_t i = 0; i < layers; ++i) {
        Layer &layer = all[i];
        layer.data = streams[i].data();
        layer.size = streams[i].shape(0);
        for (int part = 0; part < 2; ++part) {
            layer.counts[part] = counts(i, part);
            check(layer.counts[part] >= 0, "counts must not be negative");
            layer.mean[part] = &mean(i, part, 0);
        }
        const int64_t columns = layer.counts[0] + layer.counts[1];
        check(columns <= static_cast<int64_t>(distribution.shape(0)) - at &&
                  columns <= static_cast<int64_t>(directions.shape(0)) - at,
              "counts must add up to the number of coordinates");
        layer.tables = {distribution.data() + at, columns, slots.data(), symbols};
        layer.directions[0] = directions.data() + at * channels;
        layer.directions[1] = layer.directions[0] + layer.counts[0] * channels;
        at += columns;
        layer.half = cosines[i].shape(1);
        check(2 * layer.half <= shape.size && sines[i].shape(1) == cosines[i].shape(1),
              "no more than a head's dimensions can be rotated");
        check(layer.half == 0 || (static_cast<int64_t>(cosines[i].shape(0)) >= length &&
                                  static_cast<int64_t>(sines[i].shape(0)) >= length),
              "cosines and sines: one row for each token");
        layer.cosine = cosines[i].data();
        layer.sine = sines[i].data();
        layer.out[0] = key.data() + i * key.stride(0);
        layer.out[1] = value.data() + i * value.stride(0);
    }

    nb::gil_scoped_release unlocked;
    std::atomic<int64_t> next{0}, failed{-1};
    attend::parallel(static_cast<int>(std::min<int64_t>(threads, layers)), [&](int) {
        Scratch scratch;
        for (int64_t i = next++; i < layers; i = next++)
            if (!restore_layer(all[i], shape, version, scratch)) failed = i;
    });
    return failed;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Version &version : versions()) names.push_back(version.name);
    return names;
}

}  // namespace
}  // namespace restore

NB_MODULE(_restore, m) {
    using namespace nb::literals;
    // No conversions: a converted `key` would be a copy.
    m.def("restore", &restore::restore, "streams"_a, "distribution"_a.noconvert(), "counts"_a.noconvert(),
          "slots"_a.noconvert(), "symbols"_a, "directions"_a.noconvert(), "mean"_a.noconvert(), "cosines"_a, "sines"_a,
          "key"_a.noconvert(), "value"_a.noconvert(), "tokens"_a, "offset"_a, "threads"_a, nb::kw_only(), "isa"_a = "");
    m.def("instruction_sets", &restore::instruction_sets, "What `isa` may be on this machine, the default first.");
}
