// cross_entropy: the loss of logits (N, V) against targets (N), and dlogits (N, V). Forward reads the logits once,
// backward once more.
//
// A block takes kCrossEntropyColumns columns of a row, eight 16-byte vectors to a thread, all of them on their way
// before the first is used: 16 KiB (16-bit) or 32 KiB in flight per block. So one long row fills many multiprocessors,
// and a row is cut and merged in the same way whatever the batch: its loss depends on nothing else. A row of several
// ranges leaves a RowSum per range, which a second kernel merges in order; a third reduces the rows' losses. The host
// learns nothing.
//
// The online logsumexp: Milakov and Gimelshein, arXiv:1805.02867.
#include "cross_entropy.h"
#include "cuda/cross_entropy_row.cuh"
#include "cuda/vector.cuh"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kColumns = kCrossEntropyColumns;
template <typename T>
constexpr int kThreads = kColumns / (8 * kVector<T>);  // of a block: 256, or 128 for 16-bit logits
constexpr int kMergeWarps = 8, kReduceThreads = 1024;
static_assert(sizeof(RowSum) == cross_entropy_workspace(1, 2 * kColumns) / 2);

// Columns [c, c + kVector<T>) of x as 16 bytes; zeros for those outside [begin, end). `aligned`: x + c is.
template <typename T>
GK_DEVICE Words4 load_columns(const T* x, int c, int begin, int end, bool aligned) {
  if (aligned && c >= begin && c + kVector<T> <= end) return load_16_streaming(x + c);
  float v[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) v[i] = c + i >= begin && c + i < end ? widen(x[c + i]) : 0.0f;
  return pack(v, T{});
}

// Where a thread's vector v begins in its block's range.
template <typename T>
GK_DEVICE int column_of(int v) {
  return (v * kThreads<T> + static_cast<int>(threadIdx.x)) * kVector<T>;
}

template <typename T>
GK_DEVICE const T* row_of(const void* data, int64_t row, int64_t stride) {
  return static_cast<const T*>(data) + row * stride;
}

// The loss and lse of a row whose ranges have been merged. By one thread.
template <bool kCapped, typename T>
GK_DEVICE void finish_row(const CrossEntropyFwdParams& p, const LossTerms& terms, int64_t row, const RowSum& sum) {
  const int64_t target = target_of(p.targets, row);
  double lse = 0.0, loss = 0.0;
  if (target != terms.ignore_index) {
    lse = loss = nan("");
    if (is_word(terms, target)) {
      lse = logsumexp(sum);
      loss = row_loss(terms, lse, squash<kCapped>(terms, widen(row_of<T>(p.logits, row, p.logits_stride)[target])),
                      sum.z_sum);
    }
  }
  p.lse[row] = lse;
  p.row_losses[row] = static_cast<float>(loss);
}

template <bool kCapped, typename T>
__global__ void __launch_bounds__(kThreads<T>)
    cross_entropy_fwd_kernel(const __grid_constant__ CrossEntropyFwdParams p, const __grid_constant__ LossTerms terms,
                             unsigned parts) {
  const int64_t row = blockIdx.x / parts, begin = int64_t{blockIdx.x % parts} * kColumns;
  if (target_of(p.targets, row) == terms.ignore_index) {
    if (parts == 1 && threadIdx.x == 0) finish_row<kCapped, T>(p, terms, row, RowSum{});
    return;
  }
  const T* x = row_of<T>(p.logits, row, p.logits_stride) + begin;
  const int count = static_cast<int>(p.cols - begin < kColumns ? p.cols - begin : kColumns);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;

  constexpr int kVectors = 8, kPerThread = 8 * kVector<T>, kWarps = kThreads<T> / 32;
  Words4 words[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) words[v] = load_columns(x, column_of<T>(v), 0, count, aligned);

  ThreadSum mine;
  float z[kPerThread];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float x[kVector<T>];
    unpack(words[v], x, T{});
    squash<kCapped>(terms, x);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) z[v * kVector<T> + i] = x[i];
  }
  if (terms.label_smoothing > 0) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) mine.z_sum += z[i];
  }
  if (count < kColumns) {  // z of a column that is not there is 0
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (column_of<T>(i / kVector<T>) + i % kVector<T> >= count) z[i] = -INFINITY;
  }
  add_columns<T>(mine, z);

  RowSum* sums = reinterpret_cast<RowSum*>(dynamic_shared());
  RowSum sum = merge_lanes(terms, mine);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  sync_threads();
  if (threadIdx.x >= 32) return;
  sum = merge_lanes<kWarps>(terms, sums[threadIdx.x % kWarps]);
  if (threadIdx.x != 0) return;
  if (parts == 1)
    finish_row<kCapped, T>(p, terms, row, sum);
  else
    static_cast<RowSum*>(p.partials)[blockIdx.x] = sum;
}

