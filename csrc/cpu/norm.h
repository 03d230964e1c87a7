// What the norm kernels share: the row-wise pieces of y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), and of
// its gradient. Rows that do not fit into the first-level cache are swept twice from the second.
#pragma once

#include "cpu/launch.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// Runs f.template operator()<T, W>() for the runtime dtypes of x and weight.
template <typename F>
void with_row_and_weight(DType dtype, DType weight_dtype, const F& f) {
  GK_SWITCH_DTYPE(dtype, T, {
    if (weight_dtype == DType::float32)
      f.template operator()<T, float>();
    else
      f.template operator()<T, T>();
  });
}

// Sums run in float over this many elements and are then emptied into a double, so that the error does not grow with
// the length of the row.
inline constexpr int64_t kNormBlock = 128 * kLanes;

// The mean of value(c, n)^2 over the columns. Four accumulators hide the latency of the fused multiply-add.
template <typename Value>
GK_ALWAYS_INLINE float mean_of_squares(int64_t cols, const Value& value) {
  double total = 0.0;
  for (int64_t begin = 0; begin < cols; begin += kNormBlock) {
    const int64_t end = begin + kNormBlock < cols ? begin + kNormBlock : cols;
    vf sum[4] = {zero(), zero(), zero(), zero()};
    int64_t c = begin;
    for (; c + 4 * kLanes <= end; c += 4 * kLanes)
      for (int u = 0; u < 4; ++u) {
        const vf v = value(c + u * kLanes, Full{});
        sum[u] = fma(v, v, sum[u]);
      }
    for_vectors(c, end, [&](int64_t i, auto n) {
      const vf v = value(i, n);
      sum[0] = fma(v, v, sum[0]);
    });
    total += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return static_cast<float>(total / static_cast<double>(cols));
}

inline float rstd_of(float mean_of_squares, float eps) { return 1.0f / __builtin_sqrtf(mean_of_squares + eps); }

// weight, or 1 + weight where offset is 1.
template <typename W, typename Count>
GK_ALWAYS_INLINE vf scale_at(const W* weight, int64_t c, Count n, vf offset) {
  return load_n(weight + c, n) + offset;
}

// The row after the one at work, asked for while that one is written: else memory would be read and written in turns.
template <typename T>
class NextRow {
 public:
  NextRow(const T* row, int64_t stride, int64_t cols)
      : row_(row + (cols * static_cast<int64_t>(sizeof(T)) <= kMaxBytes ? stride : 0)) {}
  // At column c, a whole pair of vectors.
  GK_ALWAYS_INLINE void ask(int64_t c) const { ask_ahead(row_ + c, 2 * kLanes * static_cast<int64_t>(sizeof(T)), 0); }

 private:
  static constexpr int64_t kMaxBytes = 128 << 10;  // two rows of each tensor still fit into the second-level cache
  const T* row_;
};

// y = x * rstd * scale over one row.
template <bool kStream, typename T, typename W, typename... Next>
void scale_row(const T* x, float rstd, const W* weight, vf offset, T* y, int64_t cols, const Next&... next) {
  const vf r = set1(rstd);
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes) {
    if constexpr (kStream) (next.ask(c), ...);
    const VfPair v = load_pair(x + c), w = load_pair(weight + c);
    put_pair<kStream>(y + c, v.first * r * (w.first + offset), v.second * r * (w.second + offset));
  }
  for_vectors(c, cols,
              [&](int64_t i, auto n) { store_n(y + i, load_n(x + i, n) * r * scale_at(weight, i, n, offset), n); });
}

// The chunks of rows whose weight gradients are summed apart. They depend on the number of rows alone, never on that of
// threads: so few that adding them up costs little, so many that every core has some.
struct RowChunks {
  explicit RowChunks(int64_t rows) : rows(rows) {
    constexpr int64_t kMost = 64, kLeastRows = 16;
    count = rows / kLeastRows < 1 ? 1 : rows / kLeastRows < kMost ? rows / kLeastRows : kMost;
  }
  int64_t begin(int64_t chunk) const { return rows * chunk / count; }

  int64_t rows, count;
};

// Gradients of weights, gathered over the rows of one chunk, for `count` weights of `cols` columns: in float over
// kRowsPerSum rows, then emptied into doubles, so that the error does not grow with the number of rows.
class WeightGradients {
 public:
  // In the thread that works on the chunk, whose totals (count, cols) are written: scratch of slot 1.
  WeightGradients(double* totals, int64_t count, int64_t cols)
      : size_(count * cols), cols_(cols), totals_(totals), sums_(scratch<float>(1, size_)) {
    for (int64_t i = 0; i < size_; ++i) sums_[i] = 0.0f;
  }

  // Where rows add to weight `index`.
  float* sums(int64_t index) { return sums_ + index * cols_; }

  // After each group of rows.
  void rows_done(int64_t rows) {
    rows_ += rows;
    if (rows_ >= kRowsPerSum) empty();
  }

  // After the last one.
  void finish() {
    if (rows_ > 0 || !begun_) empty();
  }

 private:
  static constexpr int64_t kRowsPerSum = 64;

