// Clusters, as csrc/cuda/device/cluster.cuh has them. The blocks of a cluster run on one OS thread.
#pragma once

#include <device/memory.cuh>

namespace grokkernels::device {

GK_DEVICE int cluster_rank() { return emulated::current().block->rank; }
GK_DEVICE int cluster_size() { return static_cast<int>(emulated::current_launch().cluster); }

GK_DEVICE void cluster_arrive() { emulated::cluster_arrive(); }
GK_DEVICE void cluster_wait() { emulated::cluster_wait(); }
GK_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

GK_DEVICE uint32_t map_shared_rank(uint32_t address, int rank) {
  if (rank < 0 || rank >= cluster_size()) emulated::fail("map_shared_rank: no such block in the cluster");
  return (address & ((1u << emulated::kRankShift) - 1)) | static_cast<uint32_t>(rank + 1) << emulated::kRankShift;
}

template <typename V>
GK_DEVICE V load_cluster(uint32_t address) {
  return *reinterpret_cast<const V*>(
      emulated::cluster_memory(address, sizeof(V), sizeof(V), "a load from the cluster"));
}

template <typename V>
GK_DEVICE void store_cluster(uint32_t address, V v) {
  *reinterpret_cast<V*>(emulated::cluster_memory(address, sizeof(V), sizeof(V), "a store into the cluster")) = v;
  emulated::ordinary_write(address, sizeof(V));
}

GK_DEVICE uint32_t load_cluster_4(uint32_t address) { return load_cluster<uint32_t>(address); }
GK_DEVICE Words4 load_cluster_16(uint32_t address) { return load_cluster<Words4>(address); }
GK_DEVICE void store_cluster_4(uint32_t address, uint32_t v) { store_cluster(address, v); }
GK_DEVICE void store_cluster_16(uint32_t address, Words4 v) { store_cluster(address, v); }

}  // namespace grokkernels::device
