// PyTorch's OpenMP workers spin for a while after each of its operations. A second pool of threads would compete with
// them for the cores, so this uses PyTorch's own pool: the entry points of the OpenMP runtime are looked up in the
// process, where PyTorch (imported first) has loaded it for everyone, and nothing here is linked to a runtime.

#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

namespace attend {
namespace {

// The interface between GCC's compiled code and libgomp, which the OpenMP runtimes of LLVM and Intel offer as well.
using GompParallel = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);
using OmpGetMaxThreads = int (*)();

struct Runtime {
    GompParallel parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    OmpGetMaxThreads max_threads = reinterpret_cast<OmpGetMaxThreads>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    std::string path;

    Runtime() {
        Dl_info of_parallel, of_max_threads;
        // Both from one library: else one of them belongs to a runtime that PyTorch does not use.
        if (parallel != nullptr && max_threads != nullptr &&
            dladdr(reinterpret_cast<void *>(parallel), &of_parallel) != 0 &&
            dladdr(reinterpret_cast<void *>(max_threads), &of_max_threads) != 0 &&
            of_parallel.dli_fbase == of_max_threads.dli_fbase)
            path = of_parallel.dli_fname;
    }
};

const Runtime &runtime() {
    static const Runtime found;
    return found;
}

struct Call {
    const std::function<void(int)> &body;
    std::atomic<int> workers{0};

    void run() { body(workers++); }
};

}  // namespace

std::string openmp_runtime() { return runtime().path; }

void parallel(int threads, const std::function<void(int)> &body) {
    Call call{body};
    if (threads <= 1) {
        call.run();
    // `threads` is PyTorch's number, which is its runtime's number for the calling thread: it tells the runtime.
    } else if (!runtime().path.empty() && runtime().max_threads() == threads) {
        runtime().parallel([](void *data) { static_cast<Call *>(data)->run(); }, &call, threads, 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; ++i) others.emplace_back([&call] { call.run(); });
        call.run();
        for (std::thread &other : others) other.join();
    }
}

}  // namespace attend
