#include "cpu/runtime/scratch.h"

#include <cstdlib>
#include <new>

namespace grokkernels::cpu {
namespace {

struct Slots {
  void* data[kScratchSlots] = {};
  size_t size[kScratchSlots] = {};
  ~Slots() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void* scratch_bytes(int slot, size_t bytes) {
  static thread_local Slots slots;
  if (slots.size[slot] < bytes) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    std::free(slots.data[slot]);
    slots.size[slot] = 0;
    slots.data[slot] = std::aligned_alloc(64, rounded);
    if (slots.data[slot] == nullptr) throw std::bad_alloc();
    slots.size[slot] = rounded;
  }
  return slots.data[slot];
}

}  // namespace grokkernels::cpu
