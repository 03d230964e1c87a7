// Vectors of float for CPU kernels: one source, compiled once per instruction-set level.
//
// A file in csrc/cpu is built several times with -DGK_CPU_LEVEL=baseline, avx2 (-march=x86-64-v3), avx512
// (-march=x86-64-v4), avx512bf16 (and products of bfloat16) or amx (and a matrix unit: amx.h) and everything it defines
// lives in
//
//   namespace grokkernels::cpu {
//   inline namespace GK_CPU_LEVEL { ... }
//   }
//
// so that symbols of two levels stay distinct although the code reads the same. All functions here are always inlined.
// Never use a std:: template in such a file where the compiler might leave it out of line: its weak symbol has the same
// name at every level, and the linker may keep the one with AVX-512 instructions for all.
//
// vf, vi and vu are compiler vector types: + - * / & | ^ ~ << >> and comparisons work lane by lane, also against
// scalars, and a comparison gives a vmask. Intrinsics appear only where the compiler's own code is slower. "baseline"
// is SSE2 on x86-64 and plain vector types (kLanes = 4) on any other little-endian architecture.
//
// Memory pointers need only the alignment of their element, except for stream_store.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"

#ifndef GK_CPU_LEVEL
#error "define GK_CPU_LEVEL as baseline, avx2, avx512, avx512bf16 or amx"
#endif

#define GK_CPU_LEVEL_baseline 1
#define GK_CPU_LEVEL_avx2 2
#define GK_CPU_LEVEL_avx512 3
#define GK_CPU_LEVEL_avx512bf16 4
#define GK_CPU_LEVEL_amx 5
#define GK_CPU_JOIN_(a, b) a##b
#define GK_CPU_JOIN(a, b) GK_CPU_JOIN_(a, b)
#define GK_CPU_LEVEL_NUMBER GK_CPU_JOIN(GK_CPU_LEVEL_, GK_CPU_LEVEL)

#if GK_CPU_LEVEL_NUMBER >= 3 && GK_CPU_LEVEL_NUMBER <= 5
#define GK_SIMD_AVX512 1
#define GK_SIMD_X86 1
#define GK_SIMD_FMA 1
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__)
#error "level avx512 needs -march=x86-64-v4"
#endif
#if GK_CPU_LEVEL_NUMBER >= 4  // the processor rounds to bfloat16 and multiplies it
#define GK_SIMD_BFLOAT16 1
#if !defined(__AVX512BF16__)
#error "levels avx512bf16 and amx need -mavx512bf16"
#endif
#endif
#if GK_CPU_LEVEL_NUMBER == 5
#define GK_SIMD_AMX 1
#if !defined(__AMX_TILE__) || !defined(__AMX_BF16__)
#error "level amx needs -mamx-tile -mamx-bf16"
#endif
#endif
#elif GK_CPU_LEVEL_NUMBER == 2
#define GK_SIMD_AVX2 1
#define GK_SIMD_X86 1
#define GK_SIMD_FMA 1
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__) || !defined(__BMI2__)
#error "level avx2 needs -march=x86-64-v3"
#endif
#elif GK_CPU_LEVEL_NUMBER == 1
#if defined(__x86_64__)
#define GK_SIMD_SSE2 1
#define GK_SIMD_X86 1
#elif defined(__ARM_FEATURE_FMA)
#define GK_SIMD_FMA 1
#endif
#else
#error "GK_CPU_LEVEL must be baseline, avx2, avx512, avx512bf16 or amx"
#endif

#ifdef GK_SIMD_X86
#pragma GCC diagnostic push  // GCC 12's own AVX-512 intrinsics start from a register left undefined on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the narrow types are packed for little-endian machines");

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

#if defined(GK_SIMD_AVX512)
inline constexpr int kLanes = 16;  // floats per register
#elif defined(GK_SIMD_AVX2)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using vf [[gnu::vector_size(4 * kLanes)]] = float;
using vi [[gnu::vector_size(4 * kLanes)]] = int32_t;
using vu [[gnu::vector_size(4 * kLanes)]] = uint32_t;
using vmask = vi;  // per lane all ones (true) or zero; compilers turn it into mask registers where they exist

