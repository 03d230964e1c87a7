// The names of the vocabulary that need Hopper: see conformance.cu.
#include <device/core.cuh>
#include <device/matrix.cuh>
#include <device/memory.cuh>

#include "tests/device/harness.cuh"

namespace grokkernels {
using namespace device;

// ---- matrix ----
KERNEL(matrix_store_x4, {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t r[4] = {in[4 * lane], in[4 * lane + 1], in[4 * lane + 2], in[4 * lane + 3]};
  store_matrix_x4(base + 16 * static_cast<uint32_t>(lane ^ 5), r);
  sync_threads();
  store_16(out + 4 * lane, load_shared_16(base + 16 * static_cast<uint32_t>(lane)));
})
KERNEL(matrix_store_x4_trans, {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t r[4] = {in[4 * lane], in[4 * lane + 1], in[4 * lane + 2], in[4 * lane + 3]};
  store_matrix_x4_trans(base + 16 * static_cast<uint32_t>(lane ^ 2), r);
  sync_threads();
  store_16(out + 4 * lane, load_shared_16(base + 16 * static_cast<uint32_t>(lane)));
})
KERNEL(matrix_mma_e4m3, {
  float d[4];
  uint32_t a[4], b[2];
  // Exponents of 4 to 11: products whose sums float holds exactly.
  for (int i = 0; i < 4; ++i) a[i] = (in[4 * lane + i] & 0x9F9F9F9F) | 0x20202020;
  for (int i = 0; i < 2; ++i) b[i] = (in[128 + 2 * lane + i] & 0x9F9F9F9F) | 0x20202020;
  for (int i = 0; i < 4; ++i) d[i] = small(in[192 + 4 * lane + i]);
  mma_m16n8k32_e4m3(d, a, b);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = float_to_bits(d[i]);
})

}  // namespace grokkernels

RUN_BY_NAME()
