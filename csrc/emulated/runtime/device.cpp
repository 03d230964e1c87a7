#include "emulated/runtime/device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "emulated/runtime/fiber.h"

namespace grokkernels::emulated {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kSharedStride = 256 * 1024;  // between the shared memories of a cluster's blocks
constexpr unsigned kMostBlocksOfCluster = 16;
constexpr int kRegisters = 64 * 1024;  // of a multiprocessor

// What one OS thread keeps between launches.
struct Worker {
  void* stack_pointer = nullptr;  // of the OS thread itself, while fibers run
  void* tsan = nullptr;
  const void* own_stack = nullptr;  // of the OS thread, when AddressSanitizer must know
  size_t own_stack_size = 0;
  Cluster cluster;
  std::vector<char*> stacks;
  char* shared = nullptr;
  uint64_t random_state = 1;
  bool random = false;
  // How readily loads land and wgmma are carried out, 0 (only when waited for) to 5: drawn anew for every cluster,
  // since some mistakes need the one early and the other late.
  int load_pace = 3, matrix_pace = 3;
  // A warp that has fallen behind runs only when no other can, and so do its copies and products: what it has released
  // too early, or not yet read, others overwrite.
  int late_warp = -1;
  std::string error;
  uint64_t switches = 0, barriers = 0, collectives = 0;

  uint32_t random_number() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>(random_state >> 20);
  }
  uint32_t below(size_t n) { return random_number() % static_cast<uint32_t>(n); }
};

struct Launch {
  const LaunchShape* shape;
  const std::function<void()>* thread;
};

thread_local Worker* t_worker = nullptr;
thread_local Fiber* t_fiber = nullptr;
thread_local const Launch* t_launch = nullptr;

// Not inlined: a compiler may keep the address of a thread_local, and a later grid runs the fiber on another thread.
GK_UNWATCHED __attribute__((noinline)) Worker& worker() { return *t_worker; }

GK_UNWATCHED __attribute__((noinline)) void set_fiber(Fiber* fiber) { t_fiber = fiber; }

GK_UNWATCHED void to_worker(bool for_good) {
  Fiber* fiber = t_fiber;
  t_fiber = nullptr;
#if defined(__SANITIZE_THREAD__)
  if (fiber->done) end_unwatched();
  __tsan_switch_to_fiber(worker().tsan, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber->asan, worker().own_stack, worker().own_stack_size);
#endif
  (void)for_good;
  switch_stack(&fiber->stack_pointer, worker().stack_pointer);
}

GK_UNWATCHED void to_fiber(Fiber* next) {
  Fiber* fiber = t_fiber;
  if (fiber == next) return;
  t_fiber = next;
  ++worker().switches;
#if defined(__SANITIZE_THREAD__)
  if (fiber->done) end_unwatched();
  __tsan_switch_to_fiber(next->tsan, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber->done ? nullptr : &fiber->asan, next->stack, kStack);
#endif
  switch_stack(&fiber->stack_pointer, next->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t_fiber->asan, nullptr, nullptr);
#endif
}

// One of the set bits: the next after `after`, or any.
int pick(uint32_t bits, int after) {
  Worker& w = worker();
  if (w.random) {
    for (uint32_t skip = w.below(static_cast<size_t>(__builtin_popcount(bits))); skip > 0; --skip) bits &= bits - 1;
    return __builtin_ctz(bits);
  }
  const uint32_t later = after >= 31 ? 0 : bits & (~0u << (after + 1));
  return __builtin_ctz(later ? later : bits);
}

