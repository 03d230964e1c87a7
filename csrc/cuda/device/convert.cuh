// Element types in registers: to float and back, one by one and as the pairs that tensor-core operands are made of.
// A pair is 32 bits, its first element in the low half.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

GK_DEVICE float widen(float x) { return x; }

GK_DEVICE float widen(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

GK_DEVICE float widen(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounds to nearest, ties to even.
template <typename T>
GK_DEVICE T narrow(float x);

template <>
GK_DEVICE float narrow<float>(float x) {
  return x;
}

template <>
GK_DEVICE bfloat16 narrow<bfloat16>(float x) {
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <>
GK_DEVICE float16 narrow<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <typename T>
GK_DEVICE uint32_t narrow_pair(float low, float high);

template <>
GK_DEVICE uint32_t narrow_pair<bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
GK_DEVICE uint32_t narrow_pair<float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <typename T>
GK_DEVICE void widen_pair(uint32_t pair, float& low, float& high);

template <>
GK_DEVICE void widen_pair<bfloat16>(uint32_t pair, float& low, float& high) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xFFFF0000u);
}

template <>
GK_DEVICE void widen_pair<float16>(uint32_t pair, float& low, float& high) {
  low = widen(float16{static_cast<uint16_t>(pair)});
  high = widen(float16{static_cast<uint16_t>(pair >> 16)});
}

// The bits of x rounded to tf32 (10 bits of mantissa), ties away from zero.
GK_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

GK_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
GK_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

}  // namespace grokkernels::device
