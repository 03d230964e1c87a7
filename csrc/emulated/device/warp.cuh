// Collectives of a warp on registers, as csrc/cuda/device/warp.cuh has them: the last lane to arrive reads and writes
// the others' registers through their stacks.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

template <typename T>
struct ShuffleArgument {
  T value, result;
  int source;  // lane of the warp
};

template <typename T>
GK_DEVICE T shuffle_from(T value, int source, uint32_t lanes) {
  ShuffleArgument<T> mine{value, value, source};
  emulated::warp_collective(lanes, "shuffle", &mine, [](void** all, uint32_t named) GK_UNWATCHED {
    for (int lane = 0; lane < 32; ++lane) {
      if ((named >> lane & 1) == 0) continue;
      auto* to = static_cast<ShuffleArgument<T>*>(all[lane]);
      if ((named >> to->source & 1) == 0) emulated::fail("a shuffle reads a lane that takes no part in it");
      to->result = static_cast<ShuffleArgument<T>*>(all[to->source])->value;
    }
  });
  return mine.result;
}

template <typename T>
GK_DEVICE T shuffle(T value, int source, int width = 32, uint32_t lanes = kAllLanes) {
  return shuffle_from(value, (lane_id() & ~(width - 1)) | (source & (width - 1)), lanes);
}

template <typename T>
GK_DEVICE T shuffle_xor(T value, int mask, int width = 32, uint32_t lanes = kAllLanes) {
  const int lane = lane_id(), source = lane ^ mask;
  return shuffle_from(value, source > (lane | (width - 1)) ? lane : source, lanes);
}

template <typename T>
GK_DEVICE T shuffle_up(T value, unsigned delta, int width = 32, uint32_t lanes = kAllLanes) {
  const int lane = lane_id(), source = lane - static_cast<int>(delta);
  return shuffle_from(value, source < (lane & ~(width - 1)) ? lane : source, lanes);
}

template <typename T>
GK_DEVICE T shuffle_down(T value, unsigned delta, int width = 32, uint32_t lanes = kAllLanes) {
  const int lane = lane_id(), source = lane + static_cast<int>(delta);
  return shuffle_from(value, source > (lane | (width - 1)) ? lane : source, lanes);
}

struct VoteArgument {
  unsigned value, result;
};

GK_DEVICE uint32_t ballot(bool predicate, uint32_t lanes = kAllLanes) {
  VoteArgument mine{predicate, 0};
  emulated::warp_collective(lanes, "a vote", &mine, [](void** all, uint32_t named) GK_UNWATCHED {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane)
      if ((named >> lane & 1) != 0 && static_cast<VoteArgument*>(all[lane])->value != 0) bits |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
      if ((named >> lane & 1) != 0) static_cast<VoteArgument*>(all[lane])->result = bits;
  });
  return mine.result;
}

GK_DEVICE bool any(bool predicate, uint32_t lanes = kAllLanes) { return ballot(predicate, lanes) != 0; }
GK_DEVICE bool all(bool predicate, uint32_t lanes = kAllLanes) { return ballot(!predicate, lanes) == 0; }

GK_DEVICE uint32_t match_any(unsigned value, uint32_t lanes = kAllLanes) {
  VoteArgument mine{value, 0};
  emulated::warp_collective(lanes, "match_any", &mine, [](void** all, uint32_t named) GK_UNWATCHED {
    for (int lane = 0; lane < 32; ++lane) {
      if ((named >> lane & 1) == 0) continue;
      auto* to = static_cast<VoteArgument*>(all[lane]);
      for (int other = 0; other < 32; ++other)
        if ((named >> other & 1) != 0 && static_cast<VoteArgument*>(all[other])->value == to->value)
          to->result |= 1u << other;
    }
  });
  return mine.result;
}

GK_DEVICE int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

}  // namespace grokkernels::device
