// A block's part of a matrix product: an output tile, operands of any strides copied through a ring of shared tiles,
// sums in registers. What grouped_mm, moe_experts and linear_cross_entropy are made of on tensor cores of sm_80 and
// newer.
//
//   left (rows, depth), right (depth, columns); `outer` is an operand's dimension that is not summed over. Sizes are
//   below 2^31, strides are not.
//
// 128 threads, four warps in two rows of two, each with 64 rows of the tile. A step of the sum is 64 bytes deep; while
// one is multiplied the next two are on their way (cp.async), and operands are loaded from shared memory one turn
// before they are multiplied. The form is that of CUTLASS's multistage kernels.
#pragma once

#include <device/async.cuh>
#include <device/warp.cuh>
#include <type_traits>

#include "cuda/tile.cuh"
#include "cuda/vector.cuh"

namespace grokkernels::device {

// How an operand lies in memory: what has unit stride, in rows that are 16-byte aligned, a multiple of 16 bytes long
// and less than 2^31 elements apart. Anything else is read number by number.
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
        place_[i] = !inside ? 0 : from.outer_index != nullptr ? from.outer_index[outer] : outer;
      }
      at_ = from.data + depth + chunk() * kVector<T>;
    } else if constexpr (kLayout == Layout::along_outer) {
      inside_ = begin + chunk() * kVector<T> < end;
      at_ = from.data + begin + chunk() * kVector<T>;
      if (from.depth_index == nullptr) at_ += int64_t{depth + row(0)} * from.depth_stride;
      depth_ = depth;
    } else {
      begin_ = begin;
      end_ = end;
      depth_ = depth;
    }
  }

  // The next step, of which `left` of the depth are there: the rest becomes zero.
  GK_DEVICE void copy(const Shared& to, int left) {
    if constexpr (kLayout == Layout::along_depth) {
      const bool deep = chunk() * kVector<T> < left;
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        copy_async_16(to.chunk(row(i), chunk()), at_ + int64_t{place_[i]} * static_cast<int32_t>(from_.outer_stride),
                      deep && (inside_ >> i & 1) != 0);
      at_ += kStepDepth<T>;
    } else if constexpr (kLayout == Layout::along_outer) {
      if (from_.depth_index == nullptr) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          copy_async_16(to.chunk(row(i), chunk()), at_, inside_ != 0 && row(i) < left);
          at_ += kRowStep * from_.depth_stride;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const bool valid = inside_ != 0 && row(i) < left;
          const int32_t place = valid ? from_.depth_index[depth_ + row(i)] : 0;
          copy_async_16(to.chunk(row(i), chunk()), at_ + int64_t{place} * static_cast<int32_t>(from_.depth_stride),
                        valid);
        }
        depth_ += kStepDepth<T>;
      }
    } else {
#pragma unroll 1
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
  static_assert(kOuter * 4 % kGemmThreads == 0 && (!kTransposed || kRowStep * kCopies == kStepDepth<T>));

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
  const T* at_;
  int32_t place_[kCopies];
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

  // f(row of the tile, j, x) for each row that this thread has numbers of and each kTiles of its 16 x 8 tiles, j the
  // first of them, called from one place: x[2 * k + c] is that of column col_of(j + k) + c. For long epilogues, which
  // unrolled would fit neither in the registers beside the sums nor in the instruction cache. Spends the sums.
  template <int kTiles = kAcross, typename F>
  GK_DEVICE void each_row(const F& f) {
    constexpr int kAll = kDown * kAcross;
    static_assert(kAcross % kTiles == 0);
#pragma unroll 1
    for (int n = 0; n < 2 * kAll / kTiles; ++n) {
      const int tile = n / 2 * kTiles, half = n % 2;
      float x[2 * kTiles];
#pragma unroll
      for (int k = 0; k < 2 * kTiles; ++k) x[k] = sum[0][k / 2][k % 2];
      f(row_of(tile / kAcross, half), tile % kAcross, x);
      // What is next comes to where this was: the other row of these tiles, or the next tiles.
      if (half == 0) {
#pragma unroll
        for (int k = 0; k < 2 * kTiles; ++k) sum[0][k / 2][k % 2] = sum[0][k / 2][2 + k % 2];
      } else {
#pragma unroll
        for (int k = kTiles; k < kAll; ++k)
#pragma unroll
          for (int r = 0; r < 4; ++r)
            sum[(k - kTiles) / kAcross][(k - kTiles) % kAcross][r] = sum[k / kAcross][k % kAcross][r];
      }
    }
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
    const int depth = depth_end - depth_begin;
    if (depth <= 0) return;
    LeftLoader left_loader;
    RightLoader right_loader, second_loader;
    left_loader.start(left, row, row_end, depth_begin);
    right_loader.start(right, col, col_end, depth_begin);
    if constexpr (kPaired) second_loader.start(second, col, col_end, depth_begin);
    const auto copy = [&](uint32_t stage, int left_over) {
      left_loader.copy(LeftTile{stage}, left_over);
      right_loader.copy(RightTile{stage + LeftTile::kBytes}, left_over);
      if constexpr (kPaired) second_loader.copy(RightTile{stage + LeftTile::kBytes + RightTile::kBytes}, left_over);
    };
    // A warp whose share lies outside has nothing to multiply.
    const bool busy = row + row_of(0, 0) - lane_id() / 4 < row_end && col + first_col(0) < col_end;

    constexpr int kStep = kStepDepth<T>, kAhead = kGemmStages * kStep;
#pragma unroll
    for (int stage = 0; stage < kGemmStages; ++stage) {
      if (depth > stage * kStep) copy(shared + static_cast<uint32_t>(stage * kStageBytes), depth - stage * kStep);
      copy_async_commit();
    }
    copy_async_wait<kGemmStages - 1>();
    sync_threads();
    // A step is multiplied in turns: two columns of 16 x 8 tiles by one half of its depth. What the next turn needs is
    // loaded before.
    constexpr int kPairs = kAcross / 2, kTurns = 2 * kPairs;
    uint32_t a[2][kDown][4], b[2][2][2];
    if (busy) {
      load_left_half(shared, 0, a[0]);
      load_right_pair(shared, 0, 0, b[0]);
    }
    uint32_t here = shared;  // the step's stage of the ring
    for (int left_over = depth; left_over > 0; left_over -= kStep) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int next = (turn + 1) % kTurns;
        const uint32_t done = here;
        if (next == 0) {
          here = here == shared + (kGemmStages - 1) * kStageBytes ? shared : here + kStageBytes;
          copy_async_wait<kGemmStages - 2>();
          sync_threads();  // the next step has landed, and nobody reads this one any more
        }
        if (busy && (next != 0 || left_over > kStep)) {
          if (next == 0) load_left_half(here, 0, a[0]);
          if (next == kPairs - 1) load_left_half(here, 1, a[1]);
          load_right_pair(here, next / kPairs, next % kPairs, b[next % 2]);
        }
        if (next == 0) {
          if (left_over > kAhead) copy(done, left_over - kAhead);
          copy_async_commit();
        }
        if (!busy) continue;
#pragma unroll
        for (int i = 0; i < kDown; ++i)
#pragma unroll
          for (int k = 0; k < 2; ++k)
            multiply_add<T>(sum[i][turn % kPairs * 2 + k], a[turn / kPairs][i], b[turn % 2][k]);
      }
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

  // The left operands of this warp from one half of a step: kDepth<T> deep.
  static GK_DEVICE void load_left_half(uint32_t stage, int half, uint32_t (&a)[kDown][4]) {
    const LeftTile tile{stage};
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      const int row = static_cast<int>(threadIdx.x) / 64 * 64 + i * 16;
      if constexpr (LeftLoader::kTransposed)
        load_left_transposed(tile, half * kDepth<T>, row, a[i]);
      else
        load_left(tile, row, half * kDepth<T>, a[i]);
    }
  }

  // The right operands of sum[.][2 * pair] and the next.
  static GK_DEVICE void load_right_pair(uint32_t stage, int half, int pair, uint32_t (&b)[2][2]) {
    const bool of_second = kPaired && pair >= kAcross / 4;
    const RightTile tile{stage + LeftTile::kBytes + (of_second ? RightTile::kBytes : 0)};
    const int col = first_col(2 * pair);
    if constexpr (RightLoader::kTransposed)
      load_right_transposed(tile, half * kDepth<T>, col, b);
    else
      load_right(tile, col, half * kDepth<T>, b);
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

// Writes what this thread has of one row of a tile: kTiles pairs of neighbouring columns, of which pair(j, a, b) gives
// number j, from first(j) + lane % 4 * 2 on. `row` points at the row's place of column 0 of the tile, `inside` says
// whether there is such a row and `count` how many columns there are from the tile's first on. `wide`: rows may be
// written 16 bytes at a time, and count is a multiple of that; then four lanes exchange what they have. All lanes call
// together.
template <int kTiles, typename T, typename First, typename Pair>
GK_DEVICE void store_tile_row(T* row, bool inside, bool wide, int count, First first, Pair pair) {
  const int lane = lane_id() & 3;
  if (!wide) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float x[2];
      pair(j, x[0], x[1]);
      const int col = first(j) + lane * 2;
      if (inside && col < count) row[col] = narrow<T>(x[0]);
      if (inside && col + 1 < count) row[col + 1] = narrow<T>(x[1]);
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float x[2];
      pair(j, x[0], x[1]);
      const int col = first(j) + lane * 2;
      if (inside && col < count) store_8(row + col, {{float_to_bits(x[0]), float_to_bits(x[1])}});
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
      const int col = first(j) + lane * 8;
      if (inside && col < count) store_16(row + col, {{r[0], r[1], r[2], r[3]}});
    }
  }
}

