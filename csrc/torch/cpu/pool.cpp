// Lends torch's own thread pool to the kernels, so that torch.set_num_threads is the one setting.
#include "cpu/runtime/pool.h"

#include <torch/csrc/stable/ops.h>

namespace grokkernels::cpu {
namespace {

int torch_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void torch_run(int64_t n, RangeFn fn, void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { fn(begin, end, context); });
}

[[maybe_unused]] const bool g_lent = (set_pool({torch_threads, torch_run}), true);

}  // namespace
}  // namespace grokkernels::cpu
