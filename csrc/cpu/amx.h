// The matrix unit of level amx: eight tile registers of 16 rows by 64 bytes, and one instruction that multiplies them.
//
// tile_dot adds to a tile of float32, c (16, 16), the product of a (16, 32) bfloat16, whose rows lie along the sum, and
// b (32, 16) bfloat16, which a register holds as 16 rows of 16 pairs: pair (p, j) is b[2p][j], b[2p + 1][j]. Each
// element of c is c + (sum over even k) + (sum over odd k) wherever it stands in its tile. Denormal numbers count as
// zero, operands and sums alike. Intel, "Architecture Instruction Set Extensions", chapter on AMX.
#pragma once

#include <cstdint>

#include "cpu/strips.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// Configures the calling thread's tile registers, all of full size, and gives them back: then they cost a switch of
// threads nothing. Other users of the unit configure it for themselves. (Two functions and no destructor: one that
// might run for an exception drags a symbol of the C++ runtime into this level's objects.)
GK_ALWAYS_INLINE void configure_tiles() {
  struct alignas(64) {
    uint8_t palette, first_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shape = {.palette = 1, .first_row = 0, .unused = {}, .row_bytes = {}, .rows = {}};
  for (int i = 0; i < 8; ++i) {
    shape.row_bytes[i] = 64;
    shape.rows[i] = kTileLines;
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}
GK_ALWAYS_INLINE void release_tiles() { __asm__ volatile("tilerelease"); }

// The instructions by number of register. Assembly, since the compilers' own take the number as a token only.
template <int kTile>
GK_ALWAYS_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
GK_ALWAYS_INLINE void tile_load(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(row_bytes) : "memory");
}
template <int kTile>
GK_ALWAYS_INLINE void tile_store(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(row_bytes) : "memory");
}
template <int kC, int kA, int kB>
GK_ALWAYS_INLINE void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