template <int kTiles, typename T, typename First>
GK_DEVICE void store_tile_row(T* row, bool inside, bool wide, int count, First first, const float (&x)[kTiles][2]) {
  store_tile_row<kTiles>(row, inside, wide, count, first, [&](int j, float& a, float& b) {
    a = x[j][0];
    b = x[j][1];
  });
}

// The way back; what is not there is read as zero.
template <int kTiles, typename T, typename First>
GK_DEVICE void load_tile_row(const T* row, bool inside, bool wide, int count, First first, float (&x)[kTiles][2]) {
  const int lane = lane_id() & 3;
  if (!wide) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int col = first(j) + lane * 2;
      x[j][0] = inside && col < count ? widen(row[col]) : 0.0f;
      x[j][1] = inside && col + 1 < count ? widen(row[col + 1]) : 0.0f;
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int col = first(j) + lane * 2;
      const Words2 pair = inside && col < count ? load_8(row + col) : Words2{};
      x[j][0] = bits_to_float(pair.word[0]);
      x[j][1] = bits_to_float(pair.word[1]);
    }
  } else {
    static_assert(kTiles % 4 == 0);
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      const int col = first(j) + lane * 8;
      const Words4 words = inside && col < count ? load_16(row + col) : Words4{};
      uint32_t r[4] = {words.word[0], words.word[1], words.word[2], words.word[3]};
      transpose_quad(r);
#pragma unroll
      for (int i = 0; i < 4; ++i) widen_pair<T>(r[i], x[j + i][0], x[j + i][1]);
    }
  }
}

