// The thread pool the kernels run on. It is lent by the program that loads them: torch's own pool inside the
// extension, so that torch.set_num_threads is the one setting; a serial loop in the torch-free libraries until
// set_pool says otherwise.
#pragma once

#include <atomic>
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

// Threads of a region that go one after another: `await_turn` returns once `turn` is `mine`, `pass_turn` sets it. A
// short wait spins, a longer one sleeps: whoever is waited for may have lost its core to another program.
void await_turn(const std::atomic<int32_t>& turn, int32_t mine);
void pass_turn(std::atomic<int32_t>& turn, int32_t next);

}  // namespace grokkernels::cpu