// A warp merges the ranges of a row.
template <bool kCapped, typename T>
__global__ void __launch_bounds__(kMergeWarps * 32)
    cross_entropy_merge_kernel(const __grid_constant__ CrossEntropyFwdParams p, const __grid_constant__ LossTerms terms,
                               int parts) {
  const int64_t row = int64_t{blockIdx.x} * kMergeWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  RowSum sum;
  if (target_of(p.targets, row) != terms.ignore_index) {
    for (int part = lane_id(); part < parts; part += 32)
      merge(sum, static_cast<RowSum*>(p.partials)[row * parts + part]);
    sum = merge_lanes(terms, sum);
  }
  if (lane_id() == 0) finish_row<kCapped, T>(p, terms, row, sum);
}

// The number of rows that count, or 1 where none does or the reduction is another than mean; every thread gets it.
GK_DEVICE double divisor_of(const Targets& targets, const LossOptions& options, int64_t rows, double* scratch) {
  if (options.reduction != Reduction::mean) return 1.0;
  double counted = 0.0;
  for (int64_t row = threadIdx.x; row < rows; row += kReduceThreads)
    counted += target_of(targets, row) != options.ignore_index ? 1.0 : 0.0;
  counted = block_sum<kReduceThreads>(counted, scratch);
  return counted > 0.0 ? counted : 1.0;
}

// One block.
__global__ void __launch_bounds__(kReduceThreads)
    cross_entropy_reduce_kernel(const __grid_constant__ CrossEntropyFwdParams p) {
  double* scratch = reinterpret_cast<double*>(dynamic_shared());
  double total = 0.0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kReduceThreads) total += p.row_losses[row];
  total = block_sum<kReduceThreads>(total, scratch);
  const double divisor = divisor_of(p.targets, p.options, p.rows, scratch + kReduceThreads / 32);
  if (threadIdx.x == 0) *p.loss = static_cast<float>(total / divisor);
}

// One block: what the gradient of the mean is divided by.
__global__ void __launch_bounds__(kReduceThreads)
    cross_entropy_divisor_kernel(const __grid_constant__ CrossEntropyBwdParams p) {
  const double divisor = divisor_of(p.targets, p.options, p.rows, reinterpret_cast<double*>(dynamic_shared()));
  if (threadIdx.x == 0) *p.divisor = static_cast<float>(divisor);
}

