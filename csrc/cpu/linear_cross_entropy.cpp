// linear_cross_entropy on the CPU: logits = x (N, C) times weight (V, C) transposed exist only as tiles.
//
// Forward: a task owns a block of rows and a range of columns; a tile of logits in the second-level cache is squashed
// into the running sums of its rows and forgotten. 2 N V C floating-point operations.
// Backward, for as many columns at once as linear_cross_entropy_columns allows: the logits again, turned into dlogits
// where they lie; then dx += dlogits weight and dweight = dlogits^T x, each output tile with one owner and no partial
// sums between threads: the result is the same whatever their number. 6 N V C operations. Keeping the gradient of the
// forward pass, as one may for a scalar loss, would save the second product with weight and hold (rows, V) logits.
//
// Ignored rows take part in nothing: the others are gathered while they are packed. The idea of never storing logits
// is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
#include "linear_cross_entropy.h"

#include <type_traits>

#include "cpu/cross_entropy_row.h"
#include "cpu/gemm.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

// Of a task; kRows * kColumns floats lie in the second-level cache. The matrix unit is so fast that packing shows: more
// rows share it.
template <typename T>
constexpr int64_t kRows = kOnTiles<T, T> ? 512 : kBlockRows;
constexpr int64_t kColumns = 512;
constexpr int64_t kTileStride = kColumns + 16;  // no power of two: see groups.h
constexpr int64_t kRange = 4096;                // columns of a forward task; like all sizes here, no function of N

GK_ALWAYS_INLINE int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }
GK_ALWAYS_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// The rows that count, in order.
struct Counted {
  const int32_t* index;
  int64_t count;
};

Counted counted_rows(int64_t rows, const Targets& targets, int64_t ignore_index) {
  int32_t* index = scratch<int32_t>(2, rows);
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row)
    if (targets[row] != ignore_index) index[count++] = static_cast<int32_t>(row);
  return {index, count};
}

template <bool kCapped, typename T>
void forward(const LinearCrossEntropyFwdParams& p) {
  const Counted counted = counted_rows(p.rows, p.targets, p.options.ignore_index);
  const int64_t parts = blocks_of(p.cols, kRange), blocks = blocks_of(counted.count, kRows<T>);
  RowSum* partials = scratch<RowSum>(0, counted.count * parts);
  float* losses = p.options.reduction == Reduction::none ? p.loss : scratch<float>(1, p.rows);
  float* target_z = scratch<float>(3, counted.count);
  const Squash s = make_squash(p.options);
  const bool smoothed = p.options.label_smoothing > 0;
  const Strided<T> x{static_cast<const T*>(p.x), p.x_stride, 1, counted.index};
  const Strided<T> weight{static_cast<const T*>(p.weight), p.weight_stride[0], p.weight_stride[1]};

  // Blocks of rows that share a range of the weight follow each other.
  parallel_tasks(parts * blocks, kRows<T> * kRange / 8 * p.width, [&](int64_t task) {
    const int64_t part = task / blocks, row = task % blocks * kRows<T>;
    const int64_t rows = at_most(counted.count - row, kRows<T>);
    const int64_t end = at_most((part + 1) * kRange, p.cols);
    float* tile = scratch<float>(4, kRows<T> * kTileStride);
    for (int64_t i = 0; i < rows; ++i) partials[(row + i) * parts + part] = RowSum{};
    for (int64_t column = part * kRange; column < end; column += kColumns) {
      const int64_t n = at_most(end - column, kColumns);
      gemm(rows, n, p.width, x.from(row, 0), weight.from(column, 0).transposed(), tile, kTileStride, false);
      for (int64_t i = 0; i < rows; ++i) {
        const float* logits = tile + i * kTileStride;
        add_columns<kCapped>(partials[(row + i) * parts + part], logits, n, s, smoothed);
        const int64_t target = p.targets[counted.index[row + i]] - column;
        if (target >= 0 && target < n) target_z[row + i] = squash<kCapped>(s, set1(logits[target])).value[0];
      }
    }
  });

  for (int64_t row = 0, i = 0; row < p.rows; ++row) {
    if (i == counted.count || counted.index[i] != row) {
      losses[row] = 0.0f;
      p.lse[row] = 0.0;
      continue;
    }
    RowSum sum = partials[i * parts];
    for (int64_t part = 1; part < parts; ++part) merge(sum, partials[i * parts + part]);
    p.lse[row] = logsumexp(sum);
    losses[row] = static_cast<float>(row_loss(sum, target_z[i], p.cols, p.options));
    ++i;
  }
  reduce_losses(losses, p.rows, p.targets, p.options, p.loss);
}

