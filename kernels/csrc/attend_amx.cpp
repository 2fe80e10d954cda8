// Attention of scattered queries in bfloat16 on CPUs with AMX: the method of attend_kernel.cpp, on tiles.
//
// Rows (a query of one head) are taken in tiles of kTile, all of one kv head. Both products take bfloat16 and sum in
// float32, four of AMX's registers at a time: kTile rows times kTile columns. The softmax is in float32; its weights,
// all below 2^kSlack, are rounded to bfloat16 for the second product, as FlashAttention does it on GPUs.
//
// Head sizes are padded with zeros to whole registers. This file must not use inline functions of the standard
// library: the linker keeps one copy of those, which could be the one with instructions that the machine lacks.

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "attend.h"

namespace attend {
namespace {

constexpr int kRows = 16;         // of a register, and columns of a product
constexpr int kDepth = 32;        // what a register holds of the dimension that is summed over
constexpr int kTile = 2 * kRows;  // rows of Q, and columns of a product, that are taken at once
constexpr int64_t kRegister = kRows * kDepth;  // bfloat16s, or twice the float32s
constexpr int kBlock = 64;        // keys: what a step reads and writes stays in the L1 cache
constexpr int kLanes = 16;

constexpr float kSlack = 8.0f;        // P is below 2^kSlack, far from overflow
constexpr float kNoMaximum = -1e30f;  // finite, so that (-inf) - m is not NaN

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The first of 16 lanes, as many as are left.
inline __mmask16 first_lanes(int64_t left) {
    return left >= kLanes ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

inline int64_t padded(int64_t head_size) { return round_up(head_size, kDepth); }

// K and V of a block take as much: in floats.
int64_t packed_size(int64_t head_size) { return kBlock * padded(head_size) / 2; }

// What a tile keeps between key blocks, beside its queries and O.
struct Tile {
    int32_t position[kTile];
    int32_t low, high;  // the keys that any of the rows sees
    float maximum[kTile];
    __m512 sum[kTile];
};

// Offsets in the work array, in floats. S is at offset 0.
struct WorkLayout {
    int64_t width;  // of a head
    int64_t weights, query, out, tile, size;

    WorkLayout(int64_t head_size, int64_t tiles) {
        width = padded(head_size);
        weights = kTile * kBlock;
        query = weights + kTile * kBlock / 2;
        out = query + tiles * kTile * width / 2;
        tile = out + tiles * kTile * width;
        size = round_up(tile + tiles * static_cast<int64_t>(sizeof(Tile) / 4), kLanes);
    }
};

// Compilers are not told what memory the instructions on registers read and write: here all of it is as it should be.
inline void settle() { asm volatile("" ::: "memory"); }
inline void settle(const uint8_t *read_or_written) { asm volatile("" ::"r"(read_or_written) : "memory"); }

// The registers' shape for as long as this lives; whoever else in this thread uses them finds his own shape again.
class Configured {
public:
    Configured() {
        settle(before_);
        _tile_storeconfig(before_);
        settle(before_);
        alignas(64) uint8_t config[64] = {1};  // palette 1
        for (int i = 0; i < 8; ++i) {
            config[16 + 2 * i] = 64;
            config[48 + i] = kRows;
        }
        settle(config);
        _tile_loadconfig(config);
        settle(config);
    }
    ~Configured() {
        settle(before_);
        _tile_loadconfig(before_);
    }
    Configured(const Configured &) = delete;

private:
    alignas(64) uint8_t before_[64];
};

// Registers 0 to 3 += kTile rows of `a`, of which `stride` bytes apart, times `steps` registers of `b` and of `b_right`
inline void multiply(const uint16_t *a, int64_t stride, const uint16_t *b, const uint16_t *b_right, int64_t b_step,
                     int64_t steps) {
    for (int64_t i = 0; i < steps; ++i) {
        _tile_loadd(4, a + i * kDepth, stride);
        _tile_loadd(5, a + i * kDepth + kRows * (stride / 2), stride);
        _tile_loadd(6, b + i * b_step, 64);
        _tile_loadd(7, b_right + i * b_step, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

inline void store_product(float *to, int64_t width) {
    _tile_stored(0, to, 4 * width);
    _tile_stored(1, to + kRows, 4 * width);
    _tile_stored(2, to + kRows * width, 4 * width);
    _tile_stored(3, to + kRows * width + kRows, 4 * width);
}

// s [kTile][kBlock], of which `columns` columns are written = query [kTile][width] times the block's keys
inline void scores(const uint16_t *query, const uint16_t *key, int64_t width, int64_t columns, float *s) {
    const int64_t keys_size = kRows * width;  // of the keys of one register
    settle();
    for (int64_t c = 0; c < columns; c += kTile) {
        const uint16_t *keys = key + c / kRows * keys_size;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        multiply(query, 2 * width, keys, keys + keys_size, kRegister, width / kDepth);
        store_product(s + c, kBlock);
    }
}

// out [kTile][width] += weights [kTile][kBlock] @ the block's values, of which `columns` are wanted
inline void accumulate(const uint16_t *weights, const uint16_t *value, int64_t width, int64_t columns, float *out) {
    settle();
    for (int64_t d = 0; d < width; d += kTile) {
        const uint16_t *values = value + d / kRows * kRegister;
        float *to = out + d;
        _tile_loadd(0, to, 4 * width);
        _tile_loadd(1, to + kRows, 4 * width);
        _tile_loadd(2, to + kRows * width, 4 * width);
        _tile_loadd(3, to + kRows * width + kRows, 4 * width);
        multiply(weights, 2 * kBlock, values, values + kRegister, kDepth * width, columns / kDepth);
        store_product(to, width);
    }
}

void hide(float *s, const Tile &tile, int64_t first_key, int64_t columns, int64_t window) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int r = 0; r < kTile; ++r) {
        const int32_t position = tile.position[r];
        const int32_t last_hidden = window > position ? -1 : position - static_cast<int32_t>(window);
        for (int64_t c = 0; c < columns; c += kLanes) {
            const __m512i key = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(first_key + c)));
            const __mmask16 hidden = _mm512_cmpgt_epi32_mask(key, _mm512_set1_epi32(position)) |
                                     _mm512_cmple_epi32_mask(key, _mm512_set1_epi32(last_hidden));
            _mm512_mask_storeu_ps(s + r * kBlock + c, hidden, _mm512_set1_ps(-INFINITY));
        }
    }
}

// 2^x to a relative error of 1e-4, less than what is lost in rounding to bfloat16; 0 below -200; NaN stays NaN.
inline __m512 exp2_vec(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, whole);  // in [-0.5, 0.5]
    // Minimax polynomial of 2^r.
    __m512 y = _mm512_set1_ps(0.055171674f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.24261111f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.69326098f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.99992809f));
    return _mm512_scalef_ps(y, whole);
}

