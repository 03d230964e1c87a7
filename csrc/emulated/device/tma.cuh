// The copy engine, as csrc/cuda/device/tma.cuh has it. Loads land in any order, at a random time before the wait;
// stores read shared memory as late as their wait allows.
#pragma once

#include <algorithm>
#include <array>
#include <device/core.cuh>
#include <memory>

#include "common/tensor_tiles.h"

namespace grokkernels::device {

struct TensorMap {
  TensorTiles tiles;
};
static_assert(sizeof(TensorMap) == 128);

inline TensorMap make_tensor_map(const TensorTiles& t) {
  if (const char* why = tensor_tiles_refusal(t)) throw std::runtime_error(std::string("grokkernels: ") + why);
  TensorMap made{t};
  for (int i = t.rank; i < 5; ++i) {
    made.tiles.size[i] = made.tiles.box[i] = 1;
    made.tiles.stride[i] = 0;
  }
  return made;
}

GK_DEVICE void fence_proxy_async() { emulated::fence_proxies(); }
GK_DEVICE void tma_prefetch(const TensorMap&) {}

using Coordinates = std::array<int64_t, 5>;

inline int box_bytes(const TensorTiles& t) {
  int bytes = size_of(t.dtype);
  for (int i = 0; i < 5; ++i) bytes *= t.box[i];
  return bytes;
}

// Calls fn(byte offset in the box, byte offset in the tensor or -1 outside it, bytes) for the pieces of a box: whole
// 16-byte chunks, or single elements where a chunk crosses the tensor's edge.
template <typename Fn>
void for_each_piece(const TensorTiles& t, const Coordinates& at, Fn fn) {
  const int element = size_of(t.dtype), in_chunk = 16 / element;
  const int rows = box_bytes(t) / element / t.box[0];
  for (int row = 0; row < rows; ++row) {
    int64_t place = 0;
    bool inside = true;
    for (int i = 1, left = row; i < 5; left /= t.box[i++]) {
      const int64_t c = at[static_cast<size_t>(i)] + left % t.box[i];
      inside = inside && c >= 0 && c < t.size[i];
      place += c * t.stride[i];
    }
    for (int x = 0; x < t.box[0]; x += in_chunk) {
      const int64_t first = at[0] + x;
      const int offset = (row * t.box[0] + x) * element;
      if (!inside || first + in_chunk <= 0 || first >= t.size[0]) {
        fn(offset, int64_t{-1}, 16);
      } else if (first >= 0 && first + in_chunk <= t.size[0]) {
        fn(offset, (place + first) * element, 16);
      } else {
        for (int e = 0; e < in_chunk; ++e)
          fn(offset + e * element,
             first + e >= 0 && first + e < t.size[0] ? (place + first + e) * element : int64_t{-1}, element);
      }
    }
  }
}

inline void check_rank(const TensorMap& map, int rank, const char* who) {
  if (map.tiles.rank != rank)
    emulated::fail(std::string(who) + ": " + std::to_string(rank) + " coordinates for a tensor map of " +
                   std::to_string(map.tiles.rank) + " dimensions");
}

inline void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, uint32_t blocks, int rank, Coordinates at) {
  check_rank(map, rank, "tma_load");
  const TensorTiles t = map.tiles;
  const int bytes = box_bytes(t);
  emulated::Cluster& cluster = *emulated::current().block->cluster;
  for (size_t i = 0; i < cluster.blocks.size(); ++i) {
    if ((blocks >> i & 1) == 0) continue;
    emulated::Block* block = &cluster.blocks[i];
    char* target = emulated::memory_of(*block, to, bytes, static_cast<int>(tile_alignment(t.swizzle)), "tma_load");
    emulated::wrote(target, static_cast<size_t>(bytes));
    emulated::asynchronous_write(*block, target, static_cast<size_t>(bytes), emulated::fenced_by_thread(), "tma_load");
    emulated::check_mbarrier_is_seen(*block, barrier, "tma_load");
    emulated::release(emulated::memory_of(*block, barrier, 8, 8, "the mbarrier of tma_load"));
    emulated::start([=] {
      char* first = block->shared - emulated::kSharedBase;
      for_each_piece(t, at, [&](int offset, int64_t place, int piece) {
        char* target = first + swizzled(to + static_cast<uint32_t>(offset), t.swizzle);
        if (place < 0)
          std::memset(target, 0, static_cast<size_t>(piece));
        else
          std::memcpy(target, static_cast<const char*>(t.data) + place, static_cast<size_t>(piece));
      });
      emulated::mbarrier_complete(*block, barrier, bytes);
    });
  }
}

inline uint32_t own_block() { return 1u << emulated::current().block->rank; }

GK_DEVICE void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1) {
  load_box(to, map, barrier, own_block(), 2, {c0, c1});
}
GK_DEVICE void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2) {
  load_box(to, map, barrier, own_block(), 3, {c0, c1, c2});
}
GK_DEVICE void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  load_box(to, map, barrier, own_block(), 4, {c0, c1, c2, c3});
}
GK_DEVICE void tma_load_multicast(uint32_t to, const TensorMap& map, uint32_t barrier, uint16_t blocks, int c0,
                                  int c1) {
  load_box(to, map, barrier, blocks, 2, {c0, c1});
}
GK_DEVICE void tma_load_multicast(uint32_t to, const TensorMap& map, uint32_t barrier, uint16_t blocks, int c0, int c1,
                                  int c2) {
  load_box(to, map, barrier, blocks, 3, {c0, c1, c2});
}