namespace detail {
using vf_memory [[gnu::vector_size(4 * kLanes), gnu::aligned(4), gnu::may_alias]] = float;
using vi_memory [[gnu::vector_size(4 * kLanes), gnu::aligned(1), gnu::may_alias]] = int32_t;  // raw bytes too
using vu16 [[gnu::vector_size(2 * kLanes)]] = uint16_t;
using vu16_memory [[gnu::vector_size(2 * kLanes), gnu::aligned(2), gnu::may_alias]] = uint16_t;
using u64_memory [[gnu::aligned(2), gnu::may_alias]] = uint64_t;
using u32_memory [[gnu::aligned(2), gnu::may_alias]] = uint32_t;

#if defined(GK_SIMD_SSE2)
GK_ALWAYS_INLINE __m128i raw(vu16 x) { return _mm_cvtsi64_si128(__builtin_bit_cast(long long, x)); }
#endif
}  // namespace detail

// ---------------------------------------------------------------------------------------------------- constants, bits

GK_ALWAYS_INLINE vf set1(float x) { return x - vf{}; }  // x - 0 keeps -0 and NaN; compiles to one broadcast
GK_ALWAYS_INLINE vi set1(int32_t x) { return x + vi{}; }
GK_ALWAYS_INLINE vf zero() { return vf{}; }

