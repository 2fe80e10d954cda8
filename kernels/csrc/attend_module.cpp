// The Python extension `_attend`: checks, choice of the instruction set, and the order of work.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attend.h"
#include "isa.h"
#include "parallel.h"

namespace nb = nanobind;

namespace attend {
namespace {

// The instruction sets that this machine can run, best first.
std::vector<std::pair<std::string, const Kernel *>> kernels(bool bfloat16) {
    std::vector<std::pair<std::string, const Kernel *>> found;
#ifdef ATTEND_AMX
    if (bfloat16 && isa::amx()) found.emplace_back("amx", &kernel_amx);
#endif
#ifdef ATTEND_X86
    if (isa::avx512()) found.emplace_back("avx512", &kernel_avx512);
    if (isa::avx2()) found.emplace_back("avx2", &kernel_avx2);
#endif
    found.emplace_back("generic", &kernel_generic);
    return found;
}

using Kernels = std::vector<std::pair<std::string, const Kernel *>>;

const Kernels &kernels_for(bool bfloat16) {
    if (bfloat16) {
        static const Kernels found = kernels(true);
        return found;
    }
    static const Kernels found = kernels(false);
    return found;
}

const Kernel &kernel_named(const std::string &isa, bool bfloat16, bool weighs) {
    for (const auto &[name, kernel] : kernels_for(bfloat16))
        if ((isa.empty() || isa == name) && (kernel->weighs || !weighs)) return *kernel;
    throw std::invalid_argument("isa: this machine cannot run '" + isa + "' in " + (bfloat16 ? "bfloat16" : "float32"));
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

// Packed K and V of as many kv heads as fit here are made at a time: they should stay in the L3 cache.
constexpr int64_t kPackedFloats = (8 << 20) / sizeof(float);

// `mass` is null, or has a place for each key up to the last one that is seen.
void run(const Problem &problem, const Kernel &kernel, int threads, float *mass) {
    const int64_t first_block = std::max<int64_t>(0, problem.positions[0] - problem.window + 1) / kernel.keys_per_block;
    const int64_t blocks = problem.positions[problem.queries - 1] / kernel.keys_per_block + 1 - first_block;
    const int64_t key_size = kernel.packed_key_size(problem.head_size);
    const int64_t value_size = kernel.packed_value_size(problem.head_size);
    const int64_t head_floats = blocks * (key_size + value_size);
    const int64_t most_heads = std::clamp<int64_t>(kPackedFloats / head_floats, 1, problem.kv_heads);

    const int64_t tiles = (problem.rows() + kernel.rows_per_tile - 1) / kernel.rows_per_tile;
    // Enough tiles to use a key block well while it is in the cache, few enough to share the work out evenly.
    const int64_t tiles_per_item = std::clamp<int64_t>(tiles * most_heads / (threads * 8), 1, 16);
    const int64_t items = (tiles + tiles_per_item - 1) / tiles_per_item;
    const int64_t work_size = kernel.work_size(problem.head_size, tiles_per_item);

    thread_local Buffer key_buffer, value_buffer, work_buffer, mass_buffer;
    float *keys = key_buffer.at_least(most_heads * blocks * key_size);
    float *values = value_buffer.at_least(most_heads * blocks * value_size);
    float *work = work_buffer.at_least(threads * work_size);
    // Each item has its own, so that they are summed in one order, whichever thread computes which.
    const int64_t mass_size = blocks * kernel.keys_per_block;
    float *masses = mass ? mass_buffer.at_least(most_heads * items * mass_size) : nullptr;

    for (int64_t first_head = 0; first_head < problem.kv_heads; first_head += most_heads) {
        const int64_t heads = std::min(most_heads, problem.kv_heads - first_head);
        std::atomic<int64_t> next_block{0}, next_item{0};
        if (mass) std::fill_n(masses, heads * items * mass_size, 0.0f);
        parallel(threads, [&](int) {
            for (int64_t i; (i = next_block++) < heads * blocks;)
                kernel.pack(problem, first_head + i / blocks, first_block + i % blocks, keys + i * key_size,
                            values + i * value_size);
        });
        parallel(threads, [&](int worker) {
            for (int64_t i; (i = next_item++) < heads * items;) {
                // Later queries see more keys: they go first, so that the last items are short.
                const int64_t head = i / items, tile = (items - 1 - i % items) * tiles_per_item;
                kernel.attend(problem, first_head + head, tile, std::min(tiles_per_item, tiles - tile), first_block,
                              keys + head * blocks * key_size, values + head * blocks * value_size,
                              work + worker * work_size, mass ? masses + i * mass_size : nullptr);
            }
        });
        if (!mass) continue;
        const int64_t first_key = first_block * kernel.keys_per_block;
        const int64_t keys = std::min(mass_size, problem.positions[problem.queries - 1] + 1 - first_key);
        for (int64_t i = 0; i < heads * items; ++i)
            for (int64_t k = 0; k < keys; ++k) mass[first_key + k] += masses[i * mass_size + k];
    }
}

using Array = nb::ndarray<nb::device::cpu, nb::ndim<3>>;
using ConstArray = nb::ndarray<nb::ro, nb::device::cpu, nb::ndim<3>>;
using Mass = nb::ndarray<float, nb::device::cpu, nb::ndim<1>, nb::c_contig>;
using Positions = nb::ndarray<nb::ro, const int64_t, nb::device::cpu, nb::ndim<1>, nb::c_contig>;

constexpr nb::dlpack::dtype kBfloat16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};

void check(bool ok, const char *message) {
    if (!ok) throw std::invalid_argument(message);
}

template <typename A>
void take_strides(const A &array, int64_t stride[2]) {
    check(array.shape(2) == 1 || array.stride(2) == 1, "the last dimension of each tensor must be contiguous");
    stride[0] = array.stride(0);
    stride[1] = array.stride(1);
}

template <typename A, typename B>
void check_same(const A &a, const B &b, const char *message) {
    check(a.dtype() == b.dtype(), "all tensors must have one dtype");
    for (int i = 0; i < 3; ++i) check(a.shape(i) == b.shape(i), message);
}

void check_positions(const Problem &problem, int64_t tokens) {
    const int64_t *begin = problem.positions, *end = begin + problem.queries;
    check(std::is_sorted(begin, end), "positions must be ascending");
    check(*begin >= 0 && end[-1] < tokens && tokens < INT32_MAX, "positions must be in [0, tokens)");
}

void attend_arrays(ConstArray query, ConstArray key, ConstArray value, Positions positions, double scale,
                   int64_t window, Array out, std::optional<Mass> mass, int threads, const std::string &isa) {
    check(query.dtype() == nb::dtype<float>() || query.dtype() == kBfloat16, "dtype must be float32 or bfloat16");
    check_same(query, out, "query and out must have the same shape");
    check_same(key, value, "key and value must have the same shape");
    check(key.dtype() == query.dtype(), "all tensors must have one dtype");
    check(key.shape(2) == query.shape(2), "query and key must have the same head size");
    check(key.shape(1) > 0 && query.shape(1) % key.shape(1) == 0, "heads must be a multiple of kv_heads");
    check(positions.shape(0) == query.shape(0), "positions must have one element per query");
    check(window > 0 && threads > 0, "window and threads must be positive");
    check(scale > 0, "scale must be positive");
    check(query.shape(2) % 8 == 0, "the head size must be a multiple of 8");
    check(!mass || mass->shape(0) == key.shape(0), "mass must have one element per key");
    if (query.shape(0) == 0 || query.shape(1) == 0 || query.shape(2) == 0) return;

    Problem problem{};
    problem.query = query.data();
    problem.key = key.data();
    problem.value = value.data();
    problem.out = out.data();
    take_strides(query, problem.query_stride);
    take_strides(key, problem.key_stride);
    take_strides(value, problem.value_stride);
    take_strides(out, problem.out_stride);
    problem.bfloat16 = query.dtype() == kBfloat16;
    problem.positions = positions.data();
    problem.queries = query.shape(0);
    problem.kv_heads = key.shape(1);
    problem.group = query.shape(1) / key.shape(1);
    problem.head_size = query.shape(2);
    problem.scale = static_cast<float>(scale);
    // A window of all tokens is no window.
    problem.window = std::min<int64_t>(window, key.shape(0));
    const Kernel &kernel = kernel_named(isa, problem.bfloat16, mass.has_value());
    float *weights = mass ? mass->data() : nullptr;

    nb::gil_scoped_release unlocked;
    check_positions(problem, key.shape(0));
    const std::vector<uint8_t> seen = seen_keys(problem);
    problem.seen = seen.data();
    run(problem, kernel, threads, weights);
}

std::vector<std::string> instruction_sets(bool bfloat16) {
    std::vector<std::string> names;
    for (const auto &[name, kernel] : kernels_for(bfloat16)) names.push_back(name);
    return names;
}

}  // namespace
}  // namespace attend

NB_MODULE(_attend, m) {
    m.def("attend", &attend::attend_arrays, nb::arg("query"), nb::arg("key"), nb::arg("value"), nb::arg("positions"),
          nb::kw_only(), nb::arg("scale"), nb::arg("window"), nb::arg("out"), nb::arg("mass") = nb::none(),
          nb::arg("threads"), nb::arg("isa") = "");
    m.def("instruction_sets", &attend::instruction_sets, nb::arg("bfloat16"),
          "What `isa` may be on this machine, the default first.");
    m.def("openmp_runtime", &attend::openmp_runtime, "The library whose threads are used; empty for its own threads.");
}
