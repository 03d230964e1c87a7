// Tiles in shared memory and the tensor-core operands read from them, the same for bfloat16, float16 and float.
//
// A tile is rows of 16-byte chunks; chunk c of row r stands where c ^ (some bits of r) would, so that the eight rows an
// ldmatrix reads lie in different banks. Floats are read without ldmatrix, 32 bytes of four rows at a time: rows 0 to 3
// (4 to 7) as they lie, rows 0, 2, 4, 6 (1, 3, 5, 7) transposed. So their chunks stay in pairs, and no such four rows
// have the same pair in the same banks.
//
// float is multiplied in three tf32 products (Ootomo and Yokota, "Recovering single precision accuracy from Tensor
// Cores", 2022): x = high + low, and low*high + high*low + high*high loses about as much as rounding a float32 product
// does. Each starts from zero and is added to the sum by the ordinary float units, which round to nearest: tensor cores
// cut off, and the error of a long sum would grow with its length.
//
// One multiply-accumulate takes kDepth<T> of the inner dimension: 16 elements of 16 bits, or 8 floats. Within those 8,
// register t and t + 4 of the hardware's layout hold columns 2t and 2t + 1 (a sum may be taken in any order): then an
// accumulator is the left operand of the next product as it lies, for every T.
#pragma once

#include <device/convert.cuh>
#include <device/matrix.cuh>
#include <device/memory.cuh>

namespace grokkernels::device {

template <typename T>
inline constexpr int kDepth = 32 / static_cast<int>(sizeof(T));

// kRows x kCols elements at a shared address, 128-byte aligned; kCols * sizeof(T) is a multiple of 32 bytes.
template <typename T, int kRows, int kCols>
struct Tile {
  using Element = T;
  static constexpr int kChunks = kCols * static_cast<int>(sizeof(T)) / 16;  // of a row
  static constexpr int kPitch = kChunks;                                    // from row to row
  static constexpr int kBytes = kRows * kChunks * 16;
  static_assert(kChunks % 2 == 0);

  uint32_t base;

  static GK_DEVICE int swizzle(int row) {
    if constexpr (sizeof(T) == 2) return kChunks % 8 == 0 ? row & 7 : kChunks % 4 == 0 ? row >> 1 & 3 : row >> 2 & 1;
    if constexpr (kChunks % 8 == 0) return (row & 2) << 1 | ((row ^ row >> 2) & 1) << 1;
    return kChunks % 4 == 0 ? row & 2 : 0;  // (16 floats: without conflicts as they lie only)
  }

  // Where chunk `chunk` of row `row` lies in the tile, and its shared address.
  static GK_DEVICE uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>((row * kChunks + (chunk ^ swizzle(row))) * 16);
  }
  GK_DEVICE uint32_t chunk(int row, int chunk) const { return base + offset(row, chunk); }

  // The same of chunk `chunk + lane_chunk` of row `row + lane_row`, row a multiple of 8, chunk even and lane_chunk 0 or
  // 1. Then what depends on the lane is the same along the tile, and a loop computes it once.
  GK_DEVICE uint32_t chunk_of_lane(int row, int chunk, int lane_row, int lane_chunk) const {
    return base + static_cast<uint32_t>(row * kChunks * 16) +
           static_cast<uint32_t>((lane_row * kChunks + (chunk ^ lane_chunk ^ swizzle(lane_row))) * 16);
  }

  // The shared address of one element.
  GK_DEVICE uint32_t at(int row, int col) const {
    constexpr int kInChunk = 16 / static_cast<int>(sizeof(T));
    return chunk(row, col / kInChunk) + static_cast<uint32_t>(col % kInChunk * static_cast<int>(sizeof(T)));
  }
};

// The same, of 16-bit elements, without a swizzle: rows lie 16 bytes further apart than they are long, which keeps
// eight of them in different banks too. All operands are constants away from one address of the lane, where a swizzle
// needs one per step: fewer registers, for 1/8 to 1/32 more memory.
template <typename T, int kRows, int kCols>
struct PaddedTile {
  using Element = T;
  static constexpr int kChunks = kCols * static_cast<int>(sizeof(T)) / 16;
  static constexpr int kPitch = kChunks + 1;
  static constexpr int kBytes = (kRows * kPitch * 16 + 127) / 128 * 128;
  static_assert(sizeof(T) == 2 && kChunks % 2 == 0);

  uint32_t base;

  static GK_DEVICE uint32_t offset(int row, int chunk) { return static_cast<uint32_t>((row * kPitch + chunk) * 16); }
  GK_DEVICE uint32_t chunk(int row, int chunk) const { return base + offset(row, chunk); }
  GK_DEVICE uint32_t chunk_of_lane(int row, int chunk, int lane_row, int lane_chunk) const {
    return base + offset(row, chunk) + offset(lane_row, lane_chunk);
  }
  GK_DEVICE uint32_t at(int row, int col) const { return chunk(row, col / 8) + static_cast<uint32_t>(col % 8 * 2); }
};

// In all four loads row is a multiple of 8, col of 16 (of 8 for float: kDepth<T> or an operand's 8 columns).

// The left operand, 16 x kDepth<T>: rows row..row+15 and columns col..col+kDepth-1 of the tile.
template <typename AnyTile>
GK_DEVICE void load_left(const AnyTile& tile, int row, int col, uint32_t (&a)[4]) {
  using T = typename AnyTile::Element;
  const int lane = lane_id() & 31;  // (the mask tells the compiler its range)
  if constexpr (sizeof(T) == 2) {
    load_matrix_x4(a, tile.chunk_of_lane(row, col / 8, lane & 15, lane >> 4));
  } else {
    const int g = lane >> 2, t = lane & 3;
    const Words2 upper = load_shared_8(tile.chunk_of_lane(row, col / 4, g, t >> 1) + (t & 1) * 8);
    const Words2 lower = load_shared_8(tile.chunk_of_lane(row + 8, col / 4, g, t >> 1) + (t & 1) * 8);
    a[0] = upper.word[0];
    a[1] = lower.word[0];
    a[2] = upper.word[1];
    a[3] = lower.word[1];
  }
}