inline void add_float(float* to, float value) {
  std::atomic_ref<float>(*to).fetch_add(value, std::memory_order_relaxed);
}

inline void store_box(const TensorMap& map, uint32_t from, int rank, Coordinates at, bool add) {
  const char* who = add ? "tma_reduce_add" : "tma_store";
  check_rank(map, rank, who);
  const TensorTiles t = map.tiles;
  if (add && t.dtype != DType::float32) emulated::fail("tma_reduce_add is for float32");
  const int bytes = box_bytes(t);
  const char* source = emulated::shared_memory(from, bytes, static_cast<int>(tile_alignment(t.swizzle)), who);
  emulated::read(source, static_cast<size_t>(bytes));
  emulated::asynchronous_read(*emulated::current().block, source, static_cast<size_t>(bytes),
                              emulated::fenced_by_thread(), who);
  const char* first = emulated::current().block->shared - emulated::kSharedBase;
  emulated::start_store([=]() -> emulated::Work {
    auto box = std::make_shared<std::vector<char>>(static_cast<size_t>(bytes));
    for (int offset = 0; offset < bytes; offset += 16)
      std::memcpy(box->data() + offset, first + swizzled(from + static_cast<uint32_t>(offset), t.swizzle), 16);
    return [=] {
      for_each_piece(t, at, [&](int offset, int64_t place, int piece) {
        if (place < 0) return;
        char* target = static_cast<char*>(const_cast<void*>(t.data)) + place;
        if (!add) {
          std::memcpy(target, box->data() + offset, static_cast<size_t>(piece));
          return;
        }
        for (int i = 0; i < piece; i += 4)
          add_float(reinterpret_cast<float*>(target + i), *reinterpret_cast<float*>(box->data() + offset + i));
      });
    };
  });
}

GK_DEVICE void tma_store(const TensorMap& map, uint32_t from, int c0, int c1) {
  store_box(map, from, 2, {c0, c1}, false);
}
GK_DEVICE void tma_store(const TensorMap& map, uint32_t from, int c0, int c1, int c2) {
  store_box(map, from, 3, {c0, c1, c2}, false);
}
GK_DEVICE void tma_store(const TensorMap& map, uint32_t from, int c0, int c1, int c2, int c3) {
  store_box(map, from, 4, {c0, c1, c2, c3}, false);
}
GK_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t from, int c0, int c1) {
  store_box(map, from, 2, {c0, c1}, true);
}
GK_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t from, int c0, int c1, int c2) {
  store_box(map, from, 3, {c0, c1, c2}, true);
}
GK_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t from, int c0, int c1, int c2, int c3) {
  store_box(map, from, 4, {c0, c1, c2, c3}, true);
}

GK_DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (bytes % 16 != 0) emulated::fail("bulk_load: the length is not a multiple of 16 bytes");
  emulated::check_aligned(from, 16, "bulk_load");
  char* target = emulated::shared_memory(to, static_cast<int>(bytes), 16, "bulk_load");
  emulated::Block* block = emulated::current().block;
  emulated::wrote(target, bytes);
  emulated::read(from, bytes);
  emulated::asynchronous_write(*block, target, bytes, emulated::fenced_by_thread(), "bulk_load");
  emulated::check_mbarrier_is_seen(*block, barrier, "bulk_load");
  emulated::release(emulated::shared_memory(barrier, 8, 8, "the mbarrier of bulk_load"));
  emulated::start([=] {
    std::memcpy(target, from, bytes);
    emulated::mbarrier_complete(*block, barrier, bytes);
  });
}

inline void store_bytes(void* to, uint32_t from, uint32_t bytes, bool add) {
  const char* who = add ? "bulk_reduce_add" : "bulk_store";
  if (bytes % 16 != 0) emulated::fail(std::string(who) + ": the length is not a multiple of 16 bytes");
  emulated::check_aligned(to, 16, who);
  const char* source = emulated::shared_memory(from, static_cast<int>(bytes), 16, who);
  emulated::read(source, bytes);
  emulated::asynchronous_read(*emulated::current().block, source, bytes, emulated::fenced_by_thread(), who);
  emulated::start_store([=]() -> emulated::Work {
    auto taken = std::make_shared<std::vector<char>>(source, source + bytes);
    return [=] {
      if (!add) {
        std::memcpy(to, taken->data(), bytes);
        return;
      }
      for (uint32_t i = 0; i < bytes / 4; ++i)
        add_float(static_cast<float*>(to) + i, reinterpret_cast<const float*>(taken->data())[i]);
    };
  });
}

GK_DEVICE void bulk_store(void* to, uint32_t from, uint32_t bytes) { store_bytes(to, from, bytes, false); }
GK_DEVICE void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes) { store_bytes(to, from, bytes, true); }

GK_DEVICE void bulk_commit() { emulated::commit_stores(); }

template <int kGroupsLeft>
GK_DEVICE void bulk_wait() {
  emulated::wait_stores(kGroupsLeft, false);
}

template <int kGroupsLeft>
GK_DEVICE void bulk_wait_read() {
  emulated::wait_stores(kGroupsLeft, true);
}

}  // namespace grokkernels::device