// 0, 1, ..., kLanes - 1.
GK_ALWAYS_INLINE vi lane_index() {
#if defined(GK_SIMD_AVX512)
  return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(GK_SIMD_AVX2)
  return vi{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return vi{0, 1, 2, 3};
#endif
}

GK_ALWAYS_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
GK_ALWAYS_INLINE vu as_unsigned(vf x) { return reinterpret_cast<vu>(x); }
GK_ALWAYS_INLINE vu as_unsigned(vi x) { return reinterpret_cast<vu>(x); }
GK_ALWAYS_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
GK_ALWAYS_INLINE vf as_float(vu x) { return reinterpret_cast<vf>(x); }

// mask ? a : b, lane by lane.
GK_ALWAYS_INLINE vf select(vmask mask, vf a, vf b) { return mask ? a : b; }
GK_ALWAYS_INLINE vi select(vmask mask, vi a, vi b) { return mask ? a : b; }

GK_ALWAYS_INLINE bool any(vmask mask) {
#if defined(GK_SIMD_AVX512)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(GK_SIMD_AVX2)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#elif defined(GK_SIMD_SSE2)
  return _mm_movemask_ps(reinterpret_cast<__m128>(mask)) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}
GK_ALWAYS_INLINE bool all(vmask mask) { return !any(~mask); }

GK_ALWAYS_INLINE vf abs(vf x) { return as_float(as_int(x) & 0x7fffffff); }
// The magnitude of x (which must not be negative) with the sign of sign.
GK_ALWAYS_INLINE vf with_sign(vf x, vf sign) { return as_float(as_int(x) | (as_int(sign) & INT32_MIN)); }

// --------------------------------------------------------------------------------------------------------- arithmetic

// a * b + c: rounded once where the level has a fused instruction, twice at baseline on x86-64.
GK_ALWAYS_INLINE vf fma(vf a, vf b, vf c) {
#if defined(GK_SIMD_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(GK_SIMD_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(GK_SIMD_FMA)
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}
// c - a * b, rounded as fma.
GK_ALWAYS_INLINE vf fnma(vf a, vf b, vf c) {
#if defined(GK_SIMD_AVX512)
  return _mm512_fnmadd_ps(a, b, c);
#elif defined(GK_SIMD_AVX2)
  return _mm256_fnmadd_ps(a, b, c);
#else
  return fma(-a, b, c);
#endif
}

// min and max return b when either operand is NaN (and b of two zeros), as the x86 instructions do. So a clamp written
// max(bound, x) keeps a NaN in x, and acc = max(x, acc) skips it.
GK_ALWAYS_INLINE vf min(vf a, vf b) {
#if defined(GK_SIMD_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(GK_SIMD_AVX2)
  return _mm256_min_ps(a, b);
#elif defined(GK_SIMD_SSE2)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
GK_ALWAYS_INLINE vf max(vf a, vf b) {
#if defined(GK_SIMD_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(GK_SIMD_AVX2)
  return _mm256_max_ps(a, b);
#elif defined(GK_SIMD_SSE2)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Correctly rounded; NaN below zero.
GK_ALWAYS_INLINE vf sqrt(vf x) {
#if defined(GK_SIMD_AVX512)
  return _mm512_sqrt_ps(x);
#elif defined(GK_SIMD_AVX2)
  return _mm256_sqrt_ps(x);
#elif defined(GK_SIMD_SSE2)
  return _mm_sqrt_ps(x);
#else
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}
// 1 / x for x in [1, 2^60], below 1.1 ulp; NaN for NaN. AVX-512 divides sixteen floats in sixteen cycles, and
// approximates and mends the approximation in three.
GK_ALWAYS_INLINE vf reciprocal(vf x) {
#if defined(GK_SIMD_AVX512)
  const vf near = _mm512_rcp14_ps(x);
  return fma(fnma(x, near, set1(1.0f)), near, near);
#else
  return 1.0f / x;
#endif
}
// 1 / sqrt(x) in full precision: two roundings, below 1.5 ulp. Infinity at zero.
GK_ALWAYS_INLINE vf rsqrt(vf x) { return 1.0f / sqrt(x); }

// The nearest integer, ties to even. |x| must be below 2^31: outside (and for NaN) the value is unspecified.
GK_ALWAYS_INLINE vi round_to_int(vf x) {
#if defined(GK_SIMD_AVX512)
  return reinterpret_cast<vi>(_mm512_cvtps_epi32(x));
#elif defined(GK_SIMD_AVX2)
  return reinterpret_cast<vi>(_mm256_cvtps_epi32(x));
#elif defined(GK_SIMD_SSE2)
  return reinterpret_cast<vi>(_mm_cvtps_epi32(x));
#else
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_rintf(x[i]);
  return __builtin_convertvector(r, vi);
#endif
}
// The nearest integer as a float, ties to even; keeps infinities and NaN. The sign of a zero result is unspecified.
GK_ALWAYS_INLINE vf round(vf x) {
#if defined(GK_SIMD_AVX512)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(GK_SIMD_AVX2)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(GK_SIMD_SSE2)
  return select(abs(x) < 0x1p23f, __builtin_convertvector(round_to_int(x), vf), x);
#else
  vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_rintf(x[i]);
  return r;
#endif
}
// Toward zero; the same range as round_to_int.
GK_ALWAYS_INLINE vi truncate_to_int(vf x) { return __builtin_convertvector(x, vi); }
using grokkernels::to_float;  // of one element, beside the overload for vectors
GK_ALWAYS_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// --------------------------------------------------------------------------------------------------------- reductions

namespace detail {
#if defined(GK_SIMD_X86)
template <typename Op>
GK_ALWAYS_INLINE float reduce(vf x, Op op) {
#if defined(GK_SIMD_AVX512)
  const __m256 half = op(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 quarter = op(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(GK_SIMD_AVX2)
  const __m128 quarter = op(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
#else
  const __m128 quarter = x;
#endif
  const __m128 pair = op(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(op(pair, _mm_shuffle_ps(pair, pair, 1)));
}
#endif
struct Add {
  template <typename V>
  GK_ALWAYS_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  template <typename V>
  GK_ALWAYS_INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <typename V>
  GK_ALWAYS_INLINE V operator()(V a, V b) const {
    return a < b ? a : b;
  }
};
#if !defined(GK_SIMD_X86)
template <typename Op>
GK_ALWAYS_INLINE float reduce(vf x, Op op) {
  return op(op(x[0], x[2]), op(x[1], x[3]));
}
#endif
}  // namespace detail

// The sum of all lanes, as a tree.
GK_ALWAYS_INLINE float reduce_add(vf x) { return detail::reduce(x, detail::Add{}); }
// The largest or smallest lane; unspecified when a lane is NaN.
GK_ALWAYS_INLINE float reduce_max(vf x) { return detail::reduce(x, detail::Max{}); }
GK_ALWAYS_INLINE float reduce_min(vf x) { return detail::reduce(x, detail::Min{}); }

// ------------------------------------------------------------------------------------- widening and narrowing, in
// registers

namespace detail {

GK_ALWAYS_INLINE vu16 load_u16(const void* p) { return *static_cast<const vu16_memory*>(p); }
GK_ALWAYS_INLINE void store_u16(void* p, vu16 x) { *static_cast<vu16_memory*>(p) = x; }
GK_ALWAYS_INLINE vi load_bytes(const void* p) { return *static_cast<const vi_memory*>(p); }
GK_ALWAYS_INLINE void store_bytes(void* p, vi x) { *static_cast<vi_memory*>(p) = x; }

GK_ALWAYS_INLINE vf widen(vu16 x, bfloat16) {
#if defined(GK_SIMD_AVX512)
  return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)), 16));
#elif defined(GK_SIMD_AVX2)
  return reinterpret_cast<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)), 16));
#elif defined(GK_SIMD_SSE2)
  return reinterpret_cast<vf>(_mm_unpacklo_epi16(_mm_setzero_si128(), raw(x)));
#else
  return as_float(__builtin_convertvector(x, vu) << 16);
#endif
}

