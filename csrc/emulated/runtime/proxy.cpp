#include "emulated/runtime/proxy.h"

#include <algorithm>
#include <string>

#include "emulated/runtime/device.h"
#include "emulated/runtime/fiber.h"

namespace grokkernels::emulated {
namespace {

constexpr size_t kWord = 4;

Fiber& thread_of(const Cluster& cluster, uint32_t thread) {
  const auto threads = static_cast<uint32_t>(cluster.blocks[0].threads);
  return const_cast<Fiber&>(cluster.blocks[thread / threads].fibers[thread % threads]);
}

// Calls fn(write, offset of the word) for the words of these bytes.
template <typename SomeBlock, typename Fn>
void for_each_word(SomeBlock& block, const void* memory, size_t bytes, Fn fn) {
  const size_t first = static_cast<size_t>(static_cast<const char*>(memory) - block.shared) / kWord;
  const size_t end = std::min(first + (bytes + kWord - 1) / kWord, block.ordinary_writes.size());
  for (size_t i = first; i < end; ++i) fn(block.ordinary_writes[i], i * kWord);
}

}  // namespace

void ordinary_write(Fiber& writer, uint32_t address, int bytes) {
  const Unwatched unwatched;
  Block& block = block_of(address);
  if (block.ordinary_writes.empty()) block.ordinary_writes.resize(block.shared_bytes / kWord + 1);
  Cluster& cluster = *block.cluster;
  block.latest_write = ++cluster.proxy_clock;
  const uint32_t thread = static_cast<uint32_t>(writer.block->rank * writer.block->threads + writer.index);
  const size_t first = (own_address(address) - kSharedBase) / kWord;
  for (size_t i = first; i < first + static_cast<size_t>(bytes) / kWord; ++i)
    block.ordinary_writes[i] = {block.latest_write, thread};
}

void ordinary_write(uint32_t address, int bytes) { ordinary_write(current(), address, bytes); }

void fence_proxies() {
  const Unwatched unwatched;
  Fiber& fiber = current();
  fiber.proxy_fenced = fiber.mbarriers_fenced = ++fiber.block->cluster->proxy_clock;
}

uint32_t fenced_by_thread() { return current().proxy_fenced; }

uint32_t fenced_by_warp() {
  const Warp& warp = *current().warp;
  uint32_t least = ~0u;
  for (int lane = 0; lane < warp.lanes; ++lane) least = std::min(least, warp.lane[lane]->proxy_fenced);
  return least;
}

bool all_seen(const Block& block, uint32_t fenced) { return block.latest_write <= fenced; }

void asynchronous_read(const Block& block, const void* memory, size_t bytes, uint32_t fenced, const char* who) {
  if (all_seen(block, fenced)) return;
  const Unwatched unwatched;
  for_each_word(block, memory, bytes, [&](const OrdinaryWrite& write, size_t offset) {
    if (write.when <= fenced) return;
    const Fiber& writer = thread_of(*block.cluster, write.thread);
    if (write.when <= writer.proxy_fenced) return;
    fail(std::string(who) + ": thread " + std::to_string(writer.index) + " wrote shared address " +
         std::to_string(offset) + " by ordinary means, and no fence_proxy_async came between");
  });
}

void asynchronous_write(Block& block, const void* memory, size_t bytes, uint32_t fenced, const char* who) {
  asynchronous_read(block, memory, bytes, fenced, who);
  const Unwatched unwatched;
  if (block.latest_write > 0) for_each_word(block, memory, bytes, [](OrdinaryWrite& write, size_t) { write.when = 0; });
}

void fence_mbarriers() {
  const Unwatched unwatched;
  Fiber& fiber = current();
  fiber.mbarriers_fenced = ++fiber.block->cluster->proxy_clock;
}

void check_mbarrier_is_seen(const Block& block, uint32_t address, const char* who) {
  const Unwatched unwatched;
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail("an mbarrier is used before it is initialised");
  const OrdinaryWrite& made = found->second.initialised;
  if (made.when > thread_of(*block.cluster, made.thread).mbarriers_fenced)
    fail(std::string(who) + ": no fence_mbarrier_init came after the mbarrier's initialisation");
}

}  // namespace grokkernels::emulated