// Raise a row's maximum to `top`, and scale its sum and O to it.
void raise_maximum(Tile &tile, int r, float top, int64_t width, float *out) {
    const __m512 factor = _mm512_set1_ps(exp2f(tile.maximum[r] - top));
    tile.maximum[r] = top;
    tile.sum[r] = _mm512_mul_ps(tile.sum[r], factor);
    for (int64_t c = 0; c < width; c += kLanes)
        _mm512_store_ps(out + r * width + c, _mm512_mul_ps(_mm512_load_ps(out + r * width + c), factor));
}

// weights [kTile][kBlock] = 2^(s * scale - m), over the first `columns` columns
inline void softmax(const float *s, float scale, int64_t columns, Tile &tile, int64_t width, float *out,
                    uint16_t *weights) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int r = 0; r < kTile; ++r) {
        const float *row = s + r * kBlock;
        __m512 top = _mm512_load_ps(row);
        for (int64_t c = kLanes; c < columns; c += kLanes) top = _mm512_max_ps(top, _mm512_load_ps(row + c));
        top = _mm512_mul_ps(top, factor);
        if (_mm512_cmp_ps_mask(top, _mm512_set1_ps(tile.maximum[r] + kSlack), _CMP_GT_OQ) != 0)
            raise_maximum(tile, r, _mm512_reduce_max_ps(top), width, out);
        const __m512 maximum = _mm512_set1_ps(tile.maximum[r]);
        __m512 sum = tile.sum[r];
        for (int64_t c = 0; c < columns; c += 2 * kLanes) {
            const __m512 left = exp2_vec(_mm512_fmsub_ps(_mm512_load_ps(row + c), factor, maximum));
            const __m512 right = exp2_vec(_mm512_fmsub_ps(_mm512_load_ps(row + c + kLanes), factor, maximum));
            sum = _mm512_add_ps(sum, _mm512_add_ps(left, right));
            _mm512_store_si512(weights + r * kBlock + c, (__m512i)_mm512_cvtne2ps_pbh(right, left));
        }
        tile.sum[r] = sum;
    }
}

