// How the elements of two lines that lie dense in memory are multiplied, a vector at a time: products in float32, or
// the processor's own of bfloat16. The first line is of T and has any length; the other one is filled up to whole
// steps.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"
#if defined(GK_SIMD_BFLOAT16)
#include "cpu/strips.h"
#endif

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

template <typename T>
struct FloatProducts {
  using Other = float;
  static constexpr int kStep = kLanes;        // elements of a vector
  static constexpr int64_t kAskAhead = 4096;  // bytes, where a line is streamed from memory

  GK_ALWAYS_INLINE static vf first(const T* p) { return load(p); }
  GK_ALWAYS_INLINE static vf first(const T* p, int64_t left) {  // what there is of a step, zero beyond
    return left >= kStep ? load(p) : load_n(p, static_cast<int>(left));
  }
  GK_ALWAYS_INLINE static vf other(const Other* p) { return load(p); }
  GK_ALWAYS_INLINE static vf add(vf x, vf y, vf sum) { return fma(x, y, sum); }
};

#if defined(GK_SIMD_BFLOAT16)
struct PairProducts {
  using Other = bfloat16;
  static constexpr int kStep = kTileDepth;
  static constexpr int64_t kAskAhead = kStreamAhead;

  GK_ALWAYS_INLINE static vf first(const bfloat16* p) { return as_float(detail::load_bytes(p)); }
  GK_ALWAYS_INLINE static vf first(const bfloat16* p, int64_t left) { return as_float(detail::load_elements(p, left)); }
  GK_ALWAYS_INLINE static vf other(const Other* p) { return first(p); }
  GK_ALWAYS_INLINE static vf add(vf x, vf y, vf sum) { return detail::add_pairs(x, y, sum); }
};

// Of lines of TA and TB.
template <typename TA, typename TB>
using Products = std::conditional_t<kOnTiles<TA, TB>, PairProducts, FloatProducts<TB>>;
#else
template <typename TA, typename TB>
using Products = FloatProducts<TB>;
#endif

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
