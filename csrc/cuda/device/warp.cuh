// Collectives of a warp on registers. All lanes named in `lanes` call together; a lane reads only from lanes named.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

// The value of lane `source` of each segment of `width` lanes (a power of two).
template <typename T>
GK_DEVICE T shuffle(T value, int source, int width = 32, uint32_t lanes = kAllLanes) {
  return __shfl_sync(lanes, value, source, width);
}

// The value of the lane whose number differs in the bits of `mask`.
template <typename T>
GK_DEVICE T shuffle_xor(T value, int mask, int width = 32, uint32_t lanes = kAllLanes) {
  return __shfl_xor_sync(lanes, value, mask, width);
}

// The value of the lane `delta` below or above; its own where there is none in the segment.
template <typename T>
GK_DEVICE T shuffle_up(T value, unsigned delta, int width = 32, uint32_t lanes = kAllLanes) {
  return __shfl_up_sync(lanes, value, delta, width);
}

template <typename T>
GK_DEVICE T shuffle_down(T value, unsigned delta, int width = 32, uint32_t lanes = kAllLanes) {
  return __shfl_down_sync(lanes, value, delta, width);
}

// A bit for each lane whose predicate holds.
GK_DEVICE uint32_t ballot(bool predicate, uint32_t lanes = kAllLanes) { return __ballot_sync(lanes, predicate); }
GK_DEVICE bool any(bool predicate, uint32_t lanes = kAllLanes) { return __any_sync(lanes, predicate) != 0; }
GK_DEVICE bool all(bool predicate, uint32_t lanes = kAllLanes) { return __all_sync(lanes, predicate) != 0; }

// A bit for each lane that holds the same value.
GK_DEVICE uint32_t match_any(unsigned value, uint32_t lanes = kAllLanes) { return __match_any_sync(lanes, value); }

GK_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

}  // namespace grokkernels::device
