// One small kernel per name of the vocabulary (csrc/cuda/device): one warp reads words from `in` and writes words to
// `out`. tests/device runs each three ways and compares: as nvcc's PTX through the interpreter, on the emulated device,
// and, where there is one, on a GPU.
#include <device/async.cuh>
#include <device/barrier.cuh>
#include <device/convert.cuh>
#include <device/core.cuh>
#include <device/math.cuh>
#include <device/matrix.cuh>
#include <device/memory.cuh>
#include <device/warp.cuh>

#include "tests/device/harness.cuh"

namespace grokkernels {
using namespace device;

// ---- core ----
KERNEL(core_lane_id, { out[lane] = static_cast<uint32_t>(lane_id()); })
KERNEL(core_shared, {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  shared[lane] = in[lane];
  sync_threads();
  out[lane] = shared[31 - lane];
  sync_warp();
  shared[lane ^ 1] = in[lane + 32];
  sync_warp();
  out[lane + 32] = shared[lane];
  out[lane + 64] = shared_address(shared + lane) - shared_address(shared);
})
KERNEL(core_shared_alignment, { out[lane] = shared_address(dynamic_shared()) % 1024; })
KERNEL(core_fence_device, {
  out[lane] = in[lane];
  fence_device();
  out[lane + 32] = in[lane + 1];
})

// ---- convert ----
KERNEL(convert_widen_bfloat16, { out[lane] = float_to_bits(widen(bfloat16{static_cast<uint16_t>(in[lane])})); })
KERNEL(convert_widen_float16, { out[lane] = float_to_bits(widen(float16{static_cast<uint16_t>(in[lane] & 0x7BFF)})); })
KERNEL(convert_narrow_bfloat16, { out[lane] = narrow<bfloat16>(bits_to_float(in[lane])).bits; })
KERNEL(convert_narrow_float16, { out[lane] = narrow<float16>(bits_to_float(in[lane])).bits; })
KERNEL(convert_narrow_pair_bfloat16,
       { out[lane] = narrow_pair<bfloat16>(bits_to_float(in[lane]), bits_to_float(in[lane + 32])); })
KERNEL(convert_narrow_pair_float16,
       { out[lane] = narrow_pair<float16>(bits_to_float(in[lane]), bits_to_float(in[lane + 32])); })
KERNEL(convert_widen_pair_bfloat16, {
  float low, high;
  widen_pair<bfloat16>(in[lane], low, high);
  out[lane] = float_to_bits(low);
  out[lane + 32] = float_to_bits(high);
})
KERNEL(convert_widen_pair_float16, {
  float low, high;
  widen_pair<float16>(in[lane] & 0x7BFF7BFF, low, high);
  out[lane] = float_to_bits(low);
  out[lane + 32] = float_to_bits(high);
})
KERNEL(convert_to_tf32, { out[lane] = to_tf32(bits_to_float(in[lane])); })

// ---- math: approximations, compared as floats ----
KERNEL(approx_exp2, { out[lane] = float_to_bits(exp2_approx(bits_to_float(in[lane]))); })
KERNEL(approx_log2, { out[lane] = float_to_bits(log2_approx(fabsf(bits_to_float(in[lane])))); })
KERNEL(approx_reciprocal, { out[lane] = float_to_bits(reciprocal_approx(bits_to_float(in[lane]))); })
KERNEL(approx_rsqrt, { out[lane] = float_to_bits(rsqrt_approx(fabsf(bits_to_float(in[lane])))); })
KERNEL(approx_tanh, { out[lane] = float_to_bits(tanh_approx(bits_to_float(in[lane]))); })

// ---- memory ----
KERNEL(memory_16, { store_16(out + 4 * lane, load_16(in + 4 * (31 - lane))); })
KERNEL(memory_16_readonly, { store_16(out + 4 * lane, load_16_readonly(in + 4 * (lane ^ 13))); })
KERNEL(memory_16_streaming, { store_16_streaming(out + 4 * lane, load_16_streaming(in + 4 * (31 - lane))); })
KERNEL(memory_8, { store_8(out + 2 * lane, load_8(in + 2 * (31 - lane))); })
KERNEL(memory_shared, {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t me = static_cast<uint32_t>(lane);
  store_shared_16(base + 16 * me, load_16(in + 4 * lane));
  sync_threads();
  const Words4 four = load_shared_16(base + 16 * (31 - me));
  const Words2 two = load_shared_8(base + 8 * (31 - me));
  out[lane] = load_shared_4(base + 4 * (31 - me)) + four.word[0] + 3 * four.word[3] + two.word[1];
  sync_threads();
  store_shared_4(base + 4 * me, in[lane]);
  store_shared_8(base + 256 + 8 * me, {{in[lane + 32], in[lane + 64]}});
  sync_threads();
  out[lane + 32] = load_shared_4(base + 4 * (me ^ 3));
  out[lane + 64] = load_shared_4(base + 256 + 4 * (63 - me));
})
KERNEL(memory_atomics, {
  if (lane < 16) out[lane] = 0;
  sync_threads();
  atomic_add(reinterpret_cast<int*>(out), static_cast<int>(in[lane]));
  atomic_add(out + 1, in[lane]);
  atomic_add(reinterpret_cast<float*>(out + 2), static_cast<float>(lane));
  atomic_max(reinterpret_cast<int*>(out + 3), static_cast<int>(in[lane]));
  atomic_add_2(reinterpret_cast<float*>(out + 4), 1.0f, static_cast<float>(lane));
  atomic_add(reinterpret_cast<double*>(out + 6), static_cast<double>(lane));
})
KERNEL(memory_acquire_release, {
  store_release(reinterpret_cast<int*>(out + lane), static_cast<int>(in[lane]));
  out[lane + 32] = static_cast<uint32_t>(load_acquire(reinterpret_cast<const int*>(in + lane + 32)));
})

// ---- warp ----
KERNEL(warp_shuffle, {
  out[lane] = shuffle(in[lane], 7);
  out[lane + 32] = shuffle(in[lane], lane * 5, 8);
})
KERNEL(warp_shuffle_xor, {
  out[lane] = shuffle_xor(in[lane], 21);
  out[lane + 32] = shuffle_xor(in[lane], 3, 4);
  out[lane + 64] = float_to_bits(shuffle_xor(bits_to_float(in[lane]), 16));
})
KERNEL(warp_shuffle_up_down, {
  out[lane] = shuffle_up(in[lane], 3);
  out[lane + 32] = shuffle_up(in[lane], 1, 8);
  out[lane + 64] = shuffle_down(in[lane], 5);
  out[lane + 96] = shuffle_down(in[lane], 2, 16);
})
KERNEL(warp_shuffle_some, {
  if (lane < 12) out[lane] = shuffle_xor(in[lane], 1, 32, 0xFFFu);
})
KERNEL(warp_votes, {
  out[lane] = ballot((in[lane] & 1) != 0);
  out[lane + 32] = any(in[lane] == in[5]);
  out[lane + 64] = all((in[lane] | 1) != 0);
  out[lane + 96] = all((in[lane] & 2) != 0);
  out[lane + 128] = match_any(in[lane] & 3);
  out[lane + 160] = static_cast<uint32_t>(count_bits(in[lane]));
})

// ---- async ----
KERNEL(async_16, {
  const uint32_t base = shared_address(dynamic_shared());
  copy_async_16(base + 16 * static_cast<uint32_t>(lane), in + 4 * (31 - lane), lane % 5 != 0);
  copy_async_commit();
  copy_async_16(base + 512 + 16 * static_cast<uint32_t>(lane), in + 128 + 4 * lane);
  copy_async_commit();
  copy_async_wait<1>();
  sync_threads();
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = load_shared_4(base + 16 * static_cast<uint32_t>(lane) + 4 * i);
  copy_async_wait<0>();
  sync_threads();
  out[128 + lane] = load_shared_4(base + 512 + 4 * static_cast<uint32_t>(lane ^ 9));
})
KERNEL(async_4, {
  const uint32_t base = shared_address(dynamic_shared());
  copy_async_4(base + 4 * static_cast<uint32_t>(lane), in + 3 * lane + 1, lane != 7);
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads();
  out[lane] = load_shared_4(base + 4 * static_cast<uint32_t>(lane));
})

// ---- matrix: operands as in[], shared tiles of 32 rows of 16 bytes ----
GK_DEVICE uint32_t fill_tile(const uint32_t* in, int lane) {
  const uint32_t base = shared_address(dynamic_shared());
  store_shared_16(base + 16 * static_cast<uint32_t>(lane), load_16(in + 4 * lane));
  sync_threads();
  return base;
}
KERNEL(matrix_load_x4, {
  uint32_t r[4];
  load_matrix_x4(r, fill_tile(in, lane) + 16 * static_cast<uint32_t>(lane ^ 3));
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
})
KERNEL(matrix_load_x4_trans, {
  uint32_t r[4];
  load_matrix_x4_trans(r, fill_tile(in, lane) + 16 * static_cast<uint32_t>(lane ^ 6));
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
})
KERNEL(matrix_load_x2, {
  uint32_t r[2];
  load_matrix_x2(r, fill_tile(in, lane) + 16 * static_cast<uint32_t>(lane));
  for (int i = 0; i < 2; ++i) out[2 * lane + i] = r[i];
})
KERNEL(matrix_load_x2_trans, {
  uint32_t r[2];
  load_matrix_x2_trans(r, fill_tile(in, lane) + 16 * static_cast<uint32_t>(lane ^ 1));
  for (int i = 0; i < 2; ++i) out[2 * lane + i] = r[i];
})

template <typename T>
GK_DEVICE void multiply_16(const uint32_t* in, uint32_t* out, int lane) {
  float d[4];
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = small_pair<T>(in[4 * lane + i]);
  for (int i = 0; i < 2; ++i) b[i] = small_pair<T>(in[128 + 2 * lane + i]);
  for (int i = 0; i < 4; ++i) d[i] = small(in[192 + 4 * lane + i]);
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = float_to_bits(d[i]);
}
KERNEL(matrix_mma_bfloat16, { multiply_16<bfloat16>(in, out, lane); })
KERNEL(matrix_mma_float16, { multiply_16<float16>(in, out, lane); })
KERNEL(matrix_mma_tf32, {
  float d[4];
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = to_tf32(small(in[4 * lane + i]));
  for (int i = 0; i < 2; ++i) b[i] = to_tf32(small(in[128 + 2 * lane + i]));
  for (int i = 0; i < 4; ++i) d[i] = small(in[192 + 4 * lane + i]);
  mma_m16n8k8_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = float_to_bits(d[i]);
})
KERNEL(matrix_mma_int8, {
  int d[4];
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = in[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = in[128 + 2 * lane + i];
  for (int i = 0; i < 4; ++i) d[i] = static_cast<int>(in[192 + 4 * lane + i] >> 8);
  mma_m16n8k32_int8(d, a, b);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = static_cast<uint32_t>(d[i]);
})

// ---- barrier ----
KERNEL_OF(barrier_named, 64, {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  shared[lane] = in[lane];
  named_barrier_sync(3, 64);
  out[lane] = shared[(lane + 37) % 64];
  named_barrier_sync(3, 64);
  if (lane >= 32) {
    shared[lane - 32] = in[64 + lane];
    named_barrier_arrive(4, 64);
  } else {
    named_barrier_sync(4, 64);
    out[64 + lane] = shared[lane ^ 1];
  }
})

}  // namespace grokkernels

RUN_BY_NAME()
