// Attention of scattered queries on CPUs: FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135), which
// takes keys in blocks and keeps a running maximum and sum of each row's softmax, so that the scores of a block never
// leave the cache.
//
// Rows (a query of one head) are taken in tiles of kTile, all of one kv head, so that grouped-query attention reads a
// key once for its whole group. A tile goes through three steps per key block:
//   scores      S = Q K^T as a sum of outer products over the head size, in registers
//   softmax     P = 2^(S - m), the factor log2(e) being in Q already
//   accumulate  O += P V, in registers
// As in FlashAttention-4, m follows the true maximum only when that has grown by more than kSlack, since any m near
// the maximum gives the same quotient; so O is rarely rescaled.
//
// This file is compiled once per instruction set (ATTEND_KERNEL and ATTEND_LANES say which) with the compiler's
// portable vector types. It must not use inline functions of the standard library: the linker keeps one copy of
// those, which could be the one with instructions that the machine lacks.

#include "attend.h"

#include <math.h>
#include <string.h>

namespace attend {
namespace {

constexpr int kLanes = ATTEND_LANES;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

// The accumulators of a micro-kernel are kTile x kVecs registers: 24 of 32, or 12 of 16.
constexpr int kTile = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVecs = 4;
#else
constexpr int kVecs = 2;
#endif
constexpr int kPanel = kVecs * kLanes;  // the keys that `scores` takes at once
// K and V of a block (32 KiB at head size 64) stay in the L1 cache while the tiles pass over them.
constexpr int kBlock = 64;
static_assert(kBlock % kPanel == 0, "a block is whole panels");

constexpr float kSlack = 8.0f;       // P is below 2^kSlack, far from overflow
constexpr float kNoMaximum = -1e30f;  // finite, so that (-inf) - m is not NaN

struct Bfloat16 {
    uint16_t bits;
};

inline float load(const float *at) { return *at; }

inline float load(const Bfloat16 *at) {
    uint32_t bits = static_cast<uint32_t>(at->bits) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline void store(float x, float *at) { *at = x; }

inline void store(float x, Bfloat16 *at) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    // Round to nearest, ties to even.
    at->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline Vec splat(float x) { return x - Vec{}; }
inline IntVec splat(int32_t x) { return x - IntVec{}; }
inline Vec load_vec(const float *at) { return *reinterpret_cast<const Vec *>(at); }
inline void store_vec(Vec x, float *at) { *reinterpret_cast<Vec *>(at) = x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline bool any(IntVec mask) {
    uint64_t parts[sizeof(IntVec) / 8], all = 0;
    memcpy(parts, &mask, sizeof mask);
    for (uint64_t part : parts) all |= part;
    return all != 0;
}

// 2^x for x < 2^kSlack to a relative error of about 1e-7; 0 below -126; NaN stays NaN.
inline Vec exp2_vec(Vec x) {
    const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    Vec shifted = x + shift;
    Vec r = x - (shifted - shift);  // in [-0.5, 0.5]
    // Minimax polynomial of 2^r.
    Vec y = splat(0.0013276471f);
    y = y * r + 0.009675541f;
    y = y * r + 0.05550713f;
    y = y * r + 0.2402212f;
    y = y * r + 0.69314694f;
    y = y * r + 1.0000001f;
    IntVec bits = (IntVec)y + ((IntVec)shifted << 23);
    return x < splat(-126.0f) ? Vec{} : (Vec)bits;
}

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t packed_key_size(int64_t head_size) { return kBlock * head_size; }

int64_t packed_value_size(int64_t head_size) { return kBlock * round_up(head_size, kLanes); }

// What a tile keeps between key blocks, and the rows' queries. O is [kTile][width].
struct Tile {
    int32_t position[kTile];
    int32_t low, high;  // the keys that any of the rows sees
    float maximum[kTile];
    Vec sum[kTile];
};

// Offsets in the work array, in floats.
struct WorkLayout {
    int64_t width;  // the head size, padded to whole vectors
    int64_t query, tile, out, size;

    WorkLayout(int64_t head_size, int64_t tiles) {
        width = round_up(head_size, kLanes);
        const int64_t p = kTile * kBlock;  // at offset 0
        out = p;
        query = out + tiles * kTile * width;
        tile = round_up(query + tiles * kTile * head_size, 16);
        size = round_up(tile + tiles * static_cast<int64_t>(sizeof(Tile) / 4), 16);
    }
};

// s [kTile][kBlock], of which one panel is written = query [head_size][kTile] outer key [head_size][kPanel]
inline void scores(const float *query, const float *key, int64_t head_size, float *s) {
    Vec acc[kTile][kVecs] = {};
    for (int64_t d = 0; d < head_size; ++d) {
        Vec k[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) k[v] = load_vec(key + d * kPanel + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r) {
            const Vec q = splat(query[d * kTile + r]);
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) acc[r][v] += q * k[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) store_vec(acc[r][v], s + r * kBlock + v * kLanes);
}

// kColumns vectors of out [kTile][width] += p [kTile][kBlock] @ value [keys][width]
template <int kColumns>
inline void accumulate(const float *p, const float *value, int64_t keys, int64_t width, float *out) {
    Vec acc[kTile][kColumns];
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kColumns; ++v) acc[r][v] = load_vec(out + r * width + v * kLanes);
    for (int64_t k = 0; k < keys; ++k) {
        Vec row[kColumns];
#pragma GCC unroll 8
        for (int v = 0; v < kColumns; ++v) row[v] = load_vec(value + k * width + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r) {
            const Vec weight = splat(p[r * kBlock + k]);
#pragma GCC unroll 8
            for (int v = 0; v < kColumns; ++v) acc[r][v] += weight * row[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kColumns; ++v) store_vec(acc[r][v], out + r * width + v * kLanes);
}

void accumulate_all(const float *p, const float *value, int64_t keys, int64_t width, float *out) {
    int64_t column = 0;
    for (; column + kVecs * kLanes <= width; column += kVecs * kLanes)
        accumulate<kVecs>(p, value + column, keys, width, out + column);
    for (; column < width; column += kLanes) accumulate<1>(p, value + column, keys, width, out + column);
}

void hide(float *s, const Tile &tile, int64_t first_key, int64_t columns, int64_t window) {
    IntVec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    for (int r = 0; r < kTile; ++r) {
        const int32_t position = tile.position[r];
        const int32_t last_hidden = window > position ? -1 : position - static_cast<int32_t>(window);
        for (int64_t c = 0; c < columns; c += kLanes) {
            const IntVec key = lane + splat(static_cast<int32_t>(first_key + c));
            const IntVec seen = (key <= splat(position)) & (key > splat(last_hidden));
            store_vec(seen ? load_vec(s + r * kBlock + c) : splat(-INFINITY), s + r * kBlock + c);
        }
    }
}

// Raise the maximum of the rows where `top` exceeds it by more than the slack, and scale their sums and O to it.
void raise_maximum(Tile &tile, const Vec *top, int64_t width, float *out) {
    for (int r = 0; r < kTile; ++r) {
        float row_top = top[r][0];
        for (int i = 1; i < kLanes; ++i) row_top = top[r][i] > row_top ? top[r][i] : row_top;
        if (!(row_top > tile.maximum[r] + kSlack)) continue;
        const float factor = exp2f(tile.maximum[r] - row_top);
        tile.maximum[r] = row_top;
        tile.sum[r] *= factor;
        float *row = out + r * width;
        for (int64_t c = 0; c < width; c += kLanes) store_vec(load_vec(row + c) * factor, row + c);
    }
}

// s [kTile][kBlock] -> p in place, over its first `columns` columns.
inline void softmax(float *s, int64_t columns, Tile &tile, int64_t width, float *out) {
    Vec top[kTile];
    IntVec grown = {};
    for (int r = 0; r < kTile; ++r) {
        top[r] = load_vec(s + r * kBlock);
        for (int64_t c = kLanes; c < columns; c += kLanes) top[r] = larger(top[r], load_vec(s + r * kBlock + c));
        grown |= top[r] > splat(tile.maximum[r] + kSlack);
    }
    if (any(grown)) raise_maximum(tile, top, width, out);
    for (int r = 0; r < kTile; ++r) {
        const Vec maximum = splat(tile.maximum[r]);
        Vec sum = tile.sum[r];
        for (int64_t c = 0; c < columns; c += kLanes) {
            const Vec p = exp2_vec(load_vec(s + r * kBlock + c) - maximum);
            sum += p;
            store_vec(p, s + r * kBlock + c);
        }
        tile.sum[r] = sum;
    }
}

template <typename T>
const T *row_of(const void *base, const int64_t *stride, int64_t i, int64_t head) {
    return static_cast<const T *>(base) + i * stride[0] + head * stride[1];
}

template <typename T>
void start_tile(const Problem &problem, int64_t kv_head, int64_t first_row, Tile &tile, float *query) {
    const float scale = problem.scale * 1.44269504f;  // log2(e)
    for (int r = 0; r < kTile; ++r) {
        int64_t row = first_row + r;
        const bool padding = row >= problem.rows();
        if (padding) row = problem.rows() - 1;
        tile.position[r] = static_cast<int32_t>(problem.positions[row / problem.group]);
        tile.maximum[r] = kNoMaximum;
        tile.sum[r] = Vec{};
        const int64_t head = kv_head * problem.group + row % problem.group;
        const T *from = row_of<T>(problem.query, problem.query_stride, row / problem.group, head);
        for (int64_t d = 0; d < problem.head_size; ++d) query[d * kTile + r] = padding ? 0.0f : load(from + d) * scale;
    }
    tile.low = problem.window > tile.position[0] ? 0 : tile.position[0] - static_cast<int32_t>(problem.window) + 1;
    tile.high = tile.position[kTile - 1] + 1;
}

template <typename T>
void finish_tile(const Problem &problem, int64_t kv_head, int64_t first_row, const Tile &tile, const float *out,
                 int64_t width) {
    for (int r = 0; r < kTile && first_row + r < problem.rows(); ++r) {
        float sum = 0.0f;
        for (int i = 0; i < kLanes; ++i) sum += tile.sum[r][i];
        const int64_t row = first_row + r, head = kv_head * problem.group + row % problem.group;
        T *to = const_cast<T *>(row_of<T>(problem.out, problem.out_stride, row / problem.group, head));
        const float factor = 1.0f / sum;
        for (int64_t d = 0; d < problem.head_size; ++d) store(out[r * width + d] * factor, to + d);
    }
}

// The scores of a tile over one key block; returns how many columns they have.
inline int64_t scores_of_block(const Problem &problem, int64_t first_key, int64_t keys, const float *key,
                               const float *query, const Tile &tile, float *s) {
    const int64_t columns = round_up(keys, kPanel);
    for (int64_t c = 0; c < columns; c += kPanel)
        scores(query, key + c * problem.head_size, problem.head_size, s + c);
    const bool all_seen =
        first_key + columns <= tile.position[0] + 1 && first_key > tile.position[kTile - 1] - problem.window;
    if (!all_seen) hide(s, tile, first_key, columns, problem.window);
    return columns;
}

// How many keys of a block a tile sees at most.
inline int64_t keys_of_block(const Tile &tile, int64_t first_key) {
    return tile.high - first_key < kBlock ? tile.high - first_key : kBlock;
}

// One tile over one key block.
inline void step(const Problem &problem, int64_t first_key, const float *key, const float *value, const float *query,
                 int64_t width, Tile &tile, float *s, float *out) {
    const int64_t keys = keys_of_block(tile, first_key);
    const int64_t columns = scores_of_block(problem, first_key, keys, key, query, tile, s);
    softmax(s, columns, tile, width, out);
    accumulate_all(s, value, keys, width, out);
}

// What each key of a block gets of a tile's attention, whose maximum and sum are known by now: the scores are computed
// once more, which is cheaper than keeping them.
inline void weigh(const Problem &problem, int64_t first_key, const float *key, const float *query, int64_t rows,
                  const Tile &tile, float *s, float *mass) {
    const int64_t keys = keys_of_block(tile, first_key);
    const int64_t columns = scores_of_block(problem, first_key, keys, key, query, tile, s);
    float factor[kTile];
    for (int64_t r = 0; r < rows; ++r) {
        float sum = 0.0f;
        for (int i = 0; i < kLanes; ++i) sum += tile.sum[r][i];
        factor[r] = 1.0f / sum;
    }
    for (int64_t c = 0; c < columns; c += kLanes) {
        Vec total = load_vec(mass + c);
        for (int64_t r = 0; r < rows; ++r)
            total += exp2_vec(load_vec(s + r * kBlock + c) - splat(tile.maximum[r])) * splat(factor[r]);
        store_vec(total, mass + c);
    }
}

template <typename T>
void attend_rows(const Problem &problem, int64_t kv_head, int64_t first_tile, int64_t tiles, int64_t first_block,
                 const float *key, const float *value, float *work, float *mass) {
    const WorkLayout at(problem.head_size, tiles);
    const int64_t query_size = kTile * problem.head_size, out_size = kTile * at.width;
    Tile *tile = reinterpret_cast<Tile *>(work + at.tile);
    for (int64_t i = 0; i < tiles; ++i)
        start_tile<T>(problem, kv_head, (first_tile + i) * kTile, tile[i], work + at.query + i * query_size);
    memset(work + at.out, 0, sizeof(float) * tiles * out_size);

    for (int64_t block = tile[0].low / kBlock; block * kBlock < tile[tiles - 1].high; ++block) {
        const float *block_key = key + (block - first_block) * packed_key_size(problem.head_size);
        const float *block_value = value + (block - first_block) * packed_value_size(problem.head_size);
        for (int64_t i = 0; i < tiles; ++i)
            if (block * kBlock < tile[i].high && (block + 1) * kBlock > tile[i].low)
                step(problem, block * kBlock, block_key, block_value, work + at.query + i * query_size, at.width,
                     tile[i], work, work + at.out + i * out_size);
    }
    for (int64_t block = tile[0].low / kBlock; mass && block * kBlock < tile[tiles - 1].high; ++block) {
        const float *block_key = key + (block - first_block) * packed_key_size(problem.head_size);
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t left = problem.rows() - (first_tile + i) * kTile;
            if (block * kBlock < tile[i].high && (block + 1) * kBlock > tile[i].low)
                weigh(problem, block * kBlock, block_key, work + at.query + i * query_size,
                      left < kTile ? left : kTile, tile[i], work, mass + (block - first_block) * kBlock);
        }
    }

    for (int64_t i = 0; i < tiles; ++i)
        finish_tile<T>(problem, kv_head, (first_tile + i) * kTile, tile[i], work + at.out + i * out_size, at.width);
}

bool seen(const Problem &problem, int64_t token) {
    return token <= problem.positions[problem.queries - 1] && problem.seen[token];
}

// Keys of one block transposed to [kBlock / kPanel][head_size][kPanel]; those that no query sees become zeros.
template <typename T>
void pack_key(const Problem &problem, int64_t kv_head, int64_t block, float *key) {
    // A few dimensions at a time, so that the lines written to stay in the L1 cache.
    constexpr int64_t kStep = 8;
    for (int64_t first = 0; first < problem.head_size; first += kStep)
        for (int64_t j = 0; j < kBlock; ++j) {
            const int64_t token = block * kBlock + j;
            float *to = key + j / kPanel * (problem.head_size * kPanel) + first * kPanel + j % kPanel;
            if (seen(problem, token)) {
                const T *from = row_of<T>(problem.key, problem.key_stride, token, kv_head) + first;
                for (int64_t d = 0; d < kStep; ++d) to[d * kPanel] = load(from + d);
            } else {
                for (int64_t d = 0; d < kStep; ++d) to[d * kPanel] = 0.0f;
            }
        }
}

// Values of one block as [kBlock][width]. Those that no query sees become zeros, because even the weight 0 of a hidden
// key would make NaN of a NaN.
template <typename T>
void pack_value(const Problem &problem, int64_t kv_head, int64_t block, float *value) {
    const int64_t width = round_up(problem.head_size, kLanes);
    for (int64_t j = 0; j < kBlock; ++j) {
        const int64_t token = block * kBlock + j;
        float *to = value + j * width;
        int64_t d = 0;
        if (seen(problem, token)) {
            const T *from = row_of<T>(problem.value, problem.value_stride, token, kv_head);
            for (; d < problem.head_size; ++d) to[d] = load(from + d);
        }
        for (; d < width; ++d) to[d] = 0.0f;
    }
}

template <typename T>
void pack_block(const Problem &problem, int64_t kv_head, int64_t block, float *key, float *value) {
    pack_key<T>(problem, kv_head, block, key);
    pack_value<T>(problem, kv_head, block, value);
}

int64_t work_size(int64_t head_size, int64_t tiles) { return WorkLayout(head_size, tiles).size; }

void pack(const Problem &problem, int64_t kv_head, int64_t block, float *key, float *value) {
    (problem.bfloat16 ? pack_block<Bfloat16> : pack_block<float>)(problem, kv_head, block, key, value);
}

void attend(const Problem &problem, int64_t kv_head, int64_t first_tile, int64_t tiles, int64_t first_block,
            const float *key, const float *value, float *work, float *mass) {
    const auto rows = problem.bfloat16 ? attend_rows<Bfloat16> : attend_rows<float>;
    rows(problem, kv_head, first_tile, tiles, first_block, key, value, work, mass);
}

}  // namespace

extern const Kernel ATTEND_KERNEL = {kBlock,    kTile, packed_key_size, packed_value_size,
                                     work_size, pack,  attend,          true};

}  // namespace attend