void run_copy(Copy& copy) {
  if (copy.done) return;
  copy.done = true;
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
  std::memset(copy.to + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
}

void run_store(Store& store, bool reads_only) {
  if (store.read) store.write = std::exchange(store.read, nullptr)();
  if (store.write && !reads_only) std::exchange(store.write, nullptr)();
}

void run_matrix(Warp& warp) {
  const MatrixOperation& op = warp.matrix_operations[warp.matrix_done++];
  op.run(op, warp.accumulators.at(op.d[0]).values.data());
}

void run_in_flight(Cluster& cluster, size_t i) {
  const Work work = std::move(cluster.in_flight[i]);
  cluster.in_flight.erase(cluster.in_flight.begin() + static_cast<ptrdiff_t>(i));
  work();
}

// With a random schedule: something asynchronous, chosen at random, takes effect.
void progress() {
  const Unwatched unwatched;
  Worker& w = worker();
  Cluster& cluster = w.cluster;
  const auto go = [&w](int pace) { return (w.random_number() & 15) < (1u << pace) >> 1; };
  if (!cluster.in_flight.empty() && go(w.load_pace)) return run_in_flight(cluster, w.below(cluster.in_flight.size()));
  Warp& warp = cluster.warps[w.below(cluster.warps.size())];
  if (warp.index == w.late_warp) return;
  if (warp.matrix_done < warp.matrix_operations.size() && go(w.matrix_pace)) return run_matrix(warp);
  Fiber& fiber = *warp.lane[w.below(static_cast<size_t>(warp.lanes))];
  if (!fiber.copies.empty()) return run_copy(fiber.copies[w.below(fiber.copies.size())]);
  if (!fiber.bulk_groups.empty()) {
    auto& group = fiber.bulk_groups[w.below(fiber.bulk_groups.size())];
    if (!group.empty()) run_store(group[w.below(group.size())], w.below(2) == 0);
  }
}

// What the lanes of a warp wait for: "lanes 0, 2-31: an mbarrier at offset 64, parity 1 (pending: 1 arrivals, 0
// bytes)".
std::string waits_of(const Warp& warp) {
  std::string words;
  uint32_t told = 0;
  for (int lane = 0; lane < warp.lanes; ++lane) {
    const Fiber& first = *warp.lane[lane];
    if (first.done || (told >> lane & 1) != 0) continue;
    std::string lanes;
    for (int i = lane; i < warp.lanes; ++i) {
      const auto same = [&](int other) {
        const Fiber& f = *warp.lane[other];
        return !f.done && std::strcmp(f.waits_on, first.waits_on) == 0 && f.barrier_address == first.barrier_address &&
               f.barrier_parity == first.barrier_parity;
      };
      if (!same(i)) continue;
      int last = i;
      while (last + 1 < warp.lanes && same(last + 1)) ++last;
      for (int j = i; j <= last; ++j) told |= 1u << j;
      lanes += (lanes.empty() ? "" : ", ") + std::to_string(i) + (last > i ? "-" + std::to_string(last) : "");
      i = last;
    }
    words += (words.empty() ? "" : ", ") + ("lanes " + lanes) + ": " + first.waits_on;
    if (first.barrier_address == 0) continue;
    const Mbarrier& barrier = first.block->mbarriers.at(first.barrier_address);
    words += " at offset " + std::to_string(first.barrier_address - kSharedBase) + ", parity " +
             std::to_string(first.barrier_parity) + " (pending: " + std::to_string(barrier.pending) + " arrivals, " +
             std::to_string(barrier.bytes) + " bytes)";
  }
  return words;
}

std::string deadlock(const Cluster& cluster) {
  std::string words = "deadlock: no thread can run";
  int shown = 0;
  for (const Warp& warp : cluster.warps) {
    const std::string waits = waits_of(warp);
    if (waits.empty()) continue;
    if (++shown > 8) return words + "; ...";
    words += "; block " + std::to_string(warp.block->index.x) + " warp " + std::to_string(warp.lane[0]->index / 32) +
             " waits: " + waits;
  }
  return words;
}

// The running thread gives up the processor: because it waits, or only to let others go first.
void schedule() {
  Worker& w = worker();
  Cluster& cluster = w.cluster;
  Warp* mine = t_fiber->warp;
  const size_t count = cluster.warps.size();
  if (w.random) {
    if ((w.random_number() & 3) == 0) progress();
    if ((w.random_number() & 4095) == 0) w.late_warp = -1;  // others may be polling for it
  }
  for (;;) {
    // In order: stay in the warp while a lane of it can run. At random: mostly stay, sometimes leave it.
    if (mine->runnable != 0 && mine->index != w.late_warp && (!w.random || (w.random_number() & 15) != 0))
      return to_fiber(mine->lane[pick(mine->runnable, t_fiber->lane)]);
    const size_t start = w.random ? w.below(count) : static_cast<size_t>(mine->index) + 1;
    for (size_t i = 0; i < count; ++i) {
      Warp& warp = cluster.warps[(start + i) % count];
      if (warp.runnable != 0 && warp.index != w.late_warp) return to_fiber(warp.lane[pick(warp.runnable, 31)]);
    }
    if (!cluster.in_flight.empty()) {  // nobody can run: the copy engine moves
      run_in_flight(cluster, w.random ? w.below(cluster.in_flight.size()) : 0);
      continue;
    }
    if (w.late_warp >= 0) {
      w.late_warp = -1;
      continue;
    }
    if (cluster.done == cluster.threads) return to_worker(true);
    fail(deadlock(cluster));
  }
}

// With a random schedule, now and then, from here on: after it has told others something, or they have met.
void fall_behind(int warp) {
  Worker& w = worker();
  if (w.random && w.late_warp < 0 && (w.random_number() & 7) == 0) w.late_warp = warp;
}

int any_warp() { return static_cast<int>(worker().below(worker().cluster.warps.size())); }

void make_runnable(Fiber* fiber) { fiber->warp->runnable |= 1u << fiber->lane; }

void wait_for(const char* what) {
  t_fiber->waits_on = what;
  t_fiber->warp->runnable &= ~(1u << t_fiber->lane);
  schedule();
}

void open_barrier(ClusterBarrier& barrier) {
  fall_behind(any_warp());
  barrier.arrived = 0;
  ++barrier.phase;
  for (Fiber* fiber : barrier.waiting) make_runnable(fiber);
  barrier.waiting.clear();
}

void open_barrier(NamedBarrier& barrier) {
  fall_behind(any_warp());
  barrier.arrived = 0;
  for (Fiber* fiber : barrier.waiting) make_runnable(fiber);
  barrier.waiting.clear();
}

// What launch bounds let the compiler take for a thread.
int registers_at_launch(const Block& block) { return std::min(255, kRegisters / block.threads) / 8 * 8; }

// What must hold when all threads of a block have returned.
void check_block(const Block& block) {
  for (const MatrixSequence& sequence : block.warpgroups)
    if (!sequence.operations.empty()) fail("the warps of a warpgroup do not issue the same wgmma: some issue more");
  int registers = 0;
  bool moved = false;
  const auto& warps = block.cluster->warps;
  for (size_t i = 0; i < warps.size(); ++i) {
    if (warps[i].block != &block) continue;
    const Warp& first = warps[i - static_cast<size_t>(warps[i].lane[0]->index) / 32 % 4];
    if (first.registers != warps[i].registers) fail("the warps of a warpgroup do not ask for as many registers");
    moved = moved || first.registers > 0;
    registers += 32 * (first.registers > 0 ? first.registers : registers_at_launch(block));
  }
  if (moved && registers > kRegisters)
    fail("registers_take waits for ever: the warps ask for " + std::to_string(registers) + " registers, there are " +
         std::to_string(kRegisters));
}

GK_UNWATCHED void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (worker().own_stack == nullptr) {  // the first fiber comes from the OS thread
    worker().own_stack = bottom;
    worker().own_stack_size = size;
  }
#endif
  Fiber& fiber = current();
  acquire(fiber.block->cluster);
  (*t_launch->thread)();
  release(fiber.block->cluster);
  begin_unwatched();  // until the last switch away
  for (const Copy& copy : fiber.copies)
    if (copy.valid > 0) fail("the thread returns before it has waited for its asynchronous copies");
  for (auto& group : fiber.bulk_groups)
    for (Store& store : group) {
      if (store.read) fail("the thread returns before its bulk stores have read shared memory");
      run_store(store, false);
    }
  if (!fiber.warp->matrix_operations.empty()) fail("the thread returns before it has waited for its wgmma");
  fiber.done = true;
  Block& block = *fiber.block;
  Cluster& cluster = *block.cluster;
  ++block.done;
  ++cluster.done;
  fiber.warp->runnable &= ~(1u << fiber.lane);
  // Threads that have returned no longer count at __syncthreads.
  NamedBarrier& barrier = block.barriers[0];
  if (barrier.arrived > 0 && barrier.arrived == block.threads - block.done) open_barrier(barrier);
  if (cluster.barrier.arrived > 0 && cluster.barrier.arrived == cluster.threads - cluster.done)
    open_barrier(cluster.barrier);
  if (block.done == block.threads) check_block(block);
  schedule();
  std::abort();
}

