// Small kernels for tests/test_ptx_interpreter.py: what the interpreter must run, or refuse, on sm_80.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <stdio.h>
struct Params {
  const float* x;
  float* y;
  int n;
  float scale;
  float4 q;
  int table[8];
};
extern __shared__ __align__(1024) unsigned char dynamic[];
__constant__ float weights[4] = {1.f, 2.f, 4.f, 8.f};
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// y[r] = sum of x[r, :] * scale, by shuffles and a barrier; a struct by value
__global__ void row_sum(const __grid_constant__ Params p) {
  __shared__ float part[32];
  float a = 0;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) a += p.x[(size_t)blockIdx.x * p.n + i];
  for (int o = 16; o; o >>= 1) a += __shfl_xor_sync(~0u, a, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = a;
  __syncthreads();
  if (threadIdx.x == 0) {
    a = 0;
    for (int w = 0; w < blockDim.x / 32; ++w) a += part[w];
    p.y[blockIdx.x] = a * p.scale + p.q.z * p.table[blockIdx.x & 7] + weights[blockIdx.x & 3];
  }
}
// every path of a switch, a loop of data-dependent length, local memory
__global__ void paths(const int* x, int* out) {
  int v = x[threadIdx.x], a = 0, seen[8];
#pragma unroll 1
  for (int i = 0; i < 8; ++i) seen[i] = v * i;
#pragma unroll 1
  while (v > 0) {
    a += v;
    v = v & 1 ? v - 3 : v / 2;
    if (a > 10000) break;
  }
  switch (x[threadIdx.x] & 7) {
    case 0:
      a += 3;
      break;
    case 1:
      a *= 5;
      break;
    case 2:
      a ^= 0x55;
      break;
    case 3:
      a -= 11;
      break;
    case 4:
      a = -a;
      break;
    case 5:
      a = a << 3;
      break;
    case 6:
      a |= 0x1000;
      break;
    default:
      return;
  }
  out[threadIdx.x] = a + seen[(x[threadIdx.x] >> 3) & 7];
}
__global__ void collectives(const int* x, int* out) {
  int v = x[threadIdx.x], n = blockDim.x, i = threadIdx.x;
  out[i] = __shfl_up_sync(~0u, v, 3, 16);
  out[n + i] = __shfl_down_sync(~0u, v, 5, 8);
  out[2 * n + i] = __shfl_sync(~0u, v, v & 31, 32);
  out[3 * n + i] = __ballot_sync(~0u, v & 1);
  out[4 * n + i] = __any_sync(~0u, v == 77) + 2 * __all_sync(~0u, v >= 0);
  out[5 * n + i] = __match_any_sync(~0u, v & 3);
  out[6 * n + i] = __reduce_add_sync(~0u, v);
  out[7 * n + i] = __reduce_max_sync(~0u, v);
  if (i % 32 < 16)
    out[8 * n + i] = __shfl_xor_sync(0xffffu, v, 1);
  else
    out[8 * n + i] = __popc(__activemask());
  out[9 * n + i] = __syncthreads_count(v & 1);
}
__global__ void atomics(const int* x, int* out) {
  atomicAdd(out, x[threadIdx.x]);
  atomicMax(out + 1, x[threadIdx.x]);
  atomicOr(out + 2, x[threadIdx.x]);
  atomicAdd((float*)out + 3, (float)x[threadIdx.x]);
  atomicInc((unsigned*)out + 4, 6u);
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, (unsigned long long)x[threadIdx.x]);
  int before = atomicCAS(out + 5, (int)threadIdx.x, (int)threadIdx.x + 1);
  __syncthreads();
  if (before == 40) out[6] = (int)total;
}
// warp 0 hands a value to warp 1 through a named barrier, twice, and a spin lock counts
__global__ void handover(int* out) {
  __shared__ int box, lock, count;
  if (threadIdx.x == 0) {
    lock = 0;
    count = 0;
  }
  __syncthreads();
  int warp = threadIdx.x / 32;
  for (int k = 0; k < 2; ++k) {
    if (warp == 0) {
      if (threadIdx.x == 0) box = 10 + k;
      asm volatile("bar.arrive 1, 64;" ::: "memory");
      asm volatile("bar.sync 2, 64;" ::: "memory");
    } else if (warp == 1) {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      out[k * 32 + threadIdx.x % 32] = box;
      asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
  if (threadIdx.x % 32 == 5) {
    while (atomicCAS(&lock, 0, 1)) {
    }
    count += 1;
    atomicExch(&lock, 0);
  }
  __syncthreads();
  if (threadIdx.x == 0) out[64] = count;
}
__global__ void vectors(const float4* x, float4* out) {
  float4 v = x[threadIdx.x];
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(x + threadIdx.x));
  const __nv_bfloat162 b = __floats2bfloat162_rn(v.x, v.y);
  const half2 h = __floats2half2_rn(v.z, v.w);
  v.x = __low2float(b) + __high2float(__hmul2(b, b));
  v.y = __half2float(__hfma(h.x, h.y, h.x));
  __stcs(out + threadIdx.x, v);
}
__global__ void math(const float* x, float* out) {
  int i = threadIdx.x, n = blockDim.x;
  float v = x[i];
  out[i] = expf(v);
  out[n + i] = logf(fabsf(v));
  out[2 * n + i] = sinf(v * 1000);
  out[3 * n + i] = tanhf(v);
  out[4 * n + i] = powf(fabsf(v), 1.7f);
  out[5 * n + i] = erff(v);
  out[6 * n + i] = v / (1 + v * v);
  out[7 * n + i] = (float)((double)v * v / 3.0 + exp((double)v));
  out[8 * n + i] = rsqrtf(fabsf(v));
  out[9 * n + i] = fmodf(v, 0.3f);
}
__global__ void out_of_shared(int* out, int at) {
  if (at >= 0) reinterpret_cast<int*>(dynamic)[at + threadIdx.x] = 1;
  out[threadIdx.x] = reinterpret_cast<int*>(dynamic)[threadIdx.x];
}
__global__ void misaligned(int* out, int by) {
  asm volatile("st.global.v2.u32 [%0], {%1, %1};" ::"l"((char*)out + by), "r"(1));
}
__global__ void unwritten(int* out) {
  int y;
  asm volatile("{ .reg .b32 t; add.s32 %0, t, 1; }" : "=r"(y));
  out[threadIdx.x] = y;
}
// Two pairs of warps, each with a barrier of its own; `apart`: so do the two halves of a warp, which is wrong
__global__ void barrier_by_number(const int* x, int* out, int apart) {
  int *s = reinterpret_cast<int*>(dynamic), i = threadIdx.x;
  s[i] = x[i];
  asm volatile("bar.sync %0, %1;" ::"r"(1 + i / 64 + (apart ? i / 16 % 2 : 0)), "r"(64) : "memory");
  out[i] = s[i ^ 32];
}
// Calls of a function that is not inlined: twice, lanes leaving it at different times
struct Two {
  long long a, b;
};
__device__ __noinline__ Two power(Two x, int n) {
  if (n < 0) return {x.b, x.a};
  long long y = 1;
  for (int i = 0; i < n; ++i) y *= x.a;
  return {y, y + x.b};
}
__global__ void function_twice(const int* x, long long* out) {
  const int i = threadIdx.x;
  const Two first = power({x[i], i}, x[i] - 4);
  const Two second = power({first.a, first.b}, i % 2);
  out[i] = second.a + 3 * second.b;
}
// A call in a path that nobody takes, or that somebody does
__global__ void calls(int* out, int n) {
  if (n > 2) printf("%d\n", n);
  out[threadIdx.x] = n;
}
// Atomics of halves, at 3 addresses; the first 16 copies of 32 are ignored
__global__ void halves_and_ignored(const int* x, int* out) {
  int i = threadIdx.x;
  atomicAdd(reinterpret_cast<half2*>(out) + i % 3, __floats2half2_rn(1.f, 2.f));
  atomicAdd(reinterpret_cast<__nv_bfloat162*>(out) + 3 + i % 3, __floats2bfloat162_rn(1.f, 0.5f));
  asm volatile(
      "{ .reg .pred p; setp.lt.u32 p, %2, 16; cp.async.ca.shared.global [%0], [%1], 4, p; cp.async.wait_all; }" ::"r"(
          shared_address(dynamic + 4 * i)),
      "l"(x + i), "r"(i)
      : "memory");
  out[8 + i] = reinterpret_cast<int*>(dynamic)[i];
}
// Of 40 threads those with odd x leave; the others sum, across the barrier, in a warp of which a part is gone.
__global__ void leavers(const int* x, int* out) {
  int v = x[threadIdx.x];
  if (v & 1) return;
  __syncthreads();
  out[threadIdx.x] = __reduce_add_sync(__activemask(), v);
  out[40 + threadIdx.x] = __shfl_sync(~0u, v, __ffs(__ballot_sync(~0u, true)) - 1);
}
// A pointer that leads to global, shared or local memory, by thread
__global__ void generic(int* x, int* out) {
  __shared__ int s[64];
  int local[2] = {5, 6};
  s[threadIdx.x] = 100 + threadIdx.x;
  __syncthreads();
  int* p = threadIdx.x % 3 == 0 ? x + threadIdx.x : threadIdx.x % 3 == 1 ? s + threadIdx.x : local + threadIdx.x % 2;
  asm volatile("st.u32 [%0], %1;" ::"l"(p), "r"(*p * 2) : "memory");
  asm volatile("ld.u32 %0, [%1];" : "=r"(out[threadIdx.x]) : "l"(p) : "memory");
}
__global__ void table_jump(const int* x, int* out) {
  int y;
  asm volatile(
      "{ .reg .u32 i; mov.u32 i, %1;\n T%=: .branchtargets A%=, B%=, C%=;\n brx.idx i, T%=;\n"
      " A%=: mov.u32 %0, 7; bra E%=;\n B%=: mov.u32 %0, 8; bra E%=;\n C%=: mov.u32 %0, 9;\n E%=: }"
      : "=r"(y)
      : "r"(x[threadIdx.x]));
  out[threadIdx.x] = y;
}
__global__ void half_a_barrier(int* out) {
  if (threadIdx.x < 32) asm volatile("bar.sync 3, 64;");
  out[0] = 1;
}

// copies n words with cp.async, 4 or 16 bytes each, the last of them partly
template <bool WAIT>
__global__ void async_copy(const int* x, int* out, int n) {
  int i = threadIdx.x;
  uint32_t to = shared_address(dynamic + 16 * i);
  int valid = min(max(n - 4 * i, 0), 4) * 4;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(x + 4 * i), "r"(valid) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(dynamic + 2048 + 4 * i)), "l"(x + i)
               : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (WAIT)
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  __syncthreads();
  for (int j = 0; j < 4; ++j) out[4 * i + j] = reinterpret_cast<int*>(dynamic)[4 * i + j];
  out[4 * blockDim.x + i] = reinterpret_cast<int*>(dynamic + 2048)[i];
}
template __global__ void async_copy<true>(const int*, int*, int);
template __global__ void async_copy<false>(const int*, int*, int);
__global__ void matrices(const uint16_t* x, uint16_t* out) {  // 32 rows of 8 through ldmatrix, stmatrix-free
  uint16_t* s = reinterpret_cast<uint16_t*>(dynamic);
  for (int j = 0; j < 8; ++j) s[threadIdx.x * 8 + j] = x[threadIdx.x * 8 + j];
  __syncwarp();
  uint32_t r[4], at = shared_address(s + 8 * threadIdx.x);
  uint32_t* o = reinterpret_cast<uint32_t*>(out) + 8 * threadIdx.x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
  for (int j = 0; j < 4; ++j) o[j] = r[j];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
  for (int j = 0; j < 4; ++j) o[4 + j] = r[j];
}
// C (64, 64) = A (64, K) B (64, K)^T in bf16: cp.async, two stages, ldmatrix, mma.sync; 128 threads
template <bool WAIT>
__global__ void gemm(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int K) {
  constexpr int ROW = 40;  // 32 and 8 more, against bank conflicts
  __nv_bfloat16* sa = reinterpret_cast<__nv_bfloat16*>(dynamic);
  __nv_bfloat16* sb = sa + 2 * 64 * ROW;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float c[8][4] = {};
  auto stage = [&](int s, int k0) {
    for (int i = threadIdx.x; i < 256; i += 128) {
      int r = i / 4, k = i % 4 * 8;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(sa + (s * 64 + r) * ROW + k)),
                   "l"(A + r * K + k0 + k)
                   : "memory");
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(sb + (s * 64 + r) * ROW + k)),
                   "l"(B + r * K + k0 + k)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  stage(0, 0);