GK_ALWAYS_INLINE vf widen(vu16 x, float16) {
#if defined(GK_SIMD_AVX512)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(x));
#elif defined(GK_SIMD_AVX2)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x));
#else
#if defined(GK_SIMD_SSE2)
  const vi u = reinterpret_cast<vi>(_mm_unpacklo_epi16(raw(x), _mm_setzero_si128()));
#else
  const vi u = __builtin_convertvector(x, vi);
#endif
  const vi magnitude = u & 0x7fff;
  const vi normal = (magnitude << 13) + ((127 - 15) << 23);
  const vi denormal = as_int(to_float(magnitude) * 0x1p-24f);
  const vi special = (magnitude << 13) | 0x7f800000 | ((magnitude > 0x7c00) & 0x00400000);
  const vi finite = select(magnitude < 0x0400, denormal, normal);
  return as_float(((u & 0x8000) << 16) | select(magnitude >= 0x7c00, special, finite));
#endif
}

// The nearest bfloat16 in the upper half of each lane; what the lower half holds is unspecified.
GK_ALWAYS_INLINE vi bfloat16_in_upper_half(vf x) {
  const vu u = as_unsigned(x);
  const vu rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return select(x != x, reinterpret_cast<vi>(u | 0x00400000u), reinterpret_cast<vi>(rounded));
}

