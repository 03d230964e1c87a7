// Proxies of shared memory, on the emulated device ("Proxies" and "Causality order" of the PTX ISA).
//
// Ordinary stores, stmatrix, cp.async and stores into the cluster go through the generic proxy; wgmma and the copy
// engine through the asynchronous one, which does not see the former until the writer, or whoever issues the
// asynchronous operation, has executed fence.proxy.async. On a GPU its absence is a rare wrong number; here it stops
// the launch. The books are kept per word of shared memory, the least that the vocabulary writes: when, on a clock of
// the cluster, it was last written by ordinary means, and by whom. Stores through plain pointers are not seen.
#pragma once

#include <cstddef>
#include <cstdint>

namespace grokkernels::emulated {

struct Block;
struct Fiber;

struct OrdinaryWrite {
  uint32_t when = 0;    // 0: never, or the asynchronous proxy has written since
  uint32_t thread = 0;  // of the cluster
};

// An ordinary write of `bytes` at a shared address (of any block of the cluster) takes effect now.
void ordinary_write(Fiber& writer, uint32_t address, int bytes);
void ordinary_write(uint32_t address, int bytes);  // by the running thread

// fence.proxy.async of the running thread.
void fence_proxies();

// When the running thread, or that of its warp that did so least recently, executed the fence.
uint32_t fenced_by_thread();
uint32_t fenced_by_warp();

// Whether the asynchronous proxy sees all of a block's shared memory as it is, for operations of threads that fenced
// then: so that most need not be looked at.
bool all_seen(const Block& block, uint32_t fenced);

// Stops the launch if the asynchronous proxy, on behalf of threads that fenced then, would not see these bytes as they
// are. A write makes them its own.
void asynchronous_read(const Block& block, const void* memory, size_t bytes, uint32_t fenced, const char* who);
void asynchronous_write(Block& block, const void* memory, size_t bytes, uint32_t fenced, const char* who);

// The copy engine and other blocks see an mbarrier once the thread that initialised it has executed
// fence.mbarrier_init or fence.proxy.async.
void fence_mbarriers();
void check_mbarrier_is_seen(const Block& block, uint32_t address, const char* who);

}  // namespace grokkernels::emulated
