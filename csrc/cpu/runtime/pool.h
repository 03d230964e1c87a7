// The thread pool the kernels run on. It is lent by the program that loads them: torch's own pool inside the
// extension, so that torch.set_num_threads is the one setting; a serial loop in the torch-free libraries until
// set_pool says otherwise.
#pragma once

#include <cstdint>

namespace grokkernels::cpu {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

struct Pool {
  int (*num_threads)();
  // Calls fn on disjoint ranges that cover [0, n), at most one range per thread, and returns when all are done.
  void (*run)(int64_t n, RangeFn fn, void* context);
};

void set_pool(const Pool& pool);

// Threads a region may use now: 1 in a forked child, whose parent's threads do not exist there.
int num_threads();

void run_region(int64_t n, RangeFn fn, void* context);

// Lets other threads run: for the body of a loop that waits for one of them.
void yield();

}  // namespace grokkernels::cpu
