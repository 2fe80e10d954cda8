// The Python extension `_attend`: checks, choice of the instruction set, and the order of work.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "attend.h"
#include "parallel.h"

namespace nb = nanobind;

namespace attend {
namespace {

// The instruction sets that this machine can run, best first.
std::vector<std::pair<std::string, const Kernel *>> kernels() {
    std::vector<std::pair<std::string, const Kernel *>> found;
#ifdef ATTEND_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.emplace_back("avx512", &kernel_avx512);
    if (avx2) found.emplace_back("avx2", &kernel_avx2);
#endif
    found.emplace_back("generic", &kernel_generic);
    return found;
}

const Kernel &kernel_named(const std::string &isa) {
    static const auto found = kernels();
    for (const auto &[name, kernel] : found)
        if (isa.empty() || isa == name) return *kernel;
    throw std::invalid_argument("isa: this machine cannot run '" + isa + "'");
}

// A float array that grows and is kept for the next call.
class Buffer {
public:
    float *at_least(int64_t size) {
        if (size > size_) {
            data_.reset();
            size_ = 0;
            data_.reset(static_cast<float *>(::operator new(sizeof(float) * size, kAlignment)));
            size_ = size;
        }
        return data_.get();
    }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(float *data) const { ::operator delete(data, kAlignment); }
    };
    std::unique_ptr<float, Free> data_;
    int64_t size_ = 0;
};

// The keys that some query sees. `positions` is ascending.
std::vector<uint8_t> seen_keys(const Problem &problem) {
    const int64_t *positions = problem.positions;
    std::vector<uint8_t> seen(positions[problem.queries - 1] + 1, 0);
    int64_t next = 0;
    for (int64_t i = 0; i < problem.queries; ++i) {
        next = std::max(next, positions[i] - problem.window + 1);
        for (; next <= positions[i]; ++next) seen[next] = 1;
    }
    return seen;
}

void run(const Problem &problem, const Kernel &kernel, int threads) {
    const int64_t first_block = std::max<int64_t>(0, problem.positions[0] - problem.window + 1) / kernel.keys_per_block;
    const int64_t blocks = problem.positions[problem.queries - 1] / kernel.keys_per_block + 1;
    const int64_t tiles = (problem.rows() + kernel.rows_per_tile - 1) / kernel.rows_per_tile;
    // Enough tiles to use a key block well while it is in the cache, few enough to share the work out evenly.
    const int64_t tiles_per_item = std::clamp<int64_t>(tiles * problem.kv_heads / (threads * 8), 1, 16);
    const int64_t items = (tiles + tiles_per_item - 1) / tiles_per_item;

    const int64_t key_size = kernel.packed_key_size(problem.head_size);
    const int64_t value_size = kernel.packed_value_size(problem.head_size);
    const int64_t work_size = kernel.work_size(problem.head_size, tiles_per_item);
    thread_local Buffer key_buffer, value_buffer, work_buffer;
    float *key = key_buffer.at_least(problem.kv_heads * blocks * key_size);
    float *value = value_buffer.at_least(problem.kv_heads * blocks * value_size);
    float *work = work_buffer.at_least(threads * work_size);

    std::atomic<int64_t> next{0};
    parallel(threads, [&](int) {
        for (int64_t i; (i = next++) < problem.kv_heads * (blocks - first_block);) {
            const int64_t kv_head = i / (blocks - first_block), block = first_block + i % (blocks - first_block);
            const int64_t at = kv_head * blocks + block;
            kernel.pack(problem, kv_head, block, key + at * key_size, value + at * value_size);
        }
    });
    next = 0;
    parallel(threads, [&](int worker) {
        for (int64_t i; (i = next++) < problem.kv_heads * items;) {
            // Later queries see more keys: they go first, so that the last items are short.
            const int64_t kv_head = i / items, tile = (items - 1 - i % items) * tiles_per_item;
            kernel.attend(problem, kv_head, tile, std::min(tiles_per_item, tiles - tile),
                          key + kv_head * blocks * key_size, value + kv_head * blocks * value_size,
                          work + worker * work_size);
        }
    });
}

using Array = nb::ndarray<nb::device::cpu, nb::ndim<3>>;
using ConstArray = nb::ndarray<nb::ro, nb::device::cpu, nb::ndim<3>>;
using Positions = nb::ndarray<nb::ro, const int64_t, nb::device::cpu, nb::ndim<1>, nb::c_contig>;

void check(bool ok, const char *message) {
    if (!ok) throw std::invalid_argument(message);
}

template <typename A>
void take_strides(const A &array, int64_t stride[2]) {
    check(array.shape(2) == 1 || array.stride(2) == 1, "the last dimension of each tensor must be contiguous");
    stride[0] = array.stride(0);
    stride[1] = array.stride(1);
}

void attend_arrays(ConstArray query, ConstArray key, ConstArray value, Positions positions, double scale,
                   int64_t window, Array out, int threads, const std::string &isa) {
    const int64_t tokens = key.shape(0), head_size = query.shape(2);
    check(query.dtype() == nb::dtype<float>() || query.dtype() == nb::bfloat16_dtype, "dtype: float32 or bfloat16");
}

}  // namespace
}  // namespace attend
