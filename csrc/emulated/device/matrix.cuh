// ldmatrix, stmatrix and mma.sync, as csrc/cuda/device/matrix.cuh has them: the last lane to arrive gathers the
// fragments of all, computes in float and deals the result out.
#pragma once

#include <device/convert.cuh>

namespace grokkernels::device {

struct MatrixArgument {
  uint32_t address;
  uint32_t* registers;
};

// The rows that the lanes name, with the bank conflicts of reading them counted: eight rows of 16 bytes at a time take
// one pass when they lie in different 16-byte columns of the 128-byte wide memory.
GK_UNWATCHED inline void matrix_rows(void** all, int count, const char* who, uint16_t* (&rows)[32]) {
  ++emulated::counters().shared_matrix_loads;
  for (int m = 0; m < count; ++m) {
    int taken[8] = {};
    for (int i = 0; i < 8; ++i) {
      const uint32_t address = static_cast<MatrixArgument*>(all[8 * m + i])->address;
      rows[8 * m + i] = reinterpret_cast<uint16_t*>(emulated::shared_memory(address, 16, 16, who));
      if (taken[address / 16 % 8]++ > 0) ++emulated::counters().bank_conflicts;
    }
  }
}

template <int kCount, bool kTrans>
GK_UNWATCHED void load_matrices(void** all, uint32_t) {
  uint16_t* rows[32];
  matrix_rows(all, kCount, "ldmatrix", rows);
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < kCount; ++m) {
      const uint32_t low = kTrans ? rows[8 * m + 2 * t][g] : rows[8 * m + g][2 * t];
      const uint32_t high = kTrans ? rows[8 * m + 2 * t + 1][g] : rows[8 * m + g][2 * t + 1];
      static_cast<MatrixArgument*>(all[lane])->registers[m] = low | high << 16;
    }
  }
}

template <bool kTrans>
GK_UNWATCHED void store_matrices(void** all, uint32_t) {
  uint16_t* rows[32];
  matrix_rows(all, 4, "stmatrix", rows);
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      const uint32_t pair = static_cast<MatrixArgument*>(all[lane])->registers[m];
      (kTrans ? rows[8 * m + 2 * t][g] : rows[8 * m + g][2 * t]) = static_cast<uint16_t>(pair);
      (kTrans ? rows[8 * m + 2 * t + 1][g] : rows[8 * m + g][2 * t + 1]) = static_cast<uint16_t>(pair >> 16);
    }
  }
}

template <int kCount, bool kTrans>
GK_DEVICE void load_matrix(uint32_t (&r)[kCount], uint32_t address) {
  if (lane_id() < 8 * kCount) emulated::read(emulated::shared_memory(address, 16, 16, "ldmatrix"), 16);
  MatrixArgument mine{address, r};
  emulated::warp_collective(kAllLanes, "ldmatrix", &mine, load_matrices<kCount, kTrans>);
}

GK_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t address) { load_matrix<4, false>(r, address); }
GK_DEVICE void load_matrix_x4_trans(uint32_t (&r)[4], uint32_t address) { load_matrix<4, true>(r, address); }
GK_DEVICE void load_matrix_x2(uint32_t (&r)[2], uint32_t address) { load_matrix<2, false>(r, address); }
GK_DEVICE void load_matrix_x2_trans(uint32_t (&r)[2], uint32_t address) { load_matrix<2, true>(r, address); }

template <bool kTrans>
GK_DEVICE void store_matrix(uint32_t address, const uint32_t (&r)[4]) {
  emulated::wrote(emulated::shared_memory(address, 16, 16, "stmatrix"), 16);
  emulated::ordinary_write(address, 16);
  MatrixArgument mine{address, const_cast<uint32_t*>(r)};
  emulated::warp_collective(kAllLanes, "stmatrix", &mine, store_matrices<kTrans>);
}

GK_DEVICE void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]) { store_matrix<false>(address, r); }
GK_DEVICE void store_matrix_x4_trans(uint32_t address, const uint32_t (&r)[4]) { store_matrix<true>(address, r); }

template <typename D>
struct MmaArgument {
  D* d;
  const uint32_t* a;
  const uint32_t* b;
};

// D (16x8) += A (16xK) B (Kx8). Element e of a register covers its kPacked neighbours along K; `decode(register, e)`.
template <int kDepth, int kPacked, typename D, typename Number, typename Decode>
GK_UNWATCHED inline void multiply_fragments(void** all, Decode decode) {
  Number a[16][kDepth], b[kDepth][8];
  D d[16][8];
  ++emulated::counters().matrix_multiplies;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto* mine = static_cast<MmaArgument<D>*>(all[lane]);
    for (int r = 0; r < 4; ++r)
      for (int e = 0; e < kPacked; ++e)
        a[g + r % 2 * 8][t * kPacked + r / 2 * (kDepth / 2) + e] = decode(mine->a[r], e);
    for (int r = 0; r < 2; ++r)
      for (int e = 0; e < kPacked; ++e) b[t * kPacked + r * (kDepth / 2) + e][g] = decode(mine->b[r], e);
    for (int r = 0; r < 4; ++r) d[g + r / 2 * 8][2 * t + r % 2] = mine->d[r];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) static_cast<MmaArgument<D>*>(all[lane])->d[r] = d[g + r / 2 * 8][2 * t + r % 2];
  }
}

template <typename T>
GK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaArgument<float> mine{d, a, b};
  emulated::warp_collective(kAllLanes, "mma_m16n8k16", &mine, [](void** all, uint32_t) GK_UNWATCHED {
    multiply_fragments<16, 2, float, float>(
        all, [](uint32_t r, int e) { return to_float(T{static_cast<uint16_t>(r >> (16 * e))}); });
  });
}

GK_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaArgument<float> mine{d, a, b};
  emulated::warp_collective(kAllLanes, "mma_m16n8k8_tf32", &mine, [](void** all, uint32_t) GK_UNWATCHED {
    multiply_fragments<8, 1, float, float>(all, [](uint32_t r, int) { return float_from_bits(r & 0xFFFFE000u); });
  });
}

GK_DEVICE void mma_m16n8k32_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaArgument<int> mine{d, a, b};
  emulated::warp_collective(kAllLanes, "mma_m16n8k32_int8", &mine, [](void** all, uint32_t) GK_UNWATCHED {
    multiply_fragments<32, 4, int, int>(all, [](uint32_t r, int e) { return int{static_cast<int8_t>(r >> (8 * e))}; });
  });
}

// 4 exponent bits with bias 7, 3 mantissa bits, no infinity; 0x7F is NaN.
GK_DEVICE float e4m3_to_float(uint8_t x) {
  const float sign = x & 0x80 ? -1.0f : 1.0f;
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  if ((x & 0x7F) == 0x7F) return std::nanf("");
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                               : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10));
}

GK_DEVICE void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaArgument<float> mine{d, a, b};
  emulated::warp_collective(kAllLanes, "mma_m16n8k32_e4m3", &mine, [](void** all, uint32_t) GK_UNWATCHED {
    multiply_fragments<32, 4, float, float>(
        all, [](uint32_t r, int e) { return e4m3_to_float(static_cast<uint8_t>(r >> (8 * e))); });
  });
}

}  // namespace grokkernels::device