char* stack(Worker& w, size_t i) {
  while (w.stacks.size() <= i) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("the emulated device found no memory for its threads' stacks");
    w.stacks.push_back(static_cast<char*>(memory));
  }
  return w.stacks[i];
}

void prepare_block(Worker& w, Block& block, const LaunchShape& shape, Index3 index, int rank) {
  block.cluster = &w.cluster;
  block.index = index;
  block.rank = rank;
  block.threads = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
  block.done = 0;
  block.shared = w.shared + static_cast<size_t>(rank) * kSharedStride;
  block.shared_bytes = shape.shared_bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.shared, kSharedStride);
#endif
  std::memset(block.shared, 0xFF, block.shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared + block.shared_bytes, kSharedStride - block.shared_bytes);
#endif
  for (NamedBarrier& barrier : block.barriers) {
    barrier.arrived = 0;
    barrier.waiting.clear();
  }
  block.mbarriers.clear();
  block.ordinary_writes.clear();
  block.latest_write = 0;
  block.warpgroups.assign(static_cast<size_t>(block.threads + 127) / 128, {});
#if defined(__SANITIZE_THREAD__)
  for (size_t i = static_cast<size_t>(block.threads); i < block.fibers.size(); ++i)  // of a larger block before
    if (block.fibers[i].tsan != nullptr) __tsan_destroy_fiber(block.fibers[i].tsan);
#endif
  block.fibers.resize(static_cast<size_t>(block.threads));
}

void prepare_fiber(Worker& w, Fiber& fiber, Block& block, Warp& warp, int index, size_t stack_index) {
  const LaunchShape& shape = *t_launch->shape;
  fiber.block = &block;
  fiber.warp = &warp;
  fiber.index = index;
  fiber.lane = index % 32;
  const unsigned i = static_cast<unsigned>(index);
  fiber.thread = {i % shape.block.x, i / shape.block.x % shape.block.y, i / (shape.block.x * shape.block.y)};
  fiber.done = false;
  fiber.copies.clear();
  fiber.groups.clear();
  fiber.bulk_groups.clear();
  fiber.in_cluster_barrier = false;
  fiber.barrier_address = 0;
  fiber.proxy_fenced = fiber.mbarriers_fenced = 0;
  fiber.asan = nullptr;
  fiber.stack = stack(w, stack_index);
  warp.lane[fiber.lane] = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
  // Kept for the blocks that follow: these come one after another for their worker in any case, and making one is slow.
  if (fiber.tsan == nullptr) fiber.tsan = __tsan_create_fiber(0);
#endif
}

