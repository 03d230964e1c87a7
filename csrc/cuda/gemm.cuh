// A block's part of a matrix product: an output tile, operands of any strides copied through a ring of shared tiles,
// sums in registers. What grouped_mm, moe_experts and linear_cross_entropy are made of on tensor cores of sm_80 and
// newer.
//
//   left (rows, depth), right (depth, columns); `outer` is an operand's dimension that is not summed over. Sizes are
//   below 2^31, strides are not.
//
// 128 threads, four warps in two rows of two, each with 64 rows of the tile. A step of the sum is 64 bytes deep; while
// one is multiplied the next two are on their way (cp.async), and the fragments of its second half are loaded before
// the first half is multiplied. The form is that of CUTLASS's multistage kernels.
#pragma once

#include <device/async.cuh>
#include <device/warp.cuh>
#include <type_traits>

#include "cuda/tile.cuh"
#include "cuda/vector.cuh"

namespace grokkernels::device {

// How an operand lies in memory: what has unit stride, in rows that are 16-byte aligned and a multiple of 16 bytes
// long. Anything else is read number by number.
enum class Layout { along_depth, along_outer, any };

// Element (outer, depth) lies at data[outer * outer_stride + depth * depth_stride]; with an index, outer (or depth) is
// looked up there first: a gather.
template <typename T>
struct Operand {
  const T* data;
  int64_t outer_stride, depth_stride;
  const int32_t* outer_index = nullptr;
  const int32_t* depth_index = nullptr;
};

inline constexpr int kGemmThreads = 128;
inline constexpr int kGemmStages = 3;
template <typename T>
inline constexpr int kStepDepth = 64 / static_cast<int>(sizeof(T));

// Copies an operand's share of each step into shared memory: kOuter rows (or columns) of it.
template <typename T, Layout kLayout, int kOuter>
class Loader {
 public:
  static constexpr bool kTransposed = kLayout == Layout::along_outer;
  using Shared = std::conditional_t<kTransposed, Tile<T, kStepDepth<T>, kOuter>, Tile<T, kOuter, kStepDepth<T>>>;

  // `begin` .. `end` of the outer dimension, what lies past `end` becomes zero; the first step is at `depth`.
  GK_DEVICE void start(const Operand<T>& from, int begin, int end, int depth) {
    from_ = from;
    if constexpr (kLayout == Layout::along_depth) {
      inside_ = 0;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int outer = begin + row(i);
        const bool inside = outer < end;
        inside_ |= static_cast<unsigned>(inside) << i;
        const int64_t place = !inside ? 0 : from.outer_index != nullptr ? from.outer_index[outer] : outer;
        at_[i] = from.data + place * from.outer_stride + depth + chunk() * kVector<T>;
      }
    } else if constexpr (kLayout == Layout::along_outer) {
      inside_ = begin + chunk() * kVector<T> < end;
      at_[0] = from.data + begin + chunk() * kVector<T>;
      if (from.depth_index == nullptr) at_[0] += int64_t{depth + row(0)} * from.depth_stride;
      depth_ = depth;
    } else {
      begin_ = begin;
      end_ = end;
      depth_ = depth;
    }
  }

  // Step number `step`, of which `left` of the depth are there: the rest becomes zero. Steps follow each other from 0.
  GK_DEVICE void copy(const Shared& to, int step, int left) {
    if constexpr (kLayout == Layout::along_depth) {
      const bool deep = chunk() * kVector<T> < left;
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        copy_async_16(to.chunk(row(i), chunk()), at_[i] + step * int64_t{kStepDepth<T>},
                      deep && (inside_ >> i & 1) != 0);
    } else if constexpr (kLayout == Layout::along_outer) {
      if (from_.depth_index == nullptr) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i)
          copy_async_16(to.chunk(row(i), chunk()), at_[0] + i * (kRowStep * from_.depth_stride),
                        inside_ != 0 && row(i) < left);
        at_[0] += kStepDepth<T> * from_.depth_stride;
      } else {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const bool valid = inside_ != 0 && row(i) < left;
          const int64_t place = valid ? from_.depth_index[depth_ + row(i)] : 0;
          copy_async_16(to.chunk(row(i), chunk()), at_[0] + place * from_.depth_stride, valid);
        }
        depth_ += kStepDepth<T>;
      }
    } else {
#pragma unroll 2
      for (int i = 0; i < kOuter * 16 / kGemmThreads; ++i) {
        const int word = static_cast<int>(threadIdx.x) + i * kGemmThreads;
        const int first = word % 16 * kInWord;
        uint32_t bits;
        if constexpr (kInWord == 1)
          bits = float_to_bits(number(word / 16, first, left));
        else
          bits = narrow_pair<T>(number(word / 16, first, left), number(word / 16, first + 1, left));
        store_shared_4(to.at(word / 16, first), bits);
      }
      depth_ += kStepDepth<T>;
    }
  }

 private:
  static constexpr int kInWord = 4 / static_cast<int>(sizeof(T));
  static constexpr int kCopies = kOuter * 4 / kGemmThreads;  // 16 bytes each, of every thread
  static constexpr int kRowStep = kGemmThreads / Shared::kChunks;
  static_assert(kOuter * 4 % kGemmThreads == 0);

  // The chunk of a row, and the rows, that this thread copies.
  static GK_DEVICE int chunk() { return static_cast<int>(threadIdx.x) % Shared::kChunks; }
  static GK_DEVICE int row(int i) { return static_cast<int>(threadIdx.x) / Shared::kChunks + i * kRowStep; }

  GK_DEVICE float number(int outer, int depth, int left) const {
    if (begin_ + outer >= end_ || depth >= left) return 0.0f;
    const int o = begin_ + outer, d = depth_ + depth;
    const int64_t o_place = from_.outer_index != nullptr ? from_.outer_index[o] : o;
    const int64_t d_place = from_.depth_index != nullptr ? from_.depth_index[d] : d;
    return widen(from_.data[o_place * from_.outer_stride + d_place * from_.depth_stride]);
  }

  Operand<T> from_;
  const T* at_[kLayout == Layout::along_depth ? kCopies : 1];
  unsigned inside_;
  int begin_, end_, depth_;
};

