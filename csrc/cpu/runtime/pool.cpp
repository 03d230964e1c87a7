#include "cpu/runtime/pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>

namespace grokkernels::cpu {
namespace {

Pool g_pool = {[] { return 1; }, [](int64_t n, RangeFn fn, void* context) { fn(0, n, context); }};
std::atomic<bool> g_forked{false};
constexpr int kYields = 32;  // before a thread sleeps: some microseconds on a core that nobody else wants

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

void await_turn(const std::atomic<int32_t>& turn, int32_t mine) {
  for (int round = 0; round < kYields; ++round) {
    if (turn.load(std::memory_order_acquire) == mine) return;
    sched_yield();
  }
  for (int32_t now; (now = turn.load(std::memory_order_acquire)) != mine;) turn.wait(now, std::memory_order_relaxed);
}

void pass_turn(std::atomic<int32_t>& turn, int32_t next) {
  turn.store(next, std::memory_order_release);
  turn.notify_all();
}

}  // namespace grokkernels::cpu