void run_cluster(Worker& w, Index3 first_block) {
  const LaunchShape& shape = *t_launch->shape;
  Cluster& cluster = w.cluster;
  cluster.blocks.resize(shape.cluster);
  cluster.done = 0;
  cluster.barrier = {};
  cluster.mbarrier_waiters.clear();
  cluster.in_flight.clear();
  cluster.proxy_clock = 0;
  const int threads = static_cast<int>(shape.block.x * shape.block.y * shape.block.z);
  const int warps = (threads + 31) / 32;
  cluster.threads = threads * static_cast<int>(shape.cluster);
  cluster.warps.resize(static_cast<size_t>(warps) * shape.cluster);
  for (unsigned rank = 0; rank < shape.cluster; ++rank) {
    Block& block = cluster.blocks[rank];
    prepare_block(w, block, shape, {first_block.x + rank, first_block.y, first_block.z}, static_cast<int>(rank));
    for (int i = 0; i < warps; ++i) {
      Warp& warp = cluster.warps[rank * static_cast<size_t>(warps) + static_cast<size_t>(i)];
      warp.block = &block;
      warp.index = static_cast<int>(rank) * warps + i;
      warp.lanes = std::min(32, threads - 32 * i);
      warp.runnable = warp.lanes == 32 ? ~0u : (1u << warp.lanes) - 1;
      for (Collective& collective : warp.collectives) collective.arrived = 0;
      warp.matrix_operations.clear();
      warp.matrix_groups.clear();
      warp.matrix_done = 0;
      warp.accumulators.clear();
      warp.matrix_fenced = false;
      warp.matrix_issued = 0;
      warp.registers = 0;
    }
    for (int i = 0; i < threads; ++i)
      prepare_fiber(w, block.fibers[static_cast<size_t>(i)], block,
                    cluster.warps[rank * static_cast<size_t>(warps) + static_cast<size_t>(i / 32)], i,
                    rank * static_cast<size_t>(threads) + static_cast<size_t>(i));
  }
  Fiber* first = cluster.warps[w.random ? w.below(cluster.warps.size()) : 0].lane[0];
  release(&cluster);
  set_fiber(first);
  void* first_stack = first->stack_pointer;  // read as the worker: the fiber has not seen yet what was prepared
#if defined(__SANITIZE_THREAD__)
  w.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(first->tsan, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  w.own_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, first->stack, kStack);
#endif
  switch_stack(&w.stack_pointer, first_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  acquire(&cluster);
#if defined(__SANITIZE_THREAD__)
  if (!w.error.empty())  // stopped in the midst of something: these must not be destroyed
    for (Block& block : cluster.blocks)
      for (Fiber& fiber : block.fibers) fiber.tsan = nullptr;
#endif
  if (w.error.empty() && !cluster.in_flight.empty())
    w.error = "the block returned while copies into its shared memory were under way";
}

void check_shape(const LaunchShape& s) {
  const auto text = [&](const char* what) {
    return Error(std::string("launch refused: ") + what + "; grid " + std::to_string(s.grid.x) + "x" +
                 std::to_string(s.grid.y) + "x" + std::to_string(s.grid.z) + ", block " + std::to_string(s.block.x) +
                 "x" + std::to_string(s.block.y) + "x" + std::to_string(s.block.z) + ", " +
                 std::to_string(s.shared_bytes) + " bytes of shared memory, cluster " + std::to_string(s.cluster));
  };
  const uint64_t threads = uint64_t{s.block.x} * s.block.y * s.block.z;
  const int limit = settings().architecture >= 90 && settings().architecture < 120 ? kSharedLimitSm90 : kSharedLimit;
  if (threads == 0 || threads > 1024 || s.block.z > 64) throw text("a block has 1 to 1024 threads, z at most 64");
  if (s.grid.y > 65535 || s.grid.z > 65535 || s.grid.x > 0x7fffffff) throw text("the grid is too large");
  if (s.shared_bytes > static_cast<size_t>(limit)) throw text("too much shared memory");
  if (s.cluster == 0 || s.cluster > kMostBlocksOfCluster || s.grid.x % s.cluster != 0)
    throw text("a cluster has 1 to 16 blocks and divides the grid along x");
  if (s.cluster > 1 && settings().architecture < 90) throw text("clusters need sm_90");
}

}  // namespace

__asm__(
    ".text\n"
    ".p2align 4\n"
    ".type gk_switch_stack, @function\n"
    "gk_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size gk_switch_stack, .-gk_switch_stack\n");
extern "C" __attribute__((visibility("hidden"))) void gk_switch_stack(void** save, void* to);

GK_UNWATCHED void switch_stack(void** save, void* to) { gk_switch_stack(save, to); }

Settings& settings() {
  static Settings all;
  return all;
}

Executor& executor() {
  static Executor one;
  return one;
}

Counters& counters() {
  static Counters all;
  return all;
}

