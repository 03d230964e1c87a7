// The emulated device: runs CUDA kernels on the CPU, thread by thread, so that every line of them can be executed and
// judged on a machine without a GPU.
//
// One CUDA thread is a fiber with a stack of its own. The blocks of a cluster (most often one block) are run together
// by one OS thread; OS threads share the clusters of a grid between them. A warp collective is carried out by the last
// lane to arrive. Asynchronous copies and tensor-core operations take effect between their issue and their wait: at the
// wait in order (seed 0), or at a random time before (any other seed), when the choice of the next lane is random too.
// Shared memory starts as NaN.
//
// What it cannot see: the inline PTX of csrc/cuda/device (tests/ptx runs that), weak memory, the tensor cores' own
// rounding, time.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/device.h"
#include "emulated/runtime/proxy.h"

namespace grokkernels::emulated {

// A fault of the kernel that runs: where, and the seed that repeats it, are in the words.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Settings {
  int architecture = 80;    // compute capability times ten: what device_architecture() answers
  int multiprocessors = 3;  // what device_multiprocessors() answers: few, so that persistent kernels loop
  uint64_t seed = 0;        // 0: threads in order, copies at their wait; else both random
  int threads = 0;          // OS threads; 0: one per core
};
Settings& settings();

// Counted over all launches since the last reset.
struct Counters {
  std::atomic<uint64_t> launches{0}, blocks{0}, switches{0}, barriers{0}, collectives{0}, matrix_multiplies{0};
  std::atomic<uint64_t> asynchronous_copies{0}, shared_matrix_loads{0}, bank_conflicts{0};
};
Counters& counters();

// The largest dynamic shared memory of a block, in bytes. Kernels for sm_80 and newer must fit the smallest of those
// chips (99 KiB on 8.6, 8.9 and 12.0), kernels for sm_90 may use 227 KiB.
inline constexpr int kSharedLimit = 99 * 1024, kSharedLimitSm90 = 227 * 1024;
// The shared-window address of a block's first byte: never 0, so that a forgotten base is seen.
inline constexpr uint32_t kSharedBase = 1024;
// Bits of a shared::cluster address above which stands 1 + the rank of the block it belongs to; 0: the block's own.
inline constexpr int kRankShift = 24;

struct Warp;
struct Cluster;

// One cp.async of a thread.
struct Copy {
  char* to;
  const char* from;
  int bytes, valid;  // bytes past `valid` become zero
  bool done;
};

// Something asynchronous that is waited for through an mbarrier (a TMA load), or half of a TMA store.
using Work = std::function<void()>;

// A TMA store of a thread. `read` takes the bytes out of shared memory and gives the `write` that puts them where they
// go; what is done is empty.
struct Store {
  std::function<Work()> read;
  Work write;
};

struct Block;

// One wgmma of one warp: its 16 of the warpgroup's 64 rows.
struct MatrixOperation {
  void (*run)(const MatrixOperation& op, float* d);  // d: 16 x cols
  const Block* block;
  int quarter;    // the warp in its warpgroup
  uint64_t a, b;  // descriptors
  int cols;
  bool in_registers, transposed_a, transposed_b, accumulate;
  const uint32_t* a_registers[32];  // of the lanes, when A is in registers
  float* d[32];                     // the lanes' accumulators, cols / 2 each
};

// The accumulators of operations in flight: the lanes see NaN until the last of them has been waited for.
struct Accumulators {
  std::vector<float> values;  // 16 x cols
  int operations = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  Warp* warp = nullptr;
  Block* block = nullptr;
  Index3 thread{};
  int lane = 0, index = 0;  // in its warp, in its block
  bool done = false;
  const char* waits_on = "";
  uint32_t barrier_address = 0, barrier_parity = 0;  // of the mbarrier it waits for
  std::vector<Copy> copies;                          // issued, not yet waited for
  std::vector<size_t> groups;                        // where each committed group of them ends
  std::vector<std::vector<Store>> bulk_groups;       // TMA stores, not yet waited for; the last one is still open
  bool in_cluster_barrier = false;                   // has arrived at it and not waited
  uint32_t cluster_phase = 0;                        // of the cluster's barrier when it arrived
  uint32_t proxy_fenced = 0, mbarriers_fenced = 0;   // when it last executed these fences, on the cluster's clock
  char* stack = nullptr;
  void *tsan = nullptr, *asan = nullptr;
};

// A collective some lanes of a warp have arrived at.
using CollectiveFn = void (*)(void** arguments, uint32_t lanes);
struct Collective {
  uint32_t lanes = 0, arrived = 0;
  CollectiveFn fn = nullptr;
  void* arguments[32];
};

struct Warp {
  Block* block = nullptr;
  Fiber* lane[32] = {};
  int index = 0;  // in its cluster
  int lanes = 0;
  uint32_t runnable = 0;
  Collective collectives[8];
  std::vector<MatrixOperation> matrix_operations;  // not yet waited for; the first `matrix_done` have taken effect
  size_t matrix_done = 0;
  std::vector<size_t> matrix_groups;                            // where each committed group of them ends
  std::unordered_map<const float*, Accumulators> accumulators;  // by those of the first lane
  bool matrix_fenced = false;                                   // wgmma_fence since the last wait
  uint64_t matrix_issued = 0;
  int registers = 0;  // of a thread (setmaxnreg)
};