const uint16_t *row_of(const void *base, const int64_t *stride, int64_t i, int64_t head) {
    return static_cast<const uint16_t *>(base) + i * stride[0] + head * stride[1];
}

void start_tile(const Problem &problem, int64_t kv_head, int64_t first_row, Tile &tile, uint16_t *query,
                int64_t width) {
    for (int r = 0; r < kTile; ++r, query += width) {
        int64_t row = first_row + r;
        const bool padding = row >= problem.rows();
        if (padding) row = problem.rows() - 1;
        tile.position[r] = static_cast<int32_t>(problem.positions[row / problem.group]);
        tile.maximum[r] = kNoMaximum;
        tile.sum[r] = _mm512_setzero_ps();
        const int64_t head = kv_head * problem.group + row % problem.group;
        memset(query, 0, 2 * width);
        if (!padding)
            memcpy(query, row_of(problem.query, problem.query_stride, row / problem.group, head),
                   2 * problem.head_size);
    }
    tile.low = problem.window > tile.position[0] ? 0 : tile.position[0] - static_cast<int32_t>(problem.window) + 1;
    tile.high = tile.position[kTile - 1] + 1;
}

void finish_tile(const Problem &problem, int64_t kv_head, int64_t first_row, const Tile &tile, const float *out,
                 int64_t width) {
    for (int r = 0; r < kTile && first_row + r < problem.rows(); ++r, out += width) {
        const int64_t row = first_row + r, head = kv_head * problem.group + row % problem.group;
        uint16_t *to = const_cast<uint16_t *>(row_of(problem.out, problem.out_stride, row / problem.group, head));
        const __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(tile.sum[r]));
        for (int64_t d = 0; d < problem.head_size; d += kLanes) {
            const __mmask16 wanted = first_lanes(problem.head_size - d);
            const __m256bh values = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(out + d), factor));
            _mm256_mask_storeu_epi16(to + d, wanted, (__m256i)values);
        }
    }
}

// One tile over one key block.
inline void step(const Problem &problem, int64_t first_key, const uint16_t *key, const uint16_t *value,
                 const uint16_t *query, int64_t width, Tile &tile, float *s, uint16_t *weights, float *out) {
    const float scale = problem.scale * 1.44269504f;  // log2(e)
    const int64_t keys = tile.high - first_key < kBlock ? tile.high - first_key : kBlock;
    const int64_t columns = round_up(keys, kTile);
    scores(query, key, width, columns, s);
    const bool all_seen =
        first_key + columns <= tile.position[0] + 1 && first_key > tile.position[kTile - 1] - problem.window;
    if (!all_seen) hide(s, tile, first_key, columns, problem.window);
    softmax(s, scale, columns, tile, width, out, weights);
    accumulate(weights, value, width, columns, out);
}

