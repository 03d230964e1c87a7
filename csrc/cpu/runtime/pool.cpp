#include "cpu/runtime/pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>

namespace grokkernels::cpu {
namespace {

Pool g_pool = {[] { return 1; }, [](int64_t n, RangeFn fn, void* context) { fn(0, n, context); }};
std::atomic<bool> g_forked{false};

// A forked child inherits the pool's bookkeeping but none of its threads: waiting for them would hang forever.
const int g_watch_forks = pthread_atfork(nullptr, nullptr, [] { g_forked.store(true); });

}  // namespace

void set_pool(const Pool& pool) { g_pool = pool; }

int num_threads() { return g_forked.load(std::memory_order_relaxed) ? 1 : g_pool.num_threads(); }

void run_region(int64_t n, RangeFn fn, void* context) {
  if (n <= 1 || num_threads() <= 1) {
    if (n > 0) fn(0, n, context);
    return;
  }
  g_pool.run(n, fn, context);
}

void yield() { sched_yield(); }

}  // namespace grokkernels::cpu
