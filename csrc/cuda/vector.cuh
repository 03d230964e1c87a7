// Rows of float, bfloat16 or float16 in 16-byte vectors, as floats in registers.
#pragma once

#include <device/convert.cuh>
#include <device/memory.cuh>

namespace grokkernels::device {

// Elements of T in 16 bytes.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

GK_DEVICE void unpack(Words4 words, float (&x)[4], float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = bits_to_float(words.word[i]);
}

template <typename T>
GK_DEVICE void unpack(Words4 words, float (&x)[8], T) {
#pragma unroll
  for (int i = 0; i < 4; ++i) widen_pair<T>(words.word[i], x[2 * i], x[2 * i + 1]);
}

GK_DEVICE Words4 pack(const float (&x)[4], float) {
  return {{float_to_bits(x[0]), float_to_bits(x[1]), float_to_bits(x[2]), float_to_bits(x[3])}};
}

template <typename T>
GK_DEVICE Words4 pack(const float (&x)[8], T) {
  return {
      {narrow_pair<T>(x[0], x[1]), narrow_pair<T>(x[2], x[3]), narrow_pair<T>(x[4], x[5]), narrow_pair<T>(x[6], x[7])}};
}

// The kVector<T> elements at p, 16-byte aligned.
template <typename T>
GK_DEVICE void load_vector(const T* p, float (&x)[kVector<T>]) {
  unpack(load_16(p), x, T{});
}

template <typename T>
GK_DEVICE void load_vector_streaming(const T* p, float (&x)[kVector<T>]) {
  unpack(load_16_streaming(p), x, T{});
}

template <typename T>
GK_DEVICE void store_vector(T* p, const float (&x)[kVector<T>]) {
  store_16(p, pack(x, T{}));
}

template <typename T>
GK_DEVICE void store_vector_streaming(T* p, const float (&x)[kVector<T>]) {
  store_16_streaming(p, pack(x, T{}));
}

// The same one by one, for rows of any alignment and what is left at their end: `count` of them are there, the others
// become zero.
template <typename T>
GK_DEVICE void load_elements(const T* p, int64_t count, float (&x)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) x[i] = i < count ? widen(p[i]) : 0.0f;
}

template <typename T>
GK_DEVICE void store_elements(T* p, int64_t count, const float (&x)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (i < count) p[i] = narrow<T>(x[i]);
}

// Host: whether every row of a matrix of T may be read in 16-byte vectors: its start, its stride and its length.
template <typename T>
bool vectorizable(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kVector<T> == 0;
}

}  // namespace grokkernels::device