#pragma unroll 1
  for (int t = 0; t < K / 32; ++t) {
    if ((t + 1) * 32 < K) {
      stage((t + 1) & 1, (t + 1) * 32);
    } else {
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
    if (WAIT)
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    else
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    __syncthreads();
    for (int kk = 0; kk < 32; kk += 16) {
      uint32_t a[4], b[4];
      uint32_t at = shared_address(sa + ((t & 1) * 64 + warp * 16 + lane % 16) * ROW + kk + lane / 16 * 8);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(at)
                   : "memory");
      for (int n = 0; n < 8; n += 2) {
        uint32_t bt =
            shared_address(sb + ((t & 1) * 64 + n * 8 + lane % 8 + lane / 16 * 8) * ROW + kk + lane / 8 % 2 * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(bt)
                     : "memory");
        for (int h = 0; h < 2; ++h) {
          float* d = c[n + h];
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
              "{%0,%1,%2,%3};"
              : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * h]), "r"(b[2 * h + 1]));
        }
      }
    }
    __syncthreads();
  }
  for (int n = 0; n < 8; ++n)
    for (int e = 0; e < 4; ++e) C[(warp * 16 + lane / 4 + e / 2 * 8) * 64 + n * 8 + lane % 4 * 2 + e % 2] = c[n][e];
}
template __global__ void gemm<true>(const __nv_bfloat16*, const __nv_bfloat16*, float*, int);
template __global__ void gemm<false>(const __nv_bfloat16*, const __nv_bfloat16*, float*, int);