// The same of the tile transposed: operand row i is tile column col + i, operand column k is tile row row + k.
template <typename AnyTile>
GK_DEVICE void load_left_transposed(const AnyTile& tile, int row, int col, uint32_t (&a)[4]) {
  using T = typename AnyTile::Element;
  const int lane = lane_id() & 31;  // (the mask tells the compiler its range)
  if constexpr (sizeof(T) == 2) {
    load_matrix_x4_trans(a, tile.chunk_of_lane(row, col / 8, lane >> 4 << 3 | (lane & 7), lane >> 3 & 1));
  } else {
    const int g = lane >> 2, t = lane & 3;
    a[0] = load_shared_4(tile.chunk_of_lane(row, col / 4, 2 * t, g >> 2) + (g & 3) * 4);
    a[1] = load_shared_4(tile.chunk_of_lane(row, col / 4 + 2, 2 * t, g >> 2) + (g & 3) * 4);
    a[2] = load_shared_4(tile.chunk_of_lane(row, col / 4, 2 * t + 1, g >> 2) + (g & 3) * 4);
    a[3] = load_shared_4(tile.chunk_of_lane(row, col / 4 + 2, 2 * t + 1, g >> 2) + (g & 3) * 4);
  }
}

// Two right operands, kDepth<T> x 8 each, from a tile whose rows are the operand's columns (a weight (N, K), keys):
// operand column j of b[i] is tile row row + 8 * i + j, operand row k is tile column col + k.
template <typename AnyTile>
GK_DEVICE void load_right(const AnyTile& tile, int row, int col, uint32_t (&b)[2][2]) {
  using T = typename AnyTile::Element;
  const int lane = lane_id() & 31;  // (the mask tells the compiler its range)
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    load_matrix_x4(r, tile.chunk_of_lane(row, col / 8, lane >> 4 << 3 | (lane & 7), lane >> 3 & 1));
    b[0][0] = r[0];
    b[0][1] = r[1];
    b[1][0] = r[2];
    b[1][1] = r[3];
  } else {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Words2 pair = load_shared_8(tile.chunk_of_lane(row + 8 * i, col / 4, g, t >> 1) + (t & 1) * 8);
      b[i][0] = pair.word[0];
      b[i][1] = pair.word[1];
    }
  }
}

// The same from a tile that lies as the operand does (a weight (K, N), values): operand row k is tile row row + k,
// column j of b[i] is tile column col + 8 * i + j.
template <typename AnyTile>
GK_DEVICE void load_right_transposed(const AnyTile& tile, int row, int col, uint32_t (&b)[2][2]) {
  using T = typename AnyTile::Element;
  const int lane = lane_id() & 31;  // (the mask tells the compiler its range)
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    load_matrix_x4_trans(r, tile.chunk_of_lane(row, col / 8, lane & 15, lane >> 4));
    b[0][0] = r[0];
    b[0][1] = r[1];
    b[1][0] = r[2];
    b[1][1] = r[3];
  } else {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[i][0] = load_shared_4(tile.chunk_of_lane(row, col / 4 + 2 * i, 2 * t, g >> 2) + (g & 3) * 4);
      b[i][1] = load_shared_4(tile.chunk_of_lane(row, col / 4 + 2 * i, 2 * t + 1, g >> 2) + (g & 3) * 4);
    }
  }
}

// x = high + low: high is x rounded to tf32, low what is left of it, cut off at tf32's last bit. Two operations each,
// no test for NaN: of the two one stays NaN (rounding the bits of the other may carry over into its sign).
GK_DEVICE void split_float(uint32_t x, uint32_t& high, uint32_t& low) {
  high = (x + 0x1000u) & 0xFFFFE000u;
  low = float_to_bits(bits_to_float(x) - bits_to_float(high)) & 0xFFFFE000u;
}

// d (16 x 8) += a (16 x kDepth<T>) b (kDepth<T> x 8). d[0], d[1]: row lane / 4, columns 2 (lane % 4) and the next;
// d[2], d[3]: the row 8 below.
template <typename T>
GK_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16<T>(d, a, b);
  } else {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_float(a[i], a_high[i], a_low[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split_float(b[i], b_high[i], b_low[i]);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_m16n8k8_tf32(sum, a_low, b_high);
    mma_m16n8k8_tf32(sum, a_high, b_low);
    mma_m16n8k8_tf32(sum, a_high, b_high);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += sum[i];
  }
}

// A left operand from accumulators that lie side by side: kDepth<T> / 8 of them, 16 x 8 each.
template <typename T>
GK_DEVICE void left_from_accumulators(const float (*d)[4], uint32_t (&a)[4]) {
  if constexpr (sizeof(T) == 2) {
    a[0] = narrow_pair<T>(d[0][0], d[0][1]);
    a[1] = narrow_pair<T>(d[0][2], d[0][3]);
    a[2] = narrow_pair<T>(d[1][0], d[1][1]);
    a[3] = narrow_pair<T>(d[1][2], d[1][3]);
  } else {
    a[0] = float_to_bits(d[0][0]);
    a[1] = float_to_bits(d[0][2]);
    a[2] = float_to_bits(d[0][1]);
    a[3] = float_to_bits(d[0][3]);
  }
}

}  // namespace grokkernels::device
