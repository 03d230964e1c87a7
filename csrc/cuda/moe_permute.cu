// moe_permute: rows (N*K, C) in expert order from x (N, C), and its gradient; moe_unpermute: the weighted sum back, and
// its gradients.
//
// One idea: every pass goes over the tokens, so that a token's row moves once and only its K rows in expert order,
// which lie scattered but are whole rows, move K times. The order itself: expert_order.cu. Rows move in 16-byte vectors
// where their addresses allow it; sums run in float32 in the order k = 0, 1, ...
#include "common/expert_order.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"
#include "moe_permute.h"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kThreads = 256;

// A block is `height` rows of `width` threads, a power of two; a row's threads go along its
// columns. Narrow rows share a block, so that its threads have work.

struct BlockShape {
  int64_t width, height;
  // For rows of `columns` units each.
  explicit BlockShape(int64_t columns) : width(1) {
    while (width < columns && width < kThreads) width *= 2;
    height = kThreads / width;
  }
  LaunchShape grid(int64_t rows) const {
    return {.grid = {static_cast<unsigned>((rows + height - 1) / height)},
            .block = {static_cast<unsigned>(width), static_cast<unsigned>(height)}};
  }
};

GK_DEVICE int64_t row_here() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

// What is copied at a time: 16 bytes, or one element.
GK_DEVICE Words4 load_unit(const Words4* p) { return load_16(p); }
GK_DEVICE void store_unit(Words4* p, Words4 v) { store_16(p, v); }
template <typename Unit>
GK_DEVICE Unit load_unit(const Unit* p) {
  return *p;
}
template <typename Unit>
GK_DEVICE void store_unit(Unit* p, Unit v) {
  *p = v;
}

// p.cols and p.x_stride count units here. Rows past the last one used are cleared by the pair of their number.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) moe_permute_fwd_kernel(const __grid_constant__ MoePermuteFwdParams p) {
  const int64_t token = row_here();
  if (token >= p.tokens) return;
  const int64_t used = p.experts == 0 ? 0 : p.offsets[p.experts - 1];
  const Unit* x = static_cast<const Unit*>(p.x) + token * p.x_stride;
  Unit* rows = static_cast<Unit*>(p.rows);
  for (int64_t c = threadIdx.x; c < p.cols; c += blockDim.x) {
    const Unit v = load_unit(x + c);
    for (int64_t i = token * p.top_k; i < (token + 1) * p.top_k; ++i) {
      const int64_t slot = p.slots[i];
      if (slot >= 0) store_unit(rows + slot * p.cols + c, v);
      if (i >= used) store_unit(rows + i * p.cols + c, Unit{});
    }
  }
}

// kVector<T> elements, or one.
template <typename T, bool kVectors>
struct Elements {
  static constexpr int kCount = kVectors ? kVector<T> : 1;
  float x[kCount];

  GK_DEVICE void load(const T* p) {
    if constexpr (kVectors)
      load_vector(p, x);
    else
      x[0] = widen(*p);
  }
  GK_DEVICE void store(T* p) const {
    if constexpr (kVectors)
      store_vector(p, x);
    else
      *p = narrow<T>(x[0]);
  }
};

// out[n] (C) = sum over k, in order, of weights[n,k] * y[slots[n,k]]; without weights they are 1.
struct WeightedSum {
  int64_t tokens, top_k, cols;
  const void* y;
  int64_t y_stride;
  const float* weights;  // (N, K) or null
  const int32_t* slots;
  void* out;
};

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads) moe_weighted_sum_kernel(const __grid_constant__ WeightedSum p) {
  using Part = Elements<T, kVectors>;
  constexpr int kAhead = 2;  // rows on their way at a time
  const int64_t token = row_here();
  if (token >= p.tokens) return;
  const T* y = static_cast<const T*>(p.y);
  T* out = static_cast<T*>(p.out) + token * p.cols;
  const int top_k = static_cast<int>(p.top_k);
  const unsigned pairs = static_cast<unsigned>(p.tokens * p.top_k);  // below 2^31
  const int32_t* slots = p.slots + token * top_k;
  const float* weights = p.weights == nullptr ? nullptr : p.weights + token * top_k;
  for (int64_t c = threadIdx.x * Part::kCount; c < p.cols; c += blockDim.x * Part::kCount) {
    Part sum{};
    for (int k = 0; k < top_k; k += kAhead) {
      Part part[kAhead];
      float weight[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        part[j] = Part{};
        weight[j] = 0.0f;
        const unsigned slot = k + j < top_k ? static_cast<unsigned>(slots[k + j]) : pairs;
        if (slot >= pairs) continue;
        weight[j] = weights == nullptr ? 1.0f : weights[k + j];
        part[j].load(y + slot * p.y_stride + c);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
#pragma unroll
        for (int i = 0; i < Part::kCount; ++i) sum.x[i] = fmaf(weight[j], part[j].x[i], sum.x[i]);
    }
    sum.store(out + c);
  }
}

template <typename T>
void weighted_sum(const WeightedSum& p, Stream stream) {
  if (p.cols == 0) return;
  if (p.cols % kVector<T> == 0 && vectorizable<T>(p.y, p.y_stride) && vectorizable<T>(p.out, p.cols))
    launch(moe_weighted_sum_kernel<T, true>, BlockShape(p.cols / kVector<T>).grid(p.tokens), stream, p);
  else
    launch(moe_weighted_sum_kernel<T, false>, BlockShape(p.cols).grid(p.tokens), stream, p);
}

__global__ void __launch_bounds__(kThreads) moe_named_kernel(const int32_t* slots, int64_t pairs, uint8_t* named) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < pairs && slots[i] >= 0 && slots[i] < pairs) named[slots[i]] = 1;
}

