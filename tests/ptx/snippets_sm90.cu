// Small kernels for tests/test_ptx_interpreter.py with Hopper's own instructions: mbarrier, bulk copies, wgmma.
#include <stdint.h>

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};
extern __shared__ __align__(1024) unsigned char dynamic[];

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool try_wait(uint32_t barrier, uint32_t parity) {
  int done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done;
}
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  while (!try_wait(barrier, parity)) {
  }
}
__device__ __forceinline__ void load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// Warp 0 brings `n` pieces of 256 bytes through two stages; warps 1 and 2 add one and store. `fault`: 1 no wait for
// the bytes, 2 expects too few bytes, 3 no wait for a free stage, 4 one try instead of a wait.
__global__ void pipeline(const int* x, int* out, int n, int fault) {
  const uint32_t data = shared_address(dynamic), full = data + 512, empty = full + 16;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      init(full + 8 * s, 1);
      init(empty + 8 * s, 2);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < n; ++i) {
        const int s = i & 1, round = i >> 1;
        if (fault != 3) wait(empty + 8 * s, (round & 1) ^ 1);
        arrive_expect(full + 8 * s, fault == 2 ? 128 : 256);
        load(data + 256 * s, x + 64 * i, 256, full + 8 * s);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const int s = i & 1, round = i >> 1;
      if (fault == 4) {
        try_wait(full + 8 * s, round & 1);
      } else if (fault != 1) {
        wait(full + 8 * s, round & 1);
      }
      out[64 * i + threadIdx.x - 32] = reinterpret_cast<int*>(dynamic)[64 * s + threadIdx.x - 32] + 1;
      __syncwarp();
      if (threadIdx.x % 32 == 0) arrive(empty + 8 * s);
    }
  }
}

// out = 2 x of 1024 bytes through a bulk store; `wait_for` 0: nothing, 1: .read, 2: to the end. The fence is by 0:
// nobody, 1: the writers, 2: who issues the store
__global__ void bulk_store(const int* x, int* out, int wait_for, int fence_by) {
  int* s = reinterpret_cast<int*>(dynamic);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 2 * x[i];
  if (fence_by == 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    if (fence_by == 2) asm volatile("fence.proxy.async;" ::: "memory");
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out), "r"(shared_address(s)),
                 "r"(1024)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (wait_for == 1) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    if (wait_for == 2) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

// out[0:256] += x by a bulk reduction, and the tensor behind the map likewise
__global__ void bulk_add(const float* x, float* out, const __grid_constant__ TensorMap map) {
  float* s = reinterpret_cast<float*>(dynamic);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = x[i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t from = shared_address(s);
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(out), "r"(from),
                 "r"(1024)
                 : "memory");
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %1}], [%2];" ::"l"(&map),
        "r"(0), "r"(from)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

// A tile at (x, y) as it lies in shared memory, to `out`; then twice that through a tensor store to `to`.
__global__ void tile(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, unsigned short* out,
                     int elements, int x, int y) {
  const uint32_t data = shared_address(dynamic), full = data + 2 * elements;
  unsigned short* s = reinterpret_cast<unsigned short*>(dynamic);
  if (threadIdx.x == 0) init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_expect(full, 2 * elements);
    load_tile(data, &from, x, y, full);
  }
  wait(full, 0);
  for (int i = threadIdx.x; i < elements; i += blockDim.x) {
    out[i] = s[i];
    s[i] *= 2;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&to), "r"(x),
                 "r"(y), "r"(data)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}

#define D8(i)                                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define D32 D8(0), D8(8), D8(16), D8(24)
#define PLACES                                                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29" \
  ",%30,%31}"

struct Layout {
  int boxes, width, offset[4];    // of A or B: how many boxes of how many elements, where the four steps of k begin
  unsigned long long descriptor;  // but for the start address
};

// D (64, 64) = A B, k of 64: two warpgroups each do the whole. A box is brought by TMA and read as the descriptor says.
// `fault`: 1 the registers are read before the wait, 2 no fence
template <bool A_M_MAJOR, bool B_N_MAJOR, bool A_REGISTERS>
__global__ void product(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                        const uint32_t* plain_a, float* out, Layout la, Layout lb, int fault) {
  const uint32_t a = shared_address(dynamic), b = a + 8192, full = b + 8192;
  if (threadIdx.x == 0) init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_expect(full, 16384);
    for (int i = 0; i < la.boxes; ++i) load_tile(a + i * (8192 / la.boxes), &map_a, i * la.width, 0, full);
    for (int i = 0; i < lb.boxes; ++i) load_tile(b + i * (8192 / lb.boxes), &map_b, i * lb.width, 0, full);
  }
  wait(full, 0);
  float d[32];
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  if (fault != 2) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t of_a = la.descriptor | (a + la.offset[k]) >> 4, of_b = lb.descriptor | (b + lb.offset[k]) >> 4;
    if constexpr (A_REGISTERS) {
      uint32_t r[4];
      for (int i = 0; i < 4; ++i) r[i] = plain_a[(row + i % 2 * 8) * 32 + k * 8 + lane % 4 + i / 2 * 4];
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
          "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES ", {%32,%33,%34,%35}, %36, p, 1, 1, %38; }"
          : D32
          : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(of_b), "r"(k), "n"(B_N_MAJOR));
    } else {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
          "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PLACES ", %32, %33, p, -1, 1, %35, %36; }"
          : D32
          : "l"(of_a), "l"(of_b), "r"(k), "n"(A_M_MAJOR), "n"(B_N_MAJOR));
    }
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  if (fault != 1) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  float* o = out + threadIdx.x / 128 * 4096;
#pragma unroll
  for (int i = 0; i < 32; ++i) o[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}
#define PRODUCT(a, b, r)                                                                                          \
  template __global__ void product<a, b, r>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, \
                                            const uint32_t*, float*, Layout, Layout, int)
PRODUCT(false, false, false);
PRODUCT(true, true, false);
PRODUCT(false, true, true);
