// Loops over one row of memory, vector by vector.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// body(c, n) for vectors of n <= kLanes elements from c that cover [0, cols): n is kLanes for all but the last.
template <typename Body>
GK_ALWAYS_INLINE void for_vectors(int64_t cols, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) body(c, kLanes);
  if (c < cols) body(c, static_cast<int>(cols - c));
}

// A vector that is whole in all but the last step of for_vectors, where the compiler drops the test of n.
template <typename T>
GK_ALWAYS_INLINE vf load_some(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <typename T>
GK_ALWAYS_INLINE void store_some(T* p, vf x, int n) {
  if (n == kLanes)
    store(p, x);
  else
    store_n(p, x, n);
}

template <typename T>
void clear(T* out, int64_t n) {
  for_vectors(n, [&](int64_t c, int lanes) { store_some(out + c, zero(), lanes); });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