// From level avx512bf16 on the processor rounds, to zero what is below 2^-126; elsewhere it takes seven instructions.
GK_ALWAYS_INLINE vu16 narrow(vf x, bfloat16) {
#if defined(GK_SIMD_BFLOAT16)
  return reinterpret_cast<vu16>(_mm512_cvtneps_pbh(x));
#else
  const vi u = bfloat16_in_upper_half(x);
#if defined(GK_SIMD_AVX512)
  return reinterpret_cast<vu16>(_mm512_cvtepi32_epi16(_mm512_srli_epi32(reinterpret_cast<__m512i>(u), 16)));
#elif defined(GK_SIMD_AVX2)  // the arithmetic shift leaves values that the signed pack does not saturate
  const __m256i h = reinterpret_cast<__m256i>(u >> 16);
  return reinterpret_cast<vu16>(_mm_packs_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
#elif defined(GK_SIMD_SSE2)
  const __m128i h = reinterpret_cast<__m128i>(u >> 16);
  return __builtin_bit_cast(vu16, _mm_cvtsi128_si64(_mm_packs_epi32(h, h)));
#else
  return __builtin_convertvector(as_unsigned(u) >> 16, vu16);
#endif
#endif
}

GK_ALWAYS_INLINE vu16 narrow(vf x, float16) {
#if defined(GK_SIMD_AVX512)
  return reinterpret_cast<vu16>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(GK_SIMD_AVX2)
  return reinterpret_cast<vu16>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else  // to_float16 of dtypes.h, lane by lane without branches
  const vi u = as_int(x) & 0x7fffffff;
  const vi nan = 0x7e00 | ((u >> 13) & 0x3ff);
  const vi normal =
      reinterpret_cast<vi>(as_unsigned(u) - ((127u - 15u) << 23) + 0xfffu + ((as_unsigned(u) >> 13) & 1u)) >> 13;
  const vi denormal = reinterpret_cast<vi>(as_unsigned(as_float(u) + 0.5f) - as_unsigned(set1(0.5f)));
  const vi finite = select(u < 0x38800000, denormal, normal);
  const vi special = select(u > 0x7f800000, nan, set1(0x7c00));
  const vi h = select(u >= 0x47800000, special, finite) | ((as_int(x) >> 16) & 0x8000);
#if defined(GK_SIMD_SSE2)
  const __m128i signed_h = reinterpret_cast<__m128i>((h << 16) >> 16);
  return __builtin_bit_cast(vu16, _mm_cvtsi128_si64(_mm_packs_epi32(signed_h, signed_h)));
#else
  return __builtin_convertvector(h, vu16);
#endif
#endif
}

// n 16-bit elements in the low part of the result, zeros above. Reads nothing outside.
GK_ALWAYS_INLINE uint64_t load_u16_word(const uint16_t* p, int n) {
  if (n >= 4) return *reinterpret_cast<const u64_memory*>(p);
  uint64_t word = 0;
  if (n >= 2) word = *reinterpret_cast<const u32_memory*>(p);
  if (n & 1) word |= uint64_t{p[n - 1]} << (16 * (n - 1));
  return word;
}
GK_ALWAYS_INLINE void store_u16_word(uint16_t* p, uint64_t word, int n) {
  if (n >= 4) {
    *reinterpret_cast<u64_memory*>(p) = word;
    return;
  }
  if (n >= 2) *reinterpret_cast<u32_memory*>(p) = static_cast<uint32_t>(word);
  if (n & 1) p[n - 1] = static_cast<uint16_t>(word >> (16 * (n - 1)));
}

#if defined(GK_SIMD_AVX512)
GK_ALWAYS_INLINE __mmask16 tail_mask(int n) { return static_cast<__mmask16>(_bzhi_u32(0xffffu, n)); }
#endif

GK_ALWAYS_INLINE vu16 load_u16_n(const void* p, int n) {
#if defined(GK_SIMD_AVX512)
  return reinterpret_cast<vu16>(_mm256_maskz_loadu_epi16(tail_mask(n), p));
#else
  const uint16_t* s = static_cast<const uint16_t*>(p);
  uint64_t words[kLanes / 4];
  for (int i = 0; i < kLanes / 4; ++i) words[i] = n > 4 * i ? load_u16_word(s + 4 * i, n - 4 * i) : 0;
  return __builtin_bit_cast(vu16, words);
#endif
}
GK_ALWAYS_INLINE void store_u16_n(void* p, vu16 x, int n) {
#if defined(GK_SIMD_AVX512)
  _mm256_mask_storeu_epi16(p, tail_mask(n), reinterpret_cast<__m256i>(x));
#else
  struct Words {
    uint64_t word[kLanes / 4];
  };
  const Words words = __builtin_bit_cast(Words, x);
  uint16_t* s = static_cast<uint16_t*>(p);
  for (int i = 0; i < kLanes / 4; ++i) {
    if (n > 4 * i) store_u16_word(s + 4 * i, words.word[i], n - 4 * i);
  }
#endif
}

// Types whose elements load and store through 16-bit words.
template <typename T>
concept Narrow = sizeof(T) == 2 && requires(T x) { x.bits; };

}  // namespace detail

