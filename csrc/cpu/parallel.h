// Loops over cores: one region per op, none for work too small to pay for it.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/runtime/pool.h"
#include "cpu/runtime/scratch.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// Waking the pool costs about 7 microseconds after idling: work that takes less than about 20 stays on this thread.
// Costs are given in floats touched or fused multiply-adds done, a few of which pass per nanosecond.
inline constexpr int64_t kMinParallelCost = 64 * 1024;

// body(begin, end) over disjoint ranges that cover [0, n). cost_per_item in floats touched or FMAs / 8.
template <typename Body>
void parallel_range(int64_t n, int64_t cost_per_item, const Body& body) {
  if (n <= 0) return;
  const int64_t by_cost = n * cost_per_item / kMinParallelCost + 1;
  const int64_t threads = num_threads();
  const int64_t chunks = by_cost < threads ? (by_cost < n ? by_cost : n) : (threads < n ? threads : n);
  struct Context {
    const Body* body;
    int64_t n, chunks;
  } context{&body, n, chunks};
  run_region(
      chunks,
      [](int64_t first, int64_t last, void* raw) {
        const Context& c = *static_cast<const Context*>(raw);
        for (int64_t i = first; i < last; ++i) (*c.body)(c.n* i / c.chunks, c.n * (i + 1) / c.chunks);
      },
      &context);
}

// body(task) for every task in [0, n), pulled one by one from a counter: for tasks of unequal length (causal
// attention, experts). Put long tasks first.
template <typename Body>
void parallel_tasks(int64_t n, int64_t cost_per_task, const Body& body) {
  if (n <= 0) return;
  const int64_t by_cost = n * cost_per_task / kMinParallelCost + 1;
  int64_t workers = num_threads();
  if (by_cost < workers) workers = by_cost;
  if (n < workers) workers = n;
  struct Context {
    const Body* body;
    int64_t n;
    std::atomic<int64_t> next;
  } context{&body, n, {0}};
  run_region(
      workers,
      [](int64_t first, int64_t last, void* raw) {
        Context& c = *static_cast<Context*>(raw);
        for (int64_t worker = first; worker < last; ++worker)
          for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.n;) (*c.body)(i);
      },
      &context);
}

// Scratch of the calling thread, `count` elements of T (see scratch_bytes).
template <typename T>
T* scratch(int slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
