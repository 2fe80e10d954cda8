// Threads shared with PyTorch.
#pragma once

#include <functional>
#include <string>

namespace attend {

// Run `body(worker)` for workers 0 ... threads - 1, or fewer where the runtime gives fewer: each must take its work
// from a shared counter. `body` must not throw.
void parallel(int threads, const std::function<void(int)> &body);

// The library whose OpenMP threads `parallel` uses, or an empty string where it starts threads of its own.
std::string openmp_runtime();

}  // namespace attend
