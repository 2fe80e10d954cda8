// The Python extension `_restore`: checks, the choice of the instruction set, and the order of work. Each layer's
// groups of tokens are coded apart, so each is work for any thread.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "rans_stream.h"
#include "restore_versions.h"

namespace nb = nanobind;

namespace restore {
namespace {

template <typename T, int D>
using In = nb::ndarray<nb::ro, const T, nb::device::cpu, nb::ndim<D>, nb::c_contig>;
using Rows = nb::ndarray<nb::device::cpu, nb::ndim<4>>;

static_assert(kBlock == rans::kLanes);

// A layer's coordinates in one of the codings that are added up.
struct Coordinates {
    rans::Tables tables;
    const int64_t *counts;  // [2, head groups]: of K and of V
};

struct Layer {
    std::vector<Coordinates> codings;
    const float *directions[2];  // [head groups, width, width], of which the first coordinates' rows are used
    std::vector<float> mean;     // [2, channels]
    const float *cosine, *sine;  // [tokens restored, half of the dimensions that are rotated]
    int64_t half;
    uint8_t *out[2];  // K and V, a token's channels in a row
};

struct Shape {
    int64_t layers, tokens, group, offset, length, heads, size, channels, head_groups;
    int64_t token_bytes[2];  // from one token to the next in K and in V
    Narrow narrow;           // null where K and V are float32

