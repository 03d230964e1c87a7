// The activations of common/activation.h by name, with their derivatives.
#pragma once

#include "common/activation.h"
#include "cpu/simd_math.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

template <Activation kKind>
GK_ALWAYS_INLINE ValueAndSlope value_and_slope(vf x) {
  if constexpr (kKind == Activation::gelu_tanh) return gelu_tanh_and_slope(x);
  if constexpr (kKind == Activation::gelu) return gelu_erf_and_slope(x);
  if constexpr (kKind == Activation::silu) return silu_and_slope(x);
  const vmask dead = x <= 0.0f;  // not for NaN, which stays
  return {select(dead, zero(), x), select(dead, zero(), set1(1.0f))};
}

// Calls f.template operator()<kind>() for a kind known at run time.
template <typename F>
GK_ALWAYS_INLINE void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
  }
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
