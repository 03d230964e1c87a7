// Clusters (sm_90): up to 8 (16 when allowed) neighbouring blocks along x that run at the same time and reach each
// other's shared memory (PTX ISA, "barrier.cluster", "mapa", ".shared::cluster"). LaunchShape::cluster asks for them.
#pragma once

#include <device/memory.cuh>

namespace grokkernels::device {

GK_DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

GK_DEVICE int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The barrier of all threads of the cluster, in two halves; whole warps call. What was done before the arrival is seen
// after the wait. A block must not return while others may reach into its shared memory.
GK_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
GK_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
GK_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The shared::cluster address of what lies at `address` in the block of this rank.
GK_DEVICE uint32_t map_shared_rank(uint32_t address, int rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Loads and stores by shared::cluster address.
GK_DEVICE uint32_t load_cluster_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

GK_DEVICE Words4 load_cluster_16(uint32_t address) {
  Words4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(address)
               : "memory");
  return v;
}

GK_DEVICE void store_cluster_4(uint32_t address, uint32_t v) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

GK_DEVICE void store_cluster_16(uint32_t address, Words4 v) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

}  // namespace grokkernels::device