void attend(const Problem &problem, int64_t kv_head, int64_t first_tile, int64_t tiles, int64_t first_block,
            const float *key, const float *value, float *work, float *) {
    const Configured configured;
    const WorkLayout at(problem.head_size, tiles);
    const int64_t packed = packed_size(problem.head_size), tile_size = kTile * at.width;
    uint16_t *query = reinterpret_cast<uint16_t *>(work + at.query);
    float *out = work + at.out;
    Tile *tile = reinterpret_cast<Tile *>(work + at.tile);
    for (int64_t i = 0; i < tiles; ++i)
        start_tile(problem, kv_head, (first_tile + i) * kTile, tile[i], query + i * tile_size, at.width);
    memset(out, 0, sizeof(float) * tiles * tile_size);

    for (int64_t block = tile[0].low / kBlock; block * kBlock < tile[tiles - 1].high; ++block) {
        const uint16_t *block_key = reinterpret_cast<const uint16_t *>(key + (block - first_block) * packed);
        const uint16_t *block_value = reinterpret_cast<const uint16_t *>(value + (block - first_block) * packed);
        for (int64_t i = 0; i < tiles; ++i)
            if (block * kBlock < tile[i].high && (block + 1) * kBlock > tile[i].low)
                step(problem, block * kBlock, block_key, block_value, query + i * tile_size, at.width, tile[i], work,
                     reinterpret_cast<uint16_t *>(work + at.weights), out + i * tile_size);
    }

    for (int64_t i = 0; i < tiles; ++i)
        finish_tile(problem, kv_head, (first_tile + i) * kTile, tile[i], out + i * tile_size, at.width);
}

bool seen(const Problem &problem, int64_t token) {
    return token <= problem.positions[problem.queries - 1] && problem.seen[token];
}

// The keys of one block as B of a product: [kBlock / kRows][width / 2][kRows] pairs of dimensions.
void pack_key(const Problem &problem, int64_t kv_head, int64_t block, int64_t width, uint32_t *key) {
    // A few pairs at a time, so that the lines written to stay in the L1 cache.
    constexpr int64_t kStep = 4;
    for (int64_t first = 0; first < problem.head_size / 2; first += kStep)
        for (int64_t j = 0; j < kBlock; ++j) {
            const int64_t token = block * kBlock + j;
            uint32_t *to = key + j / kRows * (kRows * width / 2) + first * kRows + j % kRows;
            uint32_t pairs[kStep] = {};
            if (seen(problem, token))
                memcpy(pairs, row_of(problem.key, problem.key_stride, token, kv_head) + 2 * first, sizeof pairs);
            for (int64_t d = 0; d < kStep; ++d) to[d * kRows] = pairs[d];
        }
    for (int64_t j = 0; j < kBlock; j += kRows)
        memset(key + j * width / 2 + problem.head_size / 2 * kRows, 0, 2 * kRows * (width - problem.head_size));
}

// The values of one block as B of a product: [kBlock / kDepth][width / kRows][kDepth / 2][kRows] pairs of keys. Those
// that no query sees become zeros, because even the weight 0 of a hidden key would make NaN of a NaN.
void pack_value(const Problem &problem, int64_t kv_head, int64_t block, int64_t width, uint32_t *value) {
    for (int64_t j = 0; j < kBlock; j += 2) {
        const uint16_t *rows[2];
        for (int i = 0; i < 2; ++i) {
            const int64_t token = block * kBlock + j + i;
            rows[i] = seen(problem, token) ? row_of(problem.value, problem.value_stride, token, kv_head) : nullptr;
        }
        uint32_t *to = value + j / kDepth * (kDepth / 2 * width) + j % kDepth / 2 * kRows;
        for (int64_t d = 0; d < width; d += kRows, to += kRegister / 2) {
            const __mmask16 there = first_lanes(problem.head_size - d);
            __m512i pair[2];
            for (int i = 0; i < 2; ++i)
                pair[i] = rows[i] == nullptr ? _mm512_setzero_si512()
                                             : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, rows[i] + d));
            _mm512_storeu_si512(to, _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16)));
        }
    }
}

void pack(const Problem &problem, int64_t kv_head, int64_t block, float *key, float *value) {
    const int64_t width = padded(problem.head_size);
    pack_key(problem, kv_head, block, width, reinterpret_cast<uint32_t *>(key));
    pack_value(problem, kv_head, block, width, reinterpret_cast<uint32_t *>(value));
}

int64_t work_size(int64_t head_size, int64_t tiles) { return WorkLayout(head_size, tiles).size; }

}  // namespace

extern const Kernel kernel_amx = {kBlock, kTile, packed_size, packed_size, work_size, pack, attend, false};

}  // namespace attend