// Writes a product's tile at row `row` and column `col` of `to`, dense rows of `cols`.
template <typename T, typename Product>
GK_DEVICE void store_tile(Product& product, T* to, int row, int row_end, int col, int cols) {
  product.each_row([&](int row_of_tile, int, const auto& x) {
    const int r = row + row_of_tile;
    store_tile_row<Product::kAcross>(to + int64_t{r} * cols + col, r < row_end, cols % kVector<T> == 0, cols - col,
                                     Product::first_col, [&](int j, float& a, float& b) {
                                       a = x[2 * j];
                                       b = x[2 * j + 1];
                                     });
  });
}

// Host: whether the chip has what the files of ending _sm90 are written in: compute capability 9 and no other.
inline bool on_hopper() { return device_architecture() / 10 == 9; }

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
  const auto stride = [&](int64_t n) { return even(n) && n <= INT32_MAX; };
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || !even(stack_stride)) return Layout::any;
  if (depth_stride == 1 && stride(outer_stride) && even(depth)) return Layout::along_depth;
  if (outer_stride == 1 && stride(depth_stride) && even(outer)) return Layout::along_outer;
  return Layout::any;
}

// Host: f.template operator()<left, right>() for the pairs that have kernels: the left operand along the sum, the right
// one along either side. One operand that lies otherwise makes both read number by number.
template <typename F>
void with_layouts(Layout left, Layout right, const F& f) {
  if (left == Layout::along_depth && right == Layout::along_depth)
    f.template operator()<Layout::along_depth, Layout::along_depth>();
  else if (left == Layout::along_depth && right == Layout::along_outer)
    f.template operator()<Layout::along_depth, Layout::along_outer>();
  else
    f.template operator()<Layout::any, Layout::any>();
}

}  // namespace grokkernels::device
