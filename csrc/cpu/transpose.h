// The transpose of kLanes vectors in registers: the row's and the lane's index change places bit by bit (Eklundh, "A
// fast computer method for matrix transposing", 1972).
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

namespace detail {

// In rows a and b, which are kStep apart: the lanes of a whose index has the bit kStep change places with those of b
// whose index lacks it.
template <int kStep, int... I>
GK_ALWAYS_INLINE void exchange_lanes(vf& a, vf& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const vf low = __builtin_shufflevector(a, b, ((I & kStep) ? kLanes + I - kStep : I)...);
  b = __builtin_shufflevector(a, b, ((I & kStep) ? kLanes + I : I + kStep)...);
#else
  const vf low = __builtin_shuffle(a, b, vi{((I & kStep) ? kLanes + I - kStep : I)...});
  b = __builtin_shuffle(a, b, vi{((I & kStep) ? kLanes + I : I + kStep)...});
#endif
  a = low;
}

template <int kStep>
GK_ALWAYS_INLINE void exchange_rows(vf (&x)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if ((i & kStep) == 0) exchange_lanes<kStep>(x[i], x[i + kStep], std::make_integer_sequence<int, kLanes>());
}

}  // namespace detail

// x[i][j] becomes x[j][i].
GK_ALWAYS_INLINE void transpose(vf (&x)[kLanes]) {
  detail::exchange_rows<1>(x);
  detail::exchange_rows<2>(x);
  if constexpr (kLanes > 4) detail::exchange_rows<4 % kLanes>(x);
  if constexpr (kLanes > 8) detail::exchange_rows<8 % kLanes>(x);
}

// Lane i of the result is the sum of the lanes of x[i], which is lost: a transpose whose halves are added on the way.
GK_ALWAYS_INLINE vf sums_of_lanes(vf (&x)[kLanes]) {
  const auto add = [&](auto step) __attribute__((always_inline)) {
    constexpr int kStep = decltype(step)::value;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * kStep) {
      detail::exchange_lanes<kStep>(x[i], x[i + kStep], std::make_integer_sequence<int, kLanes>());
      x[i] = x[i] + x[i + kStep];
    }
  };
  add(std::integral_constant<int, 1>());
  add(std::integral_constant<int, 2>());
  if constexpr (kLanes > 4) add(std::integral_constant<int, 4 % kLanes>());
  if constexpr (kLanes > 8) add(std::integral_constant<int, 8 % kLanes>());
  return x[0];
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