  void empty() {
    for (int64_t i = 0; i < size_; ++i) {
      totals_[i] = static_cast<double>(sums_[i]) + (begun_ ? totals_[i] : 0.0);
      sums_[i] = 0.0f;
    }
    rows_ = 0;
    begun_ = true;
  }

  int64_t size_, cols_, rows_ = 0;
  bool begun_ = false;
  double* totals_;
  float* sums_;
};

// Rows that the backward pass takes together, and the longest that still stay in the second-level cache while it does.
inline constexpr int kGroup = 4;
inline constexpr int64_t kMaxGroupedCols = 16384;

// A number of rows as a type: body(row, rows) is compiled once for kGroup rows and once for one.
template <int kRows>
struct RowCount {
  GK_ALWAYS_INLINE constexpr operator int() const { return kRows; }
};

// dweights (kCount of (cols)) from the totals (chunks, kCount, cols), in the order of the chunks.
template <int kCount, typename W>
void add_chunks(const double* totals, int64_t chunks, int64_t cols, W* const (&dweights)[kCount]) {
  constexpr int64_t kBlock = 64;  // columns: whole cache lines of every chunk, one after another
  const int64_t blocks = (cols + kBlock - 1) / kBlock;
  parallel_range(kCount * blocks, chunks * kBlock, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t index = item / blocks, begin = item % blocks * kBlock;
      const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
      double sum[kBlock] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const double* total = totals + (chunk * kCount + index) * cols + begin;
        for (int64_t c = 0; c < n; ++c) sum[c] += total[c];
      }
      for (int64_t c = 0; c < n; ++c) dweights[index][begin + c] = from_float<W>(static_cast<float>(sum[c]));
    }
  });
}

// body(row, RowCount, gradients) over all rows, a few at once; gives the gradients of kCount weights of `cols` columns.
template <int kCount, typename W, typename Body>
void over_row_groups(int64_t rows, int64_t cols, int64_t cost_per_row, W* const (&dweights)[kCount], const Body& body) {
  const RowChunks chunks(rows);
  double* totals = scratch<double>(0, chunks.count * kCount * cols);
  parallel_tasks(chunks.count, rows * cost_per_row / chunks.count, [&](int64_t chunk) {
    WeightGradients gradients(totals + chunk * kCount * cols, kCount, cols);
    const int64_t end = chunks.begin(chunk + 1);
    int64_t row = chunks.begin(chunk);
    for (; cols <= kMaxGroupedCols && row + kGroup <= end; row += kGroup) {
      body(row, RowCount<kGroup>{}, gradients);
      gradients.rows_done(kGroup);
    }
    for (; row < end; ++row) {
      body(row, RowCount<1>{}, gradients);
      gradients.rows_done(1);
    }
    gradients.finish();
    stream_fence();
  });
  add_chunks(totals, chunks.count, cols, dweights);
}

// For kRows rows at once, so that the sums of the weight gradient are read and written once for all of them: with
// xhat = x * rstd, adds d * xhat to dweight and gives dots[r] = sum over columns of d * scale * xhat. d(r, c, n) is the
// gradient that reaches y. Each row is summed in the same order whatever kRows is.
template <int kRows, typename T, typename W, typename D>
GK_ALWAYS_INLINE void gather_rows(const D& d, const T* x, int64_t x_stride, const float* rstd, const W* weight,
                                  vf offset, float* dweight, double* dots, int64_t cols) {
  vf r[kRows];
  for (int k = 0; k < kRows; ++k) {
    r[k] = set1(rstd[k]);
    dots[k] = 0.0;
  }
  for (int64_t begin = 0; begin < cols; begin += kNormBlock) {
    const int64_t end = begin + kNormBlock < cols ? begin + kNormBlock : cols;
    vf sum[kRows] = {};
    for_vectors(begin, end, [&](int64_t c, auto n) {
      const vf w = scale_at(weight, c, n, offset);
      vf dw = load_n(dweight + c, n);
      for (int k = 0; k < kRows; ++k) {
        const vf g = d(k, c, n), xhat = fetch_n(x + k * x_stride + c, n) * r[k];
        dw = fma(g, xhat, dw);
        sum[k] = fma(g * w, xhat, sum[k]);
      }
      store_n(dweight + c, dw, n);
    });
    for (int k = 0; k < kRows; ++k) dots[k] += reduce_add(sum[k]);
  }
}

// The gradient of x from what gather_rows gave: rstd * (d * scale - xhat * dot / C), plus what else reaches x. Fused by
// hand, so that the compiler fuses alike wherever this is inlined and a row's result does not depend on its group.
struct RowGradient {
  vf rstd, mean;
  RowGradient() = default;
  RowGradient(float rstd_of_row, double dot, int64_t cols)
      : rstd(set1(rstd_of_row)), mean(set1(static_cast<float>(dot / static_cast<double>(cols)))) {}
  GK_ALWAYS_INLINE vf inner(vf d, vf x, vf scale) const { return fnma(x * rstd, mean, d * scale); }
  GK_ALWAYS_INLINE vf operator()(vf d, vf x, vf scale) const { return rstd * inner(d, x, scale); }
  GK_ALWAYS_INLINE vf operator()(vf d, vf x, vf scale, vf plus) const { return fma(rstd, inner(d, x, scale), plus); }
};

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
