// Loops over the elements of one row: whole vectors, then one tail, from one body.
#pragma once

#include "cpu/simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// The count kLanes as a type: a body that takes `auto n` is compiled once for whole vectors and once for the tail.
struct Full {
  GK_ALWAYS_INLINE constexpr operator int() const { return kLanes; }
};

template <typename T>
GK_ALWAYS_INLINE vf load_n(const T* p, Full) {
  return load(p);
}
template <typename T>
GK_ALWAYS_INLINE void store_n(T* p, vf x, Full) {
  store(p, x);
}

// body(i, n) for i = begin, begin + kLanes, ...: n is Full, or an int from 1 to kLanes - 1 in the last call.
template <typename Body>
GK_ALWAYS_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, Full{});
  if (i < end) body(i, static_cast<int>(end - i));
}

// Outputs of this many bytes leave the caches before anyone reads them: storing past the caches then saves reading
// each line before it is written.
inline constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Whether rows of T, `stride` elements apart from p on, `bytes` in all, may and should be written by put_pair<true>.
template <typename T>
bool should_stream(const T* p, int64_t stride, int64_t bytes) {
  return bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(p) % 64 == 0 &&
         stride * static_cast<int64_t>(sizeof(T)) % 64 == 0;
}

// Stores two vectors: past the caches if kStream (see should_stream; needs stream_fence() at the end), else through
// them. Two, because half a cache line at a time is written past the caches at half the speed.
template <bool kStream, typename T>
GK_ALWAYS_INLINE void put_pair(T* p, vf first, vf second) {
  if constexpr (kStream)
    stream_store_pair(p, first, second);
  else
    store_pair(p, first, second);
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
