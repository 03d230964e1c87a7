// merge_attention_states: o = s1 o1 + s2 o2 over rows (B, T, H) of D, lse = log(e^lse1 + e^lse2), s_i = e^(lse_i -
// lse), and the gradients of all four. Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
//
// One pass over memory in each direction. A row belongs to 8, 16 or 32 threads (cuda/columns.cuh), which all compute
// its shares. Backward, with delta = do . (o1 - o2): do_i = s_i do, dlse1 = s1 (dlse + s2 delta), dlse2 = s2 (dlse - s1
// delta); nothing is saved but the arguments. Where both states are dead (lse -inf) shares are 0, the result is 0 with
// lse -inf, and so is every gradient.
#include "cuda/columns.cuh"
#include "cuda/reduce.cuh"
#include "merge_attention_states.h"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kThreads = 256;

// A row of (B, T, H), and where it lies in tensors.
struct Row {
  int64_t batch, token, head;
  bool there;

  template <typename Params>
  GK_DEVICE explicit Row(const Params& p) {
    const uint64_t row = uint64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    const uint64_t heads = static_cast<uint64_t>(p.heads), tokens = static_cast<uint64_t>(p.tokens);
    const uint64_t n = row / heads;
    head = static_cast<int64_t>(row - n * heads);
    batch = static_cast<int64_t>(n / tokens);
    token = static_cast<int64_t>(n) - batch * p.tokens;
    there = batch < p.batch;
  }

  GK_DEVICE int64_t at(const MergeStrides& s) const { return batch * s.batch + token * s.token + head * s.head; }
};

// Of contiguous (B, T, H, D) and (B, H, T).
template <typename Params>
GK_DEVICE MergeStrides dense_rows(const Params& p) {
  return {p.tokens * p.heads * p.dim, p.heads * p.dim, p.dim};
}
template <typename Params>
GK_DEVICE MergeStrides dense_statistics(const Params& p) {
  return {p.heads * p.tokens, 1, p.tokens};
}

struct Shares {
  float first, second, lse;

  GK_DEVICE Shares(float lse1, float lse2) {
    const float larger = fmaxf(lse1, lse2), top = larger == -INFINITY ? 0.0f : larger;
    first = expf(lse1 - top);
    second = expf(lse2 - top);
    const float sum = first + second;
    lse = sum == 0.0f ? -INFINITY : top + logf(sum);
    const float divisor = sum == 0.0f ? 1.0f : sum;
    first /= divisor;
    second /= divisor;
  }
};