GK_UNWATCHED Fiber& current() { return *t_fiber; }
GK_UNWATCHED const LaunchShape& current_launch() { return *t_launch->shape; }

void fail(const std::string& what) {
  const Fiber& f = *t_fiber;
  const auto triple = [](Index3 i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  worker().error = what + " [block " + triple(f.block->index) + " thread " + triple(f.thread) + ", sm_" +
                   std::to_string(settings().architecture) + ", seed " + std::to_string(settings().seed) + "]";
  to_worker(true);
  __builtin_unreachable();
}

void maybe_yield() {
  if (!worker().random) return;
  const Unwatched unwatched;
  schedule();
}

void warp_collective(uint32_t lanes, const char* name, void* argument, CollectiveFn fn) {
  const Unwatched unwatched;
  Fiber& fiber = *t_fiber;
  Warp& warp = *fiber.warp;
  ++worker().collectives;
  if ((lanes >> fiber.lane & 1) == 0) fail(std::string(name) + ": the calling lane is not among its lanes");
  if (warp.lanes < 32) lanes &= (1u << warp.lanes) - 1;
  Collective* meeting = nullptr;
  for (Collective& c : warp.collectives)
    if (c.arrived != 0 && (c.lanes & lanes) != 0) {
      if (c.lanes != lanes || c.fn != fn)
        fail(std::string(name) + ": lanes of a warp meet in different collectives (divergence)");
      meeting = &c;
      break;
    }
  if (meeting == nullptr) {
    for (Collective& c : warp.collectives)
      if (c.arrived == 0) {
        meeting = &c;
        break;
      }
    if (meeting == nullptr) fail(std::string(name) + ": more than eight collectives of one warp at a time");
    meeting->lanes = lanes;
    meeting->fn = fn;
  }
  meeting->arguments[fiber.lane] = argument;
  meeting->arrived |= 1u << fiber.lane;
  if (meeting->arrived != lanes) return wait_for(name);
  fn(meeting->arguments, lanes);
  meeting->arrived = 0;
  warp.runnable |= lanes;
  maybe_yield();
}

void named_barrier(int id, int threads, bool wait) {
  const Unwatched unwatched;
  if (id < 0 || id > 15) fail("a named barrier has a number from 0 to 15, got " + std::to_string(id));
  Block& block = *t_fiber->block;
  NamedBarrier& barrier = block.barriers[id];
  release(&barrier);
  ++worker().barriers;
  const int expected = threads == 0 ? block.threads - block.done : threads;
  if (threads % 32 != 0 || threads > block.threads)
    fail("a named barrier counts whole warps of the block, got " + std::to_string(threads) + " threads");
  if (barrier.arrived > 0 && barrier.expected != expected)
    fail("named barrier " + std::to_string(id) + " is used with " + std::to_string(barrier.expected) + " and " +
         std::to_string(expected) + " threads at a time");
  barrier.expected = expected;
  if (++barrier.arrived == expected) {
    open_barrier(barrier);
    maybe_yield();
  } else if (wait) {
    barrier.waiting.push_back(t_fiber);
    wait_for(id == 0 ? "sync_threads" : "a named barrier");
  }
  if (wait) acquire(&barrier);
}

void cluster_arrive() {
  const Unwatched unwatched;
  Fiber& fiber = *t_fiber;
  Cluster& cluster = *fiber.block->cluster;
  release(&cluster.barrier);
  ++worker().barriers;
  if (fiber.in_cluster_barrier) fail("cluster_arrive twice without cluster_wait");
  fiber.in_cluster_barrier = true;
  fiber.cluster_phase = cluster.barrier.phase;
  if (++cluster.barrier.arrived == cluster.threads - cluster.done) open_barrier(cluster.barrier);
  maybe_yield();
}

void cluster_wait() {
  const Unwatched unwatched;
  Fiber& fiber = *t_fiber;
  ClusterBarrier& barrier = fiber.block->cluster->barrier;
  if (!fiber.in_cluster_barrier) fail("cluster_wait without cluster_arrive");
  fiber.in_cluster_barrier = false;
  if (fiber.cluster_phase == barrier.phase) {
    barrier.waiting.push_back(&fiber);
    wait_for("the cluster barrier");
  }
  acquire(&barrier);
}

void warp_barrier(uint32_t lanes) {
  const Unwatched unwatched;
  Warp* warp = t_fiber->warp;
  release(warp);
  warp_collective(lanes, "sync_warp", nullptr, [](void**, uint32_t) {});
  acquire(warp);
}

GK_UNWATCHED uint32_t shared_address(const void* pointer) {
  const Block& block = *t_fiber->block;
  const ptrdiff_t offset = static_cast<const char*>(pointer) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) > block.shared_bytes)
    fail("a pointer into shared memory is expected, this one points elsewhere");
  return static_cast<uint32_t>(offset) + kSharedBase;
}

GK_UNWATCHED uint32_t own_address(uint32_t address) { return address & ((1u << kRankShift) - 1); }

GK_UNWATCHED Block& block_of(uint32_t address) {
  const uint32_t rank = address >> kRankShift;
  return rank == 0 ? *t_fiber->block : t_fiber->block->cluster->blocks[rank - 1];
}

