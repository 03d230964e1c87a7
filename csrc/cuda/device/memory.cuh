// Loads and stores by width and cache, of global memory by pointer and of shared memory by shared address; atomics.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

// 16 bytes in registers.
struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(8) Words2 {
  uint32_t word[2];
};

GK_DEVICE Words4 load_16(const void* p) {
  Words4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p)
               : "memory");
  return v;
}

// Memory that no thread writes while the kernel runs and that is read once: past the L1 cache.
GK_DEVICE Words4 load_16_streaming(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}

// The same, kept in the L1 cache: read by several blocks or several times (weights, tables).
GK_DEVICE Words4 load_16_readonly(const void* p) {
  Words4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}

GK_DEVICE void store_16(void* p, Words4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}

// Not read again soon: evicted from the caches first.
GK_DEVICE void store_16_streaming(void* p, Words4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}

GK_DEVICE Words2 load_8(const void* p) {
  Words2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(p) : "memory");
  return v;
}

GK_DEVICE void store_8(void* p, Words2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]) : "memory");
}

GK_DEVICE uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

GK_DEVICE Words2 load_shared_8(uint32_t address) {
  Words2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "r"(address) : "memory");
  return v;
}

GK_DEVICE Words4 load_shared_16(uint32_t address) {
  Words4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}

GK_DEVICE void store_shared_4(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

GK_DEVICE void store_shared_8(uint32_t address, Words2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]) : "memory");
}

GK_DEVICE void store_shared_16(uint32_t address, Words4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// *p += v; returns what stood there. Relaxed, of the whole device; of shared memory too.
GK_DEVICE int atomic_add(int* p, int v) { return atomicAdd(p, v); }
GK_DEVICE unsigned atomic_add(unsigned* p, unsigned v) { return atomicAdd(p, v); }
GK_DEVICE float atomic_add(float* p, float v) { return atomicAdd(p, v); }
GK_DEVICE double atomic_add(double* p, double v) { return atomicAdd(p, v); }
GK_DEVICE int atomic_max(int* p, int v) { return atomicMax(p, v); }

// Two and four neighbouring floats of global memory at once (sm_90): each is added to by itself.
GK_DEVICE void atomic_add_2(float* p, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(a), "f"(b) : "memory");
#else
  atomicAdd(p, a);
  atomicAdd(p + 1, b);
#endif
}

// A flag or counter that other blocks write: read from where they meet, and what it guards not before it.
GK_DEVICE int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

GK_DEVICE void store_release(int* p, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

}  // namespace grokkernels::device