// A warp per pair i = (n, k): dy[slot] = weight * dout[n], and the weight's gradient dot(dout[n], y[slot]). The K pairs
// of a token are neighbours and find its dout in the caches. Row i of dy is cleared when no slot names it.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads) moe_unpermute_bwd_kernel(const __grid_constant__ MoeUnpermuteBwdParams p) {
  using Part = Elements<T, kVectors>;
  constexpr int64_t kStep = 32 * Part::kCount;
  const int64_t pairs = p.tokens * p.top_k;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (i >= pairs) return;
  const int64_t start = lane_id() * Part::kCount;
  T* dy = static_cast<T*>(p.dy);
  if (p.named[i] == 0)
    for (int64_t c = start; c < p.cols; c += kStep) Part{}.store(dy + i * p.cols + c);
  const int64_t slot = p.slots[i];
  double dot = 0.0;  // of double, so that the error does not grow with the length of the row
  if (slot >= 0 && slot < pairs) {
    const T* dout = static_cast<const T*>(p.dout) +
                    static_cast<int64_t>(static_cast<unsigned>(i) / static_cast<unsigned>(p.top_k)) * p.dout_stride;
    const T* y = static_cast<const T*>(p.y) + slot * p.y_stride;
    const float weight = p.weights[i];
#pragma unroll 2
    for (int64_t c = start; c < p.cols; c += kStep) {
      Part d, v, scaled;
      d.load(dout + c);
      v.load(y + c);
      float part = 0.0f;
#pragma unroll
      for (int e = 0; e < Part::kCount; ++e) {
        part = fmaf(d.x[e], v.x[e], part);
        scaled.x[e] = d.x[e] * weight;
      }
      dot += static_cast<double>(part);
      scaled.store(dy + slot * p.cols + c);
    }
  }
  dot = warp_sum(dot);
  if (lane_id() == 0) p.dweights[i] = static_cast<float>(dot);
}

template <typename Unit>
void copy_rows(MoePermuteFwdParams p, int64_t elements, Stream stream) {
  p.cols /= elements;
  p.x_stride /= elements;
  launch(moe_permute_fwd_kernel<Unit>, BlockShape(p.cols).grid(p.tokens), stream, p);
}

}  // namespace

void moe_permute_fwd_cuda(const MoePermuteFwdParams& p, Stream stream) {
  order_by_expert_cuda({.tokens = p.tokens,
                        .top_k = p.top_k,
                        .experts = p.experts,
                        .capacity = p.capacity,
                        .indices = p.indices,
                        .slots = p.slots,
                        .offsets = p.offsets,
                        .token_of = nullptr,
                        .counts = p.counts},
                       stream);
  if (p.cols == 0) return;
  const int64_t bytes = size_of(p.dtype), vector = 16 / bytes;
  const bool vectors = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reinterpret_cast<uintptr_t>(p.rows) % 16 == 0 &&
                       p.x_stride % vector == 0 && p.cols % vector == 0;
  if (vectors)
    copy_rows<Words4>(p, vector, stream);
  else if (bytes == 4)
    copy_rows<uint32_t>(p, 1, stream);
  else
    copy_rows<uint16_t>(p, 1, stream);
}

void moe_permute_bwd_cuda(const MoePermuteBwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T,
                  weighted_sum<T>({.tokens = p.tokens,
                                   .top_k = p.top_k,
                                   .cols = p.cols,
                                   .y = p.drows,
                                   .y_stride = p.drows_stride,
                                   .weights = nullptr,
                                   .slots = p.slots,
                                   .out = p.dx},
                                  stream));
}

void moe_unpermute_fwd_cuda(const MoeUnpermuteFwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T,
                  weighted_sum<T>({.tokens = p.tokens,
                                   .top_k = p.top_k,
                                   .cols = p.cols,
                                   .y = p.y,
                                   .y_stride = p.y_stride,
                                   .weights = p.weights,
                                   .slots = p.slots,
                                   .out = p.out},
                                  stream));
}

void moe_unpermute_bwd_cuda(const MoeUnpermuteBwdParams& p, Stream stream) {
  const int64_t pairs = p.tokens * p.top_k;
  const auto blocks = [](int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); };
  zero_memory(p.named, static_cast<size_t>(pairs), stream);
  launch(moe_named_kernel, {.grid = {blocks(pairs, kThreads)}, .block = {kThreads}}, stream, p.slots, pairs, p.named);
  GK_SWITCH_DTYPE(p.dtype, T, {
    const bool vectors = p.cols % kVector<T> == 0 && vectorizable<T>(p.dout, p.dout_stride) &&
                         vectorizable<T>(p.y, p.y_stride) && vectorizable<T>(p.dy, p.cols);
    launch(vectors ? moe_unpermute_bwd_kernel<T, true> : moe_unpermute_bwd_kernel<T, false>,
           {.grid = {blocks(pairs, kThreads / 32)}, .block = {kThreads}}, stream, p);
  });
}

}  // namespace grokkernels
