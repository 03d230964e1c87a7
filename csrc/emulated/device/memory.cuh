// Loads, stores and atomics, as csrc/cuda/device/memory.cuh has them.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(8) Words2 {
  uint32_t word[2];
};

template <typename V>
GK_DEVICE V load_words(const void* p) {
  emulated::check_aligned(p, sizeof(V), "a vector load");
  return *static_cast<const V*>(p);
}

template <typename V>
GK_DEVICE void store_words(void* p, V v) {
  emulated::check_aligned(p, sizeof(V), "a vector store");
  *static_cast<V*>(p) = v;
}

GK_DEVICE Words4 load_16(const void* p) { return load_words<Words4>(p); }
GK_DEVICE Words4 load_16_streaming(const void* p) { return load_words<Words4>(p); }
GK_DEVICE Words4 load_16_readonly(const void* p) { return load_words<Words4>(p); }
GK_DEVICE void store_16(void* p, Words4 v) { store_words(p, v); }
GK_DEVICE void store_16_streaming(void* p, Words4 v) { store_words(p, v); }
GK_DEVICE Words2 load_8(const void* p) { return load_words<Words2>(p); }
GK_DEVICE void store_8(void* p, Words2 v) { store_words(p, v); }

template <typename V>
GK_DEVICE V load_shared(uint32_t address) {
  return *reinterpret_cast<const V*>(emulated::shared_memory(address, sizeof(V), sizeof(V), "a shared load"));
}

template <typename V>
GK_DEVICE void store_shared(uint32_t address, V v) {
  *reinterpret_cast<V*>(emulated::shared_memory(address, sizeof(V), sizeof(V), "a shared store")) = v;
  emulated::ordinary_write(address, sizeof(V));
}

GK_DEVICE uint32_t load_shared_4(uint32_t address) { return load_shared<uint32_t>(address); }
GK_DEVICE Words2 load_shared_8(uint32_t address) { return load_shared<Words2>(address); }
GK_DEVICE Words4 load_shared_16(uint32_t address) { return load_shared<Words4>(address); }
GK_DEVICE void store_shared_4(uint32_t address, uint32_t v) { store_shared(address, v); }
GK_DEVICE void store_shared_8(uint32_t address, Words2 v) { store_shared(address, v); }
GK_DEVICE void store_shared_16(uint32_t address, Words4 v) { store_shared(address, v); }

template <typename T>
GK_DEVICE T atomic_add(T* p, std::type_identity_t<T> v) {
  return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}

GK_DEVICE int atomic_max(int* p, int v) {
  std::atomic_ref<int> place(*p);
  int before = place.load(std::memory_order_relaxed);
  while (before < v && !place.compare_exchange_weak(before, v, std::memory_order_relaxed)) {
  }
  return before;
}

GK_DEVICE void atomic_add_2(float* p, float a, float b) {
  emulated::check_aligned(p, 8, "atomic_add_2");
  atomic_add(p, a);
  atomic_add(p + 1, b);
}

// Yields: a loop that waits for another thread must let it run.
GK_DEVICE int load_acquire(const int* p) {
  emulated::maybe_yield();
  return std::atomic_ref<int>(*const_cast<int*>(p)).load(std::memory_order_acquire);
}

GK_DEVICE void store_release(int* p, int v) { std::atomic_ref<int>(*p).store(v, std::memory_order_release); }

}  // namespace grokkernels::device