// kPaired: two right operands share the left one; the tile's first half of columns is of the first, the other half,
// the same columns, of the second. A thread has both numbers of a place: sum[i][j] and sum[i][j + kAcross / 2].
template <typename T, Layout kLeft, Layout kRight, bool kPaired = false>
class TileProduct {
 public:
  static constexpr int kRows = 128;
  static constexpr int kCols = (sizeof(T) == 2 ? 128 : 64) / (kPaired ? 2 : 1);  // of the output
  static constexpr int kDown = 4, kAcross = sizeof(T) == 2 ? 8 : 4;              // 16 x 8 tiles of a warp
  static constexpr int kSharedBytes = kGemmStages * (kRows + (kPaired ? 2 : 1) * kCols) * 64;

  float sum[kDown][kAcross][4];

  GK_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[i][j][r] = 0.0f;
  }

  // The row of the tile that sum[i][j][2 * half] belongs to, and the column of the tile, that and the next.
  static GK_DEVICE int row_of(int i, int half) {
    return static_cast<int>(threadIdx.x) / 64 * 64 + i * 16 + half * 8 + lane_id() / 4;
  }
  static GK_DEVICE int col_of(int j) { return first_col(j) + lane_id() % 4 * 2; }
  // The first column of sum[.][j].
  static GK_DEVICE int first_col(int j) {
    constexpr int kOfOne = kPaired ? kAcross / 2 : kAcross;
    return static_cast<int>(threadIdx.x) / 32 % 2 * (kOfOne * 8) + j % kOfOne * 8;
  }

  // Adds the sum over depth_begin .. depth_end of left times right (`second` where kPaired), for the rows from `row` to
  // `row_end` and the columns from `col` to `col_end`. All threads call together; `shared`: kSharedBytes, which nobody
  // reads any more when the call returns.
  GK_DEVICE void add(uint32_t shared, const Operand<T>& left, int row, int row_end, const Operand<T>& right,
                     const Operand<T>& second, int col, int col_end, int depth_begin, int depth_end) {
    const int depth = depth_end - depth_begin, steps = (depth + kStepDepth<T> - 1) / kStepDepth<T>;
    if (steps <= 0) return;
    LeftLoader left_loader;
    RightLoader right_loader, second_loader;
    left_loader.start(left, row, row_end, depth_begin);
    right_loader.start(right, col, col_end, depth_begin);
    if constexpr (kPaired) second_loader.start(second, col, col_end, depth_begin);
    const auto copy = [&](int stage, int step) {
      const int left_over = depth - step * kStepDepth<T>;
      const uint32_t base = shared + static_cast<uint32_t>(stage * kStageBytes);
      left_loader.copy(LeftTile{base}, step, left_over);
      right_loader.copy(RightTile{base + LeftTile::kBytes}, step, left_over);
      if constexpr (kPaired)
        second_loader.copy(RightTile{base + LeftTile::kBytes + RightTile::kBytes}, step, left_over);
    };
    // A warp whose share lies outside has nothing to multiply.
    const bool busy = row + row_of(0, 0) - lane_id() / 4 < row_end && col + first_col(0) < col_end;

#pragma unroll
    for (int stage = 0; stage < kGemmStages - 1; ++stage) {
      if (stage < steps) copy(stage, stage);
      copy_async_commit();
    }
    copy_async_wait<kGemmStages - 2>();
    sync_threads();
    Fragments fragments[2];
    if (busy) fragments[0].load(shared, 0);
    int stage = 0, free_stage = kGemmStages - 1;
    for (int step = 0; step < steps; ++step) {
      const uint32_t here = shared + static_cast<uint32_t>(stage * kStageBytes);
      if (busy) fragments[1].load(here, 1);
      if (step + kGemmStages - 1 < steps) copy(free_stage, step + kGemmStages - 1);
      copy_async_commit();
      if (busy) multiply(fragments[0]);
      free_stage = stage;
      stage = stage + 1 == kGemmStages ? 0 : stage + 1;
      copy_async_wait<kGemmStages - 2>();
      sync_threads();  // the next step has landed, and nobody reads this one any more
      if (busy && step + 1 < steps) fragments[0].load(shared + static_cast<uint32_t>(stage * kStageBytes), 0);
      if (busy) multiply(fragments[1]);
    }
  }

  GK_DEVICE void add(uint32_t shared, const Operand<T>& left, int row, int row_end, const Operand<T>& right, int col,
                     int col_end, int depth_begin, int depth_end) {
    static_assert(!kPaired);
    add(shared, left, row, row_end, right, right, col, col_end, depth_begin, depth_end);
  }

 private:
  using LeftLoader = Loader<T, kLeft, kRows>;
  using RightLoader = Loader<T, kRight, kCols>;
  using LeftTile = typename LeftLoader::Shared;
  using RightTile = typename RightLoader::Shared;
  static constexpr int kStageBytes = LeftTile::kBytes + (kPaired ? 2 : 1) * RightTile::kBytes;
  static_assert(kGemmStages * kStageBytes == kSharedBytes);

  // The operands of one half of a step: kDepth<T> deep.
  struct Fragments {
    uint32_t left[kDown][4], right[kAcross / 2][2][2];

    GK_DEVICE void load(uint32_t stage, int half) {
      const LeftTile a{stage};
      const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const int row = warp / 2 * 64 + i * 16;
        if constexpr (LeftLoader::kTransposed)
          load_left_transposed(a, half * kDepth<T>, row, left[i]);
        else
          load_left(a, row, half * kDepth<T>, left[i]);
      }
#pragma unroll
      for (int j = 0; j < kAcross / 2; ++j) {
        const bool of_second = kPaired && j >= kAcross / 4;
        const RightTile b{stage + LeftTile::kBytes + (of_second ? RightTile::kBytes : 0)};
        const int col = first_col(2 * j);
        if constexpr (RightLoader::kTransposed)
          load_right_transposed(b, half * kDepth<T>, col, right[j]);
        else
          load_right(b, col, half * kDepth<T>, right[j]);
      }
    }
  };

  GK_DEVICE void multiply(const Fragments& f) {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) multiply_add<T>(sum[i][j], f.left[i], f.right[j / 2][j % 2]);
  }
};

