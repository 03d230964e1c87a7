// Philox4x32-10: random numbers that depend on a counter and a key alone, so every backend draws the same ones in any
// order. Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace grokkernels {

struct PhiloxWords {
  uint32_t word[4];
};

GK_ALWAYS_INLINE constexpr PhiloxWords philox_4x32(PhiloxWords counter, uint64_t key) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53u} * c0, right = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(right);
    c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(left);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A published known answer (Random123's kat_vectors).
static_assert(philox_4x32({{0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u}}, 0x299F31D0A4093822u).word[0] ==
              0xD16CFE09u);

// One number in [0, 1) for each index, a multiple of 2^-24: the counter is (low word, high word, 0, 0) of the index.
GK_ALWAYS_INLINE constexpr float philox_uniform(uint64_t index, uint64_t seed) {
  const PhiloxWords counter = {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0}};
  return static_cast<float>(philox_4x32(counter, seed).word[0] >> 8) * 0x1p-24f;
}

}  // namespace grokkernels