// ---------------------------------------------------------------------------------------------------- loads and stores

// kLanes elements, widened to float.
GK_ALWAYS_INLINE vf load(const float* p) { return *reinterpret_cast<const detail::vf_memory*>(p); }
GK_ALWAYS_INLINE vi load(const int32_t* p) { return detail::load_bytes(p); }
template <detail::Narrow T>
GK_ALWAYS_INLINE vf load(const T* p) {
  return detail::widen(detail::load_u16(p), T{});
}

// kLanes elements, rounded to nearest even.
GK_ALWAYS_INLINE void store(float* p, vf x) { *reinterpret_cast<detail::vf_memory*>(p) = x; }
GK_ALWAYS_INLINE void store(int32_t* p, vi x) { detail::store_bytes(p, x); }
template <detail::Narrow T>
GK_ALWAYS_INLINE void store(T* p, vf x) {
  detail::store_u16(p, detail::narrow(x, T{}));
}

// The first n elements (0 <= n <= kLanes), fill in the lanes above. Memory outside p[0..n) is not touched.
GK_ALWAYS_INLINE vf load_n(const float* p, int n, float fill = 0.0f) {
#if defined(GK_SIMD_AVX512)
  return _mm512_mask_loadu_ps(set1(fill), detail::tail_mask(n), p);
#elif defined(GK_SIMD_AVX2)
  const vmask inside = lane_index() < n;
  return select(inside, _mm256_maskload_ps(p, reinterpret_cast<__m256i>(inside)), set1(fill));
#else
  vf r = set1(fill);
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) r[i] = p[i];
  }
  return r;
#endif
}
template <detail::Narrow T>
GK_ALWAYS_INLINE vf load_n(const T* p, int n, float fill = 0.0f) {
  const vf x = detail::widen(detail::load_u16_n(p, n), T{});
#if defined(GK_SIMD_AVX512)
  return _mm512_mask_blend_ps(detail::tail_mask(n), set1(fill), x);
#else
  return select(lane_index() < n, x, set1(fill));
#endif
}

// The first n lanes (0 <= n <= kLanes). Memory outside p[0..n) is not touched.
GK_ALWAYS_INLINE void store_n(float* p, vf x, int n) {
#if defined(GK_SIMD_AVX512)
  _mm512_mask_storeu_ps(p, detail::tail_mask(n), x);
#elif defined(GK_SIMD_AVX2)
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(lane_index() < n), x);
#else
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) p[i] = x[i];
  }
#endif
}
template <detail::Narrow T>
GK_ALWAYS_INLINE void store_n(T* p, vf x, int n) {
  detail::store_u16_n(p, detail::narrow(x, T{}), n);
}

// Two vectors, 2 * kLanes elements.
struct VfPair {
  vf first, second;
};

// 2 * kLanes elements in memory order: p[0..kLanes) and p[kLanes..2 kLanes).
template <typename T>
GK_ALWAYS_INLINE VfPair load_pair(const T* p) {
#if defined(GK_SIMD_SSE2)
  if constexpr (dtype_of<T> == DType::bfloat16) {
    const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i z = _mm_setzero_si128();
    return {reinterpret_cast<vf>(_mm_unpacklo_epi16(z, u)), reinterpret_cast<vf>(_mm_unpackhi_epi16(z, u))};
  }
#endif
  return {load(p), load(p + kLanes)};
}

