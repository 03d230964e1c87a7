// Element types in registers, as csrc/cuda/device/convert.cuh has them.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

template <typename T>
GK_DEVICE float widen(T x) {
  return to_float(x);
}

template <typename T>
GK_DEVICE T narrow(float x) {
  return from_float<T>(x);
}

template <typename T>
GK_DEVICE uint32_t narrow_pair(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

template <typename T>
GK_DEVICE void widen_pair(uint32_t pair, float& low, float& high) {
  low = widen(T{static_cast<uint16_t>(pair)});
  high = widen(T{static_cast<uint16_t>(pair >> 16)});
}

// The last 13 bits go; half of the last place that stays is added first, whatever the sign.
GK_DEVICE uint32_t to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7F800000u) == 0x7F800000u) return bits & 0xFFFFE000u;
  return (bits + 0x1000u) & 0xFFFFE000u;
}

GK_DEVICE float bits_to_float(uint32_t x) { return float_from_bits(x); }
GK_DEVICE uint32_t float_to_bits(float x) { return float_bits(x); }

}  // namespace grokkernels::device
