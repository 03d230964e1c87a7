// merge_attention_states: o = s1 o1 + s2 o2 and lse = log(e^lse1 + e^lse2) with s_i = e^(lse_i - lse), and the
// gradient.
//
// kLanes lanes share a row (b, t, h) of D elements and each work out its two shares for themselves: the rows are what
// costs, 3 of them forward and 5 backward, read and written once in 16-byte vectors. Where both states are dead (lse
// -inf) the shares are 0, o is 0 with lse -inf, and so is every gradient. (The merge is that of online softmax: Milakov
// and Gimelshein, arXiv:1805.02867.)
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"
#include "merge_attention_states.h"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kThreads = 256, kLanes = 8;  // 8 lanes of 16 bytes: a row of 64 16-bit elements in one step

struct Shares {
  float first, second, lse;
};

GK_DEVICE Shares shares(float lse1, float lse2) {
  const float larger = fmaxf(lse1, lse2), top = larger == -INFINITY ? 0.0f : larger;
  const float first = expf(lse1 - top), second = expf(lse2 - top), sum = first + second;
  if (sum == 0.0f) return {0.0f, 0.0f, -INFINITY};
  return {first / sum, second / sum, top + logf(sum)};
}

// Row number `row` of all (b, t, h), h fastest.
struct Row {
  int64_t batch, token, head;

  template <typename Params>
  GK_DEVICE Row(const Params& p, int64_t row)
      : batch(row / p.heads / p.tokens), token(row / p.heads % p.tokens), head(row % p.heads) {}
  GK_DEVICE int64_t offset(const MergeStrides& s) const { return batch * s.batch + token * s.token + head * s.head; }
  // Of a contiguous (B, H, T).
  template <typename Params>
  GK_DEVICE int64_t statistic(const Params& p) const {
    return (batch * p.heads + head) * p.tokens + token;
  }
};

// The row of this thread, or one past the last: then it takes part in the sums alone.
GK_DEVICE int64_t row_number() { return (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes; }

// body(c, read, write) for this lane's vectors of a row of `dim`: read(p, x) and write(p, x) move element c and those
// after it.
template <typename T, typename Body>
GK_DEVICE void over_row(int64_t dim, bool vectors, const Body& body) {
  for (int64_t c = threadIdx.x % kLanes * kVector<T>; c < dim; c += kLanes * kVector<T>)
    body(
        c,
        [&](const T* p, float(&x)[kVector<T>]) {
          if (vectors)
            load_vector(p + c, x);
          else
            load_elements(p + c, dim - c, x);
        },
        [&](T* p, const float(&x)[kVector<T>]) {
          if (vectors)
            store_vector(p + c, x);
          else
            store_elements(p + c, dim - c, x);
        });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_attention_states_fwd_kernel(const __grid_constant__ MergeAttentionStatesFwdParams p, bool vectors) {
  const int64_t number = row_number();
  if (number >= p.batch * p.tokens * p.heads) return;
  const Row row(p, number);
  const Shares s = shares(p.lse1[row.offset(p.lse1_stride)], p.lse2[row.offset(p.lse2_stride)]);
  if (threadIdx.x % kLanes == 0) p.lse[row.statistic(p)] = s.lse;
  const T* o1 = static_cast<const T*>(p.o1) + row.offset(p.o1_stride);
  const T* o2 = static_cast<const T*>(p.o2) + row.offset(p.o2_stride);
  T* o = static_cast<T*>(p.o) + number * p.dim;
  over_row<T>(p.dim, vectors, [&](int64_t, const auto& read, const auto& write) {
    float x[kVector<T>], y[kVector<T>];
    read(o1, x);
    read(o2, y);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) x[i] = fmaf(s.first, x[i], s.second * y[i]);
    write(o, x);
  });
}

// With delta = dout . (o1 - o2):  do_i = s_i dout,  dlse1 = s1 (dlse + s2 delta),  dlse2 = s2 (dlse - s1 delta).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_attention_states_bwd_kernel(const __grid_constant__ MergeAttentionStatesBwdParams p, bool vectors) {
  const int64_t number = row_number();
  const bool there = number < p.batch * p.tokens * p.heads;
  const Row row(p, there ? number : 0);
  const Shares s = shares(p.lse1[row.offset(p.lse1_stride)], p.lse2[row.offset(p.lse2_stride)]);
  const T* dout = static_cast<const T*>(p.dout) + row.offset(p.dout_stride);
  const T* o1 = static_cast<const T*>(p.o1) + row.offset(p.o1_stride);
  const T* o2 = static_cast<const T*>(p.o2) + row.offset(p.o2_stride);
  T* do1 = static_cast<T*>(p.do1) + number * p.dim;
  T* do2 = static_cast<T*>(p.do2) + number * p.dim;
  float delta = 0.0f;
  over_row<T>(there ? p.dim : 0, vectors, [&](int64_t, const auto& read, const auto& write) {
    float g[kVector<T>], x[kVector<T>], y[kVector<T>];
    read(dout, g);
    read(o1, x);
    read(o2, y);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      delta = fmaf(g[i], x[i] - y[i], delta);
      x[i] = s.first * g[i];
      y[i] = s.second * g[i];
    }
    write(do1, x);
    write(do2, y);
  });
  delta = warp_sum<kLanes>(delta);
  if (there && threadIdx.x % kLanes == 0) {
    const float dlse = p.dlse == nullptr ? 0.0f : p.dlse[row.offset(p.dlse_stride)];
    p.dlse1[row.statistic(p)] = s.first * fmaf(s.second, delta, dlse);
    p.dlse2[row.statistic(p)] = s.second * fmaf(-s.first, delta, dlse);
  }
}

template <typename Params>
LaunchShape shape(const Params& p) {
  const int64_t rows = p.batch * p.tokens * p.heads;
  return {.grid = {static_cast<unsigned>((rows * kLanes + kThreads - 1) / kThreads)}, .block = {kThreads}};
}

// Whether all rows of a tensor begin at multiples of 16 bytes.
template <typename T>
bool vectorizable_rows(const void* data, const MergeStrides& s) {
  return vectorizable<T>(data, s.batch) && s.token % kVector<T> == 0 && s.head % kVector<T> == 0;
}

}  // namespace

void merge_attention_states_fwd_cuda(const MergeAttentionStatesFwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    const bool vectors = p.dim % kVector<T> == 0 && vectorizable_rows<T>(p.o1, p.o1_stride) &&
                         vectorizable_rows<T>(p.o2, p.o2_stride) && vectorizable<T>(p.o, p.dim);
    launch(merge_attention_states_fwd_kernel<T>, shape(p), stream, p, vectors);
  });
}

void merge_attention_states_bwd_cuda(const MergeAttentionStatesBwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    const bool vectors = p.dim % kVector<T> == 0 && vectorizable_rows<T>(p.dout, p.dout_stride) &&
                         vectorizable_rows<T>(p.o1, p.o1_stride) && vectorizable_rows<T>(p.o2, p.o2_stride) &&
                         vectorizable<T>(p.do1, p.dim) && vectorizable<T>(p.do2, p.dim);
    launch(merge_attention_states_bwd_kernel<T>, shape(p), stream, p, vectors);
  });
}

}  // namespace grokkernels
