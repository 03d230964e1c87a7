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

template <typename T>
void clear(T* out, int64_t n) {
  for_vectors(0, n, [&](int64_t i, auto lanes) { store_n(out + i, zero(), lanes); });
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

// Asks for the lines of `bytes` bytes, a little further on than p. The processor's own prefetching falls behind loops
// that compute much between two lines or that write past the caches (docs/gated_activation.md has what it gives).
// Asking for what is not mapped does nothing.
GK_ALWAYS_INLINE void ask_ahead(const void* p, int64_t bytes, int64_t ahead = 2048) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(p) + ahead + line);
}

// load_pair and load_n of what a loop is the first to read.
template <typename T>
GK_ALWAYS_INLINE VfPair fetch_pair(const T* p) {
  ask_ahead(p, 2 * kLanes * static_cast<int64_t>(sizeof(T)));
  return load_pair(p);
}
template <typename T, typename Count>
GK_ALWAYS_INLINE vf fetch_n(const T* p, Count n) {
  ask_ahead(p, kLanes * static_cast<int64_t>(sizeof(T)));
  return load_n(p, n);
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

// Copies a row, past the caches if kStream.
template <bool kStream, typename T>
void put_row(T* to, const T* from, int64_t n) {
  int64_t i = 0;
  if constexpr (kStream) {
    for (constexpr int64_t kStep = 4 * kLanes / static_cast<int64_t>(sizeof(T)); i + kStep <= n; i += kStep) {
      ask_ahead(from + i, 4 * kLanes);
      detail::stream(to + i, detail::load_bytes(from + i));
    }
  }
  __builtin_memcpy(to + i, from + i, static_cast<size_t>(n - i) * sizeof(T));
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