// Four lanes of a row have two neighbouring columns each of four 8-column tiles; after this each has all eight of one:
// lane t % 4 of tile t.
GK_DEVICE void transpose_quad(uint32_t (&r)[4]) {
  const int lane = lane_id();
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t got = shuffle_xor(upper ? r[i] : r[i + step], step);
      if (upper)
        r[i] = got;
      else
        r[i + step] = got;
    }
  }
}

// Writes rows of a tile's columns: kTiles 8-column tiles of this thread's row, of which pair(j, a, b) gives the two
// numbers; `first(j)` is the first column of tile j and `count` how many columns there are from the tile's first on.
// `to` is the row's place of column 0 of the tile; `inside`: whether there is such a row. `wide`: rows of `to` may be
// written 16 bytes at a time, and count is a multiple of that. All lanes call together.
template <int kTiles, typename T, typename First, typename Pair>
GK_DEVICE void store_tile_row(T* to, bool inside, bool wide, int count, First first, Pair pair) {
  if (!wide) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float x[2];
      pair(j, x[0], x[1]);
      const int col = first(j) + lane_id() % 4 * 2;
      if (inside && col < count) to[col] = narrow<T>(x[0]);
      if (inside && col + 1 < count) to[col + 1] = narrow<T>(x[1]);
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float x[2];
      pair(j, x[0], x[1]);
      const int col = first(j) + lane_id() % 4 * 2;
      if (inside && col < count) store_8(to + col, {{float_to_bits(x[0]), float_to_bits(x[1])}});
    }
  } else {
    static_assert(kTiles % 4 == 0);
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x[2];
        pair(j + i, x[0], x[1]);
        r[i] = narrow_pair<T>(x[0], x[1]);
      }
      transpose_quad(r);
      const int col = first(j) + lane_id() % 4 * 8;
      if (inside && col < count) store_16(to + col, {{r[0], r[1], r[2], r[3]}});
    }
  }
}

// Host: sizes are counted in 32 bits on the device.
template <typename... Sizes>
void check_sizes(const char* op, Sizes... sizes) {
  if (((sizes > INT32_MAX) || ...))
    throw std::runtime_error(std::string("grokkernels: every size of ") + op + " must be below 2^31");
}

// Host: how an operand may be read. `outer` and `depth` are its sizes.
template <typename T>
Layout layout_of(const void* data, int64_t outer, int64_t depth, int64_t outer_stride, int64_t depth_stride,
                 int64_t stack_stride = 0) {
  const auto even = [](int64_t n) { return n % kVector<T> == 0; };
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || !even(stack_stride)) return Layout::any;
  if (depth_stride == 1 && even(outer_stride) && even(depth)) return Layout::along_depth;
  if (outer_stride == 1 && even(depth_stride) && even(outer)) return Layout::along_outer;
  return Layout::any;
}

}  // namespace grokkernels::device