    int64_t width() const { return channels / head_groups; }
};

// One layer's coded tokens `token` to `end`: a stream for each coding.
struct Coded {
    struct Bytes {
        const uint8_t *data;
        int64_t size;
    };
    std::vector<Bytes> streams;
    int64_t token, end;
};

// What a thread works in.
struct Scratch {
    struct Opened {
        rans::OpenStream stream;
        std::vector<float> coordinates;  // [coordinates, kBlock]
    };
    std::vector<Opened> streams;  // of each group's codings
    std::vector<rans::Block> blocks;
    std::vector<const float *> own;
    std::vector<float> sums, values, rotated;
};

// Writes token `token` of those restored, rotated if it is K's.
void place(const float *from, int part, const Layer &layer, const Shape &shape, const Version &version, int64_t token,
           float *rotated) {
    uint8_t *to = layer.out[part] + token * shape.token_bytes[part];
    if (part == 0 && layer.half > 0) {
        float *turned = shape.narrow == nullptr ? reinterpret_cast<float *>(to) : rotated;
        version.rotate({from, layer.cosine + token * layer.half, layer.sine + token * layer.half, layer.half,
                        shape.heads, shape.size, turned});
        if (shape.narrow == nullptr) return;
        from = turned;
    }
    if (shape.narrow != nullptr)
        shape.narrow(from, shape.channels, reinterpret_cast<uint16_t *>(to));
    else
        std::memcpy(to, from, sizeof(float) * shape.channels);
}

// A head group's coordinates, [count, kBlock]: the sum of the codings'. `own` is where each coding's begin, and goes on
// to where the next group's do; `index` counts K's groups and then V's.
const float *added_up(const Layer &layer, int64_t index, std::vector<const float *> &own, std::vector<float> &sums,
                      int64_t &count) {
    const float *first = own[0];
    count = layer.codings[0].counts[index];
    for (size_t i = 0; i < own.size(); ++i) {
        const float *from = own[i];
        const int64_t more = layer.codings[i].counts[index];
        own[i] += more * kBlock;
        if (i == 0) continue;
        if (first != sums.data()) std::memcpy(sums.data(), first, sizeof(float) * count * kBlock);
        first = sums.data();
        if (more > count) std::fill(sums.data() + count * kBlock, sums.data() + more * kBlock, 0.0f);
        for (int64_t j = 0; j < more * kBlock; ++j) sums[j] += from[j];
        count = std::max(count, more);
    }
    return first;
}

// K and V of a block of tokens, from the coordinates that lie at scratch.own.
void restore_block(const Layer &layer, const Shape &shape, const Version &version, int64_t token, int rows,
                   Scratch &scratch) {
    const int64_t first = std::max(token, shape.offset), last = std::min(token + rows, shape.offset + shape.length);
    if (first >= last) return;
    const int64_t width = shape.width();
    float *values = scratch.values.data();
    for (int part = 0; part < 2; ++part) {
        const float *mean = layer.mean.data() + part * shape.channels;
        for (int64_t g = 0; g < shape.head_groups; ++g) {
            int64_t count;
            const float *sum = added_up(layer, part * shape.head_groups + g, scratch.own, scratch.sums, count);
            version.multiply({sum, count, layer.directions[part] + g * width * width, mean + g * width, width, rows,
                              values + g * width, shape.channels});
        }
        for (int64_t t = first; t < last; ++t)
            place(values + (t - token) * shape.channels, part, layer, shape, version, t - shape.offset,
                  scratch.rotated.data());
    }
}

// Whether a group's last block holds tokens before `wanted`.
bool decoded_to_its_end(const Coded &group, int64_t wanted) {
    const int64_t tokens = group.end - group.token;
    return group.token + (tokens - 1) / kBlock * kBlock < wanted;
}

// Some groups of one layer, side by side.
bool restore_groups(const Coded *groups, int count, const Layer &layer, const Shape &shape, const Version &version,
                    Scratch &scratch) {
    const size_t codings = layer.codings.size();
    scratch.streams.resize(std::max(scratch.streams.size(), count * codings));
    for (int g = 0; g < count; ++g)
        for (size_t i = 0; i < codings; ++i) {
            Scratch::Opened &opened = scratch.streams[g * codings + i];
            const Coded::Bytes &bytes = groups[g].streams[i];
            if (!opened.stream.open(bytes.data, bytes.size, groups[g].end - groups[g].token)) return false;
            opened.coordinates.resize(kBlock * layer.codings[i].tables.columns);
        }
    scratch.sums.resize(kBlock * shape.width());
    scratch.values.resize(kBlock * shape.channels);
    scratch.rotated.resize(shape.channels);
    scratch.own.resize(codings);
    const int64_t wanted = shape.offset + shape.length;  // a part costs its part
    const auto rows_at = [&](int g, int64_t from) {
        const int64_t token = groups[g].token + from;
        return token >= wanted ? 0 : static_cast<int>(std::clamp<int64_t>(groups[g].end - token, 0, kBlock));
    };
    for (int64_t from = 0;; from += kBlock) {
        scratch.blocks.clear();
        for (int g = 0; g < count; ++g)
            for (size_t i = 0; i < codings && rows_at(g, from) > 0; ++i) {
                Scratch::Opened &opened = scratch.streams[g * codings + i];
                scratch.blocks.push_back({&opened.stream, &layer.codings[i].tables, rows_at(g, from),
                                          opened.coordinates.data(), kBlock});
            }
        if (scratch.blocks.empty()) break;
        if (!version.decode(scratch.blocks.data(), static_cast<int>(scratch.blocks.size()))) return false;
        for (int g = 0; g < count; ++g) {
            if (rows_at(g, from) == 0) continue;
            for (size_t i = 0; i < codings; ++i) scratch.own[i] = scratch.streams[g * codings + i].coordinates.data();
            restore_block(layer, shape, version, groups[g].token + from, rows_at(g, from), scratch);
        }
    }
    for (int g = 0; g < count; ++g)
        for (size_t i = 0; i < codings && decoded_to_its_end(groups[g], wanted); ++i)
            if (!scratch.streams[g * codings + i].stream.ended()) return false;
    return true;
}

// The next work of a thread: several items while many are left, so that threads seldom share a layer's directions, and
// single ones at the end, so that threads end together. Negative where nothing is left.
int64_t take(std::atomic<int64_t> &next, int64_t items, int threads, int64_t most, int64_t &count) {
    int64_t first = next;
    do {
        if (first >= items) return -1;
        count = std::max<int64_t>(1, std::min(most, (items - first) / (2 * threads)));
    } while (!next.compare_exchange_weak(first, first + count));
    return first;
}

Narrow narrow_to(const Rows &rows, const std::string &type, const Version &version) {
    const bool fits = type == "float32" ? rows.dtype() == nb::dtype<float>() : rows.dtype() == nb::dtype<uint16_t>();
    check(fits, "key and value must be float32, or uint16 that stand for a narrower type");
    if (type == "float32") return nullptr;
    check(type == "bfloat16" || type == "float16", "type must be float32, bfloat16 or float16");
    return type == "bfloat16" ? version.bfloat16 : version.float16;
}

// Of a coding: data, places, distribution, counts, slots, symbols, step and mean.
using Coding = std::tuple<In<uint8_t, 1>, In<int64_t, 3>, In<uint8_t, 1>, In<int64_t, 3>, In<uint32_t, 2>, int64_t,
                          float, In<float, 3>>;

int64_t restore(const std::vector<Coding> &codings, In<float, 5> directions, const std::vector<In<float, 2>> &cosines,
                const std::vector<In<float, 2>> &sines, Rows key, Rows value, int64_t tokens, int64_t group,
                int64_t first_group, int64_t offset, int threads, const std::string &type, const std::string &isa) {
    const Version &version = version_named(isa);
    check(!codings.empty(), "there must be a coding");
    const auto &places_of_first = std::get<1>(codings[0]);
    const int64_t groups = places_of_first.shape(0), layers = places_of_first.shape(1), length = key.shape(1);
    const int64_t head_groups = directions.shape(2), itemsize = key.itemsize();
    const int64_t channels = static_cast<int64_t>(directions.shape(3)) * head_groups;
    check(static_cast<int64_t>(directions.shape(0)) == layers && directions.shape(1) == 2 && head_groups > 0 &&
              directions.shape(3) == directions.shape(4),
          "directions must be [layers, 2, head groups, width, width]");
    check(static_cast<int64_t>(cosines.size()) == layers && static_cast<int64_t>(sines.size()) == layers,
          "cosines and sines: one for each layer");
    const Shape shape{layers, tokens, group, offset, length, static_cast<int64_t>(key.shape(2)),
                      static_cast<int64_t>(key.shape(3)), channels, head_groups,
                      {key.stride(1) * itemsize, value.stride(1) * itemsize}, narrow_to(key, type, version)};
    narrow_to(value, type, version);
    for (const Rows *rows : {&key, &value}) {
        check(static_cast<int64_t>(rows->shape(0)) == layers && rows->shape(1) == key.shape(1) &&
                  rows->shape(2) == key.shape(2) && rows->shape(3) == key.shape(3),
              "key and value must be [layers, tokens, heads, size]");
        check(rows->stride(3) == 1 && rows->stride(2) == shape.size, "a token's channels must lie in a row");
    }
    check(shape.heads * shape.size == channels,
          "key and value must have heads * size channels, as many as have directions");
    check(group > 0 && first_group >= 0 && tokens >= 0 && first_group <= tokens / group && groups <= tokens / group + 1,
          "the groups must be some of those that the tokens are in");
    const int64_t begin = first_group * group, end = std::min(tokens, begin + groups * group);
    check(offset >= begin && length <= end - offset, "the tokens restored must be among those of the groups");
    std::vector<Layer> all(layers);
    for (int64_t i = 0; i < layers; ++i) {
        Layer &layer = all[i];
        layer.mean.assign(2 * channels, -0.0f);  // which added to anything leaves it
        for (int part = 0; part < 2; ++part) layer.directions[part] = &directions(i, part, 0, 0, 0);
    }
    for (const auto &[data, places, distribution, counts, slots, symbols, step, mean] : codings) {
        check(static_cast<int64_t>(places.shape(0)) == groups && static_cast<int64_t>(places.shape(1)) == layers &&
                  places.shape(2) == 2,
              "places must be [groups, layers, 2]");
        check(static_cast<int64_t>(counts.shape(0)) == layers && counts.shape(1) == 2 &&
                  static_cast<int64_t>(counts.shape(2)) == head_groups,
              "counts must be [layers, 2, head groups]");
        check(static_cast<int64_t>(mean.shape(0)) == layers && mean.shape(1) == 2 &&
                  static_cast<int64_t>(mean.shape(2)) == channels,
              "mean must be [layers, 2, channels], as many as have directions");
        check(slots.shape(1) == rans::kSlots, "slots must be [distributions, 4096]");
        for (size_t i = 0; i < distribution.shape(0); ++i)
            check(distribution(i) < slots.shape(0), "distribution must name one of the distributions");
        const int64_t size = data.shape(0);
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t i = 0; i < layers; ++i)
                check(places(g, i, 0) >= 0 && places(g, i, 1) >= 0 && places(g, i, 0) <= size &&
                          places(g, i, 1) <= size - places(g, i, 0),
                      "places must be in data");
        int64_t at = 0;
        for (int64_t i = 0; i < layers; ++i) {
            int64_t columns = 0;
            for (int part = 0; part < 2; ++part)
                for (int64_t g = 0; g < head_groups; ++g) {
                    check(counts(i, part, g) >= 0 && counts(i, part, g) <= shape.width(),
                          "counts must be of coordinates that have directions");
                    columns += counts(i, part, g);
                }
            check(columns <= static_cast<int64_t>(distribution.shape(0)) - at,
                  "counts must add up to the number of coordinates");
            const rans::Tables tables{distribution.data() + at, columns, slots.data(), symbols, step};
            all[i].codings.push_back({tables, &counts(i, 0, 0)});
            at += columns;
            for (int64_t c = 0; c < 2 * channels; ++c) all[i].mean[c] += (&mean(i, 0, 0))[c];
        }
    }
    for (int64_t i = 0; i < layers; ++i) {
        Layer &layer = all[i];
        layer.half = cosines[i].shape(1);
        check(2 * layer.half <= shape.size && sines[i].shape(1) == cosines[i].shape(1),
              "no more than a head's dimensions can be rotated");
        check(layer.half == 0 || (static_cast<int64_t>(cosines[i].shape(0)) >= length &&
                                  static_cast<int64_t>(sines[i].shape(0)) >= length),
              "cosines and sines: one row for each token");
        layer.cosine = cosines[i].data();
        layer.sine = sines[i].data();
        layer.out[0] = static_cast<uint8_t *>(key.data()) + i * key.stride(0) * itemsize;
        layer.out[1] = static_cast<uint8_t *>(value.data()) + i * value.stride(0) * itemsize;
    }
    if (length <= 0) return -1;