GK_UNWATCHED char* memory_of(const Block& block, uint32_t address, int bytes, int alignment, const char* who) {
  const uint32_t offset = address - kSharedBase;
  if (offset > block.shared_bytes || block.shared_bytes - offset < static_cast<size_t>(bytes))
    fail(std::string(who) + ": shared address " + std::to_string(static_cast<int32_t>(offset)) + " (+" +
         std::to_string(bytes) + " bytes) is outside the " + std::to_string(block.shared_bytes) +
         " bytes of the block");
  if (address % static_cast<uint32_t>(alignment) != 0)
    fail(std::string(who) + ": shared address " + std::to_string(offset) + " is not a multiple of " +
         std::to_string(alignment));
  return block.shared + offset;
}

GK_UNWATCHED char* shared_memory(uint32_t address, int bytes, int alignment, const char* who) {
  if (address >> kRankShift != 0)
    fail(std::string(who) + ": an address of the block's own shared memory is expected, this one is of the cluster's");
  return memory_of(*t_fiber->block, address, bytes, alignment, who);
}

GK_UNWATCHED char* cluster_memory(uint32_t address, int bytes, int alignment, const char* who) {
  const Block& block = block_of(address);
  if (block.done == block.threads) fail(std::string(who) + ": the block that holds this shared memory has returned");
  return memory_of(block, own_address(address), bytes, alignment, who);
}

GK_UNWATCHED void check_aligned(const void* pointer, int alignment, const char* who) {
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) != 0)
    fail(std::string(who) + ": the address is not a multiple of " + std::to_string(alignment) + " bytes");
}

void copy_async(uint32_t to, const void* from, int bytes, int valid) {
  char* target = shared_memory(to, bytes, bytes, "cp.async");
  if (valid > 0) check_aligned(from, bytes, "cp.async");
  wrote(target, static_cast<size_t>(bytes));
  if (valid > 0) read(from, static_cast<size_t>(valid));
  const Unwatched unwatched;
  ++counters().asynchronous_copies;
  t_fiber->copies.push_back({target, static_cast<const char*>(from), bytes, valid, false});
  if (worker().random && (worker().random_number() & 3) == 0) run_copy(t_fiber->copies.back());
}

void copy_async_commit() {
  const Unwatched unwatched;
  t_fiber->groups.push_back(t_fiber->copies.size());
}

void copy_async_wait(int groups_left) {
  const Unwatched unwatched;
  Fiber& fiber = *t_fiber;
  const int finished = static_cast<int>(fiber.groups.size()) - groups_left;
  if (finished > 0) {
    const size_t end = fiber.groups[static_cast<size_t>(finished) - 1];
    for (size_t i = 0; i < end; ++i) {
      run_copy(fiber.copies[i]);
      ordinary_write(shared_address(fiber.copies[i].to), fiber.copies[i].bytes);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(end));
    fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + finished);
    for (size_t& group : fiber.groups) group -= end;
  }
  maybe_yield();
}

namespace {

Mbarrier& mbarrier(Block& block, uint32_t address) {
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail("an mbarrier is used before it is initialised");
  return found->second;
}

// Ends the phase when nothing is owed.
void settle(Block& block, uint32_t address, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
  auto& waiters = block.cluster->mbarrier_waiters;
  for (size_t i = 0; i < waiters.size();) {
    Fiber* fiber = waiters[i];
    if (fiber->block == &block && fiber->barrier_address == address && fiber->barrier_parity != barrier.phase) {
      fiber->barrier_address = 0;
      make_runnable(fiber);
      waiters[i] = waiters.back();
      waiters.pop_back();
    } else {
      ++i;
    }
  }
}

}  // namespace

void mbarrier_init(uint32_t address, int arrivals) {
  shared_memory(address, 8, 8, "mbarrier");
  const Unwatched unwatched;
  if (arrivals < 1) fail("an mbarrier expects at least one arrival");
  Fiber& fiber = *t_fiber;
  const auto thread = static_cast<uint32_t>(fiber.block->rank * fiber.block->threads + fiber.index);
  fiber.block->mbarriers[address] = {arrivals, arrivals, 0, 0, {++fiber.block->cluster->proxy_clock, thread}};
}

void mbarrier_arrive(uint32_t address, int64_t bytes_expected, int arrivals) {
  const Unwatched unwatched;
  char* place = cluster_memory(address, 8, 8, "mbarrier");
  release(place);
  Block& block = block_of(address);
  Mbarrier& barrier = mbarrier(block, own_address(address));
  if (&block != t_fiber->block) check_mbarrier_is_seen(block, own_address(address), "an arrival from another block");
  if (barrier.pending < arrivals) fail("more threads arrive at an mbarrier than it expects");
  barrier.bytes += bytes_expected;
  barrier.pending -= arrivals;
  settle(block, own_address(address), barrier);
  if (arrivals > 0) fall_behind(t_fiber->warp->index);
  maybe_yield();
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  const Unwatched unwatched;
  char* place = shared_memory(address, 8, 8, "mbarrier");
  Fiber& fiber = *t_fiber;
  if (mbarrier(*fiber.block, address).phase == parity) {
    fiber.barrier_address = address;
    fiber.barrier_parity = parity;
    fiber.block->cluster->mbarrier_waiters.push_back(&fiber);
    wait_for("an mbarrier");
  } else {
    maybe_yield();
  }
  acquire(place);
}