// What the four warps of a warpgroup must all issue: the operations that not all of them have come to.
struct MatrixSequence {
  uint64_t first = 0;
  std::deque<uint64_t> operations;
};

struct ClusterBarrier {
  int arrived = 0;
  uint32_t phase = 0;
  std::vector<Fiber*> waiting;
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  std::vector<Fiber*> waiting;
};

// See the PTX ISA, "mbarrier": a phase ends when no arrival is pending and no bytes are owed.
struct Mbarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  OrdinaryWrite initialised;
};

struct Block {
  Cluster* cluster = nullptr;
  Index3 index{};
  int rank = 0;  // in its cluster
  int threads = 0, done = 0;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  NamedBarrier barriers[16];
  std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by shared address
  std::vector<OrdinaryWrite> ordinary_writes;        // by word of shared memory; empty before the first
  uint32_t latest_write = 0;                         // the latest of them
  std::vector<MatrixSequence> warpgroups;
  std::vector<Fiber> fibers;
};

// The blocks that one OS thread runs at a time.
struct Cluster {
  std::vector<Block> blocks;
  std::vector<Warp> warps;  // of all blocks
  int threads = 0, done = 0;
  ClusterBarrier barrier;
  std::vector<Fiber*> mbarrier_waiters;
  std::vector<Work> in_flight;  // TMA copies into shared memory, in no order
  uint32_t proxy_clock = 0;     // counts ordinary writes and fences
};

// The fiber that runs on this OS thread now, and the launch it belongs to.
Fiber& current();
const LaunchShape& current_launch();

// Stops the launch with an Error.
[[noreturn]] void fail(const std::string& what);

// With a random schedule, lets another thread run now.
void maybe_yield();

// Calls fn once, when every lane of the warp named in `lanes` has come here with the same fn; `argument` is each lane's
// own. Says nothing about memory order.
void warp_collective(uint32_t lanes, const char* name, void* argument, CollectiveFn fn);

// bar.sync and bar.arrive; `threads` 0: all of the block that have not returned.
void named_barrier(int id, int threads, bool wait);
void warp_barrier(uint32_t lanes);
void cluster_arrive();
void cluster_wait();

// The memory behind a shared address: of this block, of any of its cluster (a shared::cluster address), of that block.
char* shared_memory(uint32_t address, int bytes, int alignment, const char* who);
char* cluster_memory(uint32_t address, int bytes, int alignment, const char* who);
char* memory_of(const Block& block, uint32_t address, int bytes, int alignment, const char* who);
uint32_t shared_address(const void* pointer);
// The block that a shared or shared::cluster address belongs to, and the address there.
Block& block_of(uint32_t address);
uint32_t own_address(uint32_t address);

// Stops the launch if a global address is not aligned.
void check_aligned(const void* pointer, int alignment, const char* who);

void copy_async(uint32_t to, const void* from, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int groups_left);

void mbarrier_init(uint32_t address, int arrivals);
void mbarrier_arrive(uint32_t address, int64_t bytes_expected, int arrivals);
void mbarrier_wait(uint32_t address, uint32_t parity);
// Arrives when the thread's copies have landed: puts them under way as one.
void mbarrier_arrive_after_copies(uint32_t address);
// What the copy engine does when bytes have landed: may be called from Work.
void mbarrier_complete(Block& block, uint32_t address, int64_t bytes);

// Puts a copy into shared memory under way.
void start(Work work);
// TMA stores: read shared memory, and later write, at random times before the wait. `reads_only`: those of the groups
// waited for have read.
void start_store(std::function<Work()> read);
void commit_stores();
void wait_stores(int groups_left, bool reads_only);

// wgmma, by one lane for its warp; `block` and `quarter` of the operation are filled in.
void fence_matrix();
void start_matrix(MatrixOperation op);
void commit_matrix();
void wait_matrix(int groups_left);

// setmaxnreg, by one lane for its warp. When the block has returned its warps must not hold more than there are.
void set_registers(int count, bool more);

// For race checking: what a thread did to memory through a wrapper, and the order that a barrier makes.
void wrote(void* memory, size_t bytes);
void read(const void* memory, size_t bytes);
void release(void* place);
void acquire(void* place);

// A launch as bytes: the kernel's address and its arguments by address and size.
struct KernelCall {
  const void* kernel;
  std::vector<std::pair<const void*, size_t>> arguments;
};

// Who is given launches before this device, if set, and answers whether it is to run them too: the tests put a PTX
// interpreter here.
using Executor = std::function<bool(const LaunchShape&, const KernelCall&)>;
Executor& executor();

// Runs `thread` once for every thread of the grid.
void run_grid(const LaunchShape& shape, const std::function<void()>& thread);

}  // namespace grokkernels::emulated

// Work that emulates hardware is not the kernel's: the race checker must not watch it.
#if defined(__SANITIZE_THREAD__)
#define GK_UNWATCHED __attribute__((no_sanitize("thread")))
#else
#define GK_UNWATCHED
#endif
