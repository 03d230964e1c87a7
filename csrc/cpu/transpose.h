// The transpose of kLanes vectors in registers.
#pragma once

#include "cpu/simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

namespace detail {

// Exchanges, in every 2 kStep x 2 kStep block, the upper right kStep x kStep block for the lower left one.
template <int kStep>
GK_ALWAYS_INLINE void exchange_blocks(vf (&row)[kLanes]) {
  const vi lane = lane_index();
  const vi upper = (lane & kStep) != 0 ? lane - kStep + kLanes : lane;  // lanes of b count from kLanes
  const vi lower = (lane & kStep) != 0 ? lane + kLanes : lane + kStep;
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const vf a = row[i], b = row[i + kStep];
    row[i] = __builtin_shuffle(a, b, upper);
    row[i + kStep] = __builtin_shuffle(a, b, lower);
  }
}

}  // namespace detail

// row[i][j] becomes row[j][i]: log2(kLanes) rounds that exchange ever smaller blocks.
GK_ALWAYS_INLINE void transpose(vf (&row)[kLanes]) {
  if constexpr (kLanes == 16) detail::exchange_blocks<8>(row);
  if constexpr (kLanes >= 8) detail::exchange_blocks<4>(row);
  detail::exchange_blocks<2>(row);
  detail::exchange_blocks<1>(row);
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