void mbarrier_arrive_after_copies(uint32_t address) {
  const Unwatched unwatched;
  release(shared_memory(address, 8, 8, "mbarrier"));
  Fiber& fiber = *t_fiber;
  Block& block = *fiber.block;
  fiber.groups.clear();
  start([&block, &fiber, address, copies = std::exchange(fiber.copies, {})]() mutable {
    for (Copy& copy : copies) {
      run_copy(copy);
      const auto place = static_cast<uint32_t>(copy.to - block.shared);
      ordinary_write(fiber, place + kSharedBase + (static_cast<uint32_t>(block.rank + 1) << kRankShift), copy.bytes);
    }
    Mbarrier& barrier = mbarrier(block, address);
    if (barrier.pending < 1) fail("more threads arrive at an mbarrier than it expects");
    --barrier.pending;
    settle(block, address, barrier);
  });
}

void mbarrier_complete(Block& block, uint32_t address, int64_t bytes) {
  Mbarrier& barrier = mbarrier(block, address);
  barrier.bytes -= bytes;
  settle(block, address, barrier);
}

void start(Work work) {
  const Unwatched unwatched;
  ++counters().asynchronous_copies;
  t_fiber->block->cluster->in_flight.push_back(std::move(work));
  maybe_yield();
}

void start_store(std::function<Work()> read) {
  const Unwatched unwatched;
  ++counters().asynchronous_copies;
  if (t_fiber->bulk_groups.empty()) t_fiber->bulk_groups.emplace_back();
  t_fiber->bulk_groups.back().push_back({std::move(read), nullptr});
}

void commit_stores() {
  const Unwatched unwatched;
  if (t_fiber->bulk_groups.empty()) t_fiber->bulk_groups.emplace_back();
  t_fiber->bulk_groups.emplace_back();
}

void wait_stores(int groups_left, bool reads_only) {
  const Unwatched unwatched;
  auto& groups = t_fiber->bulk_groups;
  const ptrdiff_t finished = static_cast<ptrdiff_t>(groups.size()) - 1 - groups_left;
  for (ptrdiff_t i = 0; i < finished; ++i)
    for (Store& store : groups[static_cast<size_t>(i)]) run_store(store, reads_only);
  if (!reads_only && finished > 0) groups.erase(groups.begin(), groups.begin() + finished);
  maybe_yield();
}

namespace {

// Calls fn(lane, register, index in the 16 x cols rows) for every accumulator of a warp.
template <typename Fn>
void for_each_accumulator(int cols, Fn fn) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < cols / 2; ++i)
      fn(lane, i, static_cast<size_t>((lane / 4 + i % 4 / 2 * 8) * cols + i / 4 * 8 + lane % 4 * 2 + i % 2));
}

// All warps of the warpgroup must issue this operation next.
void check_sequence(Block& block, Warp& warp, const MatrixOperation& op) {
  const int first_warp = warp.index - op.quarter;
  if (t_fiber->index / 128 * 128 + 128 > block.threads) fail("wgmma needs four whole warps");
  uint64_t sign = op.a;
  for (const uint64_t part : {op.b, static_cast<uint64_t>(op.cols), uint64_t{op.in_registers}, uint64_t{op.accumulate},
                              uint64_t{op.transposed_a}, uint64_t{op.transposed_b}})
    sign = (sign ^ part) * 0x9E3779B97F4A7C15u + (sign >> 29);
  MatrixSequence& sequence = block.warpgroups[static_cast<size_t>(warp.lane[0]->index) / 128];
  const uint64_t place = warp.matrix_issued++ - sequence.first;
  if (place == sequence.operations.size())
    sequence.operations.push_back(sign);
  else if (sequence.operations[place] != sign)
    fail("the warps of a warpgroup do not issue the same wgmma");
  uint64_t all = ~uint64_t{0};
  for (int i = 0; i < 4; ++i)
    all = std::min(all, block.cluster->warps[static_cast<size_t>(first_warp + i)].matrix_issued);
  for (; sequence.first < all; ++sequence.first) sequence.operations.pop_front();
}

}  // namespace

void fence_matrix() { t_fiber->warp->matrix_fenced = true; }

void start_matrix(MatrixOperation op) {
  const Unwatched unwatched;
  ++counters().matrix_multiplies;
  Warp& warp = *t_fiber->warp;
  op.block = t_fiber->block;
  op.quarter = t_fiber->index / 32 % 4;
  check_sequence(*t_fiber->block, warp, op);
  if (!warp.matrix_fenced) fail("wgmma without a wgmma_fence since its registers were free to be touched");
  Accumulators& d = warp.accumulators[op.d[0]];
  const size_t size = static_cast<size_t>(op.cols) * 16;
  if (d.operations++ == 0) {
    d.values.resize(size);
    for_each_accumulator(op.cols, [&](int lane, int i, size_t place) {
      d.values[place] = op.d[lane][i];
      op.d[lane][i] = std::nanf("");
    });
  } else if (d.values.size() != size) {
    fail("wgmma: accumulators in flight are used with another width");
  }
  warp.matrix_operations.push_back(op);
}

