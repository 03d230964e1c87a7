// What the experts' backward pass makes of a row between its two products, the same on every architecture.
#pragma once

#include <device/warp.cuh>

#include "cuda/activation.cuh"

namespace grokkernels::device {

// From g(j, c), the gradient of hidden before the row's weight, of kTiles pairs of neighbouring columns of a thread:
// gate becomes dgate, up becomes dup, hidden is w hidden. Returns g . hidden over the columns of the row's four lanes,
// to each of them. All lanes call together.
template <Activation kKind, int kTiles, typename G>
GK_DEVICE float differentiate_row(const G& g, float weight, float (&gate)[kTiles][2], float (&up)[kTiles][2],
                                  float (&hidden)[kTiles][2]) {
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float u = up[j][c], weighted = g(j, c) * weight;
      const ValueAndSlope act = value_and_slope<kKind>(gate[j][c]);
      dot = fmaf(g(j, c), act.value * u, dot);
      hidden[j][c] = act.value * u * weight;
      gate[j][c] = weighted * u * act.slope;
      up[j][c] = weighted * act.value;
    }
  dot += shuffle_xor(dot, 1);
  return dot + shuffle_xor(dot, 2);
}

}  // namespace grokkernels::device