// Vectors lie where dlogits is aligned: a row that does not begin there has its first and last columns one by one, and
// its ranges begin as much earlier.
template <bool kCapped, typename T>
__global__ void __launch_bounds__(kThreads<T>)
    cross_entropy_bwd_kernel(const __grid_constant__ CrossEntropyBwdParams p, const __grid_constant__ LossTerms terms,
                             unsigned parts) {
  const int64_t row = blockIdx.x / parts;
  const int64_t target = target_of(p.targets, row);
  T* dx_row = static_cast<T*>(p.dlogits) + row * p.cols;
  const int64_t first =
      int64_t{blockIdx.x % parts} * kColumns - static_cast<int>(reinterpret_cast<uintptr_t>(dx_row) % 16 / sizeof(T));
  const int begin = first < 0 ? static_cast<int>(-first) : 0;
  const int end = static_cast<int>(p.cols - first < kColumns ? p.cols - first : kColumns);
  T* dx = dx_row + first;

  constexpr int kVectors = 8;
  auto store = [&](int c, const float(&gradient)[kVector<T>]) {
    if (c >= begin && c + kVector<T> <= end) {
      store_vector_streaming(dx + c, gradient);
    } else {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        if (c + i >= begin && c + i < end) dx[c + i] = narrow<T>(gradient[i]);
    }
  };
  if (target == terms.ignore_index) {
    const float zeros[kVector<T>] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) store(column_of<T>(v), zeros);
    return;
  }

  const T* x = row_of<T>(p.logits, row, p.logits_stride) + first;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  Words4 words[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) words[v] = load_columns(x, column_of<T>(v), begin, end, aligned);

  const float dloss = p.dloss[row * p.dloss_stride];
  const RowGradient gradient_of_row =
      row_gradient(terms, p.lse[row], p.options.reduction == Reduction::mean ? dloss / *p.divisor : dloss);
  const int64_t ahead = target - first;
  const int target_column = ahead >= 0 && ahead < kColumns ? static_cast<int>(ahead) : -kColumns;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int c = column_of<T>(v);
    float logits[kVector<T>];
    unpack(words[v], logits, T{});
    logit_gradients<kCapped, T>(terms, gradient_of_row, logits, target_column - c);
    store(c, logits);
  }
}

unsigned blocks(int64_t rows, int64_t parts) {
  if (rows * parts > INT32_MAX)
    throw std::runtime_error("grokkernels: cross_entropy of more than 2^31 blocks of logits");
  return static_cast<unsigned>(rows * parts);
}

template <bool kCapped, typename T>
void forward(const CrossEntropyFwdParams& p, Stream stream) {
  const LossTerms terms = loss_terms(p.options, p.cols);
  const auto parts = static_cast<unsigned>(cross_entropy_parts(p.cols));
  launch(cross_entropy_fwd_kernel<kCapped, T>,
         {.grid = {blocks(p.rows, parts)}, .block = {kThreads<T>}, .shared_bytes = kThreads<T> / 32 * sizeof(RowSum)},
         stream, p, terms, parts);
  if (parts > 1)
    launch(cross_entropy_merge_kernel<kCapped, T>,
           {.grid = {static_cast<unsigned>((p.rows + kMergeWarps - 1) / kMergeWarps)}, .block = {kMergeWarps * 32}},
           stream, p, terms, static_cast<int>(parts));
  if (p.options.reduction != Reduction::none)
    launch(cross_entropy_reduce_kernel, {.block = {kReduceThreads}, .shared_bytes = 2 * kReduceThreads / 32 * 8},
           stream, p);
}

template <bool kCapped, typename T>
void backward(const CrossEntropyBwdParams& p, Stream stream) {
  if (p.options.reduction == Reduction::mean)
    launch(cross_entropy_divisor_kernel, {.block = {kReduceThreads}, .shared_bytes = kReduceThreads / 32 * 8}, stream,
           p);
  const int64_t longest = p.cols + (vectorizable<T>(p.dlogits, p.cols) ? 0 : kVector<T> - 1);
  const auto parts = static_cast<unsigned>(cross_entropy_parts(longest));
  launch(cross_entropy_bwd_kernel<kCapped, T>, {.grid = {blocks(p.rows, parts)}, .block = {kThreads<T>}}, stream, p,
         loss_terms(p.options, p.cols), parts);
}

}  // namespace

void cross_entropy_fwd_cuda(const CrossEntropyFwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, p.options.softcap > 0 ? forward<true, T>(p, stream) : forward<false, T>(p, stream));
}

void cross_entropy_bwd_cuda(const CrossEntropyBwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, p.options.softcap > 0 ? backward<true, T>(p, stream) : backward<false, T>(p, stream));
}

}  // namespace grokkernels
