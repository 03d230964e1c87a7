// Scratch memory that a thread keeps between calls: freshly mapped pages cost more than the arithmetic done in them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace grokkernels::cpu {

inline constexpr int kScratchSlots = 8;

// At least `bytes` bytes, aligned to 64, owned by the calling thread and valid until its next request for the same
// slot. The content is whatever was there. Throws std::bad_alloc; ask before a parallel region starts, or inside one
// only for sizes that cannot fail in practice.
void* scratch_bytes(int slot, size_t bytes);

}  // namespace grokkernels::cpu