    nb::gil_scoped_release unlocked;
    // Of the groups, those that hold wanted tokens; a layer's lie next to each other in the order of work.
    const int64_t from = (offset - begin) / group, wanted = (offset + length - 1 - begin) / group + 1 - from;
    const int64_t items = layers * wanted;
    std::atomic<int64_t> next{0}, failed{-1};
    const int workers = static_cast<int>(std::min<int64_t>(threads, items));
    attend::parallel(workers, [&](int) {
        Scratch scratch;
        // Two streams at a time: those of a sum, or of two groups.
        const int64_t most = codings.size() > 1 ? 1 : 2;
        std::vector<Coded> coded(most);
        for (Coded &own : coded) own.streams.resize(codings.size());
        for (int64_t count, item; (item = take(next, items, workers, wanted, count)) >= 0;)
            while (count > 0) {
                const int64_t layer = item / wanted, at_once = std::min({most, count, wanted - item % wanted});
                for (int64_t k = 0; k < at_once; ++k, ++item, --count) {
                    const int64_t g = from + item % wanted;
                    coded[k].token = begin + g * group;
                    coded[k].end = std::min(end, coded[k].token + group);
                    for (size_t i = 0; i < codings.size(); ++i) {
                        const uint8_t *data = std::get<0>(codings[i]).data();
                        const auto &places = std::get<1>(codings[i]);
                        coded[k].streams[i] = {data + places(g, layer, 0), places(g, layer, 1)};
                    }
                }
                if (!restore_groups(coded.data(), static_cast<int>(at_once), all[layer], shape, version, scratch))
                    failed = layer;
            }
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
    // No conversions: a converted `key` would be a copy. Of codings copies would do.
    m.def("restore", &restore::restore, "codings"_a, "directions"_a.noconvert(), "cosines"_a, "sines"_a,
          "key"_a.noconvert(), "value"_a.noconvert(), "tokens"_a, "group"_a, "first_group"_a, "offset"_a, "threads"_a,
          "type"_a, nb::kw_only(), "isa"_a = "");
    m.def("instruction_sets", &restore::instruction_sets, "What `isa` may be on this machine, the default first.");
}