template <typename T>
void copy_rounded(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

template <bool kCapped, typename T>
void backward(const LinearCrossEntropyBwdParams& p) {
  const Counted counted = counted_rows(p.rows, p.targets, p.options.ignore_index);
  const int64_t rows = counted.count, held = linear_cross_entropy_columns(p.rows, p.cols, kLinearCrossEntropyHost);
  const int64_t pitch = linear_cross_entropy_stride(held);
  const int64_t row_blocks = blocks_of(rows, kRows<T>), width_blocks = blocks_of(p.width, kColumns);
  const Squash s = make_squash(p.options);
  const double divisor = loss_divisor(p.rows, p.targets, p.options);
  const Strided<T> x{static_cast<const T*>(p.x), p.x_stride, 1, counted.index};
  const Strided<T> weight{static_cast<const T*>(p.weight), p.weight_stride[0], p.weight_stride[1]};
  // On the matrix unit dlogits are rounded to the dtype of x, as logits and their gradients are in plain PyTorch.
  using Held = std::conditional_t<kOnTiles<T, T>, T, float>;
  Held* const held_dlogits = static_cast<Held*>(p.dlogits);
  const Strided<Held> dlogits{held_dlogits, pitch, 1};

  for (int64_t first = 0; first < p.cols; first += held) {
    const int64_t columns = at_most(p.cols - first, held);

    parallel_tasks(blocks_of(columns, kColumns) * row_blocks, kRows<T> * kColumns / 8 * p.width, [&](int64_t task) {
      const int64_t column = task / row_blocks * kColumns, row = task % row_blocks * kRows<T>;
      const int64_t m = at_most(rows - row, kRows<T>), n = at_most(columns - column, kColumns);
      Held* out = held_dlogits + row * pitch + column;
      float* tile;
      if constexpr (kOnTiles<T, T>)
        tile = scratch<float>(4, kRows<T> * kTileStride);
      else
        tile = out;
      const int64_t stride = kOnTiles<T, T> ? kTileStride : pitch;
      gemm(m, n, p.width, x.from(row, 0), weight.from(first + column, 0).transposed(), tile, stride, false);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t source = counted.index[row + i];
        const RowGradient g =
            row_gradient(p.lse[source], p.dloss[source * p.dloss_stride] / divisor, p.cols, p.options);
        gradient_columns<kCapped, false>(out + i * pitch, tile + i * stride, n, p.targets[source] - first - column, s,
                                         g);
      }
    });

    const int64_t dx_tasks = p.dx == nullptr ? 0 : row_blocks * width_blocks;
    const int64_t dweight_tasks = p.dweight == nullptr ? 0 : blocks_of(columns, kRows<T>) * width_blocks;
    const int64_t depth = rows > columns ? rows : columns;
    parallel_tasks(dx_tasks + dweight_tasks, kRows<T> * kColumns / 8 * depth, [&](int64_t task) {
      if (task < dx_tasks) {
        const int64_t row = task / width_blocks * kRows<T>, c = task % width_blocks * kColumns;
        gemm(at_most(rows - row, kRows<T>), at_most(p.width - c, kColumns), columns, dlogits.from(row, 0),
             weight.from(first, c), p.dx_sum + row * p.width + c, p.width, first > 0);
        return;
      }
      task -= dx_tasks;
      const int64_t column = task / width_blocks * kRows<T>, c = task % width_blocks * kColumns;
      const int64_t m = at_most(columns - column, kRows<T>), n = at_most(p.width - c, kColumns);
      float* tile = scratch<float>(4, kRows<T> * kTileStride);
      gemm(m, n, rows, dlogits.from(0, column).transposed(), x.from(0, c), tile, kTileStride, false);
      for (int64_t i = 0; i < m; ++i)
        copy_rounded(tile + i * kTileStride, n, static_cast<T*>(p.dweight) + (first + column + i) * p.width + c);
    });
  }

  if (p.dx == nullptr) return;
  for (int64_t row = 0, i = 0; row < p.rows; ++row) {
    T* dx = static_cast<T*>(p.dx) + row * p.width;
    if (i < rows && counted.index[i] == row)
      copy_rounded(p.dx_sum + i++ * p.width, p.width, dx);
    else
      __builtin_memset(dx, 0, p.width * sizeof(T));
  }
}

}  // namespace

void linear_cross_entropy_fwd(const LinearCrossEntropyFwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, { p.options.softcap > 0 ? forward<true, T>(p) : forward<false, T>(p); });
}

void linear_cross_entropy_bwd(const LinearCrossEntropyBwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, { p.options.softcap > 0 ? backward<true, T>(p) : backward<false, T>(p); });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(linear_cross_entropy_fwd, LinearCrossEntropyFwdParams);
GK_CPU_LAUNCHER(linear_cross_entropy_bwd, LinearCrossEntropyBwdParams);