void commit_matrix() {
  const Unwatched unwatched;
  t_fiber->warp->matrix_groups.push_back(t_fiber->warp->matrix_operations.size());
}

void wait_matrix(int groups_left) {
  const Unwatched unwatched;
  Warp& warp = *t_fiber->warp;
  warp.matrix_fenced = false;
  const ptrdiff_t finished = static_cast<ptrdiff_t>(warp.matrix_groups.size()) - groups_left;
  if (finished <= 0) return;
  const size_t end = warp.matrix_groups[static_cast<size_t>(finished) - 1];
  while (warp.matrix_done < end) run_matrix(warp);
  for (size_t n = 0; n < end; ++n) {
    const MatrixOperation& op = warp.matrix_operations[n];
    Accumulators& d = warp.accumulators.at(op.d[0]);
    if (--d.operations > 0) continue;
    for_each_accumulator(op.cols, [&](int lane, int i, size_t place) { op.d[lane][i] = d.values[place]; });
    warp.accumulators.erase(op.d[0]);
  }
  warp.matrix_operations.erase(warp.matrix_operations.begin(),
                               warp.matrix_operations.begin() + static_cast<ptrdiff_t>(end));
  warp.matrix_groups.erase(warp.matrix_groups.begin(), warp.matrix_groups.begin() + finished);
  for (size_t& group : warp.matrix_groups) group -= end;
  warp.matrix_done -= end;
}

void set_registers(int count, bool more) {
  const Unwatched unwatched;
  Warp& warp = *t_fiber->warp;
  const Block& block = *t_fiber->block;
  const int before = warp.registers > 0 ? warp.registers : registers_at_launch(block);
  if (more ? count < before : count > before)
    fail(more ? "registers_take of fewer than the warp has" : "registers_give of more than the warp has");
  warp.registers = count;
}

void wrote([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_write_range(memory, bytes);
#endif
}

void read([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_read_range(const_cast<void*>(memory), bytes);
#endif
}

void release([[maybe_unused]] void* place) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(place);
#endif
}

void acquire([[maybe_unused]] void* place) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(place);
#endif
}

void run_grid(const LaunchShape& shape, const std::function<void()>& thread) {
  const uint64_t grid = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  if (grid == 0) return;
  check_shape(shape);
  const Settings& set = settings();
  const uint64_t clusters = grid / shape.cluster;
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::string error;
  const Launch launch{&shape, &thread};
  // One grid at a time; the workers, with their stacks, are kept for the next.
  static std::mutex one_grid;
  static std::vector<std::unique_ptr<Worker>> workers;
  const std::lock_guard<std::mutex> alone(one_grid);
  const auto run = [&](Worker& w) {
    t_worker = &w;
    t_launch = &launch;
    w.error.clear();
    w.random = set.seed != 0;
    if (w.shared == nullptr) {
      w.shared = static_cast<char*>(std::aligned_alloc(1024, kSharedStride * kMostBlocksOfCluster));
      if (w.shared == nullptr) throw Error("the emulated device found no memory for shared memory");
    }
    for (;;) {
      const uint64_t i = next++;
      if (i >= clusters) break;
      w.random_state = (set.seed * 0x9E3779B97F4A7C15u) ^ ((i + 1) * 0xD1B54A32D192ED03u);
      if (w.random_state == 0) w.random_state = 1;
      w.random_number();
      w.load_pace = static_cast<int>(w.below(6));
      w.matrix_pace = static_cast<int>(w.below(6));
      w.late_warp = -1;
      const uint64_t block = i * shape.cluster;
      const uint64_t row = block / shape.grid.x;
      run_cluster(w, {static_cast<unsigned>(block % shape.grid.x), static_cast<unsigned>(row % shape.grid.y),
                      static_cast<unsigned>(row / shape.grid.y)});
      if (w.error.empty()) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      if (error.empty()) error = w.error;
      next = clusters;
      break;
    }
    Counters& all = counters();
    all.switches += w.switches;
    all.barriers += w.barriers;
    all.collectives += w.collectives;
    w.switches = w.barriers = w.collectives = 0;
  };
  ++counters().launches;
  counters().blocks += grid;
  const uint64_t cores = set.threads > 0 ? static_cast<uint64_t>(set.threads) : std::thread::hardware_concurrency();
  const uint64_t count = std::min(std::max<uint64_t>(cores, 1), clusters);
  while (workers.size() < count) workers.push_back(std::make_unique<Worker>());
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < count; ++i) others.emplace_back(run, std::ref(*workers[i]));
  run(*workers[0]);
  for (std::thread& other : others) other.join();
  if (!error.empty()) throw Error("emulated device: " + error);
}

}  // namespace grokkernels::emulated
