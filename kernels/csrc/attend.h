// What the parts of the attention kernels share. See attend_kernel.cpp for the method.
#pragma once

#include <cstdint>

namespace attend {

// One call. Strides are in elements; the last dimension of every tensor is contiguous.
struct Problem {
    const void *query;  // [queries, kv_heads * group, head_size]
    const void *key;    // [tokens, kv_heads, head_size]
    const void *value;  // [tokens, kv_heads, head_size]
    void *out;          // [queries, kv_heads * group, head_size]
    int64_t query_stride[2], key_stride[2], value_stride[2], out_stride[2];
    bool bfloat16;             // the dtype of all four tensors; float32 where false
    const int64_t *positions;  // [queries], ascending
    const uint8_t *seen;       // [tokens], zero for keys that no query sees: they are not read
    int64_t queries, kv_heads, group, head_size;
    int64_t window;  // a query at p sees keys k with p - window < k <= p
    float scale;

    // A row is one query of one of the heads that share a kv head.
    int64_t rows() const { return queries * group; }
};

// Attention in one instruction set.
struct Kernel {
    int64_t keys_per_block;
    int64_t rows_per_tile;
    // Sizes in floats of the packed K and V of one key block, and of the work array for this many row tiles.
    int64_t (*packed_key_size)(int64_t head_size);
    int64_t (*packed_value_size)(int64_t head_size);
    int64_t (*work_size)(int64_t head_size, int64_t tiles);
    // Write K and V of one key block of one kv head as `attend` reads them: in its order and type.
    void (*pack)(const Problem &, int64_t kv_head, int64_t block, float *key, float *value);
    // Attention of row tiles [first_tile, first_tile + tiles) of one kv head, whose packed blocks from `first_block` on
    // are at `key` and `value`. What each key gets of it, from that block's first on, is added to `mass`, where that is
    // given.
    void (*attend)(const Problem &, int64_t kv_head, int64_t first_tile, int64_t tiles, int64_t first_block,
                   const float *key, const float *value, float *work, float *mass);
    bool weighs;  // whether it takes `mass`
};

#ifdef ATTEND_X86
extern const Kernel kernel_avx512, kernel_avx2;
#endif
extern const Kernel kernel_generic;
#ifdef ATTEND_AMX
extern const Kernel kernel_amx;  // of bfloat16 only
#endif

}  // namespace attend