namespace detail {
// The 2 * kLanes narrow elements of a pair, in memory order, as one register.
GK_ALWAYS_INLINE vi narrow_pair(vf first, vf second, bfloat16) {
#if defined(GK_SIMD_BFLOAT16)
  return reinterpret_cast<vi>(_mm512_cvtne2ps_pbh(second, first));
#else
#if defined(GK_SIMD_X86)
  const vi a = bfloat16_in_upper_half(first);
  const vi b = bfloat16_in_upper_half(second);
#endif
#if defined(GK_SIMD_AVX512)
  const __m512i low = _mm512_srli_epi32(reinterpret_cast<__m512i>(a), 16);
  const __m512i high = _mm512_srli_epi32(reinterpret_cast<__m512i>(b), 16);
  const __m512i packed = _mm512_packus_epi32(low, high);
  return reinterpret_cast<vi>(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed));
#elif defined(GK_SIMD_AVX2)
  const __m256i packed = _mm256_packs_epi32(reinterpret_cast<__m256i>(a >> 16), reinterpret_cast<__m256i>(b >> 16));
  return reinterpret_cast<vi>(_mm256_permute4x64_epi64(packed, 0xd8));
#elif defined(GK_SIMD_SSE2)
  return reinterpret_cast<vi>(_mm_packs_epi32(reinterpret_cast<__m128i>(a >> 16), reinterpret_cast<__m128i>(b >> 16)));
#else
  struct Halves {
    vu16 half[2];
  };
  return __builtin_bit_cast(vi, (Halves{{narrow(first, bfloat16{}), narrow(second, bfloat16{})}}));
#endif
#endif
}
GK_ALWAYS_INLINE vi narrow_pair(vf first, vf second, float16) {
  struct Halves {
    vu16 half[2];
  };
  return __builtin_bit_cast(vi, (Halves{{narrow(first, float16{}), narrow(second, float16{})}}));
}
}  // namespace detail

// The inverse of load_pair.
GK_ALWAYS_INLINE void store_pair(float* p, vf first, vf second) {
  store(p, first);
  store(p + kLanes, second);
}
template <detail::Narrow T>
GK_ALWAYS_INLINE void store_pair(T* p, vf first, vf second) {
  detail::store_bytes(p, detail::narrow_pair(first, second, T{}));
}

// ------------------------------------------------------------------------------------------------- non-temporal stores

namespace detail {
GK_ALWAYS_INLINE void stream(void* p, vi x) {
#if defined(GK_SIMD_AVX512)
  _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#elif defined(GK_SIMD_AVX2)
  _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(x));
#elif defined(GK_SIMD_SSE2)
  _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(x));
#else
  *static_cast<vi_memory*>(p) = x;
#endif
}
}  // namespace detail

// The alignment in bytes that stream_store and stream_store_pair need: a whole register.
inline constexpr int kStreamAlignment = 4 * kLanes;

// Stores past the caches, for outputs larger than they are: no read of the line before it is written. Every cache line
// should be written whole, in order. Call stream_fence() after the last one, in the thread that stored.
GK_ALWAYS_INLINE void stream_store(float* p, vf x) { detail::stream(p, as_int(x)); }
GK_ALWAYS_INLINE void stream_store_pair(float* p, vf first, vf second) {
  detail::stream(p, as_int(first));
  detail::stream(p + kLanes, as_int(second));
}
template <detail::Narrow T>
GK_ALWAYS_INLINE void stream_store_pair(T* p, vf first, vf second) {
  detail::stream(p, detail::narrow_pair(first, second, T{}));
}
// kLanes narrow elements: half a register, so p needs kStreamAlignment / 2. Prefer the pair.
template <detail::Narrow T>
GK_ALWAYS_INLINE void stream_store(T* p, vf x) {
  const detail::vu16 u = detail::narrow(x, T{});
#if defined(GK_SIMD_AVX512)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(u));
#elif defined(GK_SIMD_AVX2)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(u));
#elif defined(GK_SIMD_SSE2)
  using word [[gnu::may_alias]] = long long;
  _mm_stream_si64(reinterpret_cast<word*>(p), __builtin_bit_cast(long long, u));
#else
  detail::store_u16(p, u);
#endif
}

// Makes the streamed data visible before anything stored later.
GK_ALWAYS_INLINE void stream_fence() {
#if defined(GK_SIMD_X86)
  _mm_sfence();
#endif
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
