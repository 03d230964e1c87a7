// The element types that kernels read and write: float, bfloat16 and float16, with conversions that round to nearest
// even.
//
// Plain C++ without any dependency, so that every backend and a unit test can include it. Every function is constexpr
// and always inlined and none calls into std::, so no out-of-line copy exists: the file is compiled at several
// instruction-set levels into one library, and the linker must never pick one level's copy for all of them.
#pragma once

#include <cstdint>

#define GK_ALWAYS_INLINE inline __attribute__((always_inline))

namespace grokkernels {

enum class DType : int { float32, bfloat16, float16 };

// Sign, 8 exponent bits, 7 mantissa bits: the upper half of a float.
struct bfloat16 {
  uint16_t bits;
};

// IEEE binary16: sign, 5 exponent bits, 10 mantissa bits; has denormals, largest finite value 65504.
struct float16 {
  uint16_t bits;
};

static_assert(sizeof(float) == 4 && sizeof(bfloat16) == 2 && sizeof(float16) == 2);

// Bytes of one element.
GK_ALWAYS_INLINE constexpr int size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// The DType of a C++ element type: dtype_of<bfloat16>.
template <typename T>
inline constexpr DType dtype_of = T::has_no_dtype;
template <>
inline constexpr DType dtype_of<float> = DType::float32;
template <>
inline constexpr DType dtype_of<bfloat16> = DType::bfloat16;
template <>
inline constexpr DType dtype_of<float16> = DType::float16;

GK_ALWAYS_INLINE constexpr uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
GK_ALWAYS_INLINE constexpr float float_from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

GK_ALWAYS_INLINE constexpr float to_float(float x) { return x; }

// Exact; a NaN keeps its bits.
GK_ALWAYS_INLINE constexpr float to_float(bfloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

// Exact; a NaN keeps its sign and payload and becomes quiet, as the F16C instructions make it.
GK_ALWAYS_INLINE constexpr float to_float(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude > 0x7c00u) return float_from_bits(sign | 0x7fc00000u | (magnitude & 0x3ffu) << 13);
  if (magnitude == 0x7c00u) return float_from_bits(sign | 0x7f800000u);
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
  return float_from_bits(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));  // denormal or zero
}

// Rounds to nearest, ties to even; overflow gives infinity; a NaN keeps its sign and upper payload and becomes quiet.
GK_ALWAYS_INLINE constexpr bfloat16 to_bfloat16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x0040u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

// As to_bfloat16; results below 2^-14 are denormal, correctly rounded.
GK_ALWAYS_INLINE constexpr float16 to_float16(float x) {
  const uint32_t sign = (float_bits(x) >> 16) & 0x8000u;
  const uint32_t u = float_bits(x) & 0x7fffffffu;
  uint32_t magnitude = 0;
  if (u > 0x7f800000u) {
    magnitude = 0x7e00u | ((u >> 13) & 0x3ffu);
  } else if (u >= 0x47800000u) {  // 2^16 and above; what lies between 65520 and 2^16 carries into infinity below
    magnitude = 0x7c00u;
  } else if (u >= 0x38800000u) {  // 2^-14, the least normal number
    magnitude = (u - ((127u - 15u) << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  } else {  // the last place of 0.5f is 2^-24, so the addition rounds to a multiple of the least denormal
    magnitude = float_bits(float_from_bits(u) + 0.5f) - float_bits(0.5f);
  }
  return {static_cast<uint16_t>(sign | magnitude)};
}

// The same by type, for templates: from_float<T>(x).
template <typename T>
T from_float(float x) = delete;
template <>
GK_ALWAYS_INLINE constexpr float from_float<float>(float x) {
  return x;
}
template <>
GK_ALWAYS_INLINE constexpr bfloat16 from_float<bfloat16>(float x) {
  return to_bfloat16(x);
}
template <>
GK_ALWAYS_INLINE constexpr float16 from_float<float16>(float x) {
  return to_float16(x);
}

}  // namespace grokkernels

// Runs the statement(s) with T bound to the C++ type of a runtime dtype.
#define GK_SWITCH_DTYPE(dtype, T, ...)     \
  switch (dtype) {                         \
    case ::grokkernels::DType::float32: {  \
      using T = float;                     \
      __VA_ARGS__;                         \
    } break;                               \
    case ::grokkernels::DType::bfloat16: { \
      using T = ::grokkernels::bfloat16;   \
      __VA_ARGS__;                         \
    } break;                               \
    case ::grokkernels::DType::float16: {  \
      using T = ::grokkernels::float16;    \
      __VA_ARGS__;                         \
    } break;                               \
  }