// body(begin, columns) for the columns of this thread in pieces of what its row's threads hold.
template <typename T, bool kAligned, typename Body>
GK_DEVICE void over_columns(int64_t dim, bool there, const Body& body) {
  const int64_t span = blockDim.x * kColumnsOfThread;
  for (int64_t begin = 0; begin < dim; begin += span) {
    const int64_t left = dim - begin;
    body(begin, Columns<T, kAligned>(static_cast<int>(left < span ? left : span)).where(there));
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3)
    merge_attention_states_fwd_kernel(const __grid_constant__ MergeAttentionStatesFwdParams p) {
  const Row row(p);
  const Shares s(row.there ? p.lse1[row.at(p.lse1_stride)] : 0.0f, row.there ? p.lse2[row.at(p.lse2_stride)] : 0.0f);
  const T* o1 = static_cast<const T*>(p.o1) + row.at(p.o1_stride);
  const T* o2 = static_cast<const T*>(p.o2) + row.at(p.o2_stride);
  T* o = static_cast<T*>(p.o) + row.at(dense_rows(p));
  if (row.there && threadIdx.x == 0) p.lse[row.at(dense_statistics(p))] = s.lse;
  over_columns<T, kAligned>(p.dim, row.there, [&](int64_t begin, const Columns<T, kAligned>& columns) {
    Words4 first[kShare<T>], second[kShare<T>];
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      first[i] = columns.load(o1 + begin, i);
      second[i] = columns.load(o2 + begin, i);
    }
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      float a[kVector<T>], b[kVector<T>];
      unpack(first[i], a, T{});
      unpack(second[i], b, T{});
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) a[j] = fmaf(s.first, a[j], s.second * b[j]);
      columns.store(o + begin, i, a);
    }
  });
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    merge_attention_states_bwd_kernel(const __grid_constant__ MergeAttentionStatesBwdParams p) {
  const Row row(p);
  const Shares s(row.there ? p.lse1[row.at(p.lse1_stride)] : 0.0f, row.there ? p.lse2[row.at(p.lse2_stride)] : 0.0f);
  const T* dout = static_cast<const T*>(p.dout) + row.at(p.dout_stride);
  const T* o1 = static_cast<const T*>(p.o1) + row.at(p.o1_stride);
  const T* o2 = static_cast<const T*>(p.o2) + row.at(p.o2_stride);
  T* do1 = static_cast<T*>(p.do1) + row.at(dense_rows(p));
  T* do2 = static_cast<T*>(p.do2) + row.at(dense_rows(p));
  float delta = 0.0f;
  over_columns<T, kAligned>(p.dim, row.there, [&](int64_t begin, const Columns<T, kAligned>& columns) {
    Words4 d[kShare<T>], first[kShare<T>], second[kShare<T>];
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      d[i] = columns.load(dout + begin, i);
      first[i] = columns.load(o1 + begin, i);
      second[i] = columns.load(o2 + begin, i);
    }
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      float g[kVector<T>], a[kVector<T>], b[kVector<T>], part = 0.0f;
      unpack(d[i], g, T{});
      unpack(first[i], a, T{});
      unpack(second[i], b, T{});
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        part = fmaf(g[j], a[j] - b[j], part);
        a[j] = s.first * g[j];
        b[j] = s.second * g[j];
      }
      delta += part;
      columns.store(do1 + begin, i, a);
      columns.store(do2 + begin, i, b);
    }
  });
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
    if (mask < static_cast<int>(blockDim.x)) delta += shuffle_xor(delta, mask);
  if (!row.there || threadIdx.x != 0) return;
  const float dlse = p.dlse == nullptr ? 0.0f : p.dlse[row.at(p.dlse_stride)];
  p.dlse1[row.at(dense_statistics(p))] = s.first * fmaf(s.second, delta, dlse);
  p.dlse2[row.at(dense_statistics(p))] = s.second * fmaf(-s.first, delta, dlse);
}

template <typename Params>
LaunchShape shape(const Params& p) {
  unsigned lanes = 8;
  while (lanes < 32 && lanes * kColumnsOfThread < p.dim) lanes *= 2;
  const unsigned groups = kThreads / lanes;
  return {.grid = {static_cast<unsigned>((p.batch * p.tokens * p.heads + groups - 1) / groups)},
          .block = {lanes, groups}};
}

template <typename T>
bool aligned(int64_t dim, const void* data, const MergeStrides& s) {
  return dim % kVector<T> == 0 && vectorizable<T>(data, s.head) && (s.batch | s.token) % kVector<T> == 0;
}

}  // namespace

void merge_attention_states_fwd_cuda(const MergeAttentionStatesFwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    if (aligned<T>(p.dim, p.o1, p.o1_stride) && aligned<T>(p.dim, p.o2, p.o2_stride) && vectorizable<T>(p.o, p.dim))
      launch(merge_attention_states_fwd_kernel<T, true>, shape(p), stream, p);
    else
      launch(merge_attention_states_fwd_kernel<T, false>, shape(p), stream, p);
  });
}

void merge_attention_states_bwd_cuda(const MergeAttentionStatesBwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    if (aligned<T>(p.dim, p.dout, p.dout_stride) && aligned<T>(p.dim, p.o1, p.o1_stride) &&
        aligned<T>(p.dim, p.o2, p.o2_stride) && vectorizable<T>(p.do1, p.dim) && vectorizable<T>(p.do2, p.dim))
      launch(merge_attention_states_bwd_kernel<T, true>, shape(p), stream, p);
    else
      launch(merge_attention_states_bwd_kernel<T, false>, shape(p), stream, p);
  });
}

}  // namespace grokkernels
